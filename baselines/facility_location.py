"""Facility location: the coreset that represents every sample best, by greedy maximisation.

f(S) = sum over samples i of the largest similarity of i to a member of S (0 for the empty set). f is monotone and
submodular, so the greedy choice reaches at least 1 - 1/e of the optimum (Nemhauser, Wolsey and Fisher, 1978). The
similarity is 0.5 + 0.5 cosine, as in DeepCore (Guo et al., 2022), so that it is never negative.

`greedy` is lazy (Minoux, 1978) in blocks: a gain can only fall, so an old gain is an upper bound. The gains of the
most promising sixteenth of the samples are kept exact; the others are brought up to date only when one of them
might be the best. An update touches only samples whose best representative changed. On average a sample changes
its representative about ln m times, so the whole costs at most a few passes over all pairs. Memory is O(N d).

Released code differs in the similarity and in ties. submodlib 0.0.3 and Superfiltering (Li et al., 2024), which
calls it, use exp(-||x - y|| / d) (`similarity: euclidean`, preset `facility_location_official`); apricot takes
squared cosines, or max(D2) - D2. `lazy_greedy` and `kernel_matrix` follow them to the last bit where possible.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from baselines.asks import Embedded, unit_rows
from staff.selection import Coreset, Draws, ScorePool, check_choice

ROWS, COLUMNS = 256, 4096  # of a block of similarities: 4 MB, which stays in a processor's cache
ACTIVE_SHARE, FEWEST_ACTIVE = 16, 512  # one of so many gains is kept exact, and at least so many are

Similarity = Callable[[np.ndarray, np.ndarray], np.ndarray]  # of the samples `rows` to the samples `columns`


@dataclass(frozen=True, kw_only=True)
class FacilityLocation(Embedded):
    """Greedy facility location on embeddings.

    Attributes:
        of: the small model fine-tuned on the pool by default.
        similarity: "cosine", 0.5 + 0.5 cosine; "euclidean", exp(-distance / dimensions).
    """

    version: ClassVar[int] = 1

    of: str = "small"
    similarity: str = "cosine"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "similarity", ("cosine", "euclidean"))

    def select(self, pool: ScorePool, budget: int, rng: Draws) -> Coreset:
        """Raises UserError for an embedding that is not finite, by the sample's id."""
        embeddings = self.embeddings(pool)
        # In an order drawn by id, ties and rounding fall alike in every order of the pool.
        order = np.argsort(rng.priorities("ties"))
        kernel = half_cosine if self.similarity == "cosine" else exponential
        picked, gains, covered = greedy(kernel(embeddings[order]), len(order), len(order), budget)
        gain, coverage = np.full(len(order), np.nan), np.empty(len(order))
        gain[order[picked]], coverage[order] = gains, covered
        return Coreset(order[picked], scores={"gain": gain, "coverage": coverage})


def half_cosine(embeddings: np.ndarray) -> Similarity:
    """0.5 + 0.5 cosine, in blocks; a zero vector has cosine 0 to everything."""
    # One more dimension makes the constant part of the inner product.
    features = np.full((len(embeddings), embeddings.shape[1] + 1), np.sqrt(0.5), dtype=np.float32)
    features[:, :-1] = unit_rows(embeddings) * np.float32(np.sqrt(0.5))
    return lambda rows, columns: features[rows] @ features[columns].T


def exponential(embeddings: np.ndarray) -> Similarity:
    """exp(-||x - y|| / d), in blocks; d is the number of dimensions."""
    centred = embeddings - embeddings.mean(axis=0, dtype=np.float64).astype(np.float32)
    squares = np.einsum("nd,nd->n", centred, centred)

    def similarity(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        block = centred[rows] @ centred[columns].T
        block *= -2
        block += squares[rows, None]
        block += squares[columns]
        block[rows[:, None] == columns] = 0  # rounding puts a sample a little away from itself
        np.sqrt(np.maximum(block, 0, out=block), out=block)
        block /= -embeddings.shape[1]
        return np.exp(block, out=block)

    return similarity


def greedy(
    similarity: Similarity, represented: int, candidates: int, budget: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`budget` candidates, each of the largest gain given those before it.

    Args:
        similarity: of some represented samples to some candidates, float32; a negative one counts as 0.
        represented: how many samples are to be represented.
        candidates: how many there are to choose from.

    Returns:
        The picks in their order and the gain of each, both (budget,), and each represented sample's similarity to
        its best representative, (represented,).
    """
    everyone, everything = np.arange(represented), np.arange(candidates)
    covered = np.zeros(represented, dtype=np.float32)
    gains = _clipped_sums(similarity, everyone, everything, covered, np.full_like(covered, np.inf))
    active, rest, bound = _most_promising(gains)
    covered_at_rest = covered.copy()  # for which the gains of the rest are exact
    picked, gained = np.empty(budget, dtype=np.int64), np.empty(budget)
    for turn in range(budget):
        if gains[active].max() < bound:
            _lower(gains, similarity, rest, covered_at_rest, covered)
            active, rest, bound = _most_promising(gains)
            covered_at_rest = covered.copy()
        best = active[gains[active].argmax()]
        picked[turn], gained[turn] = best, gains[best]
        gains[best] = -np.inf
        before = covered
        covered = np.maximum(before, similarity(everyone, best[None])[:, 0])
        _lower(gains, similarity, active, before, covered)
    return picked, gained, covered


def _most_promising(gains: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """The candidates of the largest gains, all the others, and the largest gain of those."""
    count = max(len(gains) // ACTIVE_SHARE, FEWEST_ACTIVE)
    if count >= len(gains):
        return np.arange(len(gains)), np.arange(0), -np.inf
    by_gain = np.argpartition(-gains, count)
    return np.sort(by_gain[:count]), np.sort(by_gain[count:]), float(gains[by_gain[count]])


def _lower(
    gains: np.ndarray, similarity: Similarity, columns: np.ndarray, before: np.ndarray, after: np.ndarray
) -> None:
    """Bring the gains of `columns` from the coverage `before` to `after`."""
    rows = np.flatnonzero(after > before)
    risen = _clipped_sums(similarity, rows, columns, before, after)
    gains[columns] -= risen - before[rows].sum(dtype=np.float64)


def _clipped_sums(
    similarity: Similarity, rows: np.ndarray, columns: np.ndarray, low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """The sum over `rows` of the similarity clipped to [low, high] of the row, (columns,), float64."""
    sums = np.zeros(len(columns))
    for start in range(0, len(columns), COLUMNS):
        here = slice(start, start + COLUMNS)
        for first in range(0, len(rows), ROWS):
            block_rows = rows[first : first + ROWS]
            block = similarity(block_rows, columns[here])
            np.clip(block, low[block_rows, None], high[block_rows, None], out=block)
            sums[here] += block.sum(axis=0, dtype=np.float64)
    return sums


# ---------------------------------------------------------------- as released


def lazy_greedy(
    kernel: np.ndarray, budget: int, coverage: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The order and the gains of submodlib's `LazyGreedy` (v0.0.3), both (budget,), for a kernel in memory.

    Of equal upper bounds the candidate of the largest index is looked at first. The arithmetic is the released
    one: differences in float32, summed one after the other in float64.

    Args:
        kernel: (represented, candidates), float32; a negative similarity counts as 0.
        coverage: where the maximum of each represented sample starts, 0 by default.
    """
    columns = np.ascontiguousarray(np.asarray(kernel, dtype=np.float32).T)
    covered = np.zeros(columns.shape[1], np.float32) if coverage is None else np.float32(coverage)

    def gain(candidate: int) -> float:
        differences = columns[candidate] - covered
        risen = differences[differences > 0]
        return float(np.cumsum(risen, dtype=np.float64)[-1]) if len(risen) else 0.0

    heap = [(-gain(candidate), -candidate) for candidate in range(len(columns))]
    heapq.heapify(heap)
    order, gains = [], []
    while len(order) < budget:
        candidate = -heapq.heappop(heap)[1]
        now = gain(candidate)
        if heap and now < -heap[0][0]:
            heapq.heappush(heap, (-now, -candidate))
            continue
        order.append(candidate)
        gains.append(now)
        covered = np.maximum(covered, columns[candidate])
    return np.array(order, dtype=np.int64), np.array(gains)


def kernel_matrix(embeddings: np.ndarray, metric: str) -> np.ndarray:
    """All similarities at once, (N, N), float32, as released libraries define them.

    Args:
        metric: submodlib's "cosine" (0 for a zero vector, diagonal 1), "euclidean" (exp(-distance / d)) and "dot";
            DeepCore's "half_cosine"; apricot's "apricot_euclidean" (max(D2) - D2, squared distances) and
            "apricot_cosine" (squared).
    """
    x = np.asarray(embeddings, dtype=np.float32)
    if metric.startswith("apricot"):
        return _apricot_kernel(x.astype(np.float64), metric)
    inner, squares = np.zeros((2, len(x), len(x)), dtype=np.float32)
    for feature in x.T:  # one after the other, as a loop in C++ rounds
        inner += np.outer(feature, feature)
        squares += np.subtract.outer(feature, feature) ** 2
    if metric == "dot":
        return inner
    if metric == "euclidean":
        exponents = -np.sqrt(squares) * np.float32(1 / x.shape[1])
        return np.exp(exponents.astype(np.float64)).astype(np.float32)
    norms = np.sqrt(np.diag(inner))
    norms[norms == 0] = 1
    cosine = inner / np.outer(norms, norms)
    if metric == "half_cosine":
        return np.float32(0.5) + np.float32(0.5) * cosine
    np.fill_diagonal(cosine, 1)
    return cosine


def _apricot_kernel(x: np.ndarray, metric: str) -> np.ndarray:
    if metric == "apricot_euclidean":
        distances = ((x[:, None] - x) ** 2).sum(axis=2)
        return (distances.max() - distances).astype(np.float32)
    unit = unit_rows(x)
    squared = ((unit @ unit.T) ** 2).astype(np.float32)
    np.fill_diagonal(squared, 1)  # of a zero vector, too
    return squared


def nearest_alone(kernel: np.ndarray, num_neighbors: int) -> np.ndarray:
    """What submodlib's sparse mode makes of a kernel, (N, N): each row keeps its `num_neighbors` highest, itself
    among them, and a pair counts where either of the two keeps it."""
    kept = np.zeros_like(kernel)
    highest = np.argsort(-kernel, axis=1, kind="stable")[:, :num_neighbors]
    np.put_along_axis(kept, highest, np.take_along_axis(kernel, highest, axis=1), axis=1)
    return np.maximum(kept, kept.T)


def superfiltering_official(
    embeddings: np.ndarray, ifd: np.ndarray, ifd_count: int, budget: int
) -> tuple[np.ndarray, np.ndarray]:
    """What Superfiltering with diversity keeps by IFD, and what it selects of that, both in order.

    IFD below 1 (NaN drops out), highest first with ties in the order of the file, the first `ifd_count`; of these
    facility location with the euclidean kernel.

    Args:
        embeddings: (N, d), of norm 1.
        ifd: (N,), the ratio of perplexities.
    """
    usable = np.flatnonzero(ifd < 1)
    kept = usable[np.argsort(-ifd[usable], kind="stable")][:ifd_count]
    order, _ = lazy_greedy(kernel_matrix(embeddings[kept], "euclidean"), budget)
    return kept, kept[order]
