"""LESS: the samples whose gradient points where the validation slice's does (Xia et al., ICML 2024).

The influence of a sample on the slice is the sum over the checkpoints of the learning rate times the cosine between
the sample's Adam direction and the plain gradients of the slice, all projected to few dimensions (equation 5). Per
group of the slice it is averaged, and a sample scores as high as its best group.

The checkpoints are the ends of the epochs of a warm-up: the target fine-tuned on a random 5 % of the pool. Adam's
moments are kept of that fine-tuning alone, so that of others plain gradients are compared (`adam: false`).

Where the released code (princeton-nlp/LESS) differs from the paper, the default follows the code. It averages the
cosines with each slice sample; the paper takes the cosine with the mean gradient (`average: gradients`, preset
`less_paper`). It divides the learning rates by their sum, which changes no order. Its Adam direction has no bias
correction and epsilon inside the root (`adam_direction_official`, and the signal "projected_gradient"); the paper's
is `adam_direction`. It sorts NaN first and selects it, which is refused here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd

from baselines.asks import slice_ids, unit_rows
from staff.errors import UserError
from staff.selection import Coreset, Draws, ScorePool, check_choice, check_range, check_scores

BLOCK_BYTES = 2**29  # of projected gradients asked for at once; those of 100,000 samples would take 13 GB


@dataclass(frozen=True)
class LESS:
    """The samples of the highest influence on the validation slice.

    Attributes:
        of: the fine-tuning whose checkpoints are asked, each weighed by the mean learning rate of its epoch:
            "warmup"; "small" or "target_tuned", which other methods may have paid for, with `adam: false`.
        dim: dimensions of the projection (the paper: 8,192).
        adam: compare the slice's gradients with a sample's Adam direction; false: with its gradient.
        average: "cosines" with each sample of a group, as released; "gradients": the cosine with their mean.
    """

    version: ClassVar[int] = 1

    of: str = "warmup"
    dim: int = 8192
    adam: bool = True
    average: str = "cosines"

    def __post_init__(self) -> None:
        check_choice(self, "of", ("warmup", "small", "target_tuned"))
        check_range(self, "dim", 1, whole=True)
        check_choice(self, "average", ("cosines", "gradients"))
        if self.adam and self.of != "warmup":
            raise UserError(
                f"method.adam=true needs Adam's moments, which only the warm-up keeps: with method.of={self.of} "
                "set method.adam=false."
            )

    def select(self, pool: ScorePool, budget: int, rng: Draws) -> Coreset:
        """Raises UserError for a gradient that is not finite, by the sample's id, and for a pool without a
        validation slice."""
        of = f"{self.of}@epochs"
        dev = pool.ask("projected_gradient", of=of, view="dev", dim=self.dim, adam=False)
        dev = _checked(dev, slice_ids(len(dev)))
        rates = pool.learning_rates(self.of)
        weights = rates / rates.sum() if rates.any() else np.full(len(rates), 1 / len(rates))
        labels = np.zeros(len(dev), dtype=int) if pool.dev_groups is None else np.asarray(pool.dev_groups)
        names, groups = np.unique(labels, return_inverse=True)
        directions = _directions(dev, groups, self.average)
        per_group = np.empty((len(pool.ids), len(names)), dtype=np.float32)
        for at, block in self._blocks(pool, of, rng, 4 * len(weights) * self.dim):
            per_group[at] = group_influence(_unit(block), *directions, weights)
        scores = per_group.max(axis=1).astype(np.float64)
        picked = rng.highest_first(scores)[:budget]
        best = per_group.argmax(axis=1)
        diagnostics = pd.DataFrame(
            {
                "group": names.astype(str),
                "slice": np.bincount(groups),
                "best_for": np.bincount(best, minlength=len(names)),
                "picked": np.bincount(best[picked], minlength=len(names)),
            }
        )
        return Coreset(picked, diagnostics, {"influence": scores})

    def _blocks(
        self, pool: ScorePool, of: str, rng: Draws, sample_bytes: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Positions and their Adam directions. In an order drawn by id, rounding falls alike in every order of the
        pool."""
        order, size = np.argsort(rng.priorities("ties")), max(BLOCK_BYTES // sample_bytes, 1)
        for start in range(0, len(order), size):
            at = order[start : start + size]
            block = pool.ask("projected_gradient", of=of, at=at, dim=self.dim, adam=self.adam)
            yield at, _checked(block, [str(pool.ids[i]) for i in at])


def _checked(gradients: np.ndarray, ids: Sequence[str]) -> np.ndarray:
    gradients = np.asarray(gradients, dtype=np.float32)
    check_scores(np.abs(gradients).max(axis=(1, 2)), ids, "the projected gradient")
    return gradients


def _unit(gradients: np.ndarray) -> np.ndarray:
    """(N, T, d), every gradient divided by its norm."""
    return unit_rows(gradients.reshape(-1, gradients.shape[-1])).reshape(gradients.shape)


def _directions(dev: np.ndarray, groups: np.ndarray, average: str) -> tuple[np.ndarray, np.ndarray]:
    """What a sample's cosines are taken with: the slice's gradients of norm 1 and their groups, or each group's
    mean and its own number."""
    if average == "cosines":
        return _unit(dev), groups
    means = np.stack([dev[groups == group].mean(axis=0) for group in range(groups.max() + 1)])
    return _unit(means), np.arange(len(means))


def group_influence(train: np.ndarray, dev: np.ndarray, groups: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The weighted sum of inner products, averaged over the slice samples of each group, (N, groups), float32.

    Args:
        train: gradients of the samples, (N, T, d).
        dev: of the slice, (M, T, d).
        groups: the group of each slice sample, from 0, (M,).
        weights: of the checkpoints, (T,).
    """
    influence = np.zeros((len(train), len(dev)), dtype=np.float32)
    for checkpoint, weight in enumerate(weights.astype(np.float32)):
        influence += weight * (train[:, checkpoint] @ dev[:, checkpoint].T)
    return np.stack([influence[:, groups == group].mean(axis=1) for group in range(groups.max() + 1)], axis=1)


def adam_direction(
    gradient: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    step: int,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> np.ndarray:
    """The update that Adam would make for each gradient alone, the shape of `gradient` (the paper, section 3.1).

    Args:
        gradient: (B, P).
        first: Adam's first moment, (P,).
        second: its second moment, (P,).
        step: the step's number, from 1.
    """
    m = betas[0] * first + (1 - betas[0]) * gradient
    v = betas[1] * second + (1 - betas[1]) * gradient**2
    return (m / (1 - betas[0] ** step)) / (np.sqrt(v / (1 - betas[1] ** step)) + eps)


# ---------------------------------------------------------------- as released


def adam_direction_official(
    gradient: np.ndarray, first: np.ndarray, second: np.ndarray, dtype: str = "float32"
) -> np.ndarray:
    """As `adam_direction`, without bias correction and with epsilon inside the root, float32.

    `dtype`: "bfloat16" rounds the gradient's share of both moments as a bfloat16 model does; the moments themselves
    stay float32.
    """
    gradient = _in_precision(gradient, dtype)
    squares = _in_precision(gradient**2, dtype)
    m = np.float32(0.9) * first + _in_precision(np.float32(1 - 0.9) * gradient, dtype)
    v = np.float32(0.999) * second + _in_precision(np.float32(1 - 0.999) * squares, dtype)
    return m / np.sqrt(v + np.float32(1e-8))


def project_official(
    gradients: np.ndarray, signs: np.ndarray, dtype: str = "float32"
) -> tuple[np.ndarray, np.ndarray]:
    """The projections and the same with norm 1, both (N, k), float32.

    The gradients pass through float16, whose smallest values are lost; there is no factor 1 / sqrt(k).

    Args:
        gradients: (N, P); for training samples after the Adam step.
        signs: (P, k), 1 and -1.
        dtype: "float32" or "bfloat16", of the model, in which products and norms are rounded.
    """
    with np.errstate(over="ignore"):
        halves = _in_precision(gradients, dtype).astype(np.float16)
    projected = _in_precision(_in_precision(halves, dtype) @ np.asarray(signs, dtype=np.float32), dtype)
    norms = _in_precision(np.sqrt((projected**2).sum(axis=1, keepdims=True)), dtype)
    return projected, _in_precision(projected / np.maximum(norms, np.float32(1e-12)), dtype)


def _in_precision(values: np.ndarray, dtype: str) -> np.ndarray:
    return round_to_bfloat16(values) if dtype == "bfloat16" else np.asarray(values, dtype=np.float32)


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The nearest bfloat16 numbers, ties to even, as float32."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return np.where(np.isfinite(values), bits.astype(np.uint32).view(np.float32), values)


def match_official(
    train: np.ndarray, dev: np.ndarray, weights: np.ndarray, subtasks: int
) -> tuple[np.ndarray, np.ndarray]:
    """The scores, (N,), float32, and the positions in the order of the scores, highest first.

    Gradients are taken as they are (the released ones have norm 1). Subtasks are consecutive rows of equal number.
    NaN comes first, as `torch.sort` has it; of equal scores the first is taken, which is not guaranteed there.

    Args:
        train: (T, N, d).
        dev: (T, M, d).
    """
    weights = np.asarray(weights, dtype=np.float64)
    if weights.sum() != 1:
        weights = weights / weights.sum()
    groups = np.arange(dev.shape[1]) // (dev.shape[1] // subtasks)
    train, dev = (np.asarray(g, dtype=np.float32).swapaxes(0, 1) for g in (train, dev))
    scores = group_influence(train, dev, groups, weights).max(axis=1)
    return scores, np.lexsort((-scores, ~np.isnan(scores)))
