"""Samples as a model reads them: tokenised once, for scorer and trainer alike, and checked against their limits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from staff.chat import DATE, ChatTemplate
from staff.data import Sample
from staff.errors import UserError
from staff.runtime.progress import progress


@dataclass(frozen=True)
class TokenizedSamples:
    """Samples as one model reads them: begin token (where the tokenizer has one), prompt, answer, end token.

    Attributes:
        ids: the samples' ids.
        input_ids: one row of token ids a sample.
        prompt_lengths: tokens before the first answer token.
    """

    ids: list[str]
    input_ids: list[list[int]] = field(repr=False)
    prompt_lengths: list[int] = field(repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    def labels(self, i: int) -> list[int]:
        """Token ids on the answer and its end token, -100 on the prompt (unshifted, as transformers wants)."""
        start = self.prompt_lengths[i]
        return [-100] * start + self.input_ids[i][start:]

    def prompts(self) -> list[list[int]]:
        return [row[:n] for row, n in zip(self.input_ids, self.prompt_lengths, strict=True)]

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.array([len(row) for row in self.input_ids], dtype=np.int64)

    @cached_property
    def answer_lengths(self) -> np.ndarray:
        return self.lengths - np.array(self.prompt_lengths, dtype=np.int64)

    def take(self, indices: Iterable[int]) -> TokenizedSamples:
        rows = [int(i) for i in indices]
        return TokenizedSamples(
            [self.ids[i] for i in rows],
            [self.input_ids[i] for i in rows],
            [self.prompt_lengths[i] for i in rows],
        )

    @cached_property
    def fingerprint(self) -> str:
        content = json.dumps([self.ids, self.input_ids, self.prompt_lengths], separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()


def tokenize(
    samples: Sequence[Sample],
    tokenizer: Any,
    prompt_format: str = "plain",
    *,
    date: str = DATE,
    template_options: Mapping[str, Any] | None = None,
) -> TokenizedSamples:
    """Tokenise prompt and answer apart and join them, so that no token spans their border.

    Args:
        prompt_format: "plain": begin token, prompt, answer, end token; "chat": the same with the text and the end
            of turn of the tokenizer's chat template.
        date, template_options: what the chat template is told, as in `staff.models.Family`.

    Raises:
        UserError: a tokenizer without an end token, or without a chat template that shows every answer as it is.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} has no end token, without which no answer ends; set "
            "eos_token in its tokenizer_config.json."
        )
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end, texts = tokenizer.eos_token_id, [(s.prompt, s.answer) for s in samples]
    if prompt_format == "chat":
        template = ChatTemplate(tokenizer, date, template_options)
        begin, end = [], template.end  # the template has a begin token of its own
        texts = [template.turn(s.id, s.prompt, s.answer) for s in samples]
    rows, prompt_lengths = [], []
    with progress(len(texts), "tokenise") as bar:
        # Some at a time: until it is done with a text, a tokenizer keeps far more of it than its tokens.
        for start in range(0, len(texts), 1000):
            prompts, answers = zip(*texts[start : start + 1000], strict=True)
            for p, a in zip(_tokens(prompts, tokenizer), _tokens(answers, tokenizer), strict=True):
                rows.append([*begin, *p, *a, end])
                prompt_lengths.append(len(begin) + len(p))
            bar.update(len(prompts))
    return TokenizedSamples([s.id for s in samples], rows, prompt_lengths)


def _tokens(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of each text alone; what is too long is told in our own words."""
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def fitting(
    tokenized: Sequence[TokenizedSamples],
    max_length: int,
    too_long: str,
    windows: Mapping[str, int | None] | None = None,
) -> np.ndarray:
    """Positions of the samples that fit `max_length`, and the window of the model that reads them.

    A sample that one model would cut is handled the same way for all: refused by name, or dropped from all.

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
    """Positions of the test samples whose prompt leaves room for an answer in the model's `window` of tokens (None:
    without limit). The others are refused by name, or dropped."""
    needed = np.array(test.prompt_lengths) + max_new_tokens
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
