"""A sweep as a dry run: every stage is estimated from shapes instead of run, and counted once."""

from __future__ import annotations

import copy
import json
import logging
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from omegaconf import DictConfig, OmegaConf

from experiments import sweep
from experiments.configuration import CONF, VALUES, check_size, composed, search_path
from experiments.report.seeds import Planned
from experiments.schedule import starting_order
from experiments.setup import Setup
from experiments.single import Run
from experiments.sizes import ANSWER, ASSUMED, with_placeholders
from staff.models.adapters import shapes, trained_parameters
from staff.models.spec import ARCHITECTURES, ModelSpec
from staff.runtime.progress import progress
from staff.scoring.stage import Score
from staff.store.cost import Cost, Meter
from staff.store.manifest import Artifact
from staff.store.stage import Stage
from staff.store.store import Store
from staff.training.memory import finetuning_memory
from staff.training.stage import Finetune


@dataclass(frozen=True)
class PlannedStage:
    """A stage of the sweep.

    Attributes:
        speed: what stages with the same speed have in common.
        precision: that it computes in.
        parameters: of its model.
        constants: how often it takes the constant of its speed, by `experiments.sizes.Speed`.
        exact: its FLOPs do not depend on scores or answers.
        made: the sweep's own store has it already.
        bytes: that it leaves in the store, roughly.
    """

    stage: str
    label: str
    speed: str
    precision: str
    parameters: int
    constants: float
    cost: Cost
    exact: bool
    made: bool
    bytes: int


@dataclass
class DryRun:
    """What a sweep consists of.

    Attributes:
        stages: those that compute with a model, by fingerprint.
        jobs: the fingerprints of every job's stages, in order.
        order: in which the jobs start.
        memory: bytes that fine-tuning takes, by the model's name; without models of a type that has no estimate.
        sizes: what was counted with, in words.
        replaced: models and data that are not here and were replaced by their known sizes, in words.
        distinct: the overrides of jobs that together have every speed.
        compared: what the sweep compares, by family and task.
    """

    stages: dict[str, PlannedStage] = field(default_factory=dict)
    jobs: list[list[str]] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    sizes: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    distinct: list[list[str]] = field(default_factory=list)
    compared: dict[tuple[str, str], Planned] = field(default_factory=dict)


class DryRunStore(Store):
    """A store in which stages are estimated, and listed in `planned`.

    Args:
        root: a temporary folder.
        real: the store of the sweep.
    """

    def __init__(self, root: Path, real: Store) -> None:
        super().__init__(root)
        self.real = real
        self.planned = DryRun()
        self.certain: set[str] = set()
        """Fingerprints of the samples that are known without scores."""
        self.checked: set[ModelSpec] = set()  # whose weights fit
        self._asked = 0

    def carry_out(self, stage: Stage, folder: Path, meter: Meter, inputs: list[Artifact]) -> None:
        stage.estimate(folder, meter, *inputs)

    def get(self, stage: Stage) -> Artifact:
        # What a method asks second may depend on the first answer; what follows the selection does not.
        self._asked = 0 if stage.kind == "coreset" else self._asked + (stage.kind == "scores")
        second = stage.kind == "scores" and self._asked > 1
        artifact = super().get(stage)
        if stage.kind == "coreset":
            self._asked = 0
        if stage.kind in ASSUMED:
            exact = stage.kind != "evaluation" and stage.key()["samples"] in self.certain and not second
            self._list(stage, artifact.cost, exact and not self.planned.replaced)
        return artifact

    def _list(self, stage: Stage, cost: Cost, exact: bool) -> None:
        known, job = stage.fingerprint, self.planned.jobs[-1]
        if known not in self.planned.stages:
            made = self.real.find(stage) is not None
            self.planned.stages[known] = PlannedStage(
                stage.kind,
                stage.label,
                speed_of(stage),
                precision_of(stage),
                parameters_of(stage),
                getattr(stage, "max_new_tokens", ANSWER) / ANSWER,
                cost,
                exact,
                made,
                bytes_of(stage),
            )
        if known not in job:
            job.append(known)


def speed_of(stage: Stage) -> str:
    """Kind, model and settings, without samples, epochs and seed."""
    settings = {name: value for name, value in stage.key().items() if name not in ("samples", "epochs", "seed")}
    return json.dumps([stage.kind, settings, bool(stage.inputs)], sort_keys=True)


def precision_of(stage: Stage) -> str:
    """The precision of nearly all of a stage's matrix products: frozen weights keep their own."""
    key = stage.key()
    model = key["model"] if "model" in key else key["state"]["model"]
    narrow = model["dtype"] == "bfloat16" or "quantization" in model
    settings = key.get("settings", {"kind": "lora", "precision": "float32"})
    narrow = settings["precision"] == "bfloat16" or (settings["kind"] == "lora" and narrow)
    return "bfloat16" if narrow else "float32"


def parameters_of(stage: Any) -> int:
    """Parameters of the model that a stage trains or runs, without adapters."""
    return _parameters(stage.spec if isinstance(stage, Finetune) else stage.state.spec)


@lru_cache(maxsize=32)
def _parameters(spec: ModelSpec) -> int:
    return shapes(spec).num_parameters()


def bytes_of(stage: Stage) -> int:
    """Bytes of the adapters, of all epochs, or of the scores that a stage stores; 0 for other kinds."""
    if isinstance(stage, Finetune):
        trained = trained_parameters(stage.spec, stage.adapter)
        kept = math.ceil(stage.epochs) * (3 if stage.moments else 1) if stage.adapter else 1
        return 4 * trained * kept
    if isinstance(stage, Score):
        config = stage.state.spec.config().get_text_config()
        return 4 * len(stage.samples) * sum(math.prod(signal.shape(config)) for signal in stage.signals)
    return 0


def dry_run(overrides: Sequence[str], config_dir: str | None = None) -> DryRun:
    """A sweep by these overrides, with every stage estimated.

    Args:
        config_dir: a folder with configuration of the user's own.

    Raises:
        UserError: bad configuration or data.
    """
    store: DryRunStore | None = None
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        stack.callback(logging.disable, logging.NOTSET)
        jobs = []
        for job, setup, replaced in jobs_of(overrides, config_dir, Path(folder)):
            if store is not None:  # what the first run warns of, the others would repeat
                logging.disable(logging.WARNING)
            store = store or DryRunStore(Path(folder), Store(setup.store))
            store.planned.replaced = list(dict.fromkeys([*store.planned.replaced, *replaced]))
            estimate(job, setup, store)
            jobs.append(job)
    assert store is not None
    store.planned.order = starting_order(jobs)
    return store.planned


def estimate(job: list[str], setup: Setup, store: DryRunStore) -> None:
    """Carry out a run on a store that estimates."""
    planned = store.planned
    known = {stage.speed for stage in planned.stages.values()}
    planned.jobs.append([])
    run = Run(setup, store)
    for spec in run.models:
        if spec not in store.checked:
            spec.check_weights()
            store.checked.add(spec)
    run.size.check_tokens(run.pool.lengths)
    tokenized = run.tokenized
    store.certain |= {samples.fingerprint for samples in tokenized.values()}
    chosen, coreset = run.select()
    if all(charge.stage == "coreset" for charge in chosen.charged().values()):
        store.certain.add(tokenized["target"].take(coreset.trained).fingerprint)
    if run.evaluation is not None:
        answering = run.evaluation.answering(run.state(run.finetuning(coreset)))
        store.get(answering)
        for scored in run.evaluation.measuring(answering).scored:
            store.certain.add(scored.samples.fingerprint)
            store.get(scored)
    _compare(run, planned.compared)
    if {stage.speed for stage in planned.stages.values()} - known:
        planned.distinct.append(job)
        _measure(run, planned)


def _compare(run: Run, compared: dict[tuple[str, str], Planned]) -> None:
    """Add the run to what the sweep compares, by family and task; one without evaluation compares nothing."""
    family, task = (str(run.choices.get(group)) for group in ("family", "task"))
    if run.generator is not None:
        new = Planned(family, task, run.task.metrics[0], len(run.tokenized["test"]), run.setup.results)
        found = compared.setdefault((family, task), new)
        found.seeds.add((run.setup.selection_seed, run.setup.finetune_seed))
        found.rates.add(run.pruning_rate)


def _measure(run: Run, planned: DryRun) -> None:
    """Note the sizes of a run's models and samples, and the memory that they take."""
    models = {"small": run.selecting.small, "target": run.family.target}
    for role, spec in models.items():
        samples = run.tokenized[role]
        if spec.config().model_type in ARCHITECTURES:
            need = finetuning_memory(spec, run.settings, samples.lengths, samples.answer_lengths).total
            planned.memory[spec.name] = max(need, planned.memory.get(spec.name, 0))
    parts = [f"{spec.name} has {shapes(spec).num_parameters():,} parameters" for spec in models.values()]
    pool = run.tokenized["target"]
    parts.append(
        f"{len(pool):,} samples of {pool.lengths.mean():.0f} tokens, {pool.answer_lengths.mean():.0f} in the answer"
    )
    if "test" in run.tokenized:
        parts.append(f"{len(run.tokenized['test']):,} test prompts")
    if (said := ", ".join(parts)) not in planned.sizes:
        planned.sizes.append(said)


def jobs_of(
    overrides: Sequence[str], config_dir: str | None, folder: Path
) -> Iterator[tuple[list[str], Setup, list[str]]]:
    """Overrides and setup of every run of the sweep, and what is a placeholder (`with_placeholders`).

    Args:
        folder: where placeholder samples are written.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    plain = [text for text, override in zip(overrides, parsed, strict=True) if not override.is_sweep_override()]
    overrides, plain = ([*given, *search_path(config_dir)] for given in (overrides, plain))
    with initialize_config_dir(CONF, version_base="1.3"):
        whole = compose("config", overrides=plain, return_hydra_config=True)
        every = sweep.jobs_of(whole, overrides)
        with progress(len(every), "plan", unit="job") as bar:
            for job in every:
                check_size(job)
                yield job, *_setup(job, folder)
                bar.update()


def _setup(job: Sequence[str], folder: Path) -> tuple[Setup, list[str]]:
    parsed = OverridesParser.create().parse_overrides(list(job))
    values = {o.key_or_group: o for o in parsed if o.key_or_group in VALUES and o.type == OverrideType.CHANGE}
    rest = [text for text, o in zip(job, parsed, strict=True) if o not in values.values()]
    cfg, setup, replaced = _shared(tuple(rest), folder)
    cfg = copy.deepcopy(cfg)
    for key, override in values.items():
        OmegaConf.update(cfg, key, override.value())
    return setup.varied(cfg), replaced


@lru_cache(maxsize=32)
def _shared(job: tuple[str, ...], folder: Path) -> tuple[DictConfig, Setup, list[str]]:
    cfg, choices = composed(job)
    replaced = with_placeholders(cfg, folder)
    return cfg, Setup.of(cfg, choices), replaced
