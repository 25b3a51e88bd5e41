"""The metrics. Those of answers are on the scale from 0 to 100, as in the paper's tables."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module

import numpy as np
import pandas as pd

from staff.data.samples import Sample
from staff.errors import UserError
from staff.evaluation.metrics.metric import Choices, Metric, References
from staff.evaluation.metrics.rouge import TOKENIZERS, of_every_pair, rouge_l_matrix

NAMED = {
    "rouge1": "rouge.Rouge",
    "rouge2": "rouge.Rouge",
    "rougeL": "rouge.Rouge",
    "bleu": "corpus.Bleu",
    "chrf": "corpus.Chrf",
    "exact": "exact.Exact",
    "accuracy": "exact.Exact",
    "macro_f1": "classes.MacroF1",
    "exact_match": "numbers.ExactNumber",
    "choice_accuracy": "classes.ChoiceAccuracy",
    "choice_accuracy_norm": "classes.ChoiceAccuracy",
    "choice_macro_f1": "classes.ChoiceMacroF1",
    "choice_macro_f1_norm": "classes.ChoiceMacroF1",
    "nll": "likelihood.Nll",
    "nll_end": "likelihood.Nll",
    **{f"{kind}_{name}": "rouge.Rouge" for kind in ("rouge1", "rouge2", "rougeL") for name in TOKENIZERS},
}
"""The included metrics by name: module and class in this package."""


def named_metric(name: str) -> Metric:
    """The metric with this name, or with this dotted path to a class of your own, such as "mymetrics.Accuracy".

    Raises:
        UserError: there is no such metric, or it has no direction.
    """
    path = f"staff.evaluation.metrics.{NAMED[name]}" if name in NAMED else name
    module, _, kind = path.rpartition(".")
    try:
        metric = getattr(import_module(module), kind)(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"task.metrics names {name!r}, which is unknown: choose from {', '.join(NAMED)}, or give the dotted "
            f"path of a class of your own ({error})."
        ) from None
    if not isinstance(metric, Metric) or not isinstance(metric.higher_is_better, bool):
        raise UserError(
            f"task.metrics names {name!r}, which has no direction: derive the class from "
            "staff.evaluation.metrics.metric.Metric, and set higher_is_better to true or false."
        )
    return metric


def check_metrics(names: Sequence[str], samples: Sequence[Sample] = ()) -> None:
    """Refuse metrics that cannot be measured, before any model loads.

    Raises:
        UserError: there is no metric, one is unknown, or one cannot measure a sample.
    """
    if isinstance(names, str) or not names or not all(isinstance(name, str) for name in names):
        choices = ", ".join(NAMED)
        raise UserError(f"task.metrics={names!r} must be a list of one or more of {choices}, such as [rougeL].")
    _check(tuple(names), tuple(samples))


@lru_cache(maxsize=2)  # the runs of a sweep share their samples
def _check(names: tuple[str, ...], samples: tuple[Sample, ...]) -> None:
    for metric in [named_metric(name) for name in names]:
        metric.check(samples)


def measure(
    metrics: Sequence[Metric],
    predictions: Sequence[str],
    references: References,
    nll: np.ndarray | None = None,
    choices: Choices | None = None,
) -> tuple[dict[str, float], pd.DataFrame]:
    """The headline value of every metric, and a table with a row a sample and a column a metric.

    Args:
        nll: of the references, shape (N, 2), as in `Metric.measure_likelihood`.
        choices: of the samples, as in `Metric.measure_choices`.

    Raises:
        UserError: a metric of likelihood or of choices, without these.
    """
    values = {}
    for metric in metrics:
        if metric.needs == "answers":
            values[metric.name] = metric.measure(predictions, references)
        elif metric.needs == "likelihood" and nll is not None:
            values[metric.name] = metric.measure_likelihood(nll)
        elif metric.needs == "choices" and choices is not None:
            values[metric.name] = metric.measure_choices(choices, references)
        else:
            raise UserError(f"{metric.name} needs the model that answered: run the experiment again with it.")
    headline = {name: float(value) for name, (value, _) in values.items()}
    return headline, pd.DataFrame({name: scores for name, (_, scores) in values.items()})


def sample_values(metric: str, answers: Sequence[str], references: References) -> np.ndarray:
    """One value a sample; of a corpus metric the sentences' own, and of one without parts the whole for each."""
    measured = named_metric(metric)
    whole, values = measured.measure(answers, references)
    return np.array(values if measured.has_parts else [whole] * len(values), dtype=np.float64)


def pairwise(metric: str, answers: Sequence[str], references: References) -> np.ndarray:
    """One value for every answer and sample, shape (answers, samples)."""
    if of_every_pair(metric):
        return rouge_l_matrix(answers, references, metric)
    pairs = [answer for answer in answers for _ in references]
    values = named_metric(metric).measure(pairs, [*references] * len(answers))[1]
    return np.reshape(np.array(values, dtype=np.float64), (len(answers), -1))
