"""What a run leaves in its folder: the record, and the tables beside it."""

from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from experiments import campaign
from staff import tracking
from staff.data.planted import PlantedTask
from staff.errors import UserError
from staff.evaluation.floors import read_floors, warnings
from staff.evaluation.metrics import measure, named_metric
from staff.evaluation.stage import choices_of, read_measured
from staff.runtime import processes
from staff.runtime.files import storage_failure
from staff.selection import Coreset
from staff.store.cost import Cost
from staff.store.manifest import Artifact, Charges, read_manifest

if TYPE_CHECKING:
    from experiments.single import Outcome, Run

ROOT = Path(__file__).resolve().parents[1]


def write(run: Run, outcome: Outcome) -> Path:
    """Write the tables of a run into its folder and, last, metrics.json.

    Raises:
        UserError: the folder cannot be written to, as when its disk is full. The store has everything computed.
    """
    try:
        _write(run, outcome)
    except OSError as error:
        why = storage_failure(error) or error
        raise UserError(
            f"the record of the run cannot be written to {run.folder} ({why}): make room, or name "
            "another results_dir; everything computed is stored, and the same command writes the record."
        ) from error
    return run.folder


def _write(run: Run, outcome: Outcome) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    chosen, coreset, tuned, answered = outcome.chosen, outcome.coreset, outcome.tuned, outcome.answered
    metrics, answers = _answers(run, outcome.measured)
    floors = read_floors(outcome.floors) if outcome.floors else {}
    _write_samples(run, coreset)
    trainings = _trainings(run, chosen, tuned)
    _curves(trainings).to_csv(run.folder / "training.csv", index=False)
    record = {
        "run": {**run.facts, "finished": datetime.now(UTC).isoformat(timespec="seconds")},
        "metrics": metrics,
        **({"floors": floors} if floors else {}),
        "warnings": [
            *(f"{label}: {text}" for label, _, history in trainings for text in history["warnings"]),
            *_below_floor(floors, answers, tuned),
        ],
        **({"metrics_by_group": _metrics_by_group(run, answers)} if "group" in answers else {}),
        "overhead": _overhead(run, chosen, tuned),
        "finetuning": _cost(tuned),
        "evaluation": _cost(answered),
        "coreset": {
            "fingerprint": chosen.fingerprint,
            "size": len(coreset.indices),
            "filled": coreset.filled,
            "notes": list(coreset.notes),
            **_composition(run, coreset),
        },
        "counts": _counts(run, outcome, len(answers)),
        "duplicates": run.splits.duplicates and run.splits.duplicates.counts(),
        "config": run.config,
        "identity": run.identity,
        "artifacts": sorted(run.store.used),
        "provenance": {
            **tracking.environment(ROOT),
            "concurrent_workers": run.store.workers,
            "processes": processes.world_size(),
        },
    }
    tracking.write_record(run.folder, record)


def _counts(run: Run, outcome: Outcome, answered: int) -> dict[str, int]:
    """Samples and tokens of the pool, the coreset and the test split, of which so many were answered."""
    return {
        "pool": len(run.pool.ids),
        "dropped_too_long": len(run.splits.pool) - len(run.pool.ids),
        "dropped_duplicates": run.splits.dropped,
        "dev": len(run.pool.slices["dev"].target) if run.splits.dev else 0,
        "budget": len(outcome.coreset.indices),
        "selected": len(outcome.coreset.indices),
        "pool_tokens": int(run.pool.lengths.sum()),
        "selected_tokens": int(run.pool.lengths[outcome.coreset.indices].sum()),
        "trained": len(outcome.coreset.trained) if outcome.tuned else 0,
        "test": answered,
        "test_dropped_too_long": len(run.splits.test) - answered,
        "test_prompts_in_pool": run.splits.test_prompts_in_pool,
    }


def _answers(run: Run, measured: Artifact | None) -> tuple[dict[str, float], pd.DataFrame]:
    """The metrics, and the answers to the test samples, which are written; both empty without evaluation."""
    if measured is None:
        return {}, pd.DataFrame()
    metrics, answers = read_measured(measured)
    if run.task.group_field:
        group_of = {sample.id: sample.group for sample in run.splits.test}
        answers["group"] = [group_of[id] for id in answers["id"]]
    answers.to_parquet(run.folder / "predictions.parquet")
    return {**metrics, "output_tokens": sum(answers["tokens"]) / len(answers)}, answers


def _below_floor(floors: dict[str, Any], answers: pd.DataFrame, tuned: Artifact | None) -> list[str]:
    if not len(answers):
        return []
    return warnings(floors, answers["prediction"].tolist(), "the fine-tuned target" if tuned else "the raw target")


def _metrics_by_group(run: Run, answers: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Test samples and every metric, by the group of the test samples; a corpus metric is that of the group."""
    table, named = {}, [named_metric(name) for name in run.task.metrics]
    for group, part in answers.groupby("group"):
        stored = [metric for metric in named if metric.needs != "likelihood"]
        texts = part["prediction"].tolist(), part["references"].tolist()
        metrics, _ = measure(stored, *texts, choices=choices_of(part))
        others = {name: part[name].mean() for name in run.task.metrics if name not in metrics}
        table[str(group)] = {"samples": len(part), **metrics, **others}
    return table


def _composition(run: Run, coreset: Coreset) -> dict[str, Any]:
    """What pool and coreset are made of, where the task knows: "groups", samples by group; "planted", shares of
    the samples that were planted wrong or as copies."""
    pool = list(run.pool.ids)
    chosen = [pool[i] for i in coreset.indices]
    composition: dict[str, Any] = {}
    if run.task.group_field:
        group_of = {sample.id: str(sample.group) for sample in run.splits.pool}
        all_, kept = (Counter(group_of[id] for id in ids) for ids in (pool, chosen))
        composition["groups"] = {g: {"pool": n, "coreset": kept[g]} for g, n in sorted(all_.items())}
    if isinstance(run.task, PlantedTask):
        parts = {"pool": pool, "coreset": chosen} if chosen else {"pool": pool}
        composition["planted"] = {part: run.task.shares(ids) for part, ids in parts.items()}
    return composition


def _write_samples(run: Run, coreset: Coreset) -> None:
    """samples.parquet: every sample of the pool, whether it was selected, the length of its answer and its
    scores; coreset.csv: those selected; regions.csv: the method's regions."""
    selected = np.isin(np.arange(len(run.pool.ids)), coreset.indices)
    ids, lengths = run.pool.ids, run.pool.answer_lengths
    table = pd.DataFrame({"id": ids, "selected": selected, "answer_tokens": lengths, **coreset.scores})
    table.to_parquet(run.folder / "samples.parquet")
    (run.folder / "coreset.csv").write_bytes(campaign.coreset(table).encode())
    if len(coreset.diagnostics):
        coreset.diagnostics.to_csv(run.folder / "regions.csv", index=False)


def _trainings(run: Run, chosen: Artifact, tuned: Artifact | None) -> list[tuple[str, str, dict[str, Any]]]:
    """Label, name of the curves and training.json of every fine-tuning that the run rests on: those that selection
    read, and the target's."""
    charges = {**chosen.charged(), **({} if tuned is None else tuned.charged())}
    found = []
    for fingerprint, charge in charges.items():
        if charge.stage == "finetune":
            folder = run.store.root / "finetune" / fingerprint[:32]
            manifest, _ = read_manifest(folder)
            history = json.loads((folder / "training.json").read_text())
            found.append((charge.label, run.curve_of(manifest["key"]), history))
    return found


def _curves(trainings: list[tuple[str, str, dict[str, Any]]]) -> pd.DataFrame:
    """Loss, learning rate and gradient norm of every training by step."""
    curves = []
    for label, name, history in trainings:
        steps = [entry for entry in history["log"] if "loss" in entry]
        curves.append(pd.DataFrame(steps, columns=["step", "epoch", "loss", "learning_rate", "grad_norm"]))
        curves[-1].insert(0, "training", label)
        curves[-1].insert(1, "curve", name)
    return pd.concat(curves) if curves else pd.DataFrame(columns=["training", "curve", "step", "loss"])


def tables(run: Run, outcome: Outcome) -> dict[str, pd.DataFrame]:
    """The tables that a run's page shows with texts; in the run's folder they stand without."""
    shown = {"coreset": _shown_coreset(run, outcome.coreset)}
    if outcome.measured is not None:
        shown["predictions"] = _shown_predictions(run, outcome.measured)
    return shown


def _shown_coreset(run: Run, coreset: Coreset) -> pd.DataFrame:
    """The selected samples by id, text, score (the method's first one), region, group, and the
    method's other scores."""
    samples = {sample.id: sample for sample in run.splits.pool}
    ids = list(run.pool.ids)
    chosen = [samples[ids[i]] for i in coreset.indices]
    score, *others = [values[coreset.indices] for values in coreset.scores.values()] or [None]
    columns = {
        "id": [sample.id for sample in chosen],
        "text": [sample.prompt + sample.answer for sample in chosen],
        "score": score,
        "region": None if score is None else _regions(score, coreset.diagnostics),
        "group": [sample.group for sample in chosen],
    }
    return pd.DataFrame({**columns, **dict(zip(list(coreset.scores)[1:], others, strict=True))})


def _regions(scores: np.ndarray, diagnostics: pd.DataFrame) -> list[Any] | None:
    """The region of each score, by the bounds that the method reports; None where it reports none."""
    name = next((name for name in ("region", "stratum") if name in diagnostics), None)
    if name is None or not {"low", "high"} <= set(diagnostics) or "group" in diagnostics:
        return None
    inside = (scores[:, None] >= diagnostics["low"].to_numpy()) & (
        scores[:, None] <= diagnostics["high"].to_numpy()
    )
    return [diagnostics[name].iloc[int(row.argmax())] if row.any() else None for row in inside]


def _shown_predictions(run: Run, measured: Artifact) -> pd.DataFrame:
    """The answers to the test samples: id, prompt, answer, references, tokens, every metric."""
    _, answers = read_measured(measured)
    prompts = {sample.id: sample.prompt for sample in run.splits.test}
    texts = {
        "id": answers["id"],
        "prompt": [prompts[id] for id in answers["id"]],
        "answer": answers["prediction"],
        "reference": ["\n\n".join(several) for several in answers["references"]],
    }
    return pd.DataFrame({**texts, **answers.drop(columns=["id", "prediction", "references"])})


def _overhead(run: Run, chosen: Artifact, tuned: Artifact | None) -> dict[str, Any]:
    """What selection cost, every stage it read included; STR, its share of fine-tuning on everything."""
    charges = chosen.charged()
    total = sum((charge.cost for charge in charges.values()), Cost.zero())
    seconds, flops, basis = _full_finetuning(run, tuned)
    return {
        **total.to_dict(),
        "str": total.seconds / seconds if seconds else None,
        "str_basis": basis,
        "full_finetuning_seconds": seconds,
        "full_finetuning_flops": flops,
        "stages": _stages(run, charges),
    }


def _stages(run: Run, charges: Charges) -> list[dict[str, Any]]:
    return [
        {
            "stage": charge.stage,
            "label": charge.label,
            "fingerprint": fingerprint,
            "computed": fingerprint in run.store.computed,
            **charge.cost.to_dict(),
            **_made(run.store.root / charge.stage / fingerprint[:32]),
        }
        for fingerprint, charge in charges.items()
    ]


def _made(folder: Path) -> dict[str, int | None]:
    """How many processes worked on the machine, and how many on the stage; its seconds depend on both."""
    if not folder.is_dir():  # removed since it was read
        return {}
    manifest, _ = read_manifest(folder)
    return {name: manifest.get(name) for name in ("workers", "processes")}


def _full_finetuning(run: Run, tuned: Artifact | None) -> tuple[float | None, float | None, str | None]:
    """Seconds and FLOPs to fine-tune the target on the whole pool; the seconds measured, or estimated from the
    FLOPs of the coreset's fine-tuning and its speed."""
    full = run.full_finetuning
    made = run.store.find(full)
    if made is not None:
        return made.cost.seconds, made.cost.flops, "measured"
    if tuned is None:
        return None, None, None
    training = json.loads((tuned.path / "training.json").read_text())
    flops = full.flops(training["trainable_parameters"])
    longer = flops / tuned.cost.flops
    return tuned.cost.seconds + training["seconds"] * (longer - 1), flops, "estimated from FLOPs"


def _cost(artifact: Artifact | None) -> dict[str, Any] | None:
    return None if artifact is None else {"fingerprint": artifact.fingerprint, **artifact.cost.to_dict()}
