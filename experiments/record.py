"""What a run leaves in its folder: the record, and the tables beside it."""

from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from staff import distributed, tracking
from staff.artifacts import Artifact, Charges
from staff.cost import Cost
from staff.evaluate import measure, read_predictions
from staff.finetune import epoch_flops, finetune_key
from staff.manifest import read_manifest
from staff.planted import PlantedTask
from staff.selection import Coreset

if TYPE_CHECKING:
    from experiments.single import Run

ROOT = Path(__file__).resolve().parents[1]


def write(run: Run, chosen: Artifact, coreset: Coreset, tuned: Artifact | None, answered: Artifact) -> Path:
    """Write what the run is told by into its folder and, last, metrics.json; then mirror it."""
    run.folder.mkdir(parents=True, exist_ok=True)
    answers = read_predictions(answered)
    references = {sample.id: sample.references for sample in run.test}
    asked = [references[id] for id in answers["id"]]
    metrics, per_sample = measure(run.task.metrics, answers["prediction"].tolist(), asked)
    answers = answers.assign(references=asked)
    if run.task.group_field:
        group_of = {sample.id: sample.group for sample in run.test}
        answers["group"] = [group_of[id] for id in answers["id"]]
    answers.join(per_sample).to_parquet(run.folder / "predictions.parquet")
    _write_samples(run, coreset)
    _training(run, chosen, tuned).to_csv(run.folder / "training.csv", index=False)
    record = {
        "run": {
            "name": run.name,
            "fingerprint": run.fingerprint,
            **{group: run.choices.get(group) for group in ("experiment", "family", "task", "method")},
            "selection_family": run.choices.get("family@selection_family") or run.choices.get("family"),
            "pruning_rate": run.pruning_rate,
            **{k: run.cfg[k] for k in ("seed", "selection_seed", "finetune_seed")},
            "metric": run.task.metrics[0],
            "started": run.started.isoformat(timespec="seconds"),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        },
        "metrics": {**metrics, "output_tokens": sum(answers["tokens"]) / len(answers)},
        **({"metrics_by_group": _metrics_by_group(run, answers)} if run.task.group_field else {}),
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
        "counts": {
            "pool": len(run.pool.ids),
            "dropped_too_long": len(run.train) - len(run.pool.ids),
            "budget": run.budget,
            "selected": len(coreset.indices),
            "trained": len(coreset.indices) if tuned else 0,
            "test": len(answers),
            "test_dropped_too_long": len(run.test) - len(answers),
            "test_prompts_in_pool": run.overlap,
        },
        "config": run.config,
        "identity": run.identity,
        "provenance": {
            **tracking.environment(ROOT),
            "concurrent_workers": run.store.workers,
            "processes": distributed.world(),
        },
    }
    tracking.write_record(run.folder, record)
    tracking.log_to_wandb(run.folder, run.cfg.tracking.mode)
    return run.folder


def _metrics_by_group(run: Run, answers: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Test samples and every metric, by the group of the test samples; a corpus metric is that of the group."""
    table = {}
    for group, part in answers.groupby("group"):
        metrics, _ = measure(run.task.metrics, part["prediction"].tolist(), part["references"].tolist())
        table[str(group)] = {"samples": len(part), **metrics}
    return table


def _composition(run: Run, coreset: Coreset) -> dict[str, Any]:
    """What pool and coreset are made of, where the task knows: "groups", samples by group; "planted", shares of
    the samples that were planted wrong or as copies."""
    pool = list(run.pool.ids)
    chosen = [pool[i] for i in coreset.indices]
    composition: dict[str, Any] = {}
    if run.task.group_field:
        group_of = {sample.id: str(sample.group) for sample in run.train}
        all_, kept = (Counter(group_of[id] for id in ids) for ids in (pool, chosen))
        composition["groups"] = {g: {"pool": n, "coreset": kept[g]} for g, n in sorted(all_.items())}
    if isinstance(run.task, PlantedTask):
        parts = {"pool": pool, "coreset": chosen} if chosen else {"pool": pool}
        composition["planted"] = {part: run.task.shares(ids) for part, ids in parts.items()}
    return composition


def _write_samples(run: Run, coreset: Coreset) -> None:
    """samples.parquet: every sample of the pool, whether it was selected, the length of its answer and its
    scores; coreset.csv: those selected; regions.csv: what the method tells of its regions."""
    selected = np.isin(np.arange(len(run.pool.ids)), coreset.indices)
    ids, lengths = run.pool.ids, run.pool.for_target.answer_lengths
    table = pd.DataFrame({"id": ids, "selected": selected, "answer_tokens": lengths, **coreset.scores})
    table.to_parquet(run.folder / "samples.parquet")
    chosen = table[selected].drop(columns=["selected", "answer_tokens"])
    chosen.to_csv(run.folder / "coreset.csv", index=False)
    if len(coreset.diagnostics):
        coreset.diagnostics.to_csv(run.folder / "regions.csv", index=False)


def _training(run: Run, chosen: Artifact, tuned: Artifact | None) -> pd.DataFrame:
    """The curves of every fine-tuning that the run rests on: the target's, and those that selection read."""
    charges = {**chosen.charged(), **({} if tuned is None else tuned.charged())}
    trainings = {f: charge.label for f, charge in charges.items() if charge.stage == "finetune"}
    curves = []
    for fingerprint, label in trainings.items():
        history = json.loads((run.store.root / "finetune" / fingerprint[:32] / "training.json").read_text())
        steps = [entry for entry in history["log"] if "loss" in entry]
        curves.append(pd.DataFrame(steps, columns=["step", "epoch", "loss", "learning_rate", "grad_norm"]))
        curves[-1].insert(0, "training", label)
    return pd.concat(curves) if curves else pd.DataFrame(columns=["training", "step", "loss"])


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
    """What an artefact's seconds depend on and whoever reads it may have otherwise: how many processes worked on
    the machine, and how many on the stage."""
    if not folder.is_dir():  # removed since it was read
        return {}
    manifest, _ = read_manifest(folder)
    return {name: manifest.get(name) for name in ("workers", "processes")}


def _full_finetuning(run: Run, tuned: Artifact | None) -> tuple[float | None, float | None, str | None]:
    """Seconds and FLOPs to fine-tune the target on the whole pool; the seconds measured, or estimated from the
    FLOPs of the coreset's fine-tuning and its speed."""
    settings, samples = run.settings, run.tokenized["target"]
    key = finetune_key(run.family.target, samples, settings, settings.epochs, run.cfg.finetune_seed)
    full = run.store.find("finetune", key)
    if full is not None:
        return full.cost.seconds, full.cost.flops, "measured"
    if tuned is None:
        return None, None, None
    training = json.loads((tuned.path / "training.json").read_text())
    adapter = training["trainable_parameters"] if settings.kind == "lora" else None
    flops = epoch_flops(run.family.target, samples, adapter) * settings.epochs
    longer = flops / tuned.cost.flops
    return tuned.cost.seconds + training["seconds"] * (longer - 1), flops, "estimated from FLOPs"


def _cost(artifact: Artifact | None) -> dict[str, Any] | None:
    return None if artifact is None else {"fingerprint": artifact.fingerprint, **artifact.cost.to_dict()}
