"""One run: from its configuration to the stages that it consists of. What it leaves in its folder: record.py."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from experiments import sweep
from experiments.reader import Evaluation, Reader
from experiments.recorded import read
from experiments.setup import Setup
from staff.data.samples import data_digest
from staff.data.splits import load_splits
from staff.data.tokens import TokenizedSamples
from staff.evaluation.metrics import check_metrics
from staff.models.prepare import prepare
from staff.models.spec import ModelSpec, check_quantization
from staff.models.state import ModelState
from staff.pool import Pool, Select
from staff.runtime import processes
from staff.selection import Coreset
from staff.store.manifest import Artifact, digest
from staff.store.store import SAMPLES, Store
from staff.tracking import mirror
from staff.training.memory import check_fits
from staff.training.stage import Finetune

log = logging.getLogger("staff")


@dataclass(frozen=True)
class PlannedSamples:
    """The samples of a coreset that is not selected yet: known by the stage that will select them."""

    fingerprint: str


class Run:
    """Checks its configuration and reads its data when made. It loads a model only when a stage needs one, or when
    the model itself is yet to be prepared (from GGUF, or from the target).

    Raises:
        UserError: bad configuration or data.
    """

    def __init__(self, setup: Setup, store: Store | None = None):
        self.setup, self.size, self.choices = setup, setup.size, setup.choices
        self.method, self.settings, self.scoring = setup.method, setup.finetune, setup.scoring
        self.generator = setup.generator
        self.task = setup.task.pinned()
        self.store = store or Store(setup.store, workers=sweep.workers())
        near = None if store is None else False  # which a dry run would not tell
        self.splits = load_splits(self.task, setup.generator is not None, self.store.root / SAMPLES, near)
        check_metrics(self.task.metrics, self.splits.test)
        if self.size.tokens is None:
            self.size.of_pool(len(self.splits.pool))  # refuses what leaves no sample
        loading = (self.settings.quantization, self.settings.fsdp)
        self.family = prepare(setup.family, self.store).with_loading(*loading)
        other = setup.selecting
        self.selecting = prepare(other, self.store).with_loading(*loading) if other else self.family
        self.started = datetime.now(UTC)

    @cached_property
    def pruning_rate(self) -> float:
        """The share of the pool's samples that is removed; of its tokens, where the budget is in tokens."""
        if self.size.by_rate:
            return self.size.rate
        if self.size.tokens is not None:
            return float(max(Fraction(0), 1 - Fraction(self.size.tokens, int(self.pool.lengths.sum()))))
        pool = len(self.splits.pool)
        return float(1 - Fraction(self.size.of_pool(pool), pool))

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved configuration, with the pruning rate that a budget or a method's own size amounts to."""
        return {**self.setup.config, "pruning_rate": self.pruning_rate}

    @cached_property
    def fingerprint(self) -> str:
        """Of the stages that the run ends in: the selection, and the answers of the target fine-tuned on it."""
        if self.evaluation is None:
            return digest({"run": [self.selection.fingerprint]})
        planned = PlannedSamples(self.selection.fingerprint)
        tuned = self._finetuning(planned, self.budget) if self.budget else None  # type: ignore[arg-type]
        return digest(
            {"run": [self.selection.fingerprint, self.evaluation.answering(self.state(tuned)).fingerprint]}
        )

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Data and models by their content, for the record."""
        selection = {"selection": self.selecting.identity} if self.transferred else {}
        return {
            "data": {
                "train": data_digest(self.splits.pool),
                "test": data_digest(self.splits.test),
                **({"dev": data_digest(self.splits.dev)} if self.splits.dev else {}),
                "source": self.task.source(),
            },
            **self.family.identity,
            **selection,
        }

    @cached_property
    def transferred(self) -> bool:
        """Whether the models that select are of another family than the one fine-tuned on their coreset."""
        return self.selecting.identity != self.family.identity

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        parts = [self.choices.get(group) or "custom" for group in ("family", "task", "method")]
        if self.transferred:
            parts[0] = f"{self.choices.get('family@selection_family') or 'custom'}-to-{parts[0]}"
        what = "-".join(re.sub(r"[^\w.-]+", "-", part).strip("-.") for part in parts)
        size = f"p{self.pruning_rate:g}" if self.size.tokens is None else f"t{self.size.tokens}"
        return f"{what}-{size}-s{self.setup.finetune_seed}-{self.fingerprint[:8]}"

    @property
    def facts(self) -> dict[str, Any]:
        """What is known of the run from the start, for the record and for its page."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            **{group: self.choices.get(group) for group in ("experiment", "family", "task", "method")},
            "selection_family": self.choices.get("family@selection_family") or self.choices.get("family"),
            "sweep": sweep.name(),
            "pruning_rate": self.pruning_rate,
            **{k: getattr(self.setup, k) for k in ("seed", "selection_seed", "finetune_seed")},
            "metric": self.task.metrics[0],
            "started": self.started.isoformat(timespec="seconds"),
        }

    @property
    def about(self) -> mirror.About:
        """What the run's page shows of it."""
        return mirror.About(self.folder, self.config, self.facts, lambda stage: self.curve_of(stage.key()))

    @property
    def folder(self) -> Path:
        return self.setup.results / "runs" / self.name

    @property
    def recorded(self) -> bool:
        """Whether the run has its record, by all of the metrics and with the references that are asked for. Its
        name depends on neither."""
        file = self.folder / "metrics.json"
        if not file.is_file():
            return False
        if self.evaluation is None:
            return True
        record = read(file)
        measured = {*record["config"]["task"]["metrics"], *record["metrics"]}
        test = self.identity["data"]["test"]
        return measured >= set(self.task.metrics) and record["identity"]["data"].get("test", test) == test

    @cached_property
    def reader(self) -> Reader:
        """How the run's models read samples."""
        selecting = self.selecting if self.transferred else None
        return Reader(self.task, self.family, selecting, self.settings.max_length, self.store)

    @cached_property
    def tokenized(self) -> dict[str, TokenizedSamples]:
        """The pool as the small model, the target, and the target of the family that selects (as a rule the same)
        read it; and the test samples as the target does."""
        tokenized = self.reader.trained(self.splits.pool)
        if self.evaluation is not None:
            tokenized["test"] = self.evaluation.asked
            if "choices" in self.evaluation.needs:
                tokenized["choices"] = self.evaluation.choices
        return tokenized

    @cached_property
    def evaluation(self) -> Evaluation | None:
        """How the target is evaluated; None for a run that ends with its coreset."""
        if self.generator is None:
            return None
        how = self.task, self.splits, self.reader, self.generator, self.scoring, self.settings.lora
        return Evaluation(*how)

    @cached_property
    def pool(self) -> Pool:
        slices = {"pool": self.reader.slice(self.splits.pool, self.tokenized)}
        if self.splits.dev:
            slices["dev"] = self.reader.slice(self.splits.dev, self.reader.trained(self.splits.dev))
        return Pool(slices, self.selecting, self.settings, self.store, self.setup.selection_seed, self.scoring)

    @property
    def budget(self) -> int:
        """The samples to select; with a budget in tokens, how many average samples it holds."""
        if self.size.tokens is not None:
            return max(1, min(len(self.pool.ids), int(self.size.tokens / self.pool.lengths.mean())))
        return self.size.of_pool(len(self.pool.ids))

    @cached_property
    def selection(self) -> Select:
        return Select(self.method, self.pool, self.budget, self.size.tokens)

    def select(self) -> tuple[Artifact, Coreset]:
        """The coreset, and its artefact, whose charges are the selection overhead."""
        chosen = self.store.get(self.selection)
        return chosen, Coreset.load(chosen.path)

    def finetuning(self, coreset: Coreset) -> Finetune | None:
        """The target's fine-tuning on the coreset; None where that is empty."""
        if not len(coreset.indices):
            return None
        trained, schedule = coreset.trained, coreset.schedule
        if schedule is not None:  # positions among the samples that are trained on
            schedule = np.searchsorted(trained, schedule)
        return self._finetuning(self.tokenized["target"].take(trained), len(coreset.indices), schedule)

    def _finetuning(self, samples: TokenizedSamples, size: int, schedule: np.ndarray | None = None) -> Finetune:
        epochs, seed = self.settings.coreset_epochs(size, len(self.pool.ids)), self.setup.finetune_seed
        return Finetune(self.family.target, samples, self.settings, epochs, seed, schedule=schedule)

    def curve_of(self, training: dict[str, Any]) -> str:
        """The name of the curves of a fine-tuning, by its key: the same in every run that has such a fine-tuning.

        "finetune/target" is on the coreset; the others are for selection: "finetune/small", "finetune/warmup", and
        "finetune/target_full", on the whole pool.
        """
        if training.get("moments"):
            return "finetune/warmup"
        whole, model = self.pool.slices["pool"], training["model"]
        if model == self.selecting.small.identity() and training["samples"] == whole.small.fingerprint:
            return "finetune/small_online" if training["online"] else "finetune/small"
        scored = training["samples"] == whole.target.fingerprint and self.budget < len(self.pool.ids)
        return "finetune/target_full" if scored else "finetune/target"

    @property
    def full_finetuning(self) -> Finetune:
        """The target's fine-tuning on the whole pool."""
        settings, samples = self.settings, self.tokenized["target"]
        return Finetune(self.family.target, samples, settings, settings.epochs, self.setup.finetune_seed)

    def state(self, tuned: Finetune | None) -> ModelState:
        """The fine-tuned target, or the raw one."""
        return ModelState(self.family.target, tuned)

    @property
    def models(self) -> list[ModelSpec]:
        """The models that the run may load, each once."""
        return list(dict.fromkeys((self.family.target, self.selecting.target, self.selecting.small)))

    def check_machine(self) -> None:
        """Refuse, before a model loads, what this machine cannot do, or what no coreset can be."""
        self.size.check_tokens(self.pool.lengths)
        self.settings.on_each_device(processes.world_size())
        for spec in self.models:
            spec.check_weights()
        if self.settings.quantization:
            check_quantization()
        if self.budget and self.setup.memory_check:
            tuned = {"small": self.selecting.small, **({"target": self.family.target} if self.generator else {})}
            for name, spec in tuned.items():
                check_fits(spec, self.tokenized[name], self.settings)

    def carry_out(self) -> Outcome:
        """Run every stage, or read it."""
        chosen, coreset = self.select()
        for note in coreset.notes:
            log.info("%s: %s", self.name, note)
        if (evaluation := self.evaluation) is None:
            return Outcome(chosen, coreset)
        tuning = self.finetuning(coreset)
        tuned = None if tuning is None else self.store.get(tuning)
        answering = evaluation.answering(self.state(tuning))
        answered = self.store.get(answering)
        measured = self.store.get(evaluation.measuring(answering))
        floors = evaluation.floors(answering)
        return Outcome(chosen, coreset, tuned, answered, measured, floors and self.store.get(floors))


@dataclass(frozen=True)
class Outcome:
    """What the stages of a run led to; `tuned` is None for the raw target, and all the rest without evaluation.
    `floors` is None too where no metric is of answers."""

    chosen: Artifact
    coreset: Coreset
    tuned: Artifact | None = None
    answered: Artifact | None = None
    measured: Artifact | None = None
    floors: Artifact | None = None
