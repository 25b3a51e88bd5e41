"""Which samples are asked about, and how they read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from staff.data.tokens import TokenizedSamples


@dataclass(frozen=True)
class DataView:
    """A part of the data as a signal or a training sees it.

    Attributes:
        slice: "pool", the samples to choose from; "dev", the validation slice; "test".
        prompt: False: answers without their prompts.
        text: "answer", or "all": prompt tokens count as answer tokens too.
        indices: positions in the slice, in this order; None: all of it.
    """

    slice: str = "pool"
    prompt: bool = True
    text: str = "answer"
    indices: np.ndarray | None = None

    def of(self, samples: TokenizedSamples) -> TokenizedSamples:
        """The view of a slice's samples."""
        if self.indices is not None:
            samples = samples.take(self.indices)
        if not self.prompt:
            samples = samples.without_prompts()
        return samples if self.text == "answer" else samples.all_as_answer()
