"""Embeddings as methods need them: refused by the sample's id if not finite, and scaled to norm 1."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from staff.errors import UserError
from staff.selection import check_scores


def check_embeddings(embeddings: np.ndarray, ids: Sequence[str], name: str = "the embedding") -> np.ndarray:
    """`embeddings` as float32 of shape (N, d), without a copy where they are that already.

    Raises:
        UserError: another number of rows than ids, or a value that is not finite, by the sample's id.
    """
    embeddings = np.asarray(embeddings, dtype=np.float32)
    if embeddings.ndim != 2 or len(embeddings) != len(ids):
        raise UserError(f"{name} has shape {embeddings.shape}: give {len(ids)} samples a vector each.")
    # The largest absolute value is NaN or infinite exactly if one of the values is.
    check_scores(np.abs(embeddings).max(axis=1, initial=0), ids, name)
    return embeddings


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Each row divided by its L2 norm, float32; a zero row stays zero."""
    norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
    return vectors / np.where(norms > 0, norms, 1)[:, None].astype(np.float32)


def slice_ids(count: int) -> list[str]:
    """Names of the validation slice's rows for error messages; the slice has no ids of its own."""
    return [f"{i} of the validation slice" for i in range(count)]
