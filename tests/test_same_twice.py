"""The same command twice gives the same files, also as they were committed; a seed changes what is random alone."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, SMALL
from support.any_pool import METHODS, DrawnPool, method_named, select
from support.processes import here
from support.tiny import pool_of_sums

import experiments.run
import staff.models.state
import staff.training.stage
from experiments.compare import MACHINE, compare, main
from experiments.recorded import recorded_runs
from staff.pool import Pool, Select
from staff.scoring.stage import ScoringSettings
from staff.selection import Coreset
from staff.speculative import Staff
from staff.training.trainer import AnswerTrainer

# ---------------------------------------------------------------- twice


def contents(results: Path) -> dict[str, str]:
    """Checksums of all tokens, weights, scores, coresets and answers in a store, by artefact and file."""
    manifests = {file.parent: json.loads(file.read_text()) for file in results.glob("artifacts/*/*/manifest.json")}
    return {
        f"{folder.parent.name}/{folder.name}/{name}": entry["sha256"]
        for folder, manifest in manifests.items()
        for name, entry in manifest["files"].items()
        if name.endswith((".npy", ".safetensors", ".parquet"))
    }


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A pool of 64 short samples, for what takes several runs."""
    folder = tmp_path_factory.mktemp("short")
    rows = [{"prompt": f"Add {i} to {i * i}:", "answer": f"{i + i * i} " * (1 + i % 5)} for i in range(66)]
    for split, of_it in (("train", rows[:64]), ("test", rows[64:])):
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in of_it))
    shrunk = ("task.train_limit=24", "pruning_rate=0.5", "method.num_regions=3", "method.verification_budget=2")
    return ("task=file", f"task.data_dir={folder}", "method=staff", *shrunk)


def test_the_same_jobs_give_the_same_files_in_whatever_order_process_and_hash_seed(run, short, tmp_path):
    fresh, reverse = tmp_path / "fresh", tmp_path / "reversed"
    command = [sys.executable, "-m", "experiments.run", "-m", *SMALL, *short, "tracking=none", "seed=0,1"]
    environment = {**os.environ, "PYTHONHASHSEED": "1"}  # this process has another
    sweep = subprocess.Popen([*command, f"results_dir={reverse}"], cwd=ROOT, env=environment)
    for seed in (1, 0):
        run(*short, f"seed={seed}", results=fresh)
    assert sweep.wait(300) == 0
    kept = contents(fresh)
    assert {name.split("/")[0] for name in kept} == {
        *("tokens", "finetune", "scores", "coreset", "evaluation", "metrics")
    }
    assert contents(reverse) == kept
    assert_equal_records(fresh, reverse)

    for seed in (1, 0):
        run(*short, f"seed={seed}", f"store_dir={reverse / 'artifacts'}", results=tmp_path / "warm")
    assert_equal_records(fresh, tmp_path / "warm")
    assert contents(reverse) == kept, "a store that is read stays as it was"


def assert_equal_records(first: Path, again: Path) -> None:
    """Runs of the same names, with the same coresets, answers and metrics."""
    table = compare(first, again)
    assert len(table) == 2 and table["equal"].all(), table


def jaccard(one: Any, other: Any) -> float:
    return len(np.intersect1d(one, other)) / len(np.union1d(one, other))


def test_another_batch_size_moves_scores_by_rounding_alone(tmp_path):
    def scored(pool: Pool) -> Coreset:
        method = Staff(num_regions=3, verification_budget=2)
        return Coreset.load(pool.store.get(Select(method, pool, 32)).path)

    large = pool_of_sums(tmp_path / "large", 64, scoring=ScoringSettings(batch_tokens=8192))
    first = scored(large)
    for folder in ("scores", "coreset"):
        (large.store.root / folder).rename(large.store.root / f"{folder} in large batches")
    second = scored(replace(large, scoring=ScoringSettings(batch_tokens=64)))
    for name in ("speculative", "verified"):
        np.testing.assert_allclose(first.scores[name], second.scores[name], rtol=1e-5)
    assert (first.scores["speculative"] != second.scores["speculative"]).any(), "and rounding was another"
    assert jaccard(first.indices, second.indices) >= 0.99


CHAINED = {"facility_location", "facility_location_official", "prototypes"}
"""Each of their picks, or rounds of clustering, rests on the one before it."""


@pytest.mark.parametrize("name", METHODS)
def test_rounding_of_the_scores_moves_a_sample_across_an_edge_and_no_more(name: str):
    size = 2_000 if name in CHAINED else 10_000
    pool, moved = DrawnPool(size), DrawnPool(size)
    moved.noise = 1e-5
    one, other = (select(method_named(name), p, size // 2).indices for p in (pool, moved))
    assert len(one) == 0 or jaccard(one, other) >= (0.9 if name in CHAINED else 0.99)


@pytest.fixture
def drawn(run, short, monkeypatch) -> Callable[..., dict[str, Any]]:
    """Run STAFF; returns all that is drawn in it, by what it is drawn for, in the order in which it is drawn."""
    seen: dict[str, list[Any]] = defaultdict(list)
    compute_loss = AnswerTrainer.compute_loss

    def watch_adapters(module: Any) -> None:
        fresh_lora = module.fresh_lora

        def watched(*arguments: Any, **options: Any) -> Any:
            model = fresh_lora(*arguments, **options)
            first = next(weights for name, weights in model.named_parameters() if "lora_A" in name)
            if not first.is_meta:  # shapes alone
                seen[module.__name__].append(first.tolist())
            return model

        monkeypatch.setattr(module, "fresh_lora", watched)

    def watched_loss(self: Any, model: Any, inputs: Any, *rest: Any, **options: Any) -> torch.Tensor:
        set_of = "pool" if len(self.ids) == 24 else "coreset"
        seen[f"order of the {set_of}"].append([self.ids[int(row)] for row in inputs["row"]])
        return compute_loss(self, model, inputs, *rest, **options)

    watch_adapters(staff.training.stage)
    watch_adapters(staff.models.state)
    monkeypatch.setattr(AnswerTrainer, "compute_loss", watched_loss)

    def drawn(*seeds: str, results: Path) -> dict[str, Any]:
        seen.clear()
        record = run(*short, "finetune.length_grouped=false", *seeds, results=results)
        samples = pd.read_parquet(record["folder"] / "samples.parquet")
        (small, target), (verifying,) = seen.pop("staff.training.stage"), seen.pop("staff.models.state")
        return {
            **seen,
            "adapter of the small model": small,
            "adapter of the target": target,
            "adapter of the raw target": verifying,
            "verified": samples.id[samples.verified.notna()].tolist(),
            "selected": samples.id[samples.selected].tolist(),
        }

    return drawn


def test_each_seed_reaches_all_that_is_random_on_its_side(drawn, tmp_path):
    first = drawn("seed=0", results=tmp_path / "first")
    selecting = drawn("seed=1", "finetune_seed=0", results=tmp_path / "selecting")
    tuning = drawn("seed=1", "selection_seed=0", results=tmp_path / "tuning")
    assert {name for name in first if tuning[name] != first[name]} == {
        "adapter of the target",
        "order of the coreset",
    }
    assert {name for name in first if selecting[name] == first[name]} == {"adapter of the target"}


# ---------------------------------------------------------------- what was committed


COMMITTED = ROOT / "results" / "slice"


@pytest.fixture(scope="module")
def again(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed slice, made from nothing by the settings that `make slice` has."""
    results = tmp_path_factory.mktemp("again")
    (settings,) = re.findall(r"^SLICE = ((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text(), re.M)
    arguments = [*shlex.split(settings.replace("\\\n", " ")), f"results_dir={results}"]
    made = here(experiments.run.main, *arguments)
    assert made.returncode == 0, made.stderr
    return results


def command(*arguments: object) -> subprocess.CompletedProcess:
    return here(main, *arguments)


def test_the_committed_slice_comes_out_equal_on_the_same_kind_of_machine(again: Path):
    table = compare(COMMITTED, again).set_index("run")
    assert len(table) == 2 and table["equal"].notna().all(), table
    here = [next(iter(recorded_runs(results).values())).record()["provenance"] for results in (COMMITTED, again)]
    if all(here[0][part] == here[1][part] for part in MACHINE):
        assert table["equal"].all(), table
        assert command(COMMITTED, again).returncode == 0
    random = next(run for run in table.index if "-random-" in run)
    assert table.loc[random, "jaccard"] == 1, "what is drawn at random depends on no processor"
    assert (table["jaccard"] > 0.8).all(), table


def test_a_comparison_names_runs_that_differ_and_runs_that_are_missing(again: Path, tmp_path: Path):
    first, second = tmp_path / "first", tmp_path / "second"
    for copy in (first, second):
        shutil.copytree(again / "runs", copy / "runs")
    assert command(first, second).returncode == 0
    changed, gone = sorted((second / "runs").glob("*/metrics.json"))[:2]
    record = json.loads(changed.read_text())
    record["metrics"]["rougeL"] += 1e-9
    changed.write_text(json.dumps(record))
    gone.unlink()
    table = compare(first, second).set_index("run")
    assert table.loc[changed.parent.name, "equal"] == False and table["equal"].isna().sum() == 1  # noqa: E712
    said = command(first, second)
    assert said.returncode == 1 and "0 of 2 runs equal, 1 not made again" in said.stdout
    assert len(compare(first, second, part=True)) == 1, "a part of the runs is compared by itself"
    said = command(second, first, "--part")
    assert said.returncode == 1 and f"1 not in {second}" in said.stdout

    record["provenance"]["cpu"] = "another"
    changed.write_text(json.dumps(record))
    assert compare(first, second).set_index("run").loc[changed.parent.name, "machine"] == False  # noqa: E712


def test_a_comparison_with_nothing_is_refused(tmp_path: Path):
    said = command(tmp_path, tmp_path)
    assert said.returncode == 1 and "holds no record" in said.stderr
