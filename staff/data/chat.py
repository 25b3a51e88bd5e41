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
        self._known: dict[tuple[str, ...], list[tuple[str, str, str]]] = {}
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
        turns = (*asked, (role, answer.strip()))
        before, whole = self._render(turns, f" on sample {id!r}")
        behind = turns[-1][1] + self._tail
        head = whole.removesuffix(behind)
        opening = _apart(before, head)
        # Templates put nothing before an answer that has a think block of its own.
        if not whole.endswith(behind) or opening not in (self._opening, ("", "")):
            raise UserError(
                f"the chat template of {self.name} does not leave the answer of sample {id!r} unchanged: set "
                "family.prompt_format=plain, or remove the sample."
            )
        space = _space_of(opening)
        prompt, answer = head.removesuffix(space), space + turns[-1][1] + self._end[0]
        earlier = self._cut(id, turns[:-1], prompt) if every else [Piece(prompt)]
        return [*earlier, Piece(answer, answer=True, ends=True)]

    def _cut(self, id: str, asked: Turns, prompt: str) -> list[Piece]:
        """The prompt in pieces: what the assistant says in it, with the end of each turn, and the rest."""
        pieces, text = [], ""
        around = self._between(tuple(role for role, _ in asked))
        for (role, said), (before, space, end) in zip(asked, around, strict=True):
            text += before
            if role == "assistant":
                pieces += [Piece(text), Piece(space + said + end, answer=True)]
                text = ""
            else:
                text += said
        shown = "".join(piece.text for piece in pieces) + text
        if not prompt.startswith(shown):
            raise UserError(
                f"the chat template of {self.name} does not leave every turn of sample {id!r} unchanged: set "
                "task.loss_on=last, or remove the sample."
            )
        return [*pieces, Piece(text + prompt[len(shown) :])]

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

    def _between(self, roles: tuple[str, ...]) -> list[tuple[str, str, str]]:
        """What the template shows around each turn, where turns of these roles and an answer follow one another.

        Before the turn; white space that belongs to an answer; the end token of an answer.
        """
        if roles not in self._known:
            marks = [f"{_QUESTION}{at}{_QUESTION}" for at in range(len(roles))]
            _, rest = self._render((*zip(roles, marks, strict=True), ("assistant", _ANSWER)))
            around = []
            for role, mark in zip(roles, marks, strict=True):
                before, found, rest = rest.partition(mark)
                if not found:
                    raise UserError(
                        f"the chat template of {self.name} leaves out a turn of {role} among {', '.join(roles)}: "
                        "set task.loss_on=last, or family.prompt_format=plain."
                    )
                space = end = ""
                if role == "assistant":
                    space = self._space if before.endswith(self._space) else ""
                    if mark := self._mark(rest):
                        end = mark[0] + self.tokenizer.convert_ids_to_tokens(mark[1])
                        end = end if rest.startswith(end) else ""
                around.append((before.removesuffix(space), space, end))
                rest = rest.removeprefix(end)
            self._known[roles] = around
        return self._known[roles]

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
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}] if self.content_as_parts else text}
            for role, text in turns
        ]
        try:
            # transformers passes functions to templates only as globals.
            from transformers.utils.chat_template_utils import _compile_jinja_template

            _compile_jinja_template(self._text).globals["strftime_now"] = self.day.strftime
            before, whole = (
                self.tokenizer.apply_chat_template(shown, tokenize=False, add_generation_prompt=ask, **self.options)
                for shown, ask in ((messages[:-1], True), (messages, False))
            )
        except Exception as error:  # the expressions of a template can raise anything
            raise UserError(
                f"the chat template of {self.name} fails{where} with {in_one_line(error)!r}: fix it, set what it "
                "needs in family.template_options, or set family.prompt_format=plain."
            ) from error
        return before, whole

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


def _apart(before: str, head: str) -> tuple[str, str]:
    """The rest of each text after their common prefix."""
    if head.startswith(before):
        return "", head[len(before) :]
    pairs = enumerate(zip(before, head, strict=False))
    shared = next((at for at, (one, other) in pairs if one != other), len(head))
    return before[shared:], head[shared:]
