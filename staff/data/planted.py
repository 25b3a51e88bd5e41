"""A pool whose truth is known: made by a seed, with planted wrong answers, copies and rare skills.

Every sample asks one skill of a short list of digits. The tiny target cannot do any of it before fine-tuning and
learns it in a minute of LoRA, so a coreset of this pool is judged by what is in it:

- **wrong answers** teach nothing; a method that goes by difficulty finds them first;
- **exact and near copies** are redundant;
- **rare skills** are a few per cent of the pool and as much of the test set as every other skill;
- **answers of different length** say the same: the closing words are drawn apart from everything else.

All shares are settings, so that a method's weakness can be drawn as a curve. The test set is balanced over skills,
without wrong answers, and asks no question that the pool asks. With `wrong=0 repeats=0 near=0 rarity=1` the pool is
a negative control: nothing in it is wrong, redundant or rare.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from staff.data.rows import Rows
from staff.data.task import Task
from staff.errors import UserError

LIST_LENGTHS = (3, 4)
ORDINALS = ("first", "second", "third", "fourth")
MOST_COPIES = 2  # of one question, unless copies are so many that all questions have as many


class Skill(NamedTuple):
    """What is asked of a list of digits, and the digits that answer it; `place` is a position in the list."""

    words: str
    answer: Callable[[list[int], int], list[int]]


# From the commonest to the rarest; easy and hard ones alternate.
SKILLS = {
    "copy": Skill("first two of", lambda digits, place: digits[:2]),
    "last": Skill("last of", lambda digits, place: digits[-1:]),
    "sort": Skill("sort the first two of", lambda digits, place: sorted(digits[:2])),
    "largest": Skill("largest of", lambda digits, place: [max(digits)]),
    "reverse": Skill("last two backwards of", lambda digits, place: digits[:-3:-1]),
    "lookup": Skill("{place} of", lambda digits, place: [digits[place]]),
    "add": Skill("last plus one of", lambda digits, place: [(digits[-1] + 1) % 10]),  # modulo ten
}

# How the answer is to be given, from the shortest: first words of the question, closing words of the answer.
FORMS = (("", ""), ("say ", " it is so"), ("tell ", " and that is the end"))


class Question(NamedTuple):
    """One question of a skill. `polite` chooses between two wordings, `form` the closing words of the answer."""

    skill: str
    digits: list[int]
    place: int
    polite: bool
    form: int

    def text(self) -> str:
        words = SKILLS[self.skill].words.format(place=ORDINALS[self.place])
        return f"{'please ' * self.polite}{FORMS[self.form][0]}{words} {_spaced(self.digits)} ="

    def answer(self, slip: int = 0) -> str:
        """The right answer; with a `slip` that is no multiple of 10^digits, a wrong one of the same length."""
        digits = SKILLS[self.skill].answer(self.digits, self.place)
        number = (int("".join(map(str, digits))) + slip) % 10 ** len(digits)
        return _spaced(str(number).zfill(len(digits))) + FORMS[self.form][1]


@dataclass(frozen=True)
class PlantedTask(Task):
    """The planted pool as a task. Every skill has the stated shares, rounded to whole rows; where nearly all
    questions have copies, up to two rows fewer are wrong.

    Attributes:
        size: N, rows of the pool.
        wrong: share of rows with a wrong answer: other digits, as many as the right one has, uniformly drawn. A
            copy of a wrong row is wrong alike and counts.
        repeats: share of rows that are exact copies of another row.
        near: share of rows that ask another row's question in the other wording.
        rarity: how many times as common the commonest skill is as the rarest; those between form a geometric
            series. 1: all alike.
        lengths: number of answer forms, 1 to 3; they add 0, 3 and 5 words.
        test_per_skill: test questions of each skill.
        seed: of the pool and the test set. The other settings change as little as they can: a pool with more wrong
            answers has the same questions.
    """

    name: str = "planted"
    prompt: str = "{question}"
    answer: str = " {answer}"
    metrics: Sequence[str] = ("exact",)
    max_new_tokens: int = 10
    id_field: str | None = "id"
    group_field: str | None = "group"
    size: int = 4000
    wrong: float = 0.15
    repeats: float = 0.15
    near: float = 0.05
    rarity: float = 9.0
    lengths: int = 3
    test_per_skill: int = 100
    seed: int = 0

    @property
    def origin(self) -> str:
        return "the generator of planted questions"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low, high in (("size", 1, 50_000), ("lengths", 1, len(FORMS)), ("test_per_skill", 1, 500)):
            self._check(name, low, high, whole=True)
        self._check("seed", 0, 2**32 - 1, whole=True)
        for name, low, high in (("wrong", 0, 0.8), ("repeats", 0, 0.5), ("near", 0, 0.5), ("rarity", 1, 1000)):
            self._check(name, low, high)
        if self.repeats + self.near > 0.5:
            raise UserError(
                f"task.repeats={self.repeats} and task.near={self.near} make more than half of the pool copies: "
                "lower one of them."
            )
        counts = self.skill_counts
        if min(counts.values()) < 10:
            raise UserError(
                f"task.size={self.size} leaves the rarest skill {min(counts.values())} rows: raise it, or lower "
                f"task.rarity={self.rarity}, so that there are at least 10."
            )
        asked, known = max(counts.values()) + self.test_per_skill, sum(10**n for n in LIST_LENGTHS)
        if asked > known:
            raise UserError(
                f"task.size={self.size} asks {asked} questions of the commonest skill, test set included, "
                f"which has {known} different ones: lower it, or task.rarity={self.rarity}."
            )

    def _check(self, name: str, low: float, high: float, whole: bool = False) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            raise UserError(f"task.{name}={value!r} must be a {'whole ' * whole}number.")
        if not low <= value <= high:
            raise UserError(f"task.{name}={value!r} must be at least {low:g} and at most {high:g}.")

    def _check_source(self) -> None:
        """Nothing is read; a validation slice can only be drawn from the pool."""
        for name in ("dev_file", "dev_split"):
            if (value := getattr(self, name)) is not None:
                raise UserError(f"task.{name}={value!r} names data, and the rows are generated: set task.dev_size.")

    def source(self) -> None:
        return None

    def rows(self, split: str) -> Rows:
        return ((f"planted {split} row {i + 1}", row) for i, row in enumerate(self.make(split)))

    @property
    def skill_counts(self) -> dict[str, int]:
        """Rows of the pool by skill; they add up to `size`."""
        shares = self.rarity ** -np.linspace(0, 1, len(SKILLS))
        ends = np.rint(self.size * np.cumsum(shares) / shares.sum()).astype(int)
        return dict(zip(SKILLS, np.diff(ends, prepend=0).tolist()))

    @cached_property
    def truth(self) -> pd.DataFrame:
        """What was planted in the pool: by id the columns group, wrong, copy_of and near_copy_of (ids or None)."""
        columns = ["id", "group", "wrong", "copy_of", "near_copy_of"]
        return pd.DataFrame(self.make("train"), columns=columns).set_index("id")

    def shares(self, ids: Sequence[str]) -> dict[str, float]:
        """Shares of these rows of the pool that are wrong, exact copies and near copies."""
        of = self.truth.loc[list(ids)]
        shares = {"wrong": of["wrong"], "copies": of["copy_of"].notna(), "near_copies": of["near_copy_of"].notna()}
        return {name: float(planted.mean()) for name, planted in shares.items()}

    def make(self, split: str) -> list[dict[str, Any]]:
        """Rows of the pool ("train") or of the test set ("test"), in an order that says nothing.

        A row has id, question, answer, group (its skill), wrong, copy_of and near_copy_of: the id of the row it
        repeats, exactly or in other words, or None.
        """
        rows: list[dict[str, Any]] = []
        for skill in SKILLS:
            rows += self._pool(skill, len(rows)) if split == "train" else self._test(skill)
        order = self._rng(split, "order").permutation(len(rows))
        position = np.argsort(order)
        for row, place in zip(rows, position):
            row["id"] = f"{split}-{place}"
            for field in ("copy_of", "near_copy_of"):
                row[field] = None if row[field] is None else f"{split}-{position[row[field]]}"
        return [rows[i] for i in order]

    def _test(self, skill: str) -> list[dict[str, Any]]:
        return [_row(question) for question in self._questions(skill, "test", self.test_per_skill)]

    def _pool(self, skill: str, before: int) -> list[dict[str, Any]]:
        """Rows of one skill; `before` is how many rows of other skills come before them. A copy first stands at a
        number of its own, with a question that is then replaced: other shares of copies leave the others alone."""
        count = self.skill_counts[skill]
        questions = self._questions(skill, "train", count)
        exact, near = round(self.repeats * count), round(self.near * count)
        order = self._rng(skill, "copies").permutation(count)
        copies, originals = order[: exact + near], order[exact + near :]
        parents = np.resize(self._rng(skill, "parents").permutation(np.repeat(originals, MOST_COPIES)), len(copies))
        slips = self._slips(skill, originals, parents).tolist()
        rows = [_row(question, slip) for question, slip in zip(questions, slips)]
        for i, (copy, parent) in enumerate(zip(copies.tolist(), parents.tolist())):
            question, field = questions[parent], "copy_of"
            if i >= exact:
                question, field = question._replace(polite=not question.polite), "near_copy_of"
            rows[copy] = _row(question, slips[parent]) | {field: before + parent}
        return rows

    def _slips(self, skill: str, originals: np.ndarray, parents: np.ndarray) -> np.ndarray:
        """What is added to the right answer of each original, 0 for most, shape (count,). Originals are spoilt in
        a drawn order, each with its copies, while the share of wrong rows allows."""
        count = len(originals) + len(parents)
        rows_of = 1 + np.bincount(parents, minlength=count)
        left, slips = round(self.wrong * count), np.zeros(count, dtype=np.int64)
        rng = self._rng(skill, "wrong")
        # 1 to 99 with neither digit 0, so that it changes an answer of one digit as well.
        drawn = 10 * rng.integers(0, 10, count) + rng.integers(1, 10, count)
        members = np.isin(np.arange(count), originals)
        for i in rng.permutation(count):
            if members[i] and rows_of[i] <= left:
                slips[i], left = drawn[i], left - rows_of[i]
        return slips

    def _questions(self, skill: str, split: str, count: int) -> list[Question]:
        """Different questions, the lists of digits as evenly of every length as there are lists. The test set has
        the first, and the pool those after them."""
        rng = self._rng(skill, "questions")
        numbers = [(rank, n, int(x)) for n in LIST_LENGTHS for rank, x in enumerate(rng.permutation(10**n))]
        numbers.sort(key=lambda number: number[:2])
        first = 0 if split == "test" else self.test_per_skill
        rng = self._rng(skill, split, "wording")
        places, polite = rng.random(count), rng.integers(2, size=count)
        forms = rng.integers(self.lengths, size=count)
        questions = []
        for i, (_, n, number) in enumerate(numbers[first : first + count]):
            digits = [int(digit) for digit in str(number).zfill(n)]
            questions.append(Question(skill, digits, int(places[i] * n), bool(polite[i]), int(forms[i])))
        return questions

    def _rng(self, *purpose: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32("/".join(purpose).encode())])


def _row(question: Question, slip: int = 0) -> dict[str, Any]:
    return {
        "question": question.text(),
        "answer": question.answer(slip),
        "group": question.skill,
        "wrong": bool(slip),
        "copy_of": None,
        "near_copy_of": None,
    }


def _spaced(digits: Iterable[Any]) -> str:
    return " ".join(map(str, digits))
