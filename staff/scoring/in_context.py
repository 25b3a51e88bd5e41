"""Help in context: by how much a sample's answer comes nearer to a model's predictions behind an example."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from staff.data.tokens import TokenizedSamples
from staff.errors import UserError
from staff.models.family import Family
from staff.models.spec import ModelSpec

PAIRS_AT_ONCE = 2**14
"""Pairs that are scored by one stage."""


def in_context_gains(
    score: Callable[[TokenizedSamples], np.ndarray],
    helped: TokenizedSamples,
    examples: TokenizedSamples,
    separator: list[int] | None,
    window: int | None,
) -> np.ndarray:
    """The distance of each helped sample alone, less that behind each example: (helped, examples).

    Args:
        score: gives the distances of samples, (N,).
        separator: see `TokenizedSamples.after`.
        window: tokens that the model has positions for; None: any number.

    Raises:
        UserError: the longest pair does not fit the window.
    """
    longest = int(helped.lengths.max() + examples.lengths.max()) + len(separator or [])
    if window is not None and longest > window:
        raise UserError(
            f"a sample behind an example takes up to {longest} tokens, and the model has {window} positions: "
            "lower finetune.max_length to half of them with task.too_long=drop."
        )
    alone, rows = score(helped), []
    size = max(1, PAIRS_AT_ONCE // len(examples))
    for start in range(0, len(helped), size):
        pairs = helped.take(range(start, min(start + size, len(helped)))).after(examples, separator)
        rows.append(alone[start : start + size, None] - score(pairs).reshape(-1, len(examples)))
    return np.concatenate(rows)


def separator_of(family: Family, spec: ModelSpec) -> list[int] | None:
    """What stands between an example and the next sample: a blank line, or in a chat the end of the turn."""
    if family.prompt_format == "chat":
        return None
    return spec.tokenizer()("\n\n", add_special_tokens=False)["input_ids"]
