"""Methods on the embedded models. Every method: tests/stress/test_methods.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.tiny import method_named, tiny_pool

from staff.errors import UserError
from staff.pool import Select
from staff.selection import Coreset


def test_a_method_selects_exactly_its_budget_and_is_charged_for_what_it_asked(tmp_path: Path):
    pool = tiny_pool(tmp_path)
    chosen = pool.store.get(Select(method_named("rds_plus"), pool, 10))
    coreset = Coreset.load(chosen.path)
    assert len(coreset.indices) == 10 and np.isfinite(coreset.scores["highest_similarity"]).all()
    charged = {charge.label: charge.cost for charge in chosen.charged().values() if charge.stage != "coreset"}
    assert set(charged) == {"embedding of 40 samples, raw target", "embedding of 6 samples, raw target"}
    tokens = pool.lengths.sum(), pool.slices["dev"].target.lengths.sum()
    assert [charged[label].tokens_forward for label in sorted(charged)] == list(tokens)
    assert all(cost.flops > 0 and cost.seconds > 0 for cost in charged.values())


@pytest.mark.parametrize("name", ["rds_plus", "tsds", "less"])
def test_a_method_that_needs_a_validation_slice_says_so_before_a_model_runs(name: str, tmp_path: Path):
    pool = tiny_pool(tmp_path, dev=False)
    with pytest.raises(UserError, match=r"there is no dev slice: make a validation slice with task\.dev_size"):
        pool.store.get(Select(method_named(name), pool, 10))
    assert {folder.name for folder in tmp_path.iterdir()} <= {"locks", "tmp", "attempts"}


def test_answers_in_context_are_not_generated_which_is_said_before_a_model_runs(tmp_path: Path):
    pool = tiny_pool(tmp_path)
    with pytest.raises(UserError, match=r"method=data_whisperer asks for generated answers .* from arrays alone"):
        pool.store.get(Select(method_named("data_whisperer"), pool, 10))
    assert {folder.name for folder in tmp_path.iterdir()} <= {"locks", "tmp", "attempts"}
