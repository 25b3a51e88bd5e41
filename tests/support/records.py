"""Records of runs that were never carried out, quickly and in any number, for reports and pages."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.campaign import pack
from experiments.recorded import RecordedRun
from experiments.report.records import Context, collect, contexts
from staff.tracking import write_record

TARGETS = {"raw": "baselines.full.Raw", "full": "baselines.full.Full", "random": "baselines.random.Random"}
TARGETS |= {"staff": "staff.speculative.Staff"}
WORDS = re.findall(
    r"\w+", "the a person asks what to do and another says yes no later today we meet at noon by river"
)


@dataclass(frozen=True)
class Invented(RecordedRun):
    """What a run would leave that had scored `answers` on its test samples."""

    name: str
    about: Mapping[str, Any]
    answers: np.ndarray
    texts: tuple[str, ...]
    pool: int

    def record(self) -> dict[str, Any]:
        run = {"name": self.name, "selection_family": self.about["family"], "fingerprint": self.name, **self.about}
        method, score = self.about["method"], float(self.answers.mean())
        seeds = {name: run[name] for name in ("seed", "selection_seed", "finetune_seed", "pruning_rate")}
        print_ = hashlib.sha256(self.name.encode()).hexdigest()
        stage = {
            "stage": "scores",
            "label": "score 40 samples, target model",
            "computed": True,
            "seconds": 10.0,
            "flops": 1e12,
        }
        stage |= {"fingerprint": "scores", "device": "a machine", "peak_memory_bytes": 2**30}
        return {
            "run": {**run, "started": "2026-01-01T00:00:00", "finished": "2026-01-01T00:01:00"},
            "metrics": {self.about["metric"]: score},
            "overhead": {
                "seconds": 10.0 + len(method),
                "flops": 1e12 * len(method),
                "peak_memory_bytes": 2**30,
                "device": "a machine",
                "str": 0.1,
                "str_basis": "measured",
                "full_finetuning_seconds": 300.0,
                "full_finetuning_flops": 3e13,
                "stages": [stage],
            },
            "finetuning": {"seconds": 30.0, "flops": 3e12, "peak_memory_bytes": 2**30},
            "evaluation": {"fingerprint": print_},
            "coreset": {"fingerprint": print_, "size": 10, "notes": []},
            "counts": {"pool": self.pool, "selected": 10, "test": len(self.answers), "test_dropped_too_long": 0},
            "config": {
                "family": {"name": self.about["family"]},
                "task": {
                    "_target_": "staff.data.Task",
                    "name": self.about["task"],
                    "metrics": [self.about["metric"]],
                    "prompt": "{prompt}",
                    "answer": "{answer}",
                    "max_new_tokens": 8,
                    "data_dir": "gone",
                },
                "method": {"_target_": TARGETS.get(method, f"baselines.{method}.Method")},
                **seeds,
            },
            "identity": {
                "data": {"train": "train", "test": f"test of {self.about['task']}", "source": None},
                "method": method,
                "selection": None,
            },
            "provenance": {"git_commit": "0" * 40, "git_dirty": False, "concurrent_workers": 1},
        }

    def text(self, file: str) -> str | None:
        if file == "regions.csv" and self.about["method"] == "staff":
            half, rest = self.pool // 2, self.pool - self.pool // 2
            rows = f"0,1.0,1.5,{half},9,0.9,5,5\n1,1.5,2.0,{rest},9,1.1,5,5\n"
            return f"region,low,high,size,verified,ratio,budget,picked\n{rows}"
        return json.dumps(self.record()) if file == "metrics.json" else None

    def predictions(self, columns: Sequence[str] | None = None) -> pd.DataFrame | None:
        count = len(self.answers)
        own = [f"{self.texts[i % len(self.texts)]} {i}" for i in range(count)]
        references = [[f"{self.texts[(i + 1) % len(self.texts)]} {i}"] for i in range(count)]
        table = {"id": [f"t{i}" for i in range(count)], "prediction": own, "references": references}
        return pd.DataFrame({**table, self.about["metric"]: self.answers})

    def samples(self) -> pd.DataFrame | None:
        rng = np.random.default_rng(len(self.name))
        chosen = rng.permutation(self.pool) < (1 - self.about["pruning_rate"]) * self.pool
        ids = [f"p{i}" for i in range(self.pool)]
        table = pd.DataFrame({"id": ids, "selected": chosen, "answer_tokens": 20})
        scores = np.linspace(1, 2, self.pool)
        return (
            table.assign(speculative=scores, verified=np.where(np.arange(self.pool) % 4, np.nan, scores + 1))
            if self.about["method"] == "staff"
            else table.assign(score=scores)
        )


def invented(
    effects: Mapping[str, float],
    families: Sequence[str] = ("tiny",),
    tasks: Sequence[str] = ("dialogsum",),
    rates: Sequence[float] = (0.5, 0.9),
    seeds: int = 3,
    samples: int = 40,
    metric: str = "rougeL",
    pool: int = 40,
) -> Iterator[Invented]:
    """A grid of runs whose true differences are `effects`, in units of the metric, by method."""
    rng = np.random.default_rng(0)
    for family, task in product(families, tasks):
        hard = rng.normal(25, 5, size=samples)
        for method, seed in product(effects, range(seeds)):
            for rate in {"raw": [1.0], "full": [0.0]}.get(method, rates):
                about = {"family": family, "task": task, "method": method, "metric": metric, "pruning_rate": rate}
                about |= {"seed": seed, "selection_seed": seed, "finetune_seed": seed}
                answers = hard + effects[method] + rng.normal(0, 1, size=samples) + rng.normal(0, 0.1)
                texts = tuple(" ".join(rng.choice(WORDS, size=9)) for _ in range(5))
                name = f"{family}-{task}-{method}-p{rate:g}-s{seed}"
                yield Invented(name, about, answers, texts, pool)


def write_runs(results: Path, *args: Any, **kwargs: Any) -> Path:
    """The runs of `invented`, packed into the tables of a results folder."""
    pack({run.name: run for run in invented(*args, **kwargs)}, results)
    return results


# ---------------------------------------------------------------- copies of a real run

METHODS = {"raw": "baselines.full.Raw", "full": "baselines.full.Full", "random": "baselines.random.Random"}
METHODS |= {"ccs": "baselines.ccs.CCS", "staff": "staff.speculative.Staff"}
RATES = {"raw": (1.0,), "full": (0.0,)}


def copied(
    real: Path, results: Path, method: str, rate: float, seeds: tuple[int, int], answers: np.ndarray, **changes: Any
) -> dict[str, Any]:
    """Write what a run of `method` would leave, had it scored `answers`; `changes` by dotted name."""
    record = json.loads((real / "metrics.json").read_text())
    name = f"{method}-p{rate:g}-s{seeds[0]}-{seeds[1]}-" + "-".join(
        re.sub(r"\W", "", f"{v}") for v in changes.values()
    )
    own = {"selection_seed": seeds[0], "finetune_seed": seeds[1], "pruning_rate": rate}
    record["run"] |= {"name": name, "method": method, "seed": seeds[0], **own}
    record["metrics"]["rougeL"] = float(answers.mean())
    record["evaluation"]["fingerprint"] = str(hash(answers.tobytes()))
    settings = record["config"]["method"] if method == "staff" else {}
    record["config"] |= {**own, "method": {**settings, "_target_": METHODS.get(method, "baselines.own.Own")}}
    record["identity"]["method"] = method
    for path, value in changes.items():
        *parents, leaf = path.split("__")
        place = record
        for parent in parents:
            place = place[parent]
        place[leaf] = value
    folder = results / "runs" / name
    write_record(folder, record)
    table = pd.DataFrame({"id": [f"t{i}" for i in range(len(answers))], "prediction": [f"{a}" for a in answers]})
    table.assign(references=[["a reference"]] * len(table), rougeL=answers).to_parquet(
        folder / "predictions.parquet"
    )
    for file in ("samples.parquet", "regions.csv"):
        (folder / file).write_bytes((real / file).read_bytes())
    return record


def grid(
    real: Path, results: Path, effects: dict[str, float], seeds: int = 3, rates: tuple[float, ...] = (0.5, 0.9)
) -> None:
    """A sweep whose true differences are `effects`, in points."""
    rng = np.random.default_rng(0)
    hard = rng.normal(25, 5, size=60)
    for method, effect in effects.items():
        for rate in RATES.get(method, rates):
            for seed in range(seeds):
                chance = 0 if method == "raw" else rng.normal(0, 1, size=60) + rng.normal(0, 0.1)
                copied(real, results, method, rate, (seed, seed), hard + effect + chance)


def only_context(results: Path) -> Context:
    context, *ablated = contexts(collect(results), results)
    assert "method" not in [other.varied for other in ablated]
    return context
