"""Methods on the embedded models. Every method: tests/stress/test_methods.py."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.tiny import method_named, planted_pool, tiny_pool

from baselines.data_whisperer import DataWhisperer
from baselines.less import LESS
from baselines.s2l import S2L
from staff.errors import UserError
from staff.evaluation.in_context import AnswersInContext
from staff.evaluation.metrics import named_metric
from staff.pool import Select
from staff.selection import Coreset, SelectionMethod


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


def test_demonstrations_that_do_not_fit_are_refused_with_how_many_do_before_a_model_runs(tmp_path: Path):
    pool = tiny_pool(tmp_path)
    with pytest.raises(UserError, match=r"^30 demonstrations, .* for (\d+) demonstrations of any length: ") as said:
        pool.store.get(Select(DataWhisperer(demonstrations=30), pool, 10))
    assert {folder.name for folder in tmp_path.iterdir()} <= {"locks", "tmp", "attempts"}
    fit = int(str(said.value).rpartition("=")[2].rstrip("."))
    samples, queries = pool.slices["pool"].target, pool.slices["dev"].target
    every, separator = np.arange(len(queries))[None], pool.family.target.tokenizer()("\n\n")["input_ids"][1:]
    for count in (fit, fit + 1):
        longest = np.full((1, count), samples.lengths.argmax())
        (state,) = pool.states("target")
        stage = AnswersInContext(state, samples, queries, longest, every, named_metric("exact"), separator)
        with nullcontext() if count == fit else pytest.raises(UserError, match=f"set method.demonstrations={fit}"):
            stage.check()


def test_data_whisperer_selects_by_the_answers_and_the_attention_of_the_raw_target(tmp_path: Path):
    pool = planted_pool(tmp_path, size=12, dev=3)
    method = DataWhisperer(demonstrations=3, queries=2, rounds=1, metric="exact")
    chosen = pool.store.get(Select(method, pool, 4))
    coreset = Coreset.load(chosen.path)
    assert len(coreset.indices) == 4 and np.isfinite(coreset.scores["in_context"]).all()
    (charge,) = [charge for charge in chosen.charged().values() if charge.stage == "in_context"]
    assert charge.label == "answer 8 queries in context, raw target" and charge.cost.flops > 0
    assert (
        len(Coreset.load(pool.store.get(Select(replace(method, queries_from="folds"), pool, 4)).path).indices) == 4
    )


@pytest.mark.parametrize(
    ("method", "kind", "said"),
    [
        (S2L(), "full", r"fine-tuning all weights keeps no model of epoch 1: choose finetune=lora"),
        (S2L(num_checkpoints=9), "lora", r"num_checkpoints=9 is more than the \d epochs of the small model's"),
        (LESS(dim=4_000_000), "lora", r"method.dim=4000000 is more than the \d+ parameters that are projected"),
        (LESS(dim=10**11), "lora", r"projected_gradient of 6 samples, .* takes [\d,]+ GB, .* lower method\.dim"),
    ],
)
def test_what_was_not_kept_or_fits_no_memory_is_refused_before_a_model_loads(
    method: SelectionMethod, kind: str, said: str, tmp_path: Path
):
    pool = tiny_pool(tmp_path)
    pool = replace(pool, settings=replace(pool.settings, kind=kind))
    with pytest.raises(UserError, match=said):
        pool.store.get(Select(method, pool, 10))
    assert {folder.name for folder in tmp_path.iterdir()} <= {"locks", "tmp", "attempts"}
