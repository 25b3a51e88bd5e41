"""Views of the data: which samples a signal reads, and which part of their text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from staff.data.tokens import TokenizedSamples


@dataclass(frozen=True)
class DataView:
    """Which samples a signal reads, and which part of their text.

    Attributes:
        slice: "pool", the samples to choose from; or "dev", the validation slice.
        prompt: whether answers are read after their prompts.
        text: "answer"; or "all", which counts prompt tokens as answer tokens.
        indices: positions in the slice, in this order; None: all.
    """

    slice: str = "pool"
    prompt: bool = True
    text: str = "answer"
    indices: np.ndarray | None = None

    def of(self, samples: TokenizedSamples) -> TokenizedSamples:
        """This view of the samples of its slice."""
        if self.indices is not None:
            samples = samples.take(self.indices)
        if not self.prompt:
            samples = samples.without_prompts()
        return samples if self.text == "answer" else samples.all_as_answer()
