"""Signals: what a model can compute about a sample, one file each.

A method asks for a signal by its name, `pool.ask("loss", of="small")`. A new signal is a class in a file of your
own. A method can have it as a field, which Hydra fills:

    _target_: mymethods.HighestLoss
    signal:
      _target_: staff.signals.loss.Loss
      prompt: false
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from importlib import import_module
from typing import Any

from staff.errors import UserError
from staff.scoring.signal import Signal

NAMED = {
    "effort": "effort.Effort",
    "el2n": "el2n.EL2N",
    "loss": "loss.Loss",
    "nll": "nll.AnswerNll",
    "embedding": "embedding.Embedding",
    "margin": "margin.Margin",
    "probability": "probability.Probability",
    "correct": "correct.Correct",
    "distance": "distance.Distance",
    "projected_gradient": "projected_gradient.ProjectedGradient",
    "perplexity": "loss.Perplexity",
}
"""The included signals by name: module and class in this package."""

PAIRS = "in_context_gain"
"""What a pool answers of every pair of samples (`staff.scoring.in_context`)."""

EVALUATIONS = "in_context"
"""What a pool answers of evaluations that a method plans (`staff.evaluation.in_context`)."""


def named(signal: str | Signal, **options: Any) -> Signal:
    """The signal with this name, or the signal itself, with these fields.

    Raises:
        UserError: an unknown name, or an option that the signal does not have.
    """
    return named_all([signal], options)[0]


def named_all(signals: Sequence[str | Signal], options: Mapping[str, Any]) -> tuple[Signal, ...]:
    """The signals with these names, or the signals themselves, each with the options that it has.

    Raises:
        UserError: an unknown name, or an option that none of the signals has.
    """
    plain = [_plain(signal) for signal in signals]
    known = [{field.name for field in fields(signal)} for signal in plain]  # type: ignore[arg-type]
    for option in options:
        if not any(option in names for names in known):
            has = ", ".join(sorted(set().union(*known))) or "none"
            raise UserError(
                f"signal {', '.join(repr(signal.name) for signal in plain)} has no option {option!r}: it has {has}."
            )
    return tuple(
        replace(signal, **{option: value for option, value in options.items() if option in names})  # type: ignore
        for signal, names in zip(plain, known, strict=True)
    )


def _plain(signal: str | Signal) -> Signal:
    if not isinstance(signal, str):
        return signal
    if signal not in NAMED:
        raise UserError(f"signal={signal!r} is unknown: choose one of {', '.join(NAMED)}.")
    module, _, name = NAMED[signal].partition(".")
    return getattr(import_module(f"staff.signals.{module}"), name)()
