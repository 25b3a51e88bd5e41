"""The stage that scores samples with a model."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from staff.data.tokens import TokenizedSamples
from staff.errors import UserError
from staff.models.adapters import LoraSpec, shapes
from staff.models.spec import PRECISIONS
from staff.models.state import FreshAdapter, ModelState, check_mergeable
from staff.runtime.machine import free_ram
from staff.scoring.signal import Signal, gradient_of
from staff.store.cost import Meter
from staff.store.manifest import Artifact
from staff.store.stage import Stage, identity, plain

FILE = "scores.safetensors"


@dataclass(frozen=True)
class ScoringSettings:
    """How samples are scored.

    Attributes:
        batch_tokens: padded tokens of one batch, halved where memory runs out; None: as many as suit the device.
        dtype: precision of the model while it scores; None: its family's.
        one_at_a_time: plain autograd on single samples: slower, and right for every architecture. None: where
            batches are not exact (`staff.scoring.exact`).
    """

    batch_tokens: int | None = None
    dtype: str | None = None
    one_at_a_time: bool | None = None

    def __post_init__(self) -> None:
        tokens = self.batch_tokens
        if tokens is not None and (type(tokens) is not int or tokens < 1):
            raise UserError(f"scoring.batch_tokens={tokens!r} must be null or a whole number of at least 1.")
        if self.one_at_a_time is not None and not isinstance(self.one_at_a_time, bool):
            raise UserError(f"scoring.one_at_a_time={self.one_at_a_time!r} must be null, true or false.")
        if self.dtype not in (None, *PRECISIONS):
            raise UserError(f"scoring.dtype={self.dtype!r} is unknown: choose null, {' or '.join(PRECISIONS)}.")


@dataclass(frozen=True)
class Score(Stage):
    """Signals of samples from one pass of a model.

    Attributes:
        signals: with distinct names; all read the same text of the samples.
        lora: the adapter to differentiate by, for a model without one.
        adapter_seed: seed of a new adapter's A.
    """

    kind: ClassVar[str] = "scores"
    version: ClassVar[int] = 2

    state: ModelState
    samples: TokenizedSamples
    signals: tuple[Signal, ...]
    settings: ScoringSettings
    lora: LoraSpec
    adapter_seed: int

    def __post_init__(self) -> None:
        names = [signal.name for signal in self.signals]
        if len(set(names)) < len(names):
            raise UserError(f"the signals {', '.join(names)} share a name: ask for them one after the other.")
        if self.merges:
            check_mergeable(self.state.spec)
        if self._reads_moments and not (self.state.training and self.state.training.moments):
            raise UserError(
                f"adam=true divides by the optimiser's moments, and {self.state.words} keeps none: ask for it "
                "of=warmup, or set adam=false."
            )

    @property
    def label(self) -> str:
        names = ", ".join(signal.name for signal in self.signals)
        return f"{names} of {len(self.samples)} samples, {self.state.words}"

    @property
    def inputs(self) -> tuple[Stage, ...]:
        return self.state.inputs

    def key(self) -> dict[str, Any]:
        return {
            "signals": [identity(signal) for signal in sorted(self.signals, key=lambda signal: signal.name)],
            "state": self._scored_state.key(),
            "fresh_adapter": plain(self.fresh_adapter) if self.fresh_adapter else None,
            "samples": self.samples.fingerprint,
        }

    @property
    def fresh_adapter(self) -> FreshAdapter | None:
        """The new adapter for the model; None if its own is used, or none is needed."""
        gradient = gradient_of(self.signals)
        if gradient is None or gradient.parameters == "all_linear":
            return None
        if gradient.fresh_adapter is None and self.state.adapted:
            return None
        return FreshAdapter(gradient.fresh_adapter or self.lora, self.adapter_seed)

    @property
    def merges(self) -> bool:
        """Whether the model's own adapter is merged into its weights."""
        gradient = gradient_of(self.signals)
        if gradient is None:
            return False
        return gradient.parameters == "all_linear" or (self.state.adapted and self.fresh_adapter is not None)

    @property
    def one_at_a_time(self) -> bool:
        """Whether samples are scored one by one."""
        if self.settings.one_at_a_time is not None:
            return self.settings.one_at_a_time
        from staff.scoring.exact import batches

        return batches(self.state.spec.config()) is None

    def check(self, checkpoints: int = 1) -> None:
        """Refuse, from shapes alone, what cannot be scored.

        Args:
            checkpoints: of the model, whose values are held together.

        Raises:
            UserError: values larger than memory, or a model without the layer that is read or the parameters to
                differentiate by.
        """
        config = self.state.spec.config().get_text_config()
        for layer in {signal.layer for signal in self.signals} - {None, -1}:
            blocks = self._shapes().config.get_text_config().num_hidden_layers
            if not -blocks <= layer < blocks:
                raise UserError(
                    f"layer={layer} is not a block of {self.state.spec.name}: choose 0 to {blocks - 1}, or -1 for "
                    "the last hidden states."
                )
        for signal in self.signals:
            one = checkpoints * math.prod(signal.shape(config)) * np.dtype(signal.dtype).itemsize
            if (needed := one * len(self.samples)) > (free := free_ram()):
                raise UserError(
                    f"{signal.name} of {len(self.samples)} samples, {signal.shape(config)} each, takes "
                    f"{needed / 1e9:,.0f} GB, and {free / 1e9:,.0f} GB are free: lower method.dim."
                )
        from staff.scoring.gradients import gradient_layers, gradient_parameters

        if gradient := gradient_of(self.signals):
            find = gradient_parameters if self.one_at_a_time else gradient_layers
            find(model := self._shapes(), gradient.parameters)
            parameters = sum(p.numel() for p in gradient_parameters(model, gradient.parameters).values())
            for signal in self.signals:
                signal.check(parameters)

    @property
    def _reads_moments(self) -> bool:
        return any(signal.moments for signal in self.signals)

    @property
    def _scored_state(self) -> ModelState:
        spec = self.state.spec
        return replace(self.state, spec=replace(spec, dtype=self.settings.dtype or spec.dtype))

    def run(self, folder: Path, meter: Meter, *inputs: Artifact) -> None:
        from safetensors.numpy import save_file

        from staff.scoring.flops import charge
        from staff.scoring.passes import score_samples

        state = self._scored_state
        model = self._differentiable(state.load(*inputs))
        values = score_samples(
            model,
            self.samples,
            self.signals,
            batch_tokens=self.settings.batch_tokens,
            pad_token_id=state.spec.tokenizer().pad_token_id,
            one_at_a_time=self.one_at_a_time,
            moments=state.load_moments(*inputs) if self._reads_moments else None,
        )
        charge(meter, model, self.samples, self.signals, self.one_at_a_time)
        save_file(values, folder / FILE)

    def estimate(self, folder: Path, meter: Meter, *inputs: Artifact) -> None:
        from safetensors.numpy import save_file

        from staff.scoring.flops import charge

        model = self._shapes()
        charge(meter, model, self.samples, self.signals, self.one_at_a_time)
        config = model.config.get_text_config()
        values = {
            s.name: placeholder(len(self.samples), s.name + self.state.words, s.shape(config)).astype(s.dtype)
            for s in self.signals
        }
        save_file(values, folder / FILE)

    def _shapes(self) -> Any:
        """The model that is scored, without weights."""
        spec = self._scored_state.spec
        if self.fresh_adapter:
            return shapes(spec, self.fresh_adapter.lora)
        return shapes(spec) if self.merges else self._scored_state.shapes()

    def _differentiable(self, model: Any) -> Any:
        """The model ready for the gradient that the signals need."""
        if self.fresh_adapter:
            return self.fresh_adapter.put_on(model, self.state.adapted)
        return model.merge_and_unload() if self.merges and self.state.adapted else model


def read_scores(scored: Artifact) -> dict[str, np.ndarray]:
    """The values that `Score` stored, by the signal's name: (N, *shape)."""
    from safetensors.numpy import load_file

    return load_file(scored.path / FILE)


def placeholder(samples: int, name: str, shape: tuple[int, ...] = ()) -> np.ndarray:
    """Values for a dry run: (samples, *shape).

    They are evenly spaced, so that no region is empty. Their order is drawn by `name`, so that methods with
    different scores select different coresets, as they nearly always do.
    """
    drawn = np.random.default_rng(zlib.crc32(name.encode())).permutation(samples)
    values = (1 + drawn) / samples
    return values if not shape else np.repeat(values[:, None], min(2, *shape), axis=1)
