"""What methods have in common: which model they ask, embeddings, and selection by the rank of one score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from staff.errors import UserError
from staff.selection import Draws, ScorePool, check_choice, check_scores

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

    def embeddings(self, pool: ScorePool) -> np.ndarray:
        """Of every sample, (N, d), float32.

        Raises:
            UserError: one is not finite, by the sample's id.
        """
        asked = pool.ask("embedding", of=self.of, layer=self.layer, pooling=self.pooling)
        return check_embeddings(asked, pool.ids)

    def slice_embeddings(self, pool: ScorePool) -> np.ndarray:
        """The same of the validation slice, (M, d). A method asks for them first: a pool without a slice then
        refuses before any model runs."""
        asked = pool.ask("embedding", of=self.of, view="dev", layer=self.layer, pooling=self.pooling)
        return check_embeddings(asked, slice_ids(len(asked)))


def check_embeddings(embeddings: np.ndarray, ids: Sequence[str]) -> np.ndarray:
    """`embeddings` as float32 of shape (N, d), without a copy where they are that already.

    Raises:
        UserError: another number of rows than ids, or a value that is not finite, by the sample's id.
    """
    embeddings = np.asarray(embeddings, dtype=np.float32)
    if embeddings.ndim != 2 or len(embeddings) != len(ids):
        raise UserError(f"the embedding has shape {embeddings.shape}: give {len(ids)} samples a vector each.")
    # The largest absolute value is NaN or infinite exactly if one of the values is; np.abs would copy all of them.
    largest = np.maximum(embeddings.max(axis=1, initial=0), -embeddings.min(axis=1, initial=0))
    check_scores(largest, ids, "the embedding")
    return embeddings


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Each row divided by its L2 norm, in its own precision; a zero row stays zero."""
    return vectors / row_norms(vectors)[:, None]


def row_norms(vectors: np.ndarray) -> np.ndarray:
    """L2 norm of each row, in the rows' precision; 1 for a zero row."""
    norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
    return np.where(norms > 0, norms, 1).astype(vectors.dtype)


def slice_ids(count: int) -> list[str]:
    """Names of the validation slice's rows for error messages; the slice has no ids of its own."""
    return [f"{i} of the validation slice" for i in range(count)]


WHICH = ("top", "middle", "low")


def take(scores: np.ndarray, which: str, budget: int, rng: Draws) -> np.ndarray:
    """Positions of `budget` samples: the highest scored ("top"), the lowest ("low"), or the ones whose ranks lie
    around the median ("middle"). Equal scores are ranked by keyed draws."""
    start = {"top": 0, "middle": (len(scores) - budget) // 2, "low": len(scores) - budget}[which]
    return rng.highest_first(scores)[start : start + budget]
