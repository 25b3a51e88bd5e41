"""Within groups: any method, applied inside each group, with quotas proportional to the sizes of the groups.

A method that compares scores over the whole pool may take most of its coreset from one group, a skill or a language
whose losses are higher for reasons of their own. Here each group keeps its share of the pool, and the method
chooses inside it only. Quotas are whole by the method of largest remainders (Hamilton).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from staff.errors import UserError
from staff.selection import Coreset, Draws, ScorePool, SelectionMethod


@dataclass(frozen=True)
class WithinGroups:
    """What `inner` selects of each group.

    Attributes:
        inner: the method; the validation slice that it may ask about is the whole one for every group.
    """

    version: ClassVar[int] = 1

    inner: SelectionMethod

    def __post_init__(self) -> None:
        if not hasattr(self.inner, "select"):
            raise UserError(f"method.inner={self.inner!r} is not a method: set method@method.inner=staff.")

    def select(self, pool: ScorePool, budget: int, rng: Draws) -> Coreset:
        """Raises UserError for a pool without groups, for what the inner method refuses, and for one that does not
        keep to its quota."""
        if pool.groups is None:
            raise UserError("method=within_groups needs the group of each sample: set task.group_field.")
        labels, group_of, sizes = np.unique(np.asarray(pool.groups), return_inverse=True, return_counts=True)
        quotas = largest_remainders(budget, sizes)
        picked, schedules, tables, filled, notes = [], [], [], 0, {}
        scores: dict[str, np.ndarray] = {}
        for group, (label, quota) in enumerate(zip(labels, quotas)):
            if quota == 0:
                continue
            members = np.flatnonzero(group_of == group)
            part = GroupPool(pool, members)
            coreset = self.inner.select(part, int(quota), Draws(rng.seed, part.ids))
            if len(coreset.indices) != quota:
                raise UserError(
                    f"method.inner selects {len(coreset.indices)} of group {str(label)!r} whatever its quota: "
                    f"choose one that selects {quota}."
                )
            picked.append(members[coreset.indices])
            schedules += [] if coreset.schedule is None else [members[coreset.schedule]]
            regions = coreset.diagnostics if len(coreset.diagnostics) else pd.DataFrame({"budget": [quota]})
            tables.append(regions.assign(within=str(label), within_size=len(members), within_quota=quota))
            filled += coreset.filled
            notes |= dict.fromkeys(coreset.notes)
            for name, values in coreset.scores.items():
                scores.setdefault(name, np.full(len(pool.ids), np.nan))[members] = values
        if (quotas == 0).any():
            notes[f"{(quotas == 0).sum()} of {len(quotas)} groups are too small for a sample of their own."] = None
        rest = pd.concat(tables, ignore_index=True), scores, filled, tuple(notes)
        return Coreset(np.concatenate(picked), *rest, schedule=np.hstack(schedules) if schedules else None)


def largest_remainders(budget: int, sizes: np.ndarray) -> np.ndarray:
    """Whole quotas proportional to `sizes` that add up to `budget`, in exact arithmetic, int64; none is above its
    size if the budget is not above their sum. Of equal remainders the larger group's comes first, then the first.
    """
    shares = [divmod(budget * int(size), int(np.sum(sizes))) for size in sizes]
    quotas = np.array([whole for whole, _ in shares], dtype=np.int64)
    order = sorted(range(len(shares)), key=lambda i: (-shares[i][1], -int(sizes[i]), i))
    quotas[order[: budget - quotas.sum()]] += 1
    return quotas


class GroupPool:
    """The samples `members` of a pool, as a pool.

    A question about all of them is asked about the whole pool, so that one pass serves every group; one about some
    positions is asked about those alone.
    """

    def __init__(self, pool: ScorePool, members: np.ndarray):
        self._pool, self._members = pool, members
        self.ids: Sequence[str] = [str(pool.ids[i]) for i in members]
        self.groups = None if pool.groups is None else np.asarray(pool.groups)[members]

    @property
    def dev_groups(self) -> np.ndarray | None:
        return self._pool.dev_groups

    @property
    def answer_lengths(self) -> np.ndarray:
        return np.asarray(self._pool.answer_lengths)[self._members]

    @property
    def lengths(self) -> np.ndarray:
        return np.asarray(self._pool.lengths)[self._members]

    def learning_rates(self, of: str) -> np.ndarray:
        return self._pool.learning_rates(of)

    def epochs(self, of: str) -> int:
        return self._pool.epochs(of)

    def ask(self, signal: Any, of: str, at: np.ndarray | None = None, view: str = "pool", **options: Any) -> Any:
        if signal == "in_context_gain":  # of pairs, the pool's samples by column
            gains = self._pool.ask(signal, of, view=view)[:, self._members]
            return gains[self._members] if view == "pool" else gains
        if signal == "in_context":  # of evaluations, whose demonstrations and queries are positions
            shown, asked = options["demonstrations"], options["queries"]
            options["demonstrations"] = np.where(shown >= 0, self._members[shown], -1)
            if view == "pool":
                options["queries"] = np.where(asked >= 0, self._members[asked % len(self._members)], -1)
            return self._pool.ask(signal, of, view=view, **options)
        if view != "pool":
            return self._pool.ask(signal, of, at=at, view=view, **options)
        if at is not None:
            return self._pool.ask(signal, of, at=self._members[at], **options)
        answer = self._pool.ask(signal, of, **options)
        several = isinstance(signal, list | tuple)
        return [values[self._members] for values in answer] if several else answer[self._members]
