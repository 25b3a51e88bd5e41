"""LESS against recorded matching, Adam directions and projections."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.any_pool import AnyPool, chosen, pool_of, select
from support.golden import recorded

from baselines import less as module
from baselines.less import (
    LESS,
    adam_direction,
    adam_direction_official,
    match_official,
    project_official,
    round_to_bfloat16,
)
from staff.errors import UserError

VECTORS = recorded("less")
MATCHING, ADAM, PROJECTIONS = (
    [case for case in VECTORS if case.startswith(f"less_{name}")] for name in ("match", "adam", "proj")
)


@pytest.mark.parametrize("case", MATCHING)
def test_scores_and_selections_are_those_of_the_released_matching(case: str):
    golden = VECTORS[case]
    scores, order = match_official(golden["train"], golden["val"], golden["weights"], int(golden["n_subtasks"]))
    np.testing.assert_allclose(scores, golden["score"], atol=2e-6)
    assert order.tolist() == golden["sorted_order"].tolist()
    for name in ("top_p0.05", "top_p0.5", "top_num7"):
        assert order[: len(golden[name])].tolist() == golden[name].tolist()


@pytest.mark.parametrize("case", MATCHING)
def test_the_method_selects_what_the_released_scripts_select(case: str):
    golden = VECTORS[case]
    train, dev = (golden[name].astype(np.float32).swapaxes(0, 1) for name in ("train", "val"))
    subtask = np.repeat(np.arange(int(golden["n_subtasks"])), dev.shape[0] // int(golden["n_subtasks"]))
    answers = {"projected_gradient": train, "projected_gradient/dev": dev}
    pool = AnyPool(len(train), answers, dev_groups=subtask.astype(str), learning_rates=golden["weights"])
    coreset = select(LESS(), pool, len(golden["top_p0.5"]))
    # The recorded gradients have norm 1 but for float16, so that cosines are inner products.
    np.testing.assert_allclose(coreset.scores["influence"], golden["score"], atol=1e-3)
    assert len(set(coreset.indices) & set(golden["top_p0.5"])) >= 0.98 * len(golden["top_p0.5"])


def test_nan_comes_first_in_the_released_order_and_equal_scores_in_the_order_of_the_pool():
    train = np.array([[[0.0], [1.0], [np.nan], [1.0]]])
    _, order = match_official(train, np.ones((1, 1, 1)), np.ones(1), 1)
    assert order.tolist() == [2, 1, 3, 0]


@pytest.mark.parametrize("case", ADAM)
def test_adam_directions_are_those_of_the_released_code(case: str):
    golden = VECTORS[case]
    direction = adam_direction_official(golden["grad"], golden["m"], golden["v"])
    np.testing.assert_allclose(direction, golden["adam"], rtol=1e-6, atol=1e-6)


def test_the_papers_adam_direction_is_one_step_of_torch():
    import torch

    rng = np.random.default_rng(0)
    first, second, gradients = rng.normal(size=7), rng.random(7), rng.normal(size=(3, 7))
    for gradient, direction in zip(gradients, adam_direction(gradients, first, second, step=5)):
        weights = torch.zeros(7, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([weights], lr=1.0)
        moments = {"exp_avg": torch.tensor(first), "exp_avg_sq": torch.tensor(second)}
        optimizer.state[weights] = {"step": torch.tensor(4.0), **moments}
        weights.grad = torch.tensor(gradient)
        optimizer.step()
        np.testing.assert_allclose(-weights.detach().numpy(), direction, rtol=1e-12)


@pytest.mark.parametrize("case", PROJECTIONS)
def test_projections_are_those_of_the_released_code(case: str):
    golden = VECTORS[case]
    gradients = golden["grad"]
    dtype = str(golden["model_dtype"]).removeprefix("torch.")
    for dim in golden["dims"].tolist():
        bits = np.unpackbits(golden[f"matrix_bits_dim{dim}"], count=gradients.shape[1] * dim)
        signs = 2 * bits.reshape(-1, dim).astype(np.float32) - 1
        projected, unit = project_official(gradients, signs, dtype)
        np.testing.assert_allclose(projected, golden[f"unnormalised_dim{dim}"], atol=1e-5)
        np.testing.assert_allclose(unit, golden[f"normalised_dim{dim}"], atol=1e-6)


def test_rounding_to_bfloat16_is_torchs():
    import torch

    values = np.random.default_rng(0).normal(size=1000).astype(np.float32) * 10.0 ** np.arange(-20, 20).repeat(25)
    values = np.concatenate([values, [0, -0.0, np.inf, -np.inf, 1.00390625, 1.01171875]]).astype(np.float32)
    expected = torch.tensor(values).bfloat16().float().numpy()
    np.testing.assert_array_equal(round_to_bfloat16(values), expected)
    assert np.isnan(round_to_bfloat16(np.array([np.nan]))[0])


def test_training_samples_are_asked_for_adam_directions_and_the_slice_for_plain_gradients():
    pool = pool_of(30)
    select(LESS(dim=64), pool, 5)
    plain, adam = {"dim": 64, "adam": False}, {"dim": 64, "adam": True}
    assert [(of, view, options) for _, of, view, options in pool.asked] == [
        ("warmup@epochs", "dev", plain),  # the slice first, so that a pool without one refuses at once
        ("warmup@epochs", "pool", adam),
    ]
    select(LESS("small", dim=64, adam=False), other := pool_of(30), 5)
    assert {(of, str(options)) for _, of, _, options in other.asked} == {("small@epochs", str(plain))}


def planted(average_pool: int = 40) -> AnyPool:
    """The first sample points where group "b" of the slice does, the second at group "a", the others nowhere."""
    train = np.zeros((average_pool, 2, 4))
    train[:, :, 3] = 1
    train[0], train[1] = [0, 5, 0, 0], [2, 0, 0, 0]
    dev = np.zeros((3, 2, 4))
    dev[:2, :, 0], dev[2, :, 1] = 1, 3
    answers = {"projected_gradient": train, "projected_gradient/dev": dev}
    return AnyPool(average_pool, answers, dev_groups=np.array(["a", "a", "b"]), learning_rates=np.array([1e-4, 0]))


@pytest.mark.parametrize("average", ["cosines", "gradients"])
def test_a_sample_scores_as_high_as_its_best_group_and_lengths_of_gradients_do_not_matter(average: str):
    pool = planted()
    coreset = select(LESS(average=average), pool, 2)
    assert coreset.indices.tolist() == [0, 1]
    np.testing.assert_allclose(coreset.scores["influence"][:3], [1, 1, 0], atol=1e-6)
    assert coreset.diagnostics.set_index("group")["picked"].to_dict() == {"a": 1, "b": 1}
    pool.dev_groups = None
    assert chosen(LESS(average=average), pool, 1) == ({"sample 1"} if average == "cosines" else {"sample 0"})


def test_learning_rates_weigh_the_checkpoints():
    pool = planted()
    pool.given["projected_gradient"][0, 1] = [0, 0, 5, 0]  # right at the first one only
    for rates, first in (([1e-4, 0], {"sample 0", "sample 1"}), ([0, 1e-5], {"sample 1"})):
        pool.rates = np.array(rates)
        scores = select(LESS(), pool, 1).scores["influence"]
        assert {pool.ids[i] for i in np.flatnonzero(scores > 0.9)} == first


def test_blocks_give_what_one_question_gives():
    pool = pool_of(50)
    whole = select(LESS(dim=8), pool, 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK_BYTES", 4 * 3 * 8 * 7)
        blocked = select(LESS(dim=8), pool, 20)
    assert len(pool.asked) == 2 + 1 + 8  # the slice each time, everything at once, and blocks of seven
    assert whole.indices.tolist() == blocked.indices.tolist()
    np.testing.assert_allclose(whole.scores["influence"], blocked.scores["influence"], atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"dim": 0}, r"method.dim=0 must be a whole number of at least 1"),
        ({"average": "max"}, r"method.average='max' is unknown"),
        ({"of": "target"}, r"method.of='target' is unknown: choose warmup or small or target_tuned"),
        ({"of": "small"}, r"method.adam=true needs Adam's moments, .* with method.of=small set method.adam"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        LESS(**fields)


def test_gradients_that_are_not_finite_are_refused():
    for key, name in (
        ("projected_gradient", "'sample 4'"),
        ("projected_gradient/dev", "'4 of the validation slice'"),
    ):
        pool, values = pool_of(10), np.ones((10, 3, 8))
        values[4, 1, 2] = np.inf
        pool.given[key] = values
        with pytest.raises(UserError, match=f"the projected gradient of sample {name} is inf"):
            select(LESS(), pool, 3)
