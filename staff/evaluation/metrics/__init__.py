"""Metrics of answers. The included ones are on a scale from 0 to 100, as in the paper's tables."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

import pandas as pd

from staff.data.task import Sample
from staff.errors import UserError
from staff.evaluation.metrics.metric import Metric, References

NAMED = {
    "rouge1": "rouge.Rouge",
    "rouge2": "rouge.Rouge",
    "rougeL": "rouge.Rouge",
    "bleu": "corpus.Bleu",
    "chrf": "corpus.Chrf",
    "exact_match": "numbers.ExactNumber",
}
"""The included metrics by name: module and class in this package."""


def named_metric(name: str) -> Metric:
    """The metric with this name, or with this dotted path to a class of your own, such as "mymetrics.Accuracy".

    Raises:
        UserError: there is no such metric.
    """
    module, _, kind = (
        f"staff.evaluation.metrics.{NAMED[name]}".rpartition(".") if name in NAMED else name.rpartition(".")
    )
    try:
        return getattr(import_module(module), kind)(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"task.metrics names {name!r}, which is unknown: choose from {', '.join(NAMED)}, "
            f"or give the dotted path of a class of your own ({error})."
        ) from None


def check_metrics(names: Sequence[str], samples: Sequence[Sample] = ()) -> None:
    """Refuse metrics that cannot be measured, before any model loads.

    Raises:
        UserError: there is no metric, one is unknown, or one cannot measure a sample.
    """
    if isinstance(names, str) or not names:
        choices = ", ".join(NAMED)
        raise UserError(f"task.metrics={names!r} must be a list of one or more of {choices}, such as [rougeL].")
    for metric in [named_metric(name) for name in names]:
        metric.check(samples)


def measure(
    metrics: Sequence[Metric], predictions: Sequence[str], references: References
) -> tuple[dict[str, float], pd.DataFrame]:
    """The headline value of each metric, and a table with a row for each sample and a column for each metric."""
    values = {metric.name: metric.measure(predictions, references) for metric in metrics}
    headline = {name: float(value) for name, (value, _) in values.items()}
    return headline, pd.DataFrame({name: scores for name, (_, scores) in values.items()})
