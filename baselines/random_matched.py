"""Random, matched to a reference: is a coreset worth more than its lengths, its tokens or its groups?

A short answer has a larger gradient of its mean loss, so a method that goes by effort chooses, in part, by length,
and a coreset with longer answers fine-tunes differently whatever else is in it. This twin draws at random among
the coresets that agree with a reference method's coreset in what `match` names. What the reference gains over its
twin is gained by more than that; what the twin gains over `random` is that.

Length and group are matched by cells: inside each, uniform, as many as the reference has. Tokens are matched by a
tilt: a sample of L tokens is drawn with a weight of exp(a L). With Gumbel noise such a draw is the samples of the
highest noise + a L (Kool, van Hoof and Welling, ICML 2019). Its tokens rise with a, so that bisection finds a.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd

from staff.errors import UserError
from staff.selection import Coreset, Draws, ScorePool, SelectionMethod, check_range

MATCHES = ("length", "tokens", "group")


@dataclass(frozen=True)
class RandomMatched:
    """Uniform, given what `match` names of the reference's coreset of the same seed and budget.

    The reference is carried out, and charged: in overhead this is a control, not a rival.

    Attributes:
        reference: the method whose coreset is matched; its own run with the same seed selects the same one.
        match: one or several of "length" (of the answers, by interval), "tokens" (of all samples together, prompts
            and answers, which is what an epoch of fine-tuning costs) and "group".
        num_bins: intervals of answer length with about equally many samples of the pool, within which lengths count
            as equal. The more there are, the closer the lengths, and the more samples are shared by necessity.
    """

    version: ClassVar[int] = 1

    reference: SelectionMethod
    match: Sequence[str] = ("tokens",)
    num_bins: int = 20

    def __post_init__(self) -> None:
        check_range(self, "num_bins", 1, whole=True)
        match = self.match
        if not isinstance(match, list | tuple) or not match or not set(match) <= set(MATCHES):
            raise UserError(f"method.match={match!r} must be a list of some of {', '.join(MATCHES)}.")
        if not hasattr(self.reference, "select"):
            raise UserError(
                f"method.reference={self.reference!r} is not a method: set method@method.reference=staff."
            )

    def select(self, pool: ScorePool, budget: int, rng: Draws) -> Coreset:
        """Raises UserError for what the reference refuses, for one that does not keep to the budget, and for
        groups of a pool that has none."""
        if "group" in self.match and pool.groups is None:
            raise UserError("method.match names group, but the samples have none: set task.group_field.")
        reference = self.reference.select(pool, budget, rng)
        if reference.schedule is not None:
            raise UserError(
                "method.reference selects other samples for every epoch: choose one that selects one coreset."
            )
        if len(reference.indices) != budget:
            raise UserError(
                f"method.reference selects {len(reference.indices)} samples whatever the pruning rate: choose one "
                f"that selects {budget}."
            )
        members = self._cells(pool)
        chosen = np.zeros(len(pool.ids), dtype=bool)
        chosen[reference.indices] = True
        budgets = np.array([chosen[m].sum() for m in members])
        # A purpose of its own: under the reference's it would find the reference's samples again.
        purpose, notes = "length", reference.notes
        if "tokens" in self.match:
            tokens = np.asarray(pool.lengths)
            wanted = int(tokens[chosen].sum())
            picked = draw_with_total(gumbel(rng.priorities(purpose)), members, budgets, tokens, wanted)
            if abs(off := int(tokens[picked].sum()) - wanted) > 0.01 * wanted:
                notes = (
                    *notes,
                    f"the tokens differ from the reference's {wanted} by {off}: no closer draw was found.",
                )
        else:
            picked = np.concatenate([rng.choose(purpose, m, count) for m, count in zip(members, budgets)])
        return Coreset(picked, self._table(pool, members, chosen, picked), self._matched(pool), notes=notes)

    def _cells(self, pool: ScorePool) -> list[np.ndarray]:
        """The positions of each cell that is not empty, by length and then by group."""
        cells = np.zeros((len(pool.ids), 2), dtype=np.int64)
        if "length" in self.match:
            lengths = np.asarray(pool.answer_lengths)
            edges = np.unique(np.quantile(lengths, np.linspace(0, 1, self.num_bins + 1)[1:-1]))
            cells[:, 0] = np.searchsorted(edges, lengths)
        if "group" in self.match:
            cells[:, 1] = np.unique(np.asarray(pool.groups), return_inverse=True)[1]
        cell_of = np.unique(cells, axis=0, return_inverse=True)[1].ravel()
        return np.split(np.argsort(cell_of, kind="stable"), np.cumsum(np.bincount(cell_of))[:-1])

    def _matched(self, pool: ScorePool) -> dict[str, np.ndarray]:
        values = {}
        if "length" in self.match:
            values["answer_length"] = np.asarray(pool.answer_lengths)
        if "tokens" in self.match:
            values["tokens"] = np.asarray(pool.lengths)
        return values

    def _table(
        self, pool: ScorePool, members: list[np.ndarray], chosen: np.ndarray, picked: np.ndarray
    ) -> pd.DataFrame:
        """One row a cell: its lengths, its size, what the reference has of it, and how many of that were drawn."""
        lengths, shared = np.asarray(pool.answer_lengths), chosen & np.isin(np.arange(len(chosen)), picked)
        columns = {
            "low": [lengths[m].min() for m in members],
            "high": [lengths[m].max() for m in members],
            "size": [len(m) for m in members],
            "budget": [int(chosen[m].sum()) for m in members],
            "shared": [int(shared[m].sum()) for m in members],
        }
        groups = {"group": [str(pool.groups[m[0]]) for m in members]} if "group" in self.match else {}  # type: ignore[index]
        return pd.DataFrame({**groups, **columns})


def gumbel(priorities: np.ndarray) -> np.ndarray:
    """Standard Gumbel noise, (N,); the highest where the priority is lowest, so that without a tilt it draws as
    `Draws.choose`."""
    uniform = np.minimum((priorities.astype(np.float64) + 0.5) / 2.0**64, 1 - 2.0**-53)
    return -np.log(-np.log1p(-uniform))


def draw(noise: np.ndarray, members: list[np.ndarray], budgets: np.ndarray) -> np.ndarray:
    """The positions of the highest `noise` in each cell, as many as its budget."""
    return np.concatenate([m[np.argsort(-noise[m], kind="stable")[:count]] for m, count in zip(members, budgets)])


def draw_with_total(
    noise: np.ndarray, members: list[np.ndarray], budgets: np.ndarray, tokens: np.ndarray, wanted: int
) -> np.ndarray:
    """A draw in the cells whose tokens come as close to `wanted` as a tilt and one exchange in a cell can bring it.

    Args:
        noise: Gumbel noise, (N,).
        members: the positions of each cell.
        budgets: how many to draw of each, (cells,).
        tokens: of each sample, (N,).
    """
    centred = (tokens - tokens.mean()) / max(tokens.std(), 1)
    low, high = -1e6, 1e6  # at these the longest or the shortest of each cell are drawn, whatever the noise
    best = draw(noise, members, budgets)
    for _ in range(60):
        tilt = (low + high) / 2
        picked = draw(noise + tilt * centred, members, budgets)
        if abs(tokens[picked].sum() - wanted) < abs(tokens[best].sum() - wanted):
            best = picked
        if tokens[picked].sum() < wanted:
            low = tilt
        else:
            high = tilt
    return _exchange(noise, members, tokens, best, wanted)


def _exchange(
    noise: np.ndarray, members: list[np.ndarray], tokens: np.ndarray, picked: np.ndarray, wanted: int
) -> np.ndarray:
    """`picked` after the one exchange inside a cell that brings its tokens closest to `wanted`, if any does."""
    inside = np.zeros(len(tokens), dtype=bool)
    inside[picked] = True
    missing, best = wanted - int(tokens[picked].sum()), None
    gap = abs(missing)
    for m in members:
        m = m[np.argsort(-noise[m], kind="stable")]
        ours, others = m[inside[m]], m[~inside[m]]
        # Of each length the first by noise, so that few pairs are compared.
        ours = ours[np.unique(tokens[ours], return_index=True)[1]]
        others = others[np.unique(tokens[others], return_index=True)[1]]
        if gap == 0 or not len(ours) or not len(others):
            continue
        left = np.abs(missing - (tokens[others][None] - tokens[ours][:, None]))
        if left.min() < gap:
            gap = int(left.min())
            out, into = np.unravel_index(left.argmin(), left.shape)
            best = ours[out], others[into]
    if best is None:
        return picked
    inside[best[0]], inside[best[1]] = False, True
    return np.flatnonzero(inside)
