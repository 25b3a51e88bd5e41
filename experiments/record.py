"""One run, from its configuration to its record."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from filelock import FileLock
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from experiments import sweep
from staff import distributed, tracking
from staff.artifacts import STAGE_VERSIONS, Artifact, Charges, Store
from staff.cost import Cost
from staff.data import Sample, Task
from staff.errors import UserError
from staff.evaluate import check_metrics, evaluated, measure, read_predictions
from staff.finetune import FinetuneSettings, epoch_flops, finetune_key, finetuned
from staff.made import materialise
from staff.memory import check_fits
from staff.models import Family, check_quantization
from staff.pool import Pool, ScoringSettings
from staff.selection import Coreset, SelectionMethod, budget_of, source_digest
from staff.tokens import TokenizedSamples, answerable, fitting, tokenize

ROOT = Path(__file__).resolve().parents[1]
log = logging.getLogger("staff")

# What does not change a run's numbers, or is known better by content than by name.
NOT_IN_FINGERPRINT = ("tracking", "results_dir", "store_dir", "scoring", "evaluation", "seed")


class Run:
    """Checks its configuration and reads its data when made; loads a model only when a stage needs one, or when
    the model itself is yet to be made (from GGUF, or from the target).

    Raises:
        UserError: bad configuration or data.
    """

    def __init__(self, cfg: DictConfig, choices: dict[str, Any], store: Store | None = None):
        self.cfg, self.choices = cfg, choices
        self.method: SelectionMethod = instantiate(cfg.method, _convert_="all")
        self.settings: FinetuneSettings = instantiate(cfg.finetune, _convert_="all")
        self.scoring: ScoringSettings = instantiate(cfg.scoring)
        family: Family = instantiate(cfg.family, _convert_="all")
        selecting: Family | None = instantiate(cfg.get("selection_family"), _convert_="all")
        self.task: Task = instantiate(cfg.task, _convert_="all")
        tracking.check_mode(cfg.tracking.mode)
        for name in ("selection_seed", "finetune_seed"):
            if not isinstance(cfg[name], int) or cfg[name] < 0:
                raise UserError(f"{name}={cfg[name]!r} must be a whole number of at least 0.")
        self.train, self.test = self.task.load("train"), self.task.load("test")
        check_metrics(self.task.metrics, self.test)
        kept = budget_of(self.method, cfg.pruning_rate, len(self.train))  # refuses a bad rate
        fixed = hasattr(self.method, "fixed_size")
        self.pruning_rate = float(1 - Fraction(kept, len(self.train))) if fixed else cfg.pruning_rate
        self.store = store or Store(cfg.store_dir, workers=sweep.workers())
        held = (self.settings.quantization, self.settings.fsdp)
        self.family = materialise(family, self.store).held(*held)
        self.selecting = self.family
        if selecting:
            self.selecting = materialise(selecting, self.store).held(*held)
        self.started = datetime.now(UTC)
        if self.overlap:
            log.warning("%d of %d test prompts are also in the pool", self.overlap, len(self.test))

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved configuration; a method with a size of its own shows the pruning rate that comes to."""
        config = OmegaConf.to_container(self.cfg, resolve=True)
        assert isinstance(config, dict)
        return {**{str(k): v for k, v in config.items()}, "pruning_rate": self.pruning_rate}

    @cached_property
    def fingerprint(self) -> str:
        """Of exactly what determines the run's numbers."""
        content = {k: v for k, v in self.config.items() if k not in NOT_IN_FINGERPRINT}
        content["family"] = content["selection_family"] = None
        content["method"] = {k: v for k, v in content["method"].items() if k != "path"}
        content["task"] = {k: v for k, v in content["task"].items() if k != "data_dir"}
        content["finetune"] = {k: v for k, v in content["finetune"].items() if k != "fsdp"}
        # Samples are known by their content: the commit they came from says nothing more, and not to those offline.
        data = {split: self.identity["data"][split] for split in ("train", "test")}
        content["identity"] = {**self.identity, "data": data}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Data and models by their content, and the versions of the stages' code."""
        return {
            "data": {
                "train": data_digest(self.train),
                "test": data_digest(self.test),
                "source": self.task.source(),
            },
            **_models(self.family),
            **({"selection": _models(self.selecting)} if self.transferred else {}),
            "method": source_digest(self.method),
            "scoring_dtype": self.scoring.dtype,
            "stage_versions": STAGE_VERSIONS,
        }

    @cached_property
    def overlap(self) -> int:
        """Test samples whose prompt is also in the pool: they measure memory, not learning."""
        prompts = {sample.prompt for sample in self.train}
        return sum(sample.prompt in prompts for sample in self.test)

    @cached_property
    def transferred(self) -> bool:
        """Whether the models that select are of another family than the one fine-tuned on their coreset."""
        return _models(self.selecting) != _models(self.family)

    @property
    def name(self) -> str:
        """What the run's folder is called: one name, though an option of a group may be a path."""
        parts = [self.choices.get(group) or "custom" for group in ("family", "task", "method")]
        if self.transferred:
            parts[0] = f"{self.choices.get('family@selection_family') or 'custom'}-to-{parts[0]}"
        what = "-".join(re.sub(r"[^\w.-]+", "-", part).strip("-.") for part in parts)
        return f"{what}-p{self.pruning_rate:g}-s{self.cfg.finetune_seed}-{self.fingerprint[:8]}"

    @property
    def folder(self) -> Path:
        return Path(self.cfg.results_dir) / "runs" / self.name

    @property
    def recorded(self) -> bool:
        return (self.folder / "metrics.json").is_file()

    @cached_property
    def tokenized(self) -> dict[str, TokenizedSamples]:
        """The training samples for the small model and for the target; for the target of the family that selects,
        as a rule the same; and the test samples for the target."""
        target, form = self.family.target.tokenizer(), self.family.prompt_format
        train = {"target": tokenize(self.train, target, form)}
        small, selecting = self.selecting.small.tokenizer(), self.selecting.prompt_format
        train["small"] = tokenize(self.train, small, selecting)
        if self.transferred:
            train["selecting"] = tokenize(self.train, self.selecting.target.tokenizer(), selecting)
        keep = fitting(list(train.values()), self.settings.max_length, self.task.too_long)
        train = {role: samples.take(keep) for role, samples in train.items()}
        test = tokenize(self.test, target, form)
        window = getattr(self.family.target.config().get_text_config(), "max_position_embeddings", None)
        asked = answerable(test, self.task.max_new_tokens, window, self.task.too_long)
        return {"selecting": train["target"], **train, "test": test.take(asked)}

    @cached_property
    def pool(self) -> Pool:
        for_small, for_target = self.tokenized["small"], self.tokenized["selecting"]
        seed = self.cfg.selection_seed
        return Pool(for_small, for_target, self.selecting, self.settings, self.store, seed, self.scoring)

    @property
    def budget(self) -> int:
        return budget_of(self.method, self.cfg.pruning_rate, len(self.pool.ids))

    def locked(self) -> AbstractContextManager[Any]:
        """Keeps two workers of a sweep from carrying out the same run side by side."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder.parent / f".{self.name}.lock") if distributed.first() else nullcontext()

    @contextmanager
    def failure_noted(self) -> Iterator[None]:
        """Leave the traceback of a failure beside where the record would be, and drop that of an earlier one."""
        note = self.folder / "failure.txt"
        if distributed.first():
            note.unlink(missing_ok=True)
        try:
            yield
        except Exception:
            if distributed.speaks_of_failure():
                note.parent.mkdir(parents=True, exist_ok=True)
                note.write_text(traceback.format_exc())
            raise

    def check_machine(self) -> None:
        """Refuse, before a model loads, what this machine cannot do."""
        self.settings.on_each_device(distributed.world())
        if self.settings.quantization:
            check_quantization()
        if self.budget:
            small, target = self.selecting.small, self.family.target
            for spec, samples in ((small, self.tokenized["small"]), (target, self.tokenized["target"])):
                check_fits(spec, samples, self.settings)

    def select(self) -> tuple[Artifact, Coreset]:
        return self.pool.select(self.method, self.budget)

    def finetune(self, coreset: Coreset) -> Artifact | None:
        """The target fine-tuned on the coreset; the raw target where that is empty."""
        if not len(coreset.indices):
            return None
        samples = self.tokenized["target"].take(coreset.indices)
        epochs = self.settings.coreset_epochs(len(samples), len(self.pool.ids))
        return finetuned(self.store, self.family.target, samples, self.settings, epochs, self.cfg.finetune_seed)

    def evaluate(self, tuned: Artifact | None) -> Artifact:
        return evaluated(
            self.store,
            self.family.target,
            tuned,
            self.tokenized["test"],
            kind=self.settings.kind,
            max_new_tokens=self.task.max_new_tokens,
            batch_tokens=self.cfg.evaluation.batch_tokens,
        )

    def record(self, chosen: Artifact, coreset: Coreset, tuned: Artifact | None, answered: Artifact) -> Path:
        """Write what the run is told by into its folder and, last, metrics.json; then mirror it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        answers = read_predictions(answered)
        references = {sample.id: sample.references for sample in self.test}
        asked = [references[id] for id in answers["id"]]
        metrics, per_sample = measure(self.task.metrics, answers["prediction"].tolist(), asked)
        answers = answers.assign(references=asked)
        answers.join(per_sample).to_parquet(self.folder / "predictions.parquet")
        self._write_samples(coreset)
        self._training(chosen, tuned).to_csv(self.folder / "training.csv", index=False)
        record = {
            "run": {
                "name": self.name,
                "fingerprint": self.fingerprint,
                **{group: self.choices.get(group) for group in ("experiment", "family", "task", "method")},
                "selection_family": self.choices.get("family@selection_family") or self.choices.get("family"),
                "pruning_rate": self.pruning_rate,
                **{k: self.cfg[k] for k in ("seed", "selection_seed", "finetune_seed")},
                "metric": self.task.metrics[0],
                "started": self.started.isoformat(timespec="seconds"),
                "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            },
            "metrics": {**metrics, "output_tokens": sum(answers["tokens"]) / len(answers)},
            "overhead": self._overhead(chosen, tuned),
            "finetuning": _cost(tuned),
            "evaluation": _cost(answered),
            "coreset": {
                "fingerprint": chosen.fingerprint,
                "size": len(coreset.indices),
                "filled": coreset.filled,
                "notes": list(coreset.notes),
            },
            "counts": {
                "pool": len(self.pool.ids),
                "dropped_too_long": len(self.train) - len(self.pool.ids),
                "budget": self.budget,
                "selected": len(coreset.indices),
                "trained": len(coreset.indices) if tuned else 0,
                "test": len(answers),
                "test_dropped_too_long": len(self.test) - len(answers),
                "test_prompts_in_pool": self.overlap,
            },
            "config": self.config,
            "identity": self.identity,
            "provenance": {
                **tracking.environment(ROOT),
                "concurrent_workers": self.store.workers,
                "processes": distributed.world(),
            },
        }
        tracking.write_record(self.folder, record)
        tracking.log_to_wandb(self.folder, self.cfg.tracking.mode)
        return self.folder

    def _write_samples(self, coreset: Coreset) -> None:
        """samples.parquet: every sample of the pool, whether it was selected, the length of its answer and its
        scores; coreset.csv: those selected; regions.csv: what the method tells of its regions."""
        selected = np.isin(np.arange(len(self.pool.ids)), coreset.indices)
        ids, lengths = self.pool.ids, self.pool.for_target.answer_lengths
        table = pd.DataFrame({"id": ids, "selected": selected, "answer_tokens": lengths, **coreset.scores})
        table.to_parquet(self.folder / "samples.parquet")
        chosen = table[selected].drop(columns=["selected", "answer_tokens"])
        chosen.to_csv(self.folder / "coreset.csv", index=False)
        if len(coreset.diagnostics):
            coreset.diagnostics.to_csv(self.folder / "regions.csv", index=False)

    def _training(self, chosen: Artifact, tuned: Artifact | None) -> pd.DataFrame:
        """The curves of every fine-tuning that the run rests on: the target's, and those that selection read."""
        charges = {**chosen.charged(), **({} if tuned is None else tuned.charged())}
        trainings = {f: charge.label for f, charge in charges.items() if charge.stage == "finetune"}
        curves = []
        for fingerprint, label in trainings.items():
            history = json.loads((self.store.root / "finetune" / fingerprint[:32] / "training.json").read_text())
            steps = [entry for entry in history["log"] if "loss" in entry]
            curves.append(pd.DataFrame(steps, columns=["step", "epoch", "loss", "learning_rate", "grad_norm"]))
            curves[-1].insert(0, "training", label)
        return pd.concat(curves) if curves else pd.DataFrame(columns=["training", "step", "loss"])

    def _overhead(self, chosen: Artifact, tuned: Artifact | None) -> dict[str, Any]:
        """What selection cost, every stage it read included; STR, its share of fine-tuning on everything."""
        charges = chosen.charged()
        total = sum((charge.cost for charge in charges.values()), Cost.zero())
        seconds, flops, basis = self._full_finetuning(tuned)
        return {
            **total.to_dict(),
            "str": total.seconds / seconds if seconds else None,
            "str_basis": basis,
            "full_finetuning_seconds": seconds,
            "full_finetuning_flops": flops,
            "stages": self._stages(charges),
        }

    def _stages(self, charges: Charges) -> list[dict[str, Any]]:
        return [
            {
                "stage": charge.stage,
                "label": charge.label,
                "fingerprint": fingerprint,
                "computed": fingerprint in self.store.computed,
                **charge.cost.to_dict(),
            }
            for fingerprint, charge in charges.items()
        ]

    def _full_finetuning(self, tuned: Artifact | None) -> tuple[float | None, float | None, str | None]:
        """Seconds and FLOPs to fine-tune the target on the whole pool; the seconds measured, or estimated from the
        FLOPs of the coreset's fine-tuning and its speed."""
        settings, samples = self.settings, self.tokenized["target"]
        key = finetune_key(self.family.target, samples, settings, settings.epochs, self.cfg.finetune_seed)
        full = self.store.find("finetune", key)
        if full is not None:
            return full.cost.seconds, full.cost.flops, "measured"
        if tuned is None:
            return None, None, None
        training = json.loads((tuned.path / "training.json").read_text())
        adapter = training["trainable_parameters"] if settings.kind == "lora" else None
        flops = epoch_flops(self.family.target, samples, adapter) * settings.epochs
        longer = flops / tuned.cost.flops
        return tuned.cost.seconds + training["seconds"] * (longer - 1), flops, "estimated from FLOPs"


def _models(family: Family) -> dict[str, Any]:
    """What a family's answers depend on."""
    return {
        "models": {"target": family.target.identity(), "small": family.small.identity()},
        "prompt_format": family.prompt_format,
    }


def _cost(artifact: Artifact | None) -> dict[str, Any] | None:
    return None if artifact is None else {"fingerprint": artifact.fingerprint, **artifact.cost.to_dict()}


def data_digest(samples: Sequence[Sample]) -> str:
    """What the samples are, wherever they were read from."""
    return hashlib.sha256(json.dumps([asdict(s) for s in samples]).encode()).hexdigest()
