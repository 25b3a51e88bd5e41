"""GraNd, the gradient norm on the fine-tuned target (Paul et al., NeurIPS 2021, "Deep Learning on a Data Diet").

It is the norm of the gradient of the sample's own loss. For a language model with LoRA the loss is the mean
cross-entropy of the answer tokens, and the gradient is that of the adapters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from staff.selection import Coreset, Draws, ScorePool, check_choice, check_scores


@dataclass(frozen=True)
class GraNd:
    """Selects the samples with the highest gradient norm on the target fine-tuned on the whole pool.

    Attributes:
        gradient: "all_lora": all LoRA parameters; "last_v_b": last block's v_proj lora_B alone;
            "all_linear": all weights of linear layers, with adapters merged into them.
        fresh_adapter: {rank, alpha, targets} of a new adapter that replaces that of fine-tuning, as in
            `baselines.staff_official`; with "last_v_b" this is what the STAFF authors' code calls GraNd. None: the
            adapter of fine-tuning.
    """

    version: ClassVar[int] = 1

    gradient: str = "all_lora"
    fresh_adapter: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_choice(self, "gradient", ("all_lora", "last_v_b", "all_linear"))

    def select(self, pool: ScorePool, budget: int, rng: Draws) -> Coreset:
        """The coreset of `budget` samples.

        Raises:
            UserError: a score that is negative or not finite, by the sample's id.
        """
        options = {"parameters": self.gradient, "fresh_adapter": self.fresh_adapter}
        scores = check_scores(pool.ask("effort", of="target_tuned", **options), pool.ids, "GraNd score", minimum=0)
        return Coreset(rng.highest_first(scores)[:budget], scores={"grand": scores})


# ---------------------------------------------------------------- as released


def grand_official(
    hidden: np.ndarray, logits: np.ndarray, labels: np.ndarray, batch_size: int | None = None
) -> np.ndarray:
    """The gradient norm of a classifier's last layer, weights and bias, (N,): EL2N times sqrt(1 + |h|^2).

    Args:
        hidden: input of the last layer, (N, d).
        logits: (N, C).
        labels: (N,).
        batch_size: DeepCore differentiates the mean over a batch of so many, so that each norm is divided by the
            size of its batch, and a short last batch scores too high; None: undivided.
    """
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    errors = np.exp(shifted) / np.exp(shifted).sum(axis=1, keepdims=True)
    errors[np.arange(len(labels)), labels] -= 1
    norms = np.linalg.norm(errors, axis=1) * np.sqrt(1 + (hidden.astype(np.float64) ** 2).sum(axis=1))
    if batch_size is None:
        return norms
    batch = np.arange(len(norms)) // batch_size
    return norms / np.bincount(batch)[batch]
