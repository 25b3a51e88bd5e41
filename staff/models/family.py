"""A family: the target LLM and a small model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from staff.errors import UserError
from staff.models.spec import ModelSpec

PROMPT_FORMATS = ("plain", "chat")

DATE = "2024-07-26"
"""The date that a chat template gets as today's, so that prompts are the same every day."""


@dataclass(frozen=True)
class Family:
    """A target LLM and a small model of the same family.

    Attributes:
        prompt_format: "plain", the prompt as the task renders it; "chat", the prompt as the user's turn in the
            chat template of each model's tokenizer.
        date: the date (YYYY-MM-DD) for chat templates that print today's.
        template_options: further variables for the chat templates, such as {"enable_thinking": False}.
    """

    name: str
    target: ModelSpec
    small: ModelSpec
    prompt_format: str = "plain"
    date: str = DATE
    template_options: Mapping[str, Any] | None = None

    def with_loading(self, quantization: str | None, sharded: bool) -> Family:
        """The family with both models to be loaded with this quantization, or with sharded weights."""
        target, small = (replace(s, quantization=quantization, sharded=sharded) for s in (self.target, self.small))
        return replace(self, target=target, small=small)

    def __post_init__(self) -> None:
        if self.prompt_format not in PROMPT_FORMATS:
            raise UserError(f"family.prompt_format={self.prompt_format!r}: choose {' or '.join(PROMPT_FORMATS)}.")
        check_chat(self.date, self.template_options)
        if self.template_options and self.prompt_format == "plain":
            raise UserError(
                f"family.template_options={dict(self.template_options)!r} are for chat templates, which "
                "family.prompt_format=plain does not use: set it to chat, or the options to null."
            )

    @property
    def reading(self) -> dict[str, Any]:
        """How samples are formatted: the arguments of `staff.data.tokens.tokenize` that have an effect."""
        if self.prompt_format == "plain":
            return {"prompt_format": "plain"}
        template = {"date": self.date, "template_options": dict(self.template_options or {})}
        return {"prompt_format": self.prompt_format, **template}

    @property
    def identity(self) -> dict[str, Any]:
        """The models by their content, and how they read samples."""
        models = {"target": self.target.identity(), "small": self.small.identity()}
        return {"models": models, **self.reading}


def check_chat(date: Any, options: Any) -> None:
    """Refuse a bad date or bad options for chat templates.

    Raises:
        UserError: a date that is not YYYY-MM-DD, or options that are neither None nor a mapping with text keys.
    """
    try:
        valid = datetime.strptime(date, "%Y-%m-%d").strftime("%Y-%m-%d") == date
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise UserError(f"family.date={date!r} must be a day as YYYY-MM-DD, such as {DATE}.")
    if options is not None and not (isinstance(options, Mapping) and all(isinstance(n, str) for n in options)):
        raise UserError(
            f"family.template_options={options!r} must map names to values, such as {{enable_thinking: false}}."
        )
