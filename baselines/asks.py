"""What methods ask of a model: which model, and embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from staff.errors import UserError
from staff.selection import ScorePool, check_budget, check_choice, check_scores

MODELS = ("target", "target_tuned", "small", "small_raw")
FEATURES = ("normalised", "raw")  # scaled to norm 1, so that a distance is one of directions; or as they are
POOLINGS = ("answer_mean", "position_weighted", "last_token")


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """The fields of a method that rests on embeddings.

    Attributes:
        of: the model whose hidden states they are: the raw target by default, so that nothing is fine-tuned.
        layer: -1 for the last one.
        pooling: over the tokens of a sample.
    """

    of: str = "target"
    layer: int = -1
    pooling: str = "answer_mean"

    def __post_init__(self) -> None:
        check_choice(self, "of", MODELS)
        if type(self.layer) is not int:
            raise UserError(f"method.layer={self.layer!r} must be a whole number: -1 is the last layer.")
        check_choice(self, "pooling", POOLINGS)

    def embeddings(self, pool: ScorePool, budget: int) -> np.ndarray:
        """Of every sample, (N, d), float32, after the budget is checked.

        Raises UserError for one that is not finite, by the sample's id.
        """
        check_budget(budget, len(pool.ids))
        return checked(pool.ask("embedding", of=self.of, layer=self.layer, pooling=self.pooling), pool.ids)


def checked(embeddings: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Embeddings as (N, d), float32, or a sentence that names the first sample with one that is not finite."""
    points = np.asarray(embeddings, dtype=np.float32)
    check_scores(np.einsum("nd,nd->n", points, points, dtype=np.float64), names, "the norm of the embedding")
    return points


def unit_rows(points: np.ndarray) -> np.ndarray:
    """Rows divided by their norm; a zero row stays zero."""
    norms = np.sqrt(np.einsum("nd,nd->n", points, points, dtype=np.float64))
    return points / np.where(norms > 0, norms, 1)[:, None].astype(points.dtype)
