"""Samples in the chat template of a tokenizer: the prompt as a user's turn, the answer as an assistant's."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from datetime import datetime
from functools import cached_property
from typing import Any

from staff.errors import UserError
from staff.models.family import DATE, check_chat

log = logging.getLogger(__name__)

# A sample to probe templates with: unlikely in a template's own text, and changed by any change of case.
_QUESTION, _ANSWER = "Qx7Question", "Qx7Answer"


class ChatTemplate:
    """The chat template of a tokenizer, and the text that it puts before and after an answer.

    Args:
        date: the date (YYYY-MM-DD) for templates that print today's.
        options: further variables of the template, such as `enable_thinking`.

    Raises:
        UserError: there is no template, it fails, or it changes the text of prompts or answers.
    """

    def __init__(self, tokenizer: Any, date: str = DATE, options: Mapping[str, Any] | None = None) -> None:
        check_chat(date, options)
        self.name = tokenizer.name_or_path
        if not tokenizer.chat_template:
            raise UserError(
                f"the tokenizer of {self.name} has no chat template: set family.prompt_format=plain, or name an "
                "instruction-tuned model."
            )
        self.tokenizer, self.day = tokenizer, datetime.fromisoformat(date)
        self.options = {"date_string": self.day.strftime("%d %b %Y"), **(options or {})}
        self.content_as_parts = False
        self._opening, self._tail = self._probed()
        opened, shown = self._opening
        if opened:
            log.warning(
                "the chat template of %s ends prompts with %r but puts %r before answers: using the latter",
                *(self.name, opened, shown),
            )
        for name in options or {}:
            if not re.search(rf"\b{re.escape(name)}\b", self._text):
                log.warning("family.template_options: the chat template of %s has no variable %r", self.name, name)

    def turn(self, id: str, prompt: str, answer: str) -> tuple[str, str]:
        """The text that the model reads before its answer, and the answer up to its end token.

        Whatever the template always puts before an answer belongs to the prompt, such as an empty think block. But
        white space alone belongs to the answer, because the model writes it after the generation prompt.

        Raises:
            UserError: the template fails, or changes this answer.
        """
        answer = answer.strip()
        before, whole = self._render(prompt, answer)
        behind = answer + self._tail
        head = whole.removesuffix(behind)
        opening = _apart(before, head)
        # Templates put nothing before an answer that has a think block of its own.
        if not whole.endswith(behind) or opening not in (self._opening, ("", "")):
            raise UserError(
                f"the chat template of {self.name} does not leave the answer of sample {id!r} unchanged: set "
                "family.prompt_format=plain, or remove the sample."
            )
        opened, shown = opening
        prompt, answer = (head, answer) if opened or shown.strip() else (before, shown + answer)
        return prompt, answer + self._end[0]

    @property
    def end(self) -> int:
        """The token that ends an answer: the first special or added token that the template puts after it.

        It is the tokenizer's end token if the template puts nothing or only ordinary text there.
        """
        return self._end[1]

    @cached_property
    def _end(self) -> tuple[str, int]:
        """White space between the answer and its end token, and that token."""
        added = self.tokenizer.added_tokens_decoder
        # Some vocabularies have runs of white space as added tokens; the unknown token is ordinary text.
        marks = {*self.tokenizer.all_special_ids, *added} - {self.tokenizer.unk_token_id}
        marks -= {token for token, its in added.items() if not its.content.strip()}
        text = self._tail.lstrip()
        gap = self._tail[: len(self._tail) - len(text)]
        for space, rest in (("", self._tail), (gap, text)):
            tokens = self.tokenizer([rest], add_special_tokens=False, verbose=False)["input_ids"][0]
            if tokens and tokens[0] in marks:
                return space, tokens[0]
        end = next((token for token in tokens if token in marks), self.tokenizer.eos_token_id)
        if text:
            log.warning(
                "the chat template of %s ends answers with %r, which does not start with an added token: using %r",
                *(self.name, self._tail, self.tokenizer.convert_ids_to_tokens(end)),
            )
        return "", end

    def _probed(self) -> tuple[tuple[str, str], str]:
        """How the generation prompt and the text before an answer differ (`_apart`), and the text after an answer.

        Content is passed as text, or as a list of parts if the template requires it.
        """
        refusal = UserError(
            f"the chat template of {self.name} does not put an answer as it is behind its prompt: set "
            "family.prompt_format=plain."
        )
        failure = None
        for self.content_as_parts in (False, True):
            try:
                before, whole = self._render(_QUESTION, _ANSWER)
            except UserError as error:
                failure = failure or error
                continue
            head, found, tail = whole.rpartition(_ANSWER)
            opening = _apart(before, head)
            asked = _QUESTION in before.removesuffix(opening[0])
            if found and asked and _ANSWER not in opening[1]:
                return opening, tail
        raise failure or refusal

    def _render(self, prompt: str, answer: str) -> tuple[str, str]:
        """The rendered user's turn with the generation prompt, and both turns."""
        turns = [
            {"role": role, "content": [{"type": "text", "text": text}] if self.content_as_parts else text}
            for role, text in (("user", prompt), ("assistant", answer))
        ]
        try:
            # transformers passes functions to templates only as globals.
            from transformers.utils.chat_template_utils import _compile_jinja_template

            _compile_jinja_template(self._text).globals["strftime_now"] = self.day.strftime
            before, whole = (
                self.tokenizer.apply_chat_template(shown, tokenize=False, add_generation_prompt=ask, **self.options)
                for shown, ask in ((turns[:1], True), (turns, False))
            )
        except Exception as error:  # the expressions of a template can raise anything
            said = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"the chat template of {self.name} fails with {said!r}: fix it, set what it needs in "
                "family.template_options, or set family.prompt_format=plain."
            ) from error
        return before, whole

    @cached_property
    def _text(self) -> str:
        return self.tokenizer.get_chat_template(self.options.get("chat_template"))


def _apart(before: str, head: str) -> tuple[str, str]:
    """The rest of each text after their common prefix."""
    if head.startswith(before):
        return "", head[len(before) :]
    pairs = enumerate(zip(before, head, strict=False))
    shared = next((at for at, (one, other) in pairs if one != other), len(head))
    return before[shared:], head[shared:]
