"""The presets of conf/experiment: every job composes, differs in one thing, and what they alone use runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

TINY = "pkg://staff/assets/tiny"


# ---------------------------------------------------------------- a coreset of another family


OTHER = (
    "family@selection_family=tiny",
    f"selection_family.small.path={TINY}/smaller",
    f"selection_family.target.path={TINY}/small",
)


def test_a_coreset_can_be_selected_by_another_family_and_its_record_says_so(run: Callable[..., dict[str, Any]]):
    record = run("method.verification_budget=2", *OTHER)
    assert record["run"]["name"].startswith("tiny-to-tiny-dialogsum-staff")
    assert record["run"]["selection_family"] == "tiny"
    assert record["identity"]["selection"]["models"]["small"] != record["identity"]["models"]["small"]
    asked = [stage["label"] for stage in record["overhead"]["stages"]]
    assert "fine-tune smaller on 24 samples" in asked


def test_the_target_is_the_same_whichever_family_selects(run: Callable[..., dict[str, Any]]):
    own, transferred, itself = (run("method=random", *o) for o in ((), OTHER, ("family@selection_family=tiny",)))
    assert transferred["run"]["fingerprint"] != own["run"]["fingerprint"]
    assert transferred["coreset"]["fingerprint"] != own["coreset"]["fingerprint"]
    # A random coreset is the same samples, so what follows is read, not computed again.
    assert transferred["finetuning"]["fingerprint"] == own["finetuning"]["fingerprint"]
    assert transferred["evaluation"]["fingerprint"] == own["evaluation"]["fingerprint"]
    assert itself["folder"] == own["folder"]
