"""One run, from its configuration to the answers of its model. What it leaves in its folder: record.py."""

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

from filelock import FileLock
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from experiments import sweep
from staff import distributed, tracking
from staff.artifacts import STAGE_VERSIONS, Artifact, Store
from staff.data import Sample, Task
from staff.errors import UserError
from staff.evaluate import check_metrics, evaluated
from staff.finetune import FinetuneSettings, finetuned
from staff.made import materialise
from staff.memory import check_fits
from staff.models import Family, check_quantization
from staff.pool import Pool, ScoringSettings
from staff.selection import Coreset, SelectionMethod, budget_of, check_flags, source_digest
from staff.tokens import TokenizedSamples, answerable, fitting, tokenize

log = logging.getLogger("staff")

# What does not change a run's numbers, or is known better by content than by name; by dotted name.
NOT_IN_FINGERPRINT = (
    *("tracking", "results_dir", "store_dir", "scoring", "evaluation", "seed"),
    *("method.path", "task.data_dir", "task.group_field", "finetune.fsdp"),
)
_latest: dict[str, dict[str, TokenizedSamples]] = {}
"""The tokenised samples of this process's latest run, under what they depend on."""


class Run:
    """Checks its configuration and reads its data when made; loads a model only when a stage needs one, or when
    the model itself is yet to be made (from GGUF, or from the target).

    Raises:
        UserError: bad configuration or data.
    """

    def __init__(self, cfg: DictConfig, choices: dict[str, Any], store: Store | None = None):
        self.cfg, self.choices = cfg, choices
        self.results = sweep.folder_of(cfg, "results_dir")
        self.method: SelectionMethod = instantiate(cfg.method, _convert_="all")
        check_flags(self.method)
        self.settings: FinetuneSettings = instantiate(cfg.finetune, _convert_="all")
        self.scoring: ScoringSettings = instantiate(cfg.scoring)
        family: Family = instantiate(cfg.family, _convert_="all")
        selecting: Family | None = instantiate(cfg.get("selection_family"), _convert_="all")
        self.task: Task = instantiate(cfg.task, _convert_="all")
        tracking.check_mode(cfg.tracking.mode)
        for name in ("selection_seed", "finetune_seed"):
            if type(cfg[name]) is not int or not 0 <= cfg[name] < 2**32:
                raise UserError(f"{name}={cfg[name]!r} must be a whole number of at least 0 and below 2^32.")
        tokens = cfg.evaluation.batch_tokens
        if tokens is not None and (type(tokens) is not int or tokens < 1):
            raise UserError(f"evaluation.batch_tokens={tokens!r} must be null or a whole number of at least 1.")
        self.train, self.test = self.task.load("train"), self.task.load("test")
        check_metrics(self.task.metrics, self.test)
        kept = budget_of(self.method, cfg.pruning_rate, len(self.train))  # refuses a bad rate
        fixed = hasattr(self.method, "fixed_size")
        self.pruning_rate = float(1 - Fraction(kept, len(self.train))) if fixed else cfg.pruning_rate
        self.store = store or Store(sweep.folder_of(cfg, "store_dir"), workers=sweep.workers())
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
        content = {**self.config, "family": None, "selection_family": None}
        for setting in NOT_IN_FINGERPRINT:
            group, _, name = setting.partition(".")
            if name:
                content[group] = {k: v for k, v in content[group].items() if k != name}
            else:
                del content[group]
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
        return self.results / "runs" / self.name

    @property
    def recorded(self) -> bool:
        return (self.folder / "metrics.json").is_file()

    @cached_property
    def tokenized(self) -> dict[str, TokenizedSamples]:
        """The training samples for the small model and for the target; for the target of the family that selects,
        as a rule the same; and the test samples for the target. Runs of a sweep that have them in common and
        follow each other share them."""
        texts = [self.identity["data"], _models(self.family), _models(self.selecting)]
        limits = [self.settings.max_length, self.task.too_long, self.task.max_new_tokens]
        if (known := json.dumps([texts, limits])) not in _latest:
            _latest.clear()
            _latest[known] = self._tokenize()
        return _latest[known]

    def _tokenize(self) -> dict[str, TokenizedSamples]:
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


def _models(family: Family) -> dict[str, Any]:
    """What a family's answers depend on."""
    return {
        "models": {"target": family.target.identity(), "small": family.small.identity()},
        "prompt_format": family.prompt_format,
    }


def data_digest(samples: Sequence[Sample]) -> str:
    """What the samples are, wherever they were read from; where there are no groups, as before there were any."""
    rows = [{k: v for k, v in asdict(s).items() if k != "group" or v is not None} for s in samples]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
