"""The pool of training samples, and what a selection method can ask about them: signals, lengths, groups."""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from staff.data.splits import DataView, Slice
from staff.data.tokens import TokenizedSamples
from staff.errors import UserError
from staff.evaluation.in_context import AnswersInContext, read_in_context
from staff.evaluation.metrics import named_metric
from staff.models.family import Family
from staff.models.spec import ModelSpec
from staff.models.state import ModelState
from staff.scoring.in_context import in_context_gains, separator_of
from staff.scoring.signal import Signal
from staff.scoring.stage import Score, ScoringSettings, read_scores
from staff.selection import Draws, SelectionMethod, run_method, run_method_for_tokens
from staff.signals import EVALUATIONS, PAIRS, named_all
from staff.store.cost import Meter
from staff.store.manifest import Artifact
from staff.store.stage import Stage, identity, plain
from staff.store.store import Store
from staff.training.settings import FinetuneSettings
from staff.training.stage import Finetune, read_learning_rates, read_online_efforts

log = logging.getLogger(__name__)

STATES = ("small", "small_once", "small_raw", "target", "target_tuned", "warmup")
"""Names of model states: the small model fine-tuned on the whole pool, the same for one epoch whatever the
settings, and before fine-tuning; the target before fine-tuning, fine-tuned on the whole pool, and on a random part
of it with Adam's moments kept."""

WARMUP = 0.05
"""The part of the pool that the warm-up is on (LESS, Xia et al. 2024, section 3.1), rounded up to whole samples."""

SignalLike = str | Signal


@dataclass(frozen=True)
class Pool:
    """The training samples, and the models that compute signals of them. Every signal is an artefact.

    A model is fine-tuned when a method first asks for its signals. `STATES` has the names of the models.

    Attributes:
        slices: "pool", the samples to choose from; and optionally "dev", the validation slice.
        family: the models.
        settings: how they are fine-tuned.
        store: where artefacts are stored.
        seed: the selection seed, for fine-tuning before scoring, new adapters and draws.
        scoring: how samples are scored.
    """

    slices: Mapping[str, Slice]
    family: Family
    settings: FinetuneSettings
    store: Store
    seed: int
    scoring: ScoringSettings = field(default_factory=ScoringSettings)

    @property
    def ids(self) -> Sequence[str]:
        """The samples' ids, in the pool's order."""
        return self.slices["pool"].target.ids

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample for the target, prompt and answer, shape (N,)."""
        return self.slices["pool"].target.lengths

    @property
    def answer_lengths(self) -> np.ndarray:
        """Tokens of each answer for the target, with the end token, shape (N,)."""
        return self.slices["pool"].target.answer_lengths

    @property
    def groups(self) -> np.ndarray | None:
        """The group of each sample, shape (N,); None if the task has no groups."""
        return self.slices["pool"].groups

    @property
    def dev_groups(self) -> np.ndarray | None:
        """The group of each sample of the validation slice; None if the task has no groups."""
        return self._slice("dev").groups

    def ask(
        self,
        signal: SignalLike | Sequence[SignalLike],
        of: str,
        at: np.ndarray | None = None,
        view: str = "pool",
        **options: Any,
    ) -> Any:
        """A signal of every sample, shape (N, ...), in the pool's order; for several signals, a list of arrays.

        Several signals come out of one pass over the samples, whose cost counts once. "in_context_gain" has a value
        for every pair of samples, shape (N, pool size). For "in_context" see `_in_context`.

        Args:
            signal: a name such as "loss", or a signal, or a sequence of these.
            of: one of `STATES`. "small@2" is the model at the end of its second epoch. "small@epochs" is the model
                at the end of every epoch, and gives shape (N, epochs, ...). "small@online" gives efforts from the
                backward passes of the last epoch.
            at: positions in the slice, shape (n,), for an array with n rows; None: all samples.
            view: "pool", or "dev" for the validation slice.
            options: fields of the signal; each of several signals takes those that it has.

        Raises:
            UserError: an unknown signal, option, model or slice, or a model that cannot be scored.
        """
        if signal == PAIRS:
            return self._in_context_gains(of, view)
        if signal == EVALUATIONS:
            return self._in_context(of, view, **options)
        several = not isinstance(signal, str | Signal)
        signals = named_all(signal if several else [signal], options)
        name, _, moment = of.partition("@")
        if moment == "online":
            found = [self._online(name, signals, at)]
        else:
            asked = DataView(view, signals[0].prompt, signals[0].text, at)
            states = self.states(of)
            found = [self._score(state, signals, asked, len(states)) for state in states]
        by_epoch = moment == "epochs"
        values = [np.stack([f[s.name] for f in found], 1) if by_epoch else found[0][s.name] for s in signals]
        return values if several else values[0]

    def states(self, of: str) -> list[ModelState]:
        """The model states that `of` names, as in `ask`: one, or with "@epochs" one for each epoch."""
        name, _, moment = of.partition("@")
        if name not in STATES:
            raise UserError(f"the model {name!r} is unknown: choose one of {', '.join(STATES)}.")
        if name == "small" and self.family.small.identity() == self.family.target.identity():
            log.warning("the small model is the target itself, so scoring costs as much: name a smaller one")
        state = ModelState(self._spec(name), None if name in ("small_raw", "target") else self.training(name))
        return state.at(moment, of) if moment else [state]

    def training(self, name: str, online: str | None = None) -> Finetune:
        """The fine-tuning that the state of this name is the end of."""
        epochs = {"small": self.settings.small_epochs, "small_once": 1}.get(name, self.settings.epochs)
        samples, warmup = self._slice("pool").of(name.startswith("small")), name == "warmup"
        if warmup:
            count = math.ceil(Fraction(str(WARMUP)) * len(samples))
            samples = samples.take(Draws(self.seed, self.ids).choose(name, np.arange(len(samples)), count))
        return Finetune(self._spec(name), samples, self.settings, epochs, self.seed, online, moments=warmup)

    def epochs(self, of: str) -> int:
        """Epochs of the fine-tuning that `of` names, as "small": known before it runs."""
        return int(self.training(of).epochs)

    def learning_rates(self, of: str) -> np.ndarray:
        """The mean learning rate of each epoch of the fine-tuning that `of` names, as "warmup", shape (epochs,)."""
        if self.states(of)[0].training is None:
            raise UserError(f"of={of!r}: the raw model has no learning rates; ask small, target_tuned or warmup.")
        training = self.training(of)
        return read_learning_rates(self.store.get(training), int(training.epochs))

    def key(self) -> dict[str, Any]:
        """Everything that the pool's answers depend on, as JSON holds it."""
        return {
            "slices": {
                name: {
                    "samples": [part.small.fingerprint, part.target.fingerprint],
                    "groups": None if part.groups is None else plain(part.groups.tolist()),
                }
                for name, part in self.slices.items()
            },
            "models": [self.family.small.identity(), self.family.target.identity()],
            "trainings": [self.training(name).fingerprint for name in ("small", "target_tuned")],
            "scores": {"version": Score.version, "dtype": self.scoring.dtype, "lora": plain(self.settings.lora)},
        }

    def _score(
        self, state: ModelState, signals: tuple[Signal, ...], view: DataView, checkpoints: int
    ) -> dict[str, np.ndarray]:
        if len({(signal.prompt, signal.text) for signal in signals}) > 1:
            names = ", ".join(signal.name for signal in signals)
            raise UserError(f"the signals {names} read different texts of the samples: ask for them one at a time.")
        stage = self._stage(state, view.of(self._read_by(state, view.slice)), signals)
        return read_scores(self._checked(stage, checkpoints))

    def _in_context_gains(self, of: str, view: str) -> np.ndarray:
        (state,) = self.states(of)
        helped, examples = self._read_by(state, view), self._read_by(state, "pool")

        def distances(samples: TokenizedSamples) -> np.ndarray:
            signals = named_all(["distance"], {})
            return read_scores(self.store.get(self._stage(state, samples, signals)))["distance"]

        separator, window = separator_of(self.family, state.spec), state.spec.window()
        return in_context_gains(distances, helped, examples, separator, window)

    def _in_context(
        self,
        of: str,
        view: str,
        demonstrations: np.ndarray,
        queries: np.ndarray,
        metric: str = "rougeL",
        layer: int | None = None,
    ) -> np.ndarray:
        """The attention on each demonstration per token, and the metric of each answer: (E, b + q), NaN for none.

        Args:
            demonstrations: positions in the pool, (E, b), -1 for none.
            queries: numbers of queries, (E, q), -1 for none: the remainder by the size of the view is the position.
            metric: of an answer against that of the sample; a name as in `task.metrics`.
            layer: as in `staff.evaluation.in_context.AnswersInContext`.
        """
        (state,) = self.states(of)
        shown, of_view = self._read_by(state, "pool"), self._read_by(state, view)
        at = np.where(queries >= 0, queries % len(of_view), -1)
        separator = separator_of(self.family, state.spec)
        stage = AnswersInContext(state, shown, of_view, demonstrations, at, named_metric(metric), separator, layer)
        return read_in_context(self._checked(stage))

    def _checked(self, stage: Score | AnswersInContext, *how: Any) -> Artifact:
        """The artefact of a stage, which is checked before the model is fine-tuned."""
        if self.store.find(stage) is None:
            stage.check(*how)
        return self.store.get(stage)

    def _stage(self, state: ModelState, samples: TokenizedSamples, signals: tuple[Signal, ...]) -> Score:
        seed = int(np.random.default_rng([self.seed, zlib.crc32(b"fresh adapter")]).integers(2**31))
        return Score(state, samples, signals, self.scoring, self.settings.lora, seed)

    def _online(self, name: str, signals: tuple[Signal, ...], at: np.ndarray | None) -> dict[str, np.ndarray]:
        (signal,) = signals
        gradient, trained = signal.gradient, name in ("small", "small_once", "target_tuned")
        if not trained or signal.name != "effort" or gradient is None or gradient.fresh_adapter is not None:
            raise UserError(
                f"of={name}@online gives only the signal effort, of small, small_once or target_tuned and "
                "without fresh_adapter: leave out @online for a scoring pass."
            )
        scores = read_online_efforts(self.store.get(self.training(name, gradient.parameters)))
        return {signal.name: scores if at is None else scores[at]}

    def _slice(self, name: str) -> Slice:
        if name not in ("pool", "dev"):
            raise UserError(f"view={name!r} is unknown: choose pool or dev.")
        if name not in self.slices:
            raise UserError(
                "there is no dev slice: make a validation slice with task.dev_size=200, task.dev_split or "
                "task.dev_file, and evaluate on the test split."
            )
        return self.slices[name]

    def _read_by(self, state: ModelState, view: str) -> TokenizedSamples:
        """The samples of a slice as the model of the state reads them."""
        return self._slice(view).of(small=state.spec is self.family.small)

    def _spec(self, name: str) -> ModelSpec:
        return self.family.small if name.startswith("small") else self.family.target


@dataclass(frozen=True)
class Select(Stage):
    """The coreset that a method selects. The signals that the method asks for become inputs of its artefact.

    Attributes:
        budget: samples to select.
        tokens: training tokens to select in place of that; `budget` is then a guess, and changes nothing.
    """

    kind: ClassVar[str] = "coreset"
    version: ClassVar[int] = 2

    method: SelectionMethod
    pool: Pool
    budget: int
    tokens: int | None = None

    @property
    def label(self) -> str:
        return f"select by {type(self.method).__name__}"

    def key(self) -> dict[str, Any]:
        return {
            "method": identity(self.method),
            "budget": self.budget if self.tokens is None else {"tokens": self.tokens},
            "seed": self.pool.seed,
            "pool": self.pool.key(),
        }

    def run(self, folder: Path, meter: Meter, *inputs: Artifact) -> None:
        draws = Draws(self.pool.seed, self.pool.ids)
        if self.tokens is None:
            coreset = run_method(self.method, self.pool, self.budget, draws)
        else:
            coreset = run_method_for_tokens(self.method, self.pool, self.tokens, draws)
        coreset.save(folder, self.pool.ids)
