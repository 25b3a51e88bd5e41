"""Help in context: by how much a sample's answer comes nearer to a model's predictions behind an example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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
        separator: as in `behind_examples`.
        window: tokens that the model has positions for; None: any number.

    Raises:
        UserError: the longest pair does not fit the window.
    """
    longest = int(helped.lengths.max() + examples.lengths.max()) + len(separator or [])
    if window is not None and longest > window:
        raise UserError(
            f"an example and a sample together take up to {longest} tokens, and the model has {window} positions: "
            "lower finetune.max_length to half of them with task.too_long=drop."
        )
    alone, rows = score(helped), []
    size = max(1, PAIRS_AT_ONCE // len(examples))
    for start in range(0, len(helped), size):
        some = helped.take(range(start, min(start + size, len(helped))))
        pairs = behind_examples(some, examples, separator)
        rows.append(alone[start : start + size, None] - score(pairs).reshape(-1, len(examples)))
    return np.concatenate(rows)


def behind_examples(
    samples: TokenizedSamples, examples: TokenizedSamples, separator: Sequence[int] | None
) -> TokenizedSamples:
    """Each sample behind each example, which then belongs to its prompt: the first sample behind every example,
    then the second, and so on, len(samples) x len(examples) in all.

    Args:
        separator: token ids in place of an example's end token; None: the end token stays.
    """
    begin, shown = samples.begin, [examples.row(j) for j in range(len(examples))]
    if separator is not None:
        shown = [np.append(row[:-1], separator) for row in shown]
    own = [samples.row(i)[begin:] for i in range(len(samples))]
    rows: list[Any] = [np.concatenate([example, row]) for row in own for example in shown]
    prompts = [len(example) + int(n) - begin for n in samples.prompt_lengths for example in shown]
    ids = [f"{sample} after {example}" for sample in samples.ids for example in examples.ids]
    masks = None
    if samples.labelled is not None:
        of = [samples.label_mask(i)[begin:] for i in range(len(samples))]
        masks = [np.append(np.zeros(len(example), bool), mask) for mask in of for example in shown]
    return TokenizedSamples.of_rows(ids, rows, prompts, begin, masks)


def separator_of(family: Family, spec: ModelSpec) -> list[int] | None:
    """What stands between an example and the next sample: a blank line, or in a chat the end of the turn."""
    if family.prompt_format == "chat":
        return None
    return spec.tokenizer()("\n\n", add_special_tokens=False)["input_ids"]
