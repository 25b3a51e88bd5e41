"""The signals: what a model can be asked about a sample. One file each; a new signal is a new file.

A method names a signal, `pool.ask("loss", of="small")`, or is given one as a field by Hydra:

    _target_: mymethods.HighestLoss
    signal:
      _target_: staff.signals.loss.Loss
      prompt: false
"""

from __future__ import annotations

from dataclasses import fields, replace
from importlib import import_module
from typing import Any

from staff.errors import UserError
from staff.scoring.signal import Signal

NAMED = {
    "effort": "effort.Effort",
    "el2n": "el2n.EL2N",
    "loss": "loss.Loss",
    "embedding": "embedding.Embedding",
}
"""The shipped signals by name: module and class in this package."""


def named(signal: str | Signal, **options: Any) -> Signal:
    """The signal of this name, or the signal itself, with these fields.

    Raises:
        UserError: an unknown name, or an option that the signal does not have.
    """
    if isinstance(signal, str):
        if signal not in NAMED:
            raise UserError(f"signal={signal!r} is unknown: choose one of {', '.join(NAMED)}.")
        module, _, name = NAMED[signal].partition(".")
        kind = getattr(import_module(f"staff.signals.{module}"), name)
        made = kind()
    else:
        made = signal
    known = [field.name for field in fields(made)]  # type: ignore[arg-type]
    for option in options:
        if option not in known:
            has = ", ".join(known) or "none"
            raise UserError(f"signal {made.name!r} has no option {option!r}: it has {has}.")
    return replace(made, **options) if options else made  # type: ignore[type-var]
