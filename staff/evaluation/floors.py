"""Floors of a metric: what answers score that ignore the prompt, and the stages that measure
them from stored answers.

Two floors. The *best constant answer* is one text for every prompt. The *shuffled score* gives each answer the
references of another sample: it keeps a method's length, style and template and loses what is said of the prompt.
What is left, `specific = score - shuffled`, is what the answers say of their own prompts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from staff.draws import Draws
from staff.evaluation.metrics import NAMED, pairwise, sample_values
from staff.evaluation.metrics.metric import Metric, References, is_unspaced, letters_of
from staff.evaluation.metrics.rouge import of_every_pair, rouge_l_matrix
from staff.evaluation.stage import Generate, read_predictions
from staff.store.cost import Meter
from staff.store.manifest import Artifact, digest
from staff.store.stage import Stage, identity, plain

LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)  # words of an opening or an ending
FREQUENT = 10  # candidates of a kind
MEDOID = 150  # training answers that the medoid is one of
JUDGES = 500  # training answers that candidates are scored against; ten times as many for ROUGE-L, which is fast
SHIFTS = 20


@dataclass(frozen=True)
class Specificity:
    """A metric of each sample's answer, shape (samples,) each; of one without parts (`Metric.has_parts`), its value
    over all of them, at each.

    Attributes:
        own: against the sample's own references.
        others: the mean against other samples' references.
        error: Monte Carlo standard error of the mean of `others`; 0 where every pair was scored.
    """

    own: np.ndarray
    others: np.ndarray
    error: float

    @property
    def specific(self) -> np.ndarray:
        return self.own - self.others


def specificity(
    metric: str, answers: Sequence[str], references: References, ids: Sequence[str], shifts: int | None = None
) -> Specificity:
    """`metric` of each answer against its own and against other samples' references.

    Let q be a permutation of the n samples drawn by their ids, and s(i, j) the metric of answer i on the references
    of sample j. Shift d pairs q(k) with q(k + d), counted modulo n: a derangement for 0 < d < n. The n - 1 shifts
    hold every ordered pair of different samples once. So all of them give the expectation over random derangements,
    sum of s(i, j) over i != j, divided by n (n - 1). Of D shifts drawn without replacement with means m_d, the mean
    is unbiased, with standard error sd(m_d) sqrt((1 - D / (n - 1)) / D).

    Args:
        ids: of the samples; with the answers in another order the result is the same.
        shifts: how many; None: every one for ROUGE-L, 20 or every one, if fewer, otherwise.
    """
    every = len(answers) - 1
    if not every:
        return Specificity(sample_values(metric, answers, references), np.array([np.nan]), float("nan"))
    partners = _partners(ids, min(shifts or (every if of_every_pair(metric) else SHIFTS), every))
    if of_every_pair(metric):
        matrix = rouge_l_matrix(answers, references, metric)
        own, scores = np.diag(matrix).copy(), matrix[np.arange(len(answers)), partners]
    else:
        own = sample_values(metric, answers, references)
        scores = np.stack([sample_values(metric, answers, [references[j] for j in row]) for row in partners])
    drawn, error = len(partners), 0.0
    if drawn < every:
        spread = scores.mean(axis=1).std(ddof=1) if drawn > 1 else float("nan")
        error = float(spread * np.sqrt((1 - drawn / every) / drawn))
    return Specificity(own, scores.mean(axis=0), error)


def _partners(ids: Sequence[str], shifts: int) -> np.ndarray:
    """Whose references each sample meets in each of `shifts` drawn shifts, shape (shifts, samples)."""
    count = len(ids)
    order = np.argsort(Draws(0, ids).priorities("shuffle"))
    drawn = 1 + np.sort(np.random.default_rng([count, 4]).permutation(count - 1)[:shifts])
    partners = np.empty((shifts, count), dtype=np.int64)
    partners[:, order] = order[(np.arange(count) + drawn[:, None]) % count]
    return partners


@dataclass(frozen=True)
class Constant:
    """One answer to every prompt; `kind` is the candidate's, `judged` its score in the choice."""

    text: str
    kind: str
    judged: float

    def scores(self, metric: str, references: References) -> np.ndarray:
        """`metric` of it on each sample's references, shape (samples,)."""
        return sample_values(metric, [self.text] * len(references), references)


def best_constant(
    metric: str, training: Sequence[str], judges: References | None = None, references: int = 1
) -> Constant:
    """The constant answer that scores best on training answers; test references have no part in the choice.

    Args:
        training: answers; they give the candidates (`candidates`).
        judges: references to choose by; None: training answers (5,000 for ROUGE-L, 500 otherwise, by a keyed draw
            where there are more). Test references make it the best candidate in hindsight, which no method could
            know.
        references: of a test sample (`typical_count`). So many training answers are the references of one judge:
            where the best of several counts, other constants do well than where there is one.
    """
    texts = [text.strip() for text in training]
    if judges is None:
        drawn = _drawn(texts, "judges", 10 * JUDGES if of_every_pair(metric) else JUDGES)
        last = max(len(drawn) - references, 0)
        judges = [tuple(drawn[i : i + references]) for i in range(0, last + 1, references)]
    found = candidates(metric, texts)
    means = pairwise(metric, list(found), judges).mean(axis=1)
    best = int(np.argmax(means))
    text, kind = list(found.items())[best]
    return Constant(text, kind, float(means[best]))


def typical_count(references: Iterable[tuple[str, ...]]) -> int:
    """How many references a sample has, the median."""
    return int(np.median([len(texts) for texts in references]))


def candidates(metric: str, training: Sequence[str]) -> dict[str, str]:
    """Texts that might do well as an answer to everything, each with its kind.

    - The ten most frequent openings, and the ten most frequent endings, of 1 to 32 words (`LENGTHS`), or characters
      in a script without spaces, each in two answers or more.
    - The ten most frequent whole answers, likewise.
    - The medoid: of a keyed draw of 150 answers, the one with the highest mean metric against the others.
    """
    found: dict[str, str] = {}
    drawn = _drawn(training, "medoid", MEDOID)
    letters = [letter for text in drawn for letter in letters_of(text)]
    spaced = 2 * sum(map(is_unspaced, letters)) <= len(letters)
    gap, unit = (" ", "word") if spaced else ("", "character")
    words = [text.split(" ") if spaced else list(text) for text in training]
    for length in LENGTHS:
        long = [w for w in words if len(w) > length]
        for kind, parts in (("opening", [w[:length] for w in long]), ("ending", [w[-length:] for w in long])):
            for text in _frequent(gap.join(part) for part in parts):
                found.setdefault(text, f"{kind} of {length} {unit}{'s' if length > 1 else ''}")
    for text in _frequent(training):
        found.setdefault(text, "whole answer")
    medoid = int(np.argmax(pairwise(metric, drawn, [(text,) for text in drawn]).mean(axis=1)))
    found.setdefault(drawn[medoid], "medoid")
    return found


def _frequent(texts: Iterable[str]) -> list[str]:
    """The most frequent, in an order that no order of the answers changes."""
    counts = Counter(texts)
    ranked = sorted((-count, text) for text, count in counts.items() if count > 1 and text)
    return [text for _, text in ranked[:FREQUENT]]


def _drawn(texts: Sequence[str], purpose: str, count: int) -> list[str]:
    """So many of the texts, by draws that depend on the texts alone."""
    return [texts[int(i)] for i in Draws(0, texts).choose(purpose, np.arange(len(texts)), count)]


FILE = "floors.json"
EMPTY = 0.05  # a larger share of empty answers is worth a warning


def with_floors(metrics: Sequence[Metric]) -> list[Metric]:
    """The included metrics of answers. One of a user's own may be slow, and floors take thousands of pairs."""
    return [metric for metric in metrics if metric.needs == "answers" and metric.name in NAMED]


@dataclass(frozen=True)
class ChooseConstant(Stage):
    """The best constant answer by a metric, chosen on the answers of the pool; `references` of a test sample."""

    kind: ClassVar[str] = "constant"
    version: ClassVar[int] = 1
    one_process: ClassVar[bool] = True

    metric: Metric
    answers: Sequence[str] = field(repr=False)
    references: int = 1

    @property
    def label(self) -> str:
        return f"choose the best constant answer by {self.metric.name}"

    def key(self) -> dict[str, Any]:
        several = {"references": self.references} if self.references > 1 else {}
        return {"metric": identity(self.metric), "answers": digest({"answers": list(self.answers)}), **several}

    def run(self, folder: Path, meter: Meter, *inputs: Artifact) -> None:
        (folder / FILE).write_text(
            json.dumps(asdict(best_constant(self.metric.name, self.answers, references=self.references)))
        )


@dataclass(frozen=True)
class Floors(Stage):
    """What stored answers, and the best constant one, score by each metric without their own prompts.

    Attributes:
        constants: of each metric.
        references: by the sample's id.
    """

    kind: ClassVar[str] = "floors"
    version: ClassVar[int] = 1
    one_process: ClassVar[bool] = True

    answers: Generate
    constants: tuple[ChooseConstant, ...]
    references: dict[str, tuple[str, ...]] = field(repr=False)

    @property
    def label(self) -> str:
        return f"floors of {', '.join(constant.metric.name for constant in self.constants)}"

    @property
    def inputs(self) -> tuple[Stage, ...]:
        return (self.answers, *self.constants)

    def key(self) -> dict[str, Any]:
        return {"references": plain(self.references)}

    def run(self, folder: Path, meter: Meter, *inputs: Artifact) -> None:
        answered, *chosen = inputs
        table = read_predictions(answered)
        ids, answers = table["id"].tolist(), table["prediction"].tolist()
        references = [self.references[id] for id in ids]
        found = {}
        for stage, artifact in zip(self.constants, chosen, strict=True):
            name, constant = stage.metric.name, Constant(**json.loads((artifact.path / FILE).read_text()))
            split = specificity(name, answers, references, ids)
            found[name] = {
                "score": float(split.own.mean()),
                "shuffled": float(split.others.mean()),
                "error": split.error,
                "constant": float(constant.scores(name, references).mean()),
                "constant_answer": constant.text,
                "constant_kind": constant.kind,
            }
        (folder / FILE).write_text(json.dumps(found))


def read_floors(measured: Artifact) -> dict[str, dict[str, Any]]:
    """What `Floors` stored, by metric: means over the samples of each one's own value.

    "score" of the answers, "shuffled" on other samples' references, with the Monte Carlo "error" of that mean,
    "constant" of the best constant answer, with its text and kind.
    """
    return json.loads((measured.path / FILE).read_text())


def warnings(floors: dict[str, dict[str, Any]], answers: Sequence[str], model: str) -> list[str]:
    """A sentence where `model` is below the floor by its first metric, and where over 5 % of answers are empty."""
    said = []
    for name, floor in [*floors.items()][:1]:
        if floor["score"] < floor["constant"]:
            text = " ".join(floor["constant_answer"].split())
            shown = text if len(text) <= 60 else f"{text[:60]}..."
            said.append(
                f"{model} scores {floor['score']:.2f} {name}, less than {floor['constant']:.2f} of the constant "
                f'answer "{shown}".'
            )
    empty = sum(not answer.strip() for answer in answers) / max(len(answers), 1)
    return [*said, f"{empty:.0%} of the answers of {model} are empty."] if empty > EMPTY else said
