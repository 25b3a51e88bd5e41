"""Negative log-likelihood of the reference answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from staff.evaluation.metrics.metric import Metric, Values


@dataclass(frozen=True)
class Nll(Metric):
    """Mean negative log-likelihood of a reference's content tokens, in nats per token, teacher-forced.

    The headline is the mean over samples. A sample none of whose references fits the model's window has no value.

    The end token is apart (`nll_end`): whether a model stops is another question than what it says.
    """

    version: ClassVar[int] = 1
    higher_is_better: ClassVar[bool] = False
    margin: ClassVar[float] = 0.02  # 2 % of the perplexity
    unit: ClassVar[str] = "nat"
    needs: ClassVar[str] = "likelihood"

    def measure_likelihood(self, nll: np.ndarray) -> Values:
        values = nll[:, 1 if self.name == "nll_end" else 0]
        return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan"), values.tolist()
