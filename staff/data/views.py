"""Which samples are read: views of the data, and those that fit into the cut-off of fine-tuning and into the
context windows of the models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from staff.data.tokens import TokenizedSamples
from staff.errors import UserError
from staff.models.spec import ModelSpec


@dataclass(frozen=True)
class DataView:
    """Which samples a signal reads, and which part of their text.

    Attributes:
        slice: "pool", the samples to choose from; or "dev", the validation slice.
        prompt: whether answers are read after their prompts.
        text: "answer"; or "all", which counts prompt tokens as answer tokens.
        indices: positions in the slice, in this order; None: all.
    """

    slice: str = "pool"
    prompt: bool = True
    text: str = "answer"
    indices: np.ndarray | None = None

    def of(self, samples: TokenizedSamples) -> TokenizedSamples:
        """This view of the samples of its slice."""
        if self.indices is not None:
            samples = samples.take(self.indices)
        if not self.prompt:
            samples = samples.without_prompts()
        return samples if self.text == "answer" else samples.all_as_answer()


def check_vocabulary(samples: TokenizedSamples, spec: ModelSpec) -> None:
    """Refuse tokens that the model has no embedding for, as after adding tokens to its tokenizer alone."""
    rows = getattr(spec.config().get_text_config(), "vocab_size", None)
    if rows is None or not len(samples.tokens) or int(samples.tokens.max()) < rows:
        return
    at = int(np.argmax(samples.tokens >= rows))
    id = samples.ids[int(np.searchsorted(samples.offsets, at, side="right")) - 1]
    raise UserError(
        f"sample {id!r} has the token {samples.tokens[at]} of the tokenizer in {spec.path}, but the model has "
        f"{rows} embeddings: resize them (resize_token_embeddings), or take the tokenizer that belongs to it."
    )


def fitting(
    tokenized: Sequence[TokenizedSamples],
    max_length: int,
    too_long: str,
    windows: Mapping[str, int | None] | None = None,
) -> np.ndarray:
    """Positions of the samples that fit `max_length` and every model's context window, shape (n,).

    Args:
        windows: by the name of the model that reads each of `tokenized`, the most tokens it has positions for
            (None: without limit).
    """
    longest = np.max([t.lengths for t in tokenized], axis=0)
    fits = longest <= max_length
    over = np.flatnonzero(~fits)
    if len(over) and too_long == "refuse":
        worst = over[np.argmax(longest[over])]
        raise UserError(
            f"finetune.max_length={max_length} would cut the answer of {len(over)} sample(s), the longest being "
            f"{tokenized[0].ids[worst]!r} with {longest[worst]} tokens: raise it, or drop what does not fit "
            "(task.too_long=drop)."
        )
    if not fits.any():
        raise UserError(f"finetune.max_length={max_length} leaves no sample: raise it.")
    for (name, window), samples in zip((windows or {}).items(), tokenized, strict=windows is not None):
        beyond = np.flatnonzero(fits & (samples.lengths > (window or np.inf)))
        if len(beyond) and too_long == "refuse":
            worst = beyond[np.argmax(samples.lengths[beyond])]
            raise UserError(
                f"the {name} reads {window} tokens, too few for {len(beyond)} training sample(s), the longest "
                f"being {samples.ids[worst]!r} with {samples.lengths[worst]} tokens: take it out, or set "
                "task.too_long=drop."
            )
        fits[beyond] = False
        if not fits.any():
            raise UserError(f"no training sample fits the {window} tokens that the {name} reads: shorten them.")
    return np.flatnonzero(fits)


def answerable(test: TokenizedSamples, max_new_tokens: int, window: int | None, too_long: str) -> np.ndarray:
    """Positions of the test samples whose prompt and answer fit the context window, shape (n,).

    Args:
        window: context window in tokens; None: no limit.
        too_long: "drop" the other samples, or "refuse" them.

    Raises:
        UserError: a sample that is refused, by its id, or no sample that fits.
    """
    needed = test.prompt_lengths + max_new_tokens
    over = np.flatnonzero(needed > (window or np.inf))
    if len(over) and too_long == "refuse":
        worst = over[np.argmax(needed[over])]
        raise UserError(
            f"the target reads {window} tokens, too few for the prompt of {len(over)} test sample(s) and "
            f"task.max_new_tokens={max_new_tokens}, the longest being {test.ids[worst]!r} with "
            f"{test.prompt_lengths[worst]} tokens: take it out, or set task.too_long=drop."
        )
    keep = np.setdiff1d(np.arange(len(test)), over)
    if not len(keep):
        raise UserError(
            f"no prompt of the test split fits the {window} tokens that the target reads: shorten them."
        )
    return keep
