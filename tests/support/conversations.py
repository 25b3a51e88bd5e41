"""Conversations of a few turns, and rows that hold them."""

from typing import Any

SYSTEM, ASKED, SAID = ("system", "Be brief."), ("user", "2 + 2?"), ("assistant", "It is 4.")
AGAIN = ("user", "3 + 3?"), ("assistant", "6, of course.")
SEVERAL = (SYSTEM, ASKED, SAID, *AGAIN)


def messages(*turns: tuple[str, Any], role: str = "role", content: str = "content") -> list[dict[str, Any]]:
    return [{role: name, content: text} for name, text in turns]
