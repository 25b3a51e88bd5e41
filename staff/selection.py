"""The interface of selection methods: what they get, what they return, and how they draw at random."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

from staff.draws import Draws
from staff.errors import UserError


class ScorePool(Protocol):
    """What a method can ask about the training samples. See `staff.pool.Pool`, which answers with models."""

    @property
    def ids(self) -> Sequence[str]: ...

    @property
    def lengths(self) -> np.ndarray: ...

    @property
    def answer_lengths(self) -> np.ndarray: ...

    @property
    def groups(self) -> np.ndarray | None: ...

    @property
    def dev_groups(self) -> np.ndarray | None: ...

    def ask(
        self, signal: Any, of: str, at: np.ndarray | None = None, view: str = "pool", **options: Any
    ) -> Any: ...

    def learning_rates(self, of: str) -> np.ndarray: ...

    def epochs(self, of: str) -> int: ...


class SelectionMethod(Protocol):
    """A selection method. Implementations are frozen dataclasses.

    Their fields are the method's hyperparameters; `__post_init__` refuses values out of range. `run_method` calls
    `select`, and checks the budget before and the selection after it.
    """

    def select(self, pool: ScorePool, budget: int, rng: Draws) -> Coreset:
        """A coreset of `budget` samples of the pool."""
        ...


SCHEDULE = "schedule.npy"


@dataclass(frozen=True)
class Coreset:
    """The samples that a method selected.

    Attributes:
        indices: sorted positions in the pool, shape (budget,), int64; with a `schedule`, those of its first epoch.
        diagnostics: a table that the method reports, such as a row for each region.
        scores: values of the samples that the selection is based on, each of shape (pool size,); NaN where not
            computed.
        filled: how many samples were selected to reach the budget rather than by the method's own rule.
        notes: what readers of the result should know, in sentences.
        schedule: positions by epoch of fine-tuning, shape (epochs, budget), int64, for a method that selects again
            for every epoch; None: the same samples in every epoch.
    """

    indices: np.ndarray
    diagnostics: pd.DataFrame = field(default_factory=pd.DataFrame)
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    filled: int = 0
    notes: tuple[str, ...] = ()
    schedule: np.ndarray | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "indices", np.sort(np.asarray(self.indices, dtype=np.int64)))
        if self.schedule is not None:
            object.__setattr__(self, "schedule", np.sort(np.asarray(self.schedule, dtype=np.int64), axis=1))

    @classmethod
    def by_epoch(cls, schedule: np.ndarray, **others: Any) -> Coreset:
        """A coreset with this `schedule`, (epochs, budget); `others` are its other attributes."""
        return cls(schedule[0], schedule=schedule, **others)

    @property
    def trained(self) -> np.ndarray:
        """Sorted positions of all samples that fine-tuning sees."""
        return self.indices if self.schedule is None else np.unique(self.schedule)

    def save(self, folder: Path, ids: Sequence[str]) -> None:
        """Write samples.parquet (a row for each sample of the pool), regions.parquet, coreset.json and, for a
        schedule, schedule.npy."""
        selected = np.isin(np.arange(len(ids)), self.indices)
        pd.DataFrame({"id": ids, "selected": selected, **self.scores}).to_parquet(folder / "samples.parquet")
        self.diagnostics.to_parquet(folder / "regions.parquet")
        (folder / "coreset.json").write_text(json.dumps({"filled": int(self.filled), "notes": self.notes}))
        if self.schedule is not None:
            np.save(folder / SCHEDULE, self.schedule)

    @classmethod
    def load(cls, folder: Path) -> Coreset:
        """The coreset that `save` wrote."""
        samples = pd.read_parquet(folder / "samples.parquet")
        said = json.loads((folder / "coreset.json").read_text())
        return cls(
            np.flatnonzero(samples["selected"]),
            pd.read_parquet(folder / "regions.parquet"),
            {name: samples[name].to_numpy() for name in samples.columns[2:]},
            said["filled"],
            tuple(said["notes"]),
            np.load(folder / SCHEDULE) if (folder / SCHEDULE).is_file() else None,
        )


def budget_for(pruning_rate: float, pool_size: int) -> int:
    """m = floor((1 - p) N), computed exactly from the decimal form of p: removing 0.9 of 1,000 leaves 100, not 99.

    Raises:
        UserError: p outside [0, 1), or a budget of zero samples.
    """
    if isinstance(pruning_rate, bool) or not isinstance(pruning_rate, int | float):
        raise UserError(f"pruning_rate={pruning_rate!r} is not a number: choose one in [0, 1), such as 0.9.")
    if not 0 <= pruning_rate < 1:
        raise UserError(f"pruning_rate={pruning_rate} is outside [0, 1): it is the fraction removed, such as 0.9.")
    budget = int((1 - Fraction(str(pruning_rate))) * pool_size)
    if budget == 0:
        raise UserError(
            f"pruning_rate={pruning_rate} leaves none of the {pool_size} samples: lower it or enlarge the pool."
        )
    return budget


def budget_of(method: SelectionMethod, pruning_rate: float, pool_size: int, count: int | None = None) -> int:
    """The number of samples that the method selects.

    It is the method's own `fixed_size(pool_size)` if it ignores what is asked for (all samples, none, or a given
    list); else `count`, or `budget_for` where that is None.

    Raises:
        UserError: a rate or a count that leaves no sample, or a count beyond the pool.
    """
    if (fixed := getattr(method, "fixed_size", None)) is not None:
        return fixed(pool_size)
    if count is None:
        return budget_for(pruning_rate, pool_size)
    if type(count) is not int or not 1 <= count <= pool_size:
        raise UserError(f"budget={count!r} must be a whole number of at least 1 and at most {pool_size}, the pool.")
    return count


def tokens_of(budget_tokens: Any) -> int | None:
    """`budget_tokens` as it was set: None, or a number of training tokens.

    Raises:
        UserError: anything else.
    """
    if budget_tokens is not None and (type(budget_tokens) is not int or budget_tokens < 1):
        raise UserError(f"budget_tokens={budget_tokens!r} must be null or a whole number of at least 1.")
    return budget_tokens


def run_method_for_tokens(method: SelectionMethod, pool: ScorePool, tokens: int, rng: Draws) -> Coreset:
    """The coreset that `method` selects within a budget of training tokens: at most `tokens` by `pool.lengths`.

    The method is asked for a number of samples as in `run_method`, and bisection finds the number m whose coreset
    fits while the coreset of m + 1 samples does not. If larger coresets always have more tokens, as with rankings,
    m is the largest number that fits. The result is the method's own coreset of m samples.

    Raises:
        UserError: as `run_method`, or the budget holds no sample.
    """
    lengths = np.sort(np.asarray(pool.lengths))
    fits = int(np.searchsorted(np.cumsum(lengths[::-1]), tokens, "right"))  # even the longest so many do
    beyond = int(np.searchsorted(np.cumsum(lengths), tokens, "right")) + 1  # not even the shortest so many do
    chosen = None
    while beyond - fits > 1:
        middle = (fits + beyond) // 2
        coreset = run_method(method, pool, middle, rng)
        if int(pool.lengths[coreset.indices].sum()) <= tokens:
            fits, chosen = middle, coreset
        else:
            beyond = middle
    if fits == 0:
        raise UserError(
            f"budget_tokens={tokens} holds no sample that {type(method).__name__} selects: raise it (the shortest "
            f"sample has {lengths[0]} tokens, the longest {lengths[-1]})."
        )
    return chosen or run_method(method, pool, fits, rng)


def run_method(method: SelectionMethod, pool: ScorePool, budget: int, rng: Draws) -> Coreset:
    """The coreset that `method` selects: exactly `budget` distinct samples, or the method's own `fixed_size`. One
    with a schedule has as many in every epoch.

    All selection goes through this function, so methods need not check this themselves.

    Raises:
        UserError: a budget outside [1, pool size], or a selection that is not of this form.
    """
    size, name = len(pool.ids), type(method).__name__
    fixed = getattr(method, "fixed_size", None)
    if fixed is None:
        check_budget(budget, size)
    wanted = budget if fixed is None else fixed(size)
    coreset = method.select(pool, budget, rng)
    if not isinstance(coreset, Coreset):
        raise UserError(f"{name}.select returned a {type(coreset).__name__}: it must return a Coreset.")
    for chosen in [coreset.indices] if coreset.schedule is None else coreset.schedule:
        _check_chosen(chosen, size, wanted, name)
    if coreset.schedule is not None and not np.array_equal(coreset.indices, coreset.schedule[0]):
        raise UserError(f"{name}.select names others than its schedule's first epoch: use Coreset.by_epoch.")
    return coreset


def _check_chosen(chosen: np.ndarray, size: int, wanted: int, name: str) -> None:
    """Refuse positions that are not `wanted` distinct ones of a pool of this size."""
    outside = chosen[(chosen < 0) | (chosen >= size)]
    if len(outside):
        raise UserError(
            f"{name}.select chose position {outside[0]}, but the pool's are 0 to {size - 1}: fix the method."
        )
    positions, times = np.unique(chosen, return_counts=True)
    if len(positions) and times.max() > 1:
        twice = positions[times.argmax()]
        raise UserError(f"{name}.select chose position {twice} {times.max()} times: choose each sample once.")
    if len(positions) != wanted:
        raise UserError(
            f"{name}.select chose {len(positions)} samples, not the {wanted} of the budget: fix the method."
        )


def check_scores(scores: np.ndarray, ids: Sequence[str], name: str, minimum: float = -np.inf) -> np.ndarray:
    """`scores` as float64, shape (len(ids),).

    Args:
        name: what the scores are, for messages.

    Raises:
        UserError: another shape, or a score that is not finite or below `minimum`, with the sample's id.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.shape != (len(ids),):
        raise UserError(f"{name} has shape {scores.shape}, but the pool has {len(ids)} samples: give one each.")
    bad = np.flatnonzero(~np.isfinite(scores) | (scores < minimum))
    if len(bad):
        raise UserError(
            f"{name} of sample {ids[bad[0]]!r} is {scores[bad[0]]} ({len(bad)} in total): "
            "scores must be finite" + (f" and at least {minimum:g}." if minimum > -np.inf else ".")
        )
    return scores


def check_range(owner: object, name: str, low: float, high: float = np.inf, *, whole: bool = False) -> None:
    """Refuse a hyperparameter of a method that is not a number in [low, high]."""
    value = getattr(owner, name)
    kind = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
        what = "a whole number" if whole else "a number"
        upper = "" if high == np.inf else f" and at most {high:g}"
        raise UserError(f"method.{name}={value!r} must be {what} of at least {low:g}{upper}.")


def check_choice(owner: object, name: str, choices: Sequence[str]) -> None:
    """Refuse a hyperparameter of a method that is not one of `choices`."""
    if getattr(owner, name) not in choices:
        raise UserError(f"method.{name}={getattr(owner, name)!r} is unknown: choose {' or '.join(choices)}.")


def check_flags(method: SelectionMethod) -> None:
    """Refuse a boolean field of a method that is not a bool, since any non-empty text would count as true."""
    for name, kind in getattr(type(method), "__annotations__", {}).items():
        if kind in (bool, "bool") and not isinstance(value := getattr(method, name), bool):
            raise UserError(f"method.{name}={value!r} must be true or false.")


def check_budget(budget: int, eligible: int) -> None:
    """Refuse a budget that is not in [1, eligible]."""
    if not 1 <= budget <= eligible:
        raise UserError(
            f"a budget of {budget} samples cannot be met: {eligible} are eligible; change pruning_rate, "
            "or how many samples the method drops."
        )
