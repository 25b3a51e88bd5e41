"""Every family runs with every kind of signal: in exact batches where it has them, one by one elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.families import FAMILIES, FUSED, save_model
from support.tuning import told_and_peak

METHODS = ("random", "staff", "el2n", "grand", "d2", "s2l", "k_center")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_with_every_kind_of_method(run: Any, models: Path, family: str, method: str):
    folder = models / family
    if not folder.exists():
        save_model(family, folder)
    overrides = [f"family.target.path={folder}", f"family.small.path={folder}", f"method={method}"]
    if method == "staff":
        overrides += ["method.num_regions=3", "method.verification_budget=2"]
    if method == "staff" and family in FUSED:
        overrides.append("method.gradient=all_lora")
    record = run(*overrides)
    assert record["counts"]["selected"] == 6
    assert record["evaluation"]["flops"] > 0


@pytest.mark.parametrize("family", FUSED)
def test_a_gradient_that_a_family_does_not_have_is_refused_before_anything_is_fine_tuned(
    run: Any, models: Path, tmp_path: Path, family: str
):
    from staff.errors import UserError

    folder = models / family
    if not folder.exists():
        save_model(family, folder)
    with pytest.raises(UserError, match="choose gradient=all_lora"):
        run(f"family.target.path={folder}", f"family.small.path={folder}", "method=staff")
    assert not list((tmp_path / "results" / "artifacts").glob("finetune/*"))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma", "gemma2", "gemma3_text"])
def test_the_estimate_of_memory_is_the_measured_peak_within_a_tenth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, dtype: str, kind: str, checkpointing: bool
):
    changes = {"kind": kind, "gradient_checkpointing": checkpointing}
    told, peak = told_and_peak(architecture, dtype, tmp_path, monkeypatch, **changes)
    print(f"{architecture}, {dtype}, {changes}: {told / peak:.3f} of the measured peak")
    assert told == pytest.approx(peak, rel=0.1)
