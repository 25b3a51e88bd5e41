"""Records of runs that were never carried out, for reports and pages; and what pages of runs on W&B hold."""

from __future__ import annotations

import hashlib
import json
import re
import struct
import zlib
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
METHODS |= {"random_length": "baselines.random_matched.RandomMatched"}
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
    record["metrics"] |= {"rougeL": float(answers.mean()), "nll": float(answers.mean()) / 10}
    record["evaluation"]["fingerprint"] = str(hash(answers.tobytes()))
    settings = record["config"]["method"] if method == "staff" else {}
    if method == "random_length":
        settings = {"match": ["length"], "reference": record["config"]["method"]}
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
    table = table.assign(references=[["a reference"]] * len(table), rougeL=answers, nll=answers / 10)
    table.to_parquet(folder / "predictions.parquet")
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


# ---------------------------------------------------------------- offline pages of Weights & Biases

WHICH_RUN = ("entity", "project", "run_id", "run_group", "job_type", "display_name")


def pages(folder: Path) -> list[dict[str, Any]]:
    """What each offline file under `folder` holds, the oldest first."""
    import wandb

    wandb.teardown()  # waits until the service has written all
    return [read_page(file) for file in sorted(folder.glob("wandb/offline-run-*/*.wandb"))]


def read_page(file: Path) -> dict[str, Any]:
    """What a .wandb file holds. W&B has no public reader of it.

    It is a LevelDB log (blocks of 32 KiB, records cut at their borders into pieces with a header of checksum,
    length and type) of protocol buffers. After a kill its last piece may be cut off.
    """
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore # made at import

    data, at, message = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B", "the format has changed"
    page: dict[str, Any] = {"config": {}, "summary": {}, "history": {}, "curves": {}, "metrics": {}, "lines": []}
    page |= {"folder": file.parent, "rows": [], "system": set(), "exit": None}
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no header fits into the rest of a block
            at += 32768 - at % 32768
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, at)
        piece = data[at + 7 : at + 7 + length]
        if len(piece) < length:
            break
        assert checksum == zlib.crc32(bytes([kind]) + piece)
        message, at = message + piece, at + 7 + length
        if kind in (1, 4):  # whole, or the last piece
            _take_in(Record.FromString(message), page)
            message = b""
    return page


def _take_in(record: Any, page: dict[str, Any]) -> None:
    match record.WhichOneof("record_type"):
        case "run":
            page |= {name: getattr(record.run, name) for name in WHICH_RUN}
            page["tags"] = list(record.run.tags)
            page["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        case "metric":
            page["metrics"][record.metric.name or record.metric.glob_name] = record.metric.step_metric
        case "stats":
            page["system"] |= {item.key for item in record.stats.item}
        case "output_logger":
            page["lines"].append(record.output_logger.line.rstrip("\n"))
        case "exit":
            page["exit"] = record.exit.exit_code
        case "history":
            row = {
                "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
            }
            page["rows"].append(row)
            for name, value in row.items():
                page["curves"].setdefault(name, []).append(value)
            _update(page["history"], record.history.item)
        case "summary":
            _update(page["summary"], record.summary.update)


def _update(values: dict[str, Any], items: Any) -> None:
    for item in items:
        *folders, leaf = item.nested_key or [item.key]
        branch = values
        for key in folders:
            branch = branch.setdefault(key, {})
        branch[leaf] = json.loads(item.value_json)


def table_of(page: dict[str, Any], name: str) -> pd.DataFrame:
    content = json.loads((page["folder"] / "files" / page["history"][name]["path"]).read_text())
    return pd.DataFrame(content["data"], columns=content["columns"])


def stages_of(page: dict[str, Any]) -> list[tuple[str, str]]:
    """What happened to which kind of stage, in order; kinds by the first word of the label."""
    return [(row["stage/label"].split()[0], row["stage/event"]) for row in page["rows"] if "stage/event" in row]
