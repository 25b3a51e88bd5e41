"""A pool with given arrays as signals, for selection without models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from staff.errors import UserError
from staff.scoring.signal import Signal
from staff.signals import NAMED, named, named_all

SignalLike = str | Signal
Signals = Mapping[tuple[Any, str], np.ndarray]
"""Values by signal (or its name) and model."""


class ArrayPool:
    """A pool with given arrays as signals, so that no model is needed.

    Args:
        ids: the samples' ids, unique.
        signals: arrays by signal and model, such as {("effort", "small"): array of shape (N,)}. A name means the
            signal with its default options; for others give the signal itself: (Effort("all_lora"), "small").
        answer_lengths, lengths: tokens of the answers and of the whole samples, shape (N,).
        groups: the samples' groups, shape (N,).
        dev: the signals of a validation slice.
        dev_groups: the groups of its samples.
        learning_rates: by model, the mean learning rate of each epoch of its fine-tuning, shape (epochs,).

    Raises:
        UserError: ids that are not text or not unique.
    """

    def __init__(
        self,
        ids: Sequence[str],
        signals: Signals,
        answer_lengths: np.ndarray | None = None,
        *,
        lengths: np.ndarray | None = None,
        groups: np.ndarray | None = None,
        dev: Signals | None = None,
        dev_groups: np.ndarray | None = None,
        learning_rates: Mapping[str, np.ndarray] | None = None,
    ):
        for position, given in enumerate(ids):
            if not isinstance(given, str):
                raise UserError(f"ids[{position}]={given!r} must be text: give ids as strings.")
        if len(set(ids)) != len(ids):
            raise UserError("ids must be unique: give every sample its own id.")
        self.ids = list(ids)
        self.groups, self.dev_groups = groups, dev_groups
        self._answer_lengths, self._lengths = answer_lengths, lengths
        self._learning_rates = learning_rates or {}
        self._views = {"pool": _resolved(signals)}
        if dev is not None:
            self._views["dev"] = _resolved(dev)

    @property
    def answer_lengths(self) -> np.ndarray:
        return self._given("answer_lengths", self._answer_lengths)

    @property
    def lengths(self) -> np.ndarray:
        return self._given("lengths", self._lengths)

    def ask(
        self,
        signal: SignalLike | Sequence[SignalLike],
        of: str,
        at: np.ndarray | None = None,
        view: str = "pool",
        **options: Any,
    ) -> Any:
        """As `staff.pool.Pool.ask`.

        Raises:
            UserError: the pool has no such signal, with these options, of this model.
        """
        if isinstance(signal, Sequence) and not isinstance(signal, str):
            return [self.ask(one, of, at, view) for one in named_all(signal, options)]
        if view not in self._views:
            raise UserError(f"the pool has no {view} slice: give ArrayPool {view}=....")
        known, wanted = self._views[view], _signal(signal, options)
        if (wanted, of) not in known:
            has = ", ".join(f"{_words(s)} of {m}" for s, m in known) or "none"
            raise UserError(f"the pool has no {_words(wanted)} of {of!r}: it has {has}.")
        values = known[wanted, of]
        return values if at is None else values[at]

    def epochs(self, of: str) -> int:
        """As the answers of its checkpoints have them."""
        known = [values.shape[1] for (_, model), values in self._views["pool"].items() if model == f"{of}@epochs"]
        return int(self._given(f"signal of {of}@epochs", np.array(known) if known else None)[0])

    def learning_rates(self, of: str) -> np.ndarray:
        return self._given("learning_rates", self._learning_rates.get(of))

    @staticmethod
    def _given(name: str, values: np.ndarray | None) -> np.ndarray:
        if values is None:
            raise UserError(f"the pool has no {name}: give ArrayPool {name}.")
        return values


def _resolved(signals: Signals) -> dict[tuple[Any, str], np.ndarray]:
    return {(_signal(signal, {}), model): np.asarray(values) for (signal, model), values in signals.items()}


def _signal(signal: SignalLike, options: Mapping[str, Any]) -> Any:
    """A key for the signal with these options. An unknown name without options is its own key."""
    if isinstance(signal, str) and signal not in NAMED and not options:
        return signal
    made = named(signal, **options)
    return (type(made), repr(made))


def _words(signal: Any) -> str:
    """A signal's key in words: its name, and its options if they are not the defaults."""
    if isinstance(signal, str):
        return repr(signal)
    kind, text = signal
    plain = kind()
    return repr(kind.name) if repr(plain) == text else f"{kind.name!r} ({text})"
