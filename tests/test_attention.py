"""Passes whose batches change their shape leave out cuDNN's attention, and restore the user's choice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from staff.data.tokens import TokenizedSamples
from staff.evaluation.generator import generate
from staff.models.adapters import LoraSpec
from staff.models.spec import ModelSpec
from staff.scoring.passes import score_samples
from staff.signals.loss import Loss
from staff.store.store import Store
from staff.training.settings import FinetuneSettings
from staff.training.stage import Finetune

TINY = ModelSpec("pkg://staff/assets/tiny/small")
SAMPLES = TokenizedSamples.of_rows(["a", "b"], [[5, 6, 7, 8], [9, 10, 11]], [2, 1])


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> set[bool]:
    """Whether cuDNN's attention is enabled, asked in every forward pass of a model."""
    found: set[bool] = set()
    forward = torch.nn.Embedding.forward

    def asking(self: Any, ids: Any) -> Any:
        found.add(torch.backends.cuda.cudnn_sdp_enabled())
        return forward(self, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", asking)
    return found


def test_scoring_leaves_it_out(seen: set[bool]):
    score_samples(TINY.load(), SAMPLES, [Loss()], batch_tokens=None, pad_token_id=0)
    assert seen == {False} and torch.backends.cuda.cudnn_sdp_enabled()


def test_fine_tuning_leaves_it_out(seen: set[bool], tmp_path: Path):
    settings = FinetuneSettings(lora=LoraSpec(2, 4), batch_size=2, device_batch_size=2)
    Store(tmp_path).get(Finetune(TINY, SAMPLES, settings, 1, 0))
    assert seen == {False} and torch.backends.cuda.cudnn_sdp_enabled()


def test_generation_leaves_it_out(seen: set[bool]):
    generate(TINY.load(), TINY.tokenizer(), [[5, 6], [7]], max_new_tokens=2, batch_tokens=None)
    assert seen == {False} and torch.backends.cuda.cudnn_sdp_enabled()
