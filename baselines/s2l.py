"""S2L, SmallToLarge (Yang et al., NeurIPS 2024): samples that a small model learns alike are worth the same.

The loss of a sample at every checkpoint of the small model's fine-tuning is its trajectory. Trajectories are
clustered by k-means, and the budget is shared out equally over the clusters, smallest first, so that what a
small cluster cannot take goes to larger ones (algorithm 1). Samples are drawn uniformly inside a cluster.

The released code (`schedules/s2l.py`) differs from the paper. It splits the pool by source first and shares the
budget over the sources by the same rule; the default does so where the task has groups, and `by_group: false`
never. It serves clusters of one or two samples last, as one (`s2l_official`). It sets a NaN loss to 0, which is
refused here. It reads checkpoints in the order of the file system, where they are in the order of training
here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd

from baselines.kmeans import kmeans
from staff.errors import UserError
from staff.regions import regions_left, serving_order, share_out
from staff.selection import Coreset, Draws, ScorePool, check_range, check_scores


@dataclass(frozen=True)
class S2L:
    """Equal shares of the budget over clusters of loss trajectories of the small model.

    Attributes:
        num_clusters: k of k-means (the paper and the released configuration: 100), fewer where a group is smaller.
        num_checkpoints: every floor(T / this)-th of the T checkpoints counts; None for all of them.
        pooled_size: clusters of at most so many samples are served last, as one. The released code has 2.
        by_group: share the budget out over groups of samples first, where the task has groups.
    """

    version: ClassVar[int] = 1

    num_clusters: int = 100
    num_checkpoints: int | None = None
    pooled_size: int = 0
    by_group: bool = True

    def __post_init__(self) -> None:
        check_range(self, "num_clusters", 1, whole=True)
        check_range(self, "pooled_size", 0, whole=True)
        if self.num_checkpoints is not None:
            check_range(self, "num_checkpoints", 1, whole=True)

    def select(self, pool: ScorePool, budget: int, rng: Draws) -> Coreset:
        """Raises UserError for more checkpoints than epochs, and for a loss that is not finite, by the sample's
        id."""
        if self.num_checkpoints is not None and self.num_checkpoints > (epochs := pool.epochs("small")):
            raise UserError(
                f"method.num_checkpoints={self.num_checkpoints} is more than the {epochs} epochs of the small "
                "model's fine-tuning: lower it, or raise finetune.small_epochs."
            )
        losses = np.asarray(pool.ask("loss", of="small@epochs"), dtype=np.float64)
        for epoch, column in enumerate(losses.T, start=1):
            check_scores(column, pool.ids, f"loss at checkpoint {epoch}")
        points = trajectories(losses, self.num_checkpoints)
        cluster_of = np.full(len(points), -1)
        picked, rows = [], []
        for group, members, share in self._groups(pool, budget):
            if share == len(members):  # taken whole
                served, chosen = [(-1, members)], [members]
            else:
                labels, _ = kmeans(points[members], self.num_clusters, rng.priorities("k-means")[members])
                cluster_of[members] = labels
                served = clusters_to_serve(labels, members, self.pooled_size)
                chosen = serve(served, share, lambda of, count: rng.choose("pick", of, count))
            picked += chosen
            rows += [(group, c, len(m), len(taken)) for (c, m), taken in zip(served, chosen)]
        diagnostics = pd.DataFrame(rows, columns=["group", "cluster", "size", "budget"])
        scores = {"cluster": cluster_of, "last_loss": losses[:, -1]}
        return Coreset(np.concatenate(picked), diagnostics, scores)

    def _groups(self, pool: ScorePool, budget: int) -> list[tuple[str, np.ndarray, int]]:
        """Name, members and share of the budget of each group, smallest first."""
        if not self.by_group or pool.groups is None:
            return [("all", np.arange(len(pool.ids)), budget)]
        names, group_of = np.unique(pool.groups, return_inverse=True)
        groups, members = serving_order(group_of, np.arange(len(group_of)))
        return [
            (str(names[g]), m, int(share)) for g, m, share in zip(groups, members, equal_shares(members, budget))
        ]


def trajectories(losses: np.ndarray, num_checkpoints: int | None) -> np.ndarray:
    """The columns of `losses` (N, T) that count: every floor(T / num_checkpoints)-th, all where that is None."""
    count = losses.shape[1]
    step = 1 if num_checkpoints is None or count <= num_checkpoints else count // num_checkpoints
    return losses[:, ::step]


def equal_shares(members: Sequence[np.ndarray], budget: int) -> np.ndarray:
    """How many each gets, in serving order: floor(left / to go), never more than there are."""
    return share_out(budget, [len(m) for m in members], np.ones(len(members)), regions_left(len(members)))


def clusters_to_serve(labels: np.ndarray, members: np.ndarray, pooled_size: int) -> list[tuple[int, np.ndarray]]:
    """Label and members of each cluster, smallest first; those of at most `pooled_size` at the end, as one (-1)."""
    order, clusters = serving_order(labels, members)
    small = [c for c in clusters if len(c) <= pooled_size]
    large = [(int(k), c) for k, c in zip(order, clusters) if len(c) > pooled_size]
    return [*large, (-1, np.sort(np.concatenate(small)))] if small else large


def serve(
    clusters: Sequence[tuple[int, np.ndarray]], budget: int, choose: Callable[[np.ndarray, int], np.ndarray]
) -> list[np.ndarray]:
    """The samples chosen from each of `clusters_to_serve`: all members where the share is that large, or `choose`
    of them. The pooled rest gets what the others leave."""
    members = [m for _, m in clusters]
    rest = members.pop() if clusters[-1][0] == -1 else None
    shares = [int(share) for share in equal_shares(members, budget)]
    chosen = [m if share >= len(m) else choose(m, share) for m, share in zip(members, shares)]
    if rest is not None:
        left = budget - sum(shares)
        chosen.append(choose(rest, left) if left else rest[:0])
    return chosen
