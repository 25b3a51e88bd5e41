"""The same command twice gives the same files; a seed, and nothing else, changes what is random."""

import json
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import staff.finetune
import torch
from contract import METHODS, AnyPool, method_named
from staff.trainer import AnswerTrainer
from test_sweep import SHRUNK, finish, records, start

import staff.pool
from staff.pool import ArrayPool
from staff.selection import Draws, run_method


def contents(results: Path) -> dict[str, str]:
    """Checksums of all weights, scores, coresets and answers in a store, by artefact and file."""
    manifests = {file.parent: json.loads(file.read_text()) for file in results.glob("artifacts/*/*/manifest.json")}
    return {
        f"{folder.parent.name}/{folder.name}/{name}": entry["sha256"]
        for folder, manifest in manifests.items()
        for name, entry in manifest["files"].items()
        if name.endswith((".safetensors", ".parquet"))
    }


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A pool of 64 short samples, for what takes several runs."""
    folder = tmp_path_factory.mktemp("short")
    rows = [{"prompt": f"Add {i} to {i * i}:", "answer": f"{i + i * i} " * (1 + i % 5)} for i in range(66)]
    for split, of_it in (("train", rows[:64]), ("test", rows[64:])):
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in of_it))
    shrunk = ("task.train_limit=24", "pruning_rate=0.5", "method.num_regions=3", "method.verification_budget=2")
    return ("task=jsonl", f"task.data_dir={folder}", "method=staff", *shrunk)


def test_the_same_jobs_give_the_same_files_in_whatever_order_process_and_hash_seed(
    run, short, tmp_path, monkeypatch
):
    seeds = (1, 0)
    monkeypatch.setenv("PYTHONHASHSEED", "1")  # of the sweep; this process has another
    sweep = start(tmp_path / "reversed", *short, "seed=0,1")
    for seed in seeds:
        run(*SHRUNK, *short, f"seed={seed}", results=tmp_path / "fresh")
    finish(sweep)
    kept = contents(tmp_path / "fresh")
    assert {name.split("/")[0] for name in kept} == {"finetune", "scores", "coreset", "evaluation"}
    assert contents(tmp_path / "reversed") == kept
    assert records(tmp_path / "reversed") == records(tmp_path / "fresh") and len(records(tmp_path / "fresh")) == 2

    warm = f"store_dir={tmp_path / 'reversed/artifacts'}"
    for seed in seeds:
        run(*SHRUNK, *short, f"seed={seed}", warm, results=tmp_path / "warm")
    assert records(tmp_path / "warm") == records(tmp_path / "fresh")
    assert contents(tmp_path / "reversed") == kept, "a store that is read stays as it was"


def jaccard(one: Any, other: Any) -> float:
    return len(np.intersect1d(one, other)) / len(np.union1d(one, other))


def test_another_batch_size_moves_scores_by_rounding_alone(run, short, tmp_path):
    def scored(results: Path, batch_tokens: int) -> pd.DataFrame:
        record = run(*short, "task.train_limit=64", f"scoring.batch_tokens={batch_tokens}", results=results)
        assert record["config"]["scoring"]["batch_tokens"] == batch_tokens
        return pd.read_parquet(record["folder"] / "samples.parquet")

    large = scored(tmp_path / "large", 8192)
    shutil.copytree(tmp_path / "large/artifacts/finetune", tmp_path / "small/artifacts/finetune")
    small = scored(tmp_path / "small", 64)
    for score in ("speculative", "verified"):
        np.testing.assert_allclose(small[score], large[score], rtol=1e-5)
    assert not small.equals(large), "the batches were others, and so was rounding"
    assert jaccard(small.id[small.selected], large.id[large.selected]) >= 0.99


@pytest.mark.parametrize("name", METHODS)
def test_rounding_of_the_scores_moves_a_sample_across_an_edge_and_no_more(name: str):
    pool = AnyPool(10_000 if name == "d2" else 100_000)
    rng = np.random.default_rng(1)
    scores = {key: values * (1 + rng.uniform(-1e-5, 1e-5, values.shape)) for key, values in pool._scores.items()}
    moved = ArrayPool(pool.ids, scores, pool.answer_lengths)
    method, budget, draws = method_named(name), len(pool.ids) // 2, Draws(0, pool.ids)
    one, other = (run_method(method, p, budget, draws).indices for p in (pool, moved))
    assert len(one) == 0 or jaccard(one, other) >= 0.99


@pytest.fixture
def drawn(run, short, monkeypatch) -> Callable[..., dict[str, Any]]:
    """Run STAFF; returns all that is drawn in it, by what it is drawn for, in the order in which it is drawn."""
    seen: dict[str, list[Any]] = defaultdict(list)
    compute_loss = AnswerTrainer.compute_loss

    def watch_adapters(module: Any) -> None:
        fresh_lora = module.fresh_lora

        def watched(*arguments: Any) -> Any:
            model = fresh_lora(*arguments)
            first = next(weights for name, weights in model.named_parameters() if "lora_A" in name)
            seen[module.__name__].append(first.tolist())
            return model

        monkeypatch.setattr(module, "fresh_lora", watched)

    def watched_loss(self: Any, model: Any, inputs: Any, *rest: Any, **options: Any) -> torch.Tensor:
        set_of = "pool" if len(self.ids) == 24 else "coreset"
        seen[f"order of the {set_of}"].append([self.ids[int(row)] for row in inputs["row"]])
        return compute_loss(self, model, inputs, *rest, **options)

    watch_adapters(staff.finetune)
    watch_adapters(staff.pool)
    monkeypatch.setattr(AnswerTrainer, "compute_loss", watched_loss)

    def drawn(*seeds: str, results: Path) -> dict[str, Any]:
        seen.clear()
        record = run(*short, "finetune.length_grouped=false", *seeds, results=results)
        samples = pd.read_parquet(record["folder"] / "samples.parquet")
        (small, target), (verifying,) = seen.pop("staff.finetune"), seen.pop("staff.pool")
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
