"""What a generated metric gives without reading the prompt: the floors under a score.

Two floors. The *best constant answer* is one text for every prompt. The *shuffled score* gives each answer the
references of another sample: it keeps a method's length, style and template and loses what is said of the prompt.
What is left, `specific = score - shuffled`, is what the answers say of their own prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from staff.draws import Draws
from staff.evaluation.metrics import named_metric
from staff.evaluation.rouge_matrix import rouge_l_matrix

LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)  # words of an opening or an ending
FREQUENT = 10  # candidates of a kind
MEDOID = 150  # training answers that the medoid is one of
JUDGES = 500  # training answers that candidates are scored against; ten times as many for ROUGE-L, which is fast
SHIFTS = 20
References = Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Specificity:
    """A metric of each sample's answer, shape (samples,) each.

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
        return Specificity(_scores(metric, answers, references), np.array([np.nan]), float("nan"))
    partners = _partners(ids, min(shifts or (every if of_every_pair(metric) else SHIFTS), every))
    if of_every_pair(metric):
        matrix = rouge_l_matrix(answers, references, metric)
        own, scores = np.diag(matrix).copy(), matrix[np.arange(len(answers)), partners]
    else:
        own = _scores(metric, answers, references)
        found = _scores(metric, [*answers] * len(partners), [references[j] for j in partners.ravel()])
        scores = found.reshape(partners.shape)
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
        return _scores(metric, [self.text] * len(references), references)


def best_constant(metric: str, training: Sequence[str], judges: References | None = None) -> Constant:
    """The constant answer that scores best on training answers; test references have no part in the choice.

    Args:
        training: answers; they give the candidates (`candidates`).
        judges: references to choose by; None: training answers, each a reference of its own (5,000 for ROUGE-L, 500
            otherwise, by a keyed draw where there are more). Test references make it the best candidate in
            hindsight, which no method could know.
    """
    texts = [text.strip() for text in training]
    most = 10 * JUDGES if of_every_pair(metric) else JUDGES
    judges = judges or [(text,) for text in _drawn(texts, "judges", most)]
    found = candidates(metric, texts)
    means = _matrix(metric, list(found), judges).mean(axis=1)
    best = int(np.argmax(means))
    text, kind = list(found.items())[best]
    return Constant(text, kind, float(means[best]))


def candidates(metric: str, training: Sequence[str]) -> dict[str, str]:
    """Texts that might do well as an answer to everything, each with its kind.

    - The ten most frequent openings, and the ten most frequent endings, of 1 to 32 words (`LENGTHS`), each in two
      answers or more.
    - The ten most frequent whole answers, likewise.
    - The medoid: of a keyed draw of 150 answers, the one with the highest mean metric against the others.
    """
    found: dict[str, str] = {}
    words = [text.split(" ") for text in training]
    for length in LENGTHS:
        long = [w for w in words if len(w) > length]
        for kind, parts in (("opening", [w[:length] for w in long]), ("ending", [w[-length:] for w in long])):
            for text in _frequent(" ".join(part) for part in parts):
                found.setdefault(text, f"{kind} of {length} word{'s' if length > 1 else ''}")
    for text in _frequent(training):
        found.setdefault(text, "whole answer")
    drawn = _drawn(training, "medoid", MEDOID)
    medoid = int(np.argmax(_matrix(metric, drawn, [(text,) for text in drawn]).mean(axis=1)))
    found.setdefault(drawn[medoid], "medoid")
    return found


def of_every_pair(metric: str) -> bool:
    """Whether every pair of answers and references is scored in a moment (`rouge_l_matrix`)."""
    return metric.partition("_")[0] == "rougeL"


def _frequent(texts: Iterable[str]) -> list[str]:
    """The most frequent, in an order that no order of the answers changes."""
    counts = Counter(texts)
    ranked = sorted((-count, text) for text, count in counts.items() if count > 1 and text)
    return [text for _, text in ranked[:FREQUENT]]


def _drawn(texts: Sequence[str], purpose: str, count: int) -> list[str]:
    """So many of the texts, by draws that depend on the texts alone."""
    return [texts[int(i)] for i in Draws(0, texts).choose(purpose, np.arange(len(texts)), count)]


def _scores(metric: str, answers: Sequence[str], references: References) -> np.ndarray:
    """One value a sample; of a corpus metric the sentences' own."""
    return np.array(named_metric(metric).measure(answers, references)[1], dtype=np.float64)


def _matrix(metric: str, answers: Sequence[str], references: References) -> np.ndarray:
    """One value for every answer and sample, shape (answers, samples)."""
    if of_every_pair(metric):
        return rouge_l_matrix(answers, references, metric)
    pairs = [answer for answer in answers for _ in references]
    return _scores(metric, pairs, [*references] * len(answers)).reshape(len(answers), -1)
