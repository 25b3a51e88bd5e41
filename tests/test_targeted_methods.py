"""Methods that select for a validation slice, LESS and TSDS, against recorded vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import vectors
from hypothesis import given, settings
from hypothesis import strategies as st
from support.any_pool import AnyPool, chosen, pool_of, select

from baselines import less as less
from baselines import tsds as tsds
from baselines.asks import unit_rows
from baselines.less import (
    LESS,
    adam_direction,
    adam_direction_official,
    match_official,
    project_official,
    round_to_bfloat16,
)
from baselines.tsds import (
    TSDS,
    assign_mass,
    assign_mass_official,
    density_official,
    kernel_density,
    nearest_candidates,
)
from staff.errors import UserError

# ---------------------------------------------------------------- LESS


LESS_VECTORS = vectors("less")
MATCHING, ADAM, PROJECTIONS = (
    [case for case in LESS_VECTORS if case.startswith(f"less_{name}")] for name in ("match", "adam", "proj")
)


@pytest.mark.parametrize("case", MATCHING)
def test_scores_and_selections_are_those_of_the_released_matching(case: str):
    golden = LESS_VECTORS[case]
    scores, order = match_official(golden["train"], golden["val"], golden["weights"], int(golden["n_subtasks"]))
    np.testing.assert_allclose(scores, golden["score"], atol=2e-6)
    assert order.tolist() == golden["sorted_order"].tolist()
    for name in ("top_p0.05", "top_p0.5", "top_num7"):
        assert order[: len(golden[name])].tolist() == golden[name].tolist()


@pytest.mark.parametrize("case", MATCHING)
def test_the_method_selects_what_the_released_scripts_select(case: str):
    golden = LESS_VECTORS[case]
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
    golden = LESS_VECTORS[case]
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
    golden = LESS_VECTORS[case]
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
        patch.setattr(less, "BLOCK_BYTES", 4 * 3 * 8 * 7)
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
def test_bad_fields_of_less_are_refused(fields: dict[str, Any], said: str):
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


# ---------------------------------------------------------------- TSDS


TSDS_VECTORS = vectors("tsds")


@pytest.mark.parametrize("case", TSDS_VECTORS)
def test_masses_levels_and_last_neighbours_are_those_of_the_released_code(case: str):
    golden = TSDS_VECTORS[case]
    found = [golden[name] for name in ("top_indices", "top_dists", "top_kdes")]
    for alpha in golden["alphas"].tolist():
        given = (*found, len(golden["candidates"]), alpha, float(golden["C"]))
        if f"failed_{alpha}" in golden:
            with pytest.raises(ValueError, match="more than all of its mass"):
                assign_mass_official(*given)
            continue
        mass, level, last = assign_mass_official(*given)
        np.testing.assert_allclose(mass, golden[f"probs_{alpha}"], atol=1e-12)
        assert level == pytest.approx(float(golden[f"s_{alpha}"]), rel=1e-12)
        assert last.tolist() == golden[f"lastK_{alpha}"].tolist()


@pytest.mark.parametrize("case", TSDS_VECTORS)
def test_neighbours_and_densities_are_the_released_ones_whichever_way_ties_fall(case: str):
    golden = TSDS_VECTORS[case]
    candidates, queries = golden["candidates"], golden["queries"]
    neighbours, distances = nearest_candidates(candidates, queries, int(golden["max_K"]))
    np.testing.assert_allclose(distances, golden["top_dists"], atol=1e-5)
    if "dup" not in case and "grid" not in case and "constant" not in case:
        assert neighbours.tolist() == golden["top_indices"].tolist()
    if golden["sigma"] > 0:
        found, where = np.unique(golden["top_indices"], return_inverse=True)
        density = density_official(candidates[found], float(golden["sigma"]), int(golden["kde_K_used"]))
        np.testing.assert_allclose(density[where].reshape(neighbours.shape), golden["top_kdes"], rtol=1e-5)


@settings(max_examples=60)
@given(
    queries=st.integers(1, 6),
    count=st.integers(1, 8),
    alpha=st.sampled_from([0, 0.3, 0.9, 0.999, 1]),
    seed=st.integers(0, 2**32),
)
def test_mass_adds_up_to_one_and_each_query_hands_out_its_share(queries: int, count: int, alpha: float, seed: int):
    rng = np.random.default_rng(seed)
    neighbours = np.stack([rng.permutation(20)[:count] for _ in range(queries)])
    distances = np.sort(rng.random((queries, count)), axis=1)
    density = rng.uniform(0.5, 4, (queries, count))
    mass, level, last = assign_mass(neighbours, distances, density, 20, alpha, 5)
    assert mass.min() >= 0 and mass.sum() == pytest.approx(1)
    assert (last < max(count - 1, 1)).all() and level > 0
    if alpha == 1 and count > 1:  # alignment alone: all of it to the nearest
        np.testing.assert_allclose(mass, np.bincount(neighbours[:, 0], minlength=20) / queries)


def test_the_density_over_the_pool_in_blocks_is_the_plain_sum():
    points = np.random.default_rng(0).normal(size=(90, 3)).astype(np.float32)
    squared = ((points[:, None].astype(np.float64) - points) ** 2).sum(axis=2)
    plain = np.maximum(1 - squared / 1.5**2, 0).sum(axis=1)
    at = np.array([5, 80, 3])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tsds, "ROWS", 2)
        patch.setattr(tsds, "COLUMNS", 7)
        np.testing.assert_allclose(kernel_density(points, at, 1.5), plain[at], rtol=1e-5)


def near_and_far(n: int = 100) -> AnyPool:
    """Samples 0 to 4 lie at the slice, 5 to 9 are copies of one near it, the others are far away."""
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [rng.normal([9, 0, 0], 1.5, (5, 3)), np.tile([9, 6.0, 0], (5, 1)), rng.normal([-9, 0, 0], 1, (n - 10, 3))]
    )
    dev = rng.normal([9, 0, 0], 0.1, (3, 3))
    return AnyPool(n, {"embedding": x, "embedding/dev": dev})


def test_samples_near_the_slice_come_first_and_copies_share_their_mass():
    pool = near_and_far(120)  # twelve neighbours each
    coreset = select(TSDS(alpha=0, sigma=0.2), pool, 5)
    mass = coreset.scores["mass"]
    assert coreset.indices.tolist() == list(range(5)) and coreset.filled == 0
    assert mass[:5].min() > 1.2 * mass[5:10].max() > 0
    uniform = select(TSDS(alpha=0, density="uniform"), pool, 10).scores["mass"]
    np.testing.assert_allclose(uniform[:10], uniform[0])


def test_what_no_mass_reaches_is_drawn_counted_and_noted():
    coreset = select(TSDS(), near_and_far(), 30)
    reached = int((coreset.scores["mass"] > 0).sum())
    assert len(coreset.indices) == 30 and coreset.filled == 30 - reached > 0
    assert coreset.notes == (f"{30 - reached} samples without mass were drawn at random: raise max_neighbors.",)
    assert select(TSDS(), near_and_far(), 30, seed=1).indices.tolist() != coreset.indices.tolist()


@pytest.mark.parametrize("density", ["pool", "neighbours", "uniform"])
def test_the_order_of_the_pool_changes_nothing(density: str):
    for constant in (False, True):
        pool, method = pool_of(150, constant=constant), TSDS(density=density)
        order = np.random.default_rng(0).permutation(150)
        assert chosen(method, pool.reordered(order), 40) == chosen(method, pool, 40)


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ({"alpha": 1.5}, r"method.alpha=1.5 must be a number of at least 0 and at most 1"),
        ({"sigma": 0}, r"method.sigma=0 must be a number"),
        ({"max_neighbors": 1}, r"method.max_neighbors=1 must be a whole number of at least 2"),
        ({"density": "kde"}, r"method.density='kde' is unknown"),
    ],
)
def test_bad_fields_of_tsds_are_refused(field: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        TSDS(**field)


def test_embeddings_that_are_not_finite_are_refused_by_name_in_the_pool_and_in_the_slice():
    for key, at, name in (("embedding", 4, "'sample 4'"), ("embedding/dev", 2, "'2 of the validation slice'")):
        pool = near_and_far()
        pool.given[key][at, 1] = np.nan
        with pytest.raises(UserError, match=f"the embedding of sample {name} is nan"):
            select(TSDS(), pool, 3)


def test_a_kernel_narrower_than_any_distance_leaves_each_sample_the_density_of_itself():
    points = unit_rows(np.random.default_rng(0).normal(size=(300, 24)).astype(np.float32))
    for sigma in (1e-9, 1e-4):
        assert (kernel_density(points, np.arange(300), sigma) == 1).all()
        assert (density_official(points, sigma, 30) == 1).all()


def test_the_moments_of_a_weight_that_got_no_gradient_are_zero():
    """In Mamba, some weights are read past their adapters, which then have no moments."""
    import torch

    from staff.training.checkpoints import _moments

    model = torch.nn.ModuleDict({"read": torch.nn.Linear(2, 1), "unread": torch.nn.Linear(2, 1)})
    optimizer = torch.optim.AdamW(model.parameters())
    model["read"](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    moments = _moments(model, optimizer)
    assert {name.rpartition(".")[0] for name in moments} == {name for name, _ in model.named_parameters()}
    assert all(bool(value.any()) == name.startswith("read") for name, value in moments.items())
