"""A sample as a user's turn and a model's answer, as the chat template of a tokenizer shows them."""

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

# Stand for a sample in the probe of a template: unlikely in a template's own text, changed by any change of case.
_QUESTION, _ANSWER = "Qx7Question", "Qx7Answer"


class ChatTemplate:
    """The chat template of one tokenizer, and what it puts before and after an answer.

    Args:
        date: the day for templates that print today's, as YYYY-MM-DD.
        options: further variables of the template, such as `enable_thinking`.

    Raises:
        UserError: no template, one that fails, or one that does not show question and answer as they are.
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
        self.in_parts = False
        self._opening, self._tail = self._probed()
        opened, shown = self._opening
        if opened:
            log.warning(
                "the chat template of %s asks for an answer with %r, but shows answers after %r: prompts end so",
                *(self.name, opened, shown),
            )
        for name in options or {}:
            if not re.search(rf"\b{re.escape(name)}\b", self._text):
                log.warning("family.template_options: the chat template of %s has no variable %r", self.name, name)

    def turn(self, id: str, prompt: str, answer: str) -> tuple[str, str]:
        """What the model reads before its answer, and the answer up to its end token.

        All that the template always puts before an answer belongs to the prompt, an empty think block included.
        White space alone belongs to the answer, which the model writes after the generation prompt.

        Raises:
            UserError: the template fails, or changes this answer.
        """
        answer = answer.strip()
        before, whole = self._render(prompt, answer)
        behind = answer + self._tail
        head = whole.removesuffix(behind)
        opening = _apart(before, head)
        # Nothing at all is shown before an answer that brings its own think block.
        if not whole.endswith(behind) or opening not in (self._opening, ("", "")):
            raise UserError(
                f"the chat template of {self.name} does not show the answer of sample {id!r} as it is: set "
                "family.prompt_format=plain, or take the sample out."
            )
        opened, shown = opening
        prompt, answer = (head, answer) if opened or shown.strip() else (before, shown + answer)
        return prompt, answer + self._end[0]

    @property
    def end(self) -> int:
        """The token that ends an answer: the first special or added one of what the template puts after the answer.

        It is the tokenizer's end token where the template puts nothing there, or only ordinary text.
        """
        return self._end[1]

    @cached_property
    def _end(self) -> tuple[str, int]:
        """White space between the answer and its end token, and that token."""
        added = self.tokenizer.added_tokens_decoder
        # Some vocabularies add runs of white space; an unknown token stands for ordinary text.
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
                "the chat template of %s ends an answer with %r, which begins with no added token: %r ends it here",
                *(self.name, self._tail, self.tokenizer.convert_ids_to_tokens(end)),
            )
        return "", end

    def _probed(self) -> tuple[tuple[str, str], str]:
        """How the generation prompt and the text before an answer part (`_apart`), and the text after an answer.

        Content is given as text, or as a list of parts to templates that want it so.
        """
        refusal = UserError(
            f"the chat template of {self.name} does not put an answer as it is behind its prompt: set "
            "family.prompt_format=plain."
        )
        failure = None
        for self.in_parts in (False, True):
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
        """The user's turn with what asks for an answer, and both turns."""
        turns = [
            {"role": role, "content": [{"type": "text", "text": text}] if self.in_parts else text}
            for role, text in (("user", prompt), ("assistant", answer))
        ]
        try:
            # transformers hands functions on to templates as globals alone.
            from transformers.utils.chat_template_utils import _compile_jinja_template

            _compile_jinja_template(self._text).globals["strftime_now"] = self.day.strftime
            before, whole = (
                self.tokenizer.apply_chat_template(shown, tokenize=False, add_generation_prompt=ask, **self.options)
                for shown, ask in ((turns[:1], True), (turns, False))
            )
        except Exception as error:  # whatever a template's expressions may raise
            said = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"the chat template of {self.name} fails with {said!r}: mend it, set what it asks for in "
                "family.template_options, or set family.prompt_format=plain."
            ) from error
        return before, whole

    @cached_property
    def _text(self) -> str:
        return self.tokenizer.get_chat_template(self.options.get("chat_template"))


def _apart(before: str, head: str) -> tuple[str, str]:
    """What two texts have each after the beginning that they share."""
    if head.startswith(before):
        return "", head[len(before) :]
    pairs = enumerate(zip(before, head, strict=False))
    shared = next((at for at, (one, other) in pairs if one != other), len(head))
    return before[shared:], head[shared:]
