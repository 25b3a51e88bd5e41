"""Samples in the chat template of a tokenizer: turns of a user and of an assistant."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import datetime
from functools import cached_property
from itertools import product
from typing import Any

from staff.data.samples import Piece, Turns
from staff.errors import UserError, in_one_line
from staff.models.family import DATE, check_chat

log = logging.getLogger(__name__)

# A sample to probe templates with: unlikely in a template's own text, and changed by any change of case.
_QUESTION, _ANSWER = "Qx7Question", "Qx7Answer"

ENDS_WITHIN = 64
"""Characters behind an answer in which the token that ends it is looked for."""


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
        self._ends: list[str] = []
        self._told = False
        self._opening, self._tail = self._probed()
        self._space = _space_of(self._opening)
        opened, shown = self._opening
        if opened:
            log.warning(
                "the chat template of %s ends prompts with %r but puts %r before answers: using the latter",
                *(self.name, opened, shown),
            )
        for name in options or {}:
            if name not in self._variables:
                log.warning("family.template_options: the chat template of %s has no variable %r", self.name, name)

    def pieces(self, id: str, turns: Turns, every: bool = False) -> list[Piece]:
        """The text of a conversation up to the end of its last answer.

        Whatever the template always puts before an answer belongs to the prompt, such as an empty think block. But
        white space alone belongs to the answer, because the model writes it after the generation prompt.

        Args:
            every: cut at the earlier answers too.

        Raises:
            UserError: the template fails, or changes an answer.
        """
        *asked, (role, answer) = turns
        answer, where = answer.strip(), f" on sample {id!r}"
        turns = (*asked, (role, answer))
        before, whole = self._render(turns, where)
        head = whole.removesuffix(answer + self._tail)
        opening = _apart(before, head)
        # Templates put nothing before an answer that has a think block of its own.
        if head != whole and opening in (self._opening, ("", "")):
            space = _space_of(opening)
            prompt, answer = head.removesuffix(space), space + answer
        elif _continues(before, whole, answer, self._tail):
            prompt, answer = before, whole[len(before) :].removesuffix(self._tail)
        else:
            raise UserError(
                f"the chat template of {self.name} does not leave the answer of sample {id!r} unchanged: set "
                "family.prompt_format=plain, or remove the sample."
            )
        lost = next((role for role, text in asked if role != "assistant" and text.strip() not in prompt), None)
        if lost is not None and every:
            raise UserError(
                f"the chat template of {self.name} leaves out or changes a turn of {lost} of sample {id!r}: remove "
                "the turn, set task.loss_on=last, or family.prompt_format=plain."
            )
        if lost is not None and not self._told:
            self._told = True
            log.warning(
                "the chat template of %s leaves out or changes a turn of %s, first of sample %r",
                *(self.name, lost, id),
            )
        earlier = self._cut(id, turns, prompt, where) if every else [Piece(prompt)]
        return [*earlier, Piece(answer + self._end[0], answer=True, ends=True)]

    def _cut(self, id: str, turns: Turns, prompt: str, where: str) -> list[Piece]:
        """The prompt in pieces: what the assistant says in it, with the end of each turn, and the rest."""
        said = {
            f"{_ANSWER}{at}{_ANSWER}": text for at, (role, text) in enumerate(turns[:-1]) if role == "assistant"
        }
        if not said:
            return [Piece(prompt)]
        marks = iter(said)
        asked = tuple((role, next(marks) if role == "assistant" else text) for role, text in turns[:-1])
        pieces, rest = [], self._show((*asked, turns[-1]), False, where)
        for mark, text in said.items():
            before, _, rest = rest.partition(mark)
            space = self._space if before.endswith(self._space) else ""
            end = self._shown_end(rest)
            pieces += [Piece(before.removesuffix(space)), Piece(space + text + end, answer=True)]
            rest = rest.removeprefix(end)
        shown = "".join(piece.text for piece in pieces)
        if not prompt.startswith(shown):
            raise UserError(
                f"the chat template of {self.name} does not leave every turn of sample {id!r} unchanged: set "
                "task.loss_on=last, or remove the sample."
            )
        return [*pieces, Piece(prompt[len(shown) :])]

    def _shown_end(self, rest: str) -> str:
        """The token that ends an answer within a conversation, with the white space before it; "" for none."""
        if known := next(filter(rest.startswith, self._ends), None):
            return known
        found = self._mark(rest[:ENDS_WITHIN])
        if found and found[1] != self._opener:
            end = found[0] + self.tokenizer.convert_ids_to_tokens(found[1])
            if rest.startswith(end):
                self._ends.append(end)
                return end
        return ""

    @cached_property
    def _opener(self) -> int | None:
        """The token that begins the generation prompt; it ends no answer, where the next turn begins so."""
        asked = (("user", _QUESTION),)
        try:
            shown, before = (self._show(asked, ask, "") for ask in (False, True))
        except UserError:  # a template that wants a system turn
            return None
        opened = self._mark(before.removeprefix(shown)) if before.startswith(shown) else None
        return opened and opened[1]

    @property
    def end(self) -> int:
        """The token that ends an answer: the first special or added token that the template puts after it.

        It is the tokenizer's end token if the template puts nothing or only ordinary text there.
        """
        return self._end[1]

    @cached_property
    def _end(self) -> tuple[str, int]:
        """White space between the answer and its end token, and that token."""
        if found := self._mark(self._tail):
            return found
        tokens = self._tokens(self._tail.lstrip())
        end = next((token for token in tokens if token in self._marks), self.tokenizer.eos_token_id)
        if self._tail.strip():
            log.warning(
                "the chat template of %s ends answers with %r, which does not start with an added token: using %r",
                *(self.name, self._tail, self.tokenizer.convert_ids_to_tokens(end)),
            )
        return "", end

    def _mark(self, tail: str) -> tuple[str, int] | None:
        """The added token that a text begins with, and the white space before it."""
        gap = tail[: len(tail) - len(tail.lstrip())]
        for space in ("", gap):
            tokens = self._tokens(tail.removeprefix(space))
            if tokens and tokens[0] in self._marks:
                return space, tokens[0]
        return None

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer([text], add_special_tokens=False, verbose=False)["input_ids"][0]

    @cached_property
    def _marks(self) -> set[int]:
        """Added tokens that may end a turn."""
        added = self.tokenizer.added_tokens_decoder
        # Some vocabularies have runs of white space as added tokens; the unknown token is ordinary text.
        marks = {*self.tokenizer.all_special_ids, *added} - {self.tokenizer.unk_token_id}
        return marks - {token for token, its in added.items() if not its.content.strip()}

    def _probed(self) -> tuple[tuple[str, str], str]:
        """How the generation prompt and the text before an answer differ (`_apart`), and the text after an answer.

        Content is passed as text, or as a list of parts if the template requires it. A template that requires a
        system turn gets one here; samples need one of their own.
        """
        refusal = UserError(
            f"the chat template of {self.name} does not put an answer as it is behind its prompt: set "
            "family.prompt_format=plain."
        )
        failure = None
        for system, self.content_as_parts in product(((), (("system", _QUESTION),)), (False, True)):
            try:
                before, whole = self._render((*system, ("user", _QUESTION), ("assistant", _ANSWER)))
            except UserError as error:
                failure = failure or error
                continue
            head, found, tail = whole.rpartition(_ANSWER)
            opening = _apart(before, head)
            asked = _QUESTION in before.removesuffix(opening[0])
            if found and asked and _ANSWER not in opening[1]:
                return opening, tail
        raise failure or refusal

    def _render(self, turns: Turns, where: str = "") -> tuple[str, str]:
        """The turns before the answer with what asks for it, and all turns."""
        return self._show(turns[:-1], True, where), self._show(turns, False, where)

    def _show(self, turns: Turns, ask: bool, where: str) -> str:
        """The text of turns, with what asks for an answer or without."""
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}] if self.content_as_parts else text}
            for role, text in turns
        ]
        try:
            # transformers passes functions to templates only as globals.
            from transformers.utils.chat_template_utils import _compile_jinja_template

            _compile_jinja_template(self._text).globals["strftime_now"] = self.day.strftime
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=ask, **self.options
            )
        except Exception as error:  # the expressions of a template can raise anything
            raise UserError(
                f"the chat template of {self.name} fails{where} with {in_one_line(error)!r}: fix it, set what it "
                "needs in family.template_options, or set family.prompt_format=plain."
            ) from error

    @cached_property
    def _variables(self) -> set[str]:
        """The variables that the template reads."""
        from jinja2.meta import find_undeclared_variables
        from transformers.utils.chat_template_utils import _compile_jinja_template

        environment = _compile_jinja_template(self._text).environment
        return find_undeclared_variables(environment.parse(self._text))

    @cached_property
    def _text(self) -> str:
        return self.tokenizer.get_chat_template(self.options.get("chat_template"))


def _space_of(opening: tuple[str, str]) -> str:
    """The white space that the model writes before an answer: all that follows the generation prompt."""
    opened, shown = opening
    return "" if opened or shown.strip() else shown


def _continues(before: str, whole: str, answer: str, tail: str) -> bool:
    """Whether the template writes a think block out of the answer, and the generation prompt opens it."""
    thought, _, said = answer.rpartition("</think>")
    kept = thought.strip().removeprefix("<think>").strip()
    return bool(kept) and whole.startswith(before) and whole.endswith(said.strip() + tail) and kept in whole


def _apart(before: str, head: str) -> tuple[str, str]:
    """The rest of each text after their common prefix."""
    if head.startswith(before):
        return "", head[len(before) :]
    pairs = enumerate(zip(before, head, strict=False))
    shared = next((at for at, (one, other) in pairs if one != other), len(head))
    return before[shared:], head[shared:]
