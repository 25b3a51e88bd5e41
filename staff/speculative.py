"""STAFF: speculative coreset selection (Zhang et al., ICLR 2025).

A small model of the target's family, fine-tuned on the task, scores every sample by its effort, the norm of the
sample's own gradient (speculative score). The samples are stratified into K regions of equal score width. A few
samples of each region are scored again by the target LLM (verification). The ratio

    V_i = sum of target scores / sum of small-model scores     over the verified samples of region i

measures how much the small model underestimates region i. The budget m is allocated by this ratio, smallest region
first.

The paper's formulas and the authors' released code differ, so there are three presets of them in `conf/method`:

- `staff_paper` follows the paper: a region gets floor(m_left V_i / regions left), with gradients over all LoRA
  parameters.
- `staff_official` follows the released code; `baselines/staff_official.py` lists the differences.
- `staff`, the default, differs from the paper in two fields. First, V is scaled at every step to average one over
  the regions left. Raw V depends on the scale of both models' gradients: a target with gradients five times smaller
  would leave most of the budget unspent, and one with larger gradients would spend it all on the first regions.
  With equal V this is CCS, up to rounding. Second, the gradient is that of the last block's v_proj lora_B, which
  the published numbers were computed with, and which costs no more than a forward pass.

The last and largest region takes what is left, up to its size, whatever its ratio. `staff.selection.budget_for`
computes the size of the coreset exactly; at the rates of the paper it equals int(N x kept fraction) of the released
code. The released code loads the target in 8 bits for verification; here it has the precision of its family.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from staff.draws import left_after_dropping
from staff.errors import UserError
from staff.regions import equal_width_edges, regions_left, serving_order, share_out, shares_of_ratio, stratify
from staff.selection import (
    Coreset,
    Draws,
    ScorePool,
    check_budget,
    check_choice,
    check_range,
    check_scores,
)


@dataclass(frozen=True)
class Staff:
    """Speculative coreset selection; defaults are the preset `staff`.

    Attributes:
        num_regions: K, the number of regions of equal score width (section 4.1: 50).
        verification_budget: b_v, samples of each region that the target scores (section 4.1: 10). 0: no
            verification, all ratios are one (the paper's ablation).
        budget_rule: "share": floor(m_left V_i / sum of V over the regions left); "ratio": floor(m_left V_i /
            regions left), the paper's formula.
        pick: "random": uniform inside a region; "highest": highest score first (released code).
        gradient: "last_v_b": last block's v_proj lora_B (released code); "all_lora": all LoRA parameters (paper);
            "all_linear": all weights of linear layers, with adapters merged into them.
        signal: the score of both models: "effort" (the paper); for the ablation of scoring functions "el2n", "loss"
            or "perplexity", which ignore `gradient`.
        speculation: the scores that define the regions. "small": the small model's (the paper). For the ablation of
            speculation, "target": the raw target's own, with nothing to verify; "none": random numbers
            define the regions, and V_i is the mean of the target's scores.
        scores: "pass": the small model scores after its fine-tuning (the paper); "online": its scores are taken
            from the backward passes of its last epoch; "one_epoch": the same of a fine-tuning of one epoch alone.
        drop_hardest: fraction of highest-scored samples dropped beforehand. Equal-width regions served smallest
            first take nearly every outlier at high pruning rates.
        length_exponent: beta; both models' scores are multiplied by L^beta, L being the tokens of the answer. The
            mean of L nearly independent token gradients falls as L^-0.5, so that plain efforts (0) prefer short
            answers. "fit": for each model minus the slope of log score on log L, the target's over its verified
            samples.
    """

    version: ClassVar[int] = 1

    num_regions: int = 50
    verification_budget: int = 10
    budget_rule: str = "share"
    pick: str = "random"
    gradient: str = "last_v_b"
    signal: str = "effort"
    speculation: str = "small"
    scores: str = "pass"
    drop_hardest: float = 0.0
    length_exponent: float | str = 0

    def __post_init__(self) -> None:
        check_range(self, "num_regions", 1, whole=True)
        check_range(self, "verification_budget", 0, whole=True)
        check_range(self, "drop_hardest", 0, 0.99)
        if self.length_exponent != "fit":
            if isinstance(self.length_exponent, str):
                raise UserError(f"method.length_exponent={self.length_exponent!r} must be fit or a number.")
            check_range(self, "length_exponent", 0, 2)
        check_choice(self, "budget_rule", ("share", "ratio"))
        check_choice(self, "pick", ("random", "highest"))
        check_choice(self, "gradient", ("last_v_b", "all_lora", "all_linear"))
        check_choice(self, "signal", ("effort", "el2n", "loss", "perplexity"))
        check_choice(self, "speculation", ("small", "target", "none"))
        check_choice(self, "scores", ("pass", "online", "one_epoch"))
        if self.scores != "pass" and self.gradient == "all_linear":
            raise UserError(
                f"method.scores={self.scores} uses gradients of the LoRA adapter, not method.gradient=all_linear: "
                "choose last_v_b or all_lora, or method.scores=pass."
            )
        if self.scores != "pass" and (self.signal, self.speculation) != ("effort", "small"):
            raise UserError(
                f"method.scores={self.scores} gives the small model's effort: leave out signal={self.signal} and "
                f"speculation={self.speculation}, or set method.scores=pass."
            )

    def select(self, pool: ScorePool, budget: int, rng: Draws) -> Coreset:
        """The coreset: score, stratify, verify, allocate the budget, pick.

        Raises:
            UserError: a score that is negative or not finite, by the sample's id, or a budget above the number of
                samples that `drop_hardest` leaves.
        """
        check_budget(budget, left_after_dropping(self.drop_hardest, len(pool.ids)))
        if self.speculation == "none":
            speculative, counted, notes = rng.priorities("regions") / 2.0**64, np.ones(len(pool.ids)), ()
        else:
            speculative, notes = self.rescaled(self.scored(pool, self.speculation), pool, "speculative")
            counted = speculative
        eligible = rng.all_but_highest(speculative, self.drop_hardest)
        regions, members = self.regions(speculative, eligible)
        probes = self.probes(members, rng)
        verified, of_target = self.rescaled(self.scored(pool, "target", probes), pool, "target's")
        ratios, of_ratios = verification_ratios(counted, verified, probes)
        sizes = np.array([len(m) for m in members])
        budgets, filled = self.budgets(sizes, ratios, budget)
        picks = [self.pick_from(m, speculative, b, rng) for m, b in zip(members, budgets)]
        picked = np.concatenate([np.empty(0, dtype=np.int64), *picks])
        if len(picked) < budget:
            filled = budget - len(picked)
            rest = np.setdiff1d(eligible, picked)
            picked = np.concatenate([picked, rng.choose("fill", rest, filled)])
        diagnostics = pd.DataFrame(
            {
                "region": regions,
                "low": [speculative[m].min() for m in members],
                "high": [speculative[m].max() for m in members],
                "size": sizes,
                "verified": [len(p) for p in probes],
                "ratio": ratios,
                "budget": budgets,
                "picked": [np.isin(m, picked).sum() for m in members],
            }
        )
        scores = {"speculative": speculative, "verified": verified}
        return Coreset(picked, diagnostics, scores, filled, notes + of_target + of_ratios)

    def scored(self, pool: ScorePool, model: str, probes: Sequence[np.ndarray] | None = None) -> np.ndarray:
        """The scores of all samples, or of the probes alone (NaN elsewhere), shape (N,)."""
        name = "target's score" if model == "target" else "speculative score"
        ids = pool.ids
        if probes is None:
            return check_scores(self.ask(pool, model), ids, name, minimum=0)
        scores = np.full(len(ids), np.nan)
        asked = np.sort(np.concatenate([*probes, np.empty(0, dtype=np.int64)]))
        if len(asked):
            answer = self.ask(pool, model, asked)
            scores[asked] = check_scores(answer, [ids[int(i)] for i in asked], name, minimum=0)
        return scores

    def ask(self, pool: ScorePool, model: str, at: np.ndarray | None = None) -> np.ndarray:
        """The scores of a model for the samples at these positions (None: all), shape (n,)."""
        if self.signal == "perplexity":
            return np.exp(pool.ask("loss", model, at))
        if self.signal != "effort":
            return pool.ask(self.signal, model, at)
        if model == "small" and self.scores != "pass":
            model = "small@online" if self.scores == "online" else "small_once@online"
        return pool.ask("effort", model, at, **self.effort_options())

    def effort_options(self) -> dict[str, Any]:
        """The fields of the signal "effort"."""
        return {"parameters": self.gradient}

    def rescaled(self, scores: np.ndarray, pool: ScorePool, name: str) -> tuple[np.ndarray, tuple[str, ...]]:
        """The scores of a model times L^beta, shape (N,), with NaN where there is none; and notes."""
        if self.length_exponent == 0:
            return scores, ()
        lengths, notes = np.asarray(pool.answer_lengths, dtype=np.float64), ()
        exponent = self.length_exponent
        if isinstance(exponent, str):
            exponent = fitted_exponent(scores, lengths)
            notes = (f"the {name} scores are multiplied by L^{exponent:.2f}, L being the length of the answer.",)
        return scores * lengths**exponent, notes

    def regions(self, speculative: np.ndarray, eligible: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """The non-empty regions in serving order, and their members (positions in the pool)."""
        scores = speculative[eligible]
        edges = equal_width_edges(scores.min(), scores.max(), self.num_regions)
        return serving_order(stratify(scores, edges), eligible)

    def probes(self, members: list[np.ndarray], rng: Draws) -> list[np.ndarray]:
        """The samples of each region to verify: min(b_v, size) at random."""
        most = 0 if self.speculation == "target" else self.verification_budget
        return [rng.choose("verification", m, most) for m in members]

    def budgets(self, sizes: np.ndarray, ratios: np.ndarray, budget: int) -> tuple[np.ndarray, int]:
        """The regions' budgets, shape (regions,), and how many samples of them are a fill.

        The pass over the regions is repeated until the budget is spent or all regions are full. When a pass
        allocates nothing, the regions with the highest ratios get one more sample each; these are the fill.
        """
        budgets, filled = np.zeros(len(sizes), dtype=np.int64), 0
        while (left := budget - budgets.sum()) > 0:
            open_ = np.flatnonzero(sizes > budgets)
            if not len(open_):  # the samples left are in no region
                break
            given = share_out(left, (sizes - budgets)[open_], *self.shares(ratios[open_]))
            if not given.any():
                highest = np.argsort(-np.nan_to_num(ratios[open_], nan=1.0), kind="stable")[:left]
                given[highest] = 1
                filled += len(highest)
            budgets[open_] += given
        return budgets, filled

    def shares(self, ratios: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weights and totals for `share_out`, from the ratios of the regions."""
        if self.budget_rule == "share":
            return shares_of_ratio(ratios)
        return np.nan_to_num(ratios, nan=1.0), regions_left(len(ratios))

    def pick_from(self, members: np.ndarray, speculative: np.ndarray, count: int, rng: Draws) -> np.ndarray:
        """`count` samples of a region (positions in the pool)."""
        if self.pick == "random":
            return rng.choose("pick", members, count)
        order = np.lexsort((rng.priorities("ties")[members], -speculative[members]))
        return members[order[:count]]


def fitted_exponent(scores: np.ndarray, lengths: np.ndarray) -> float:
    """Minus the slope of log score on log length over the samples with a score above 0; 0 where it is undefined.

    Sums run in the order of lengths and scores, so that the order of the samples changes nothing.
    """
    known = np.nan_to_num(scores) > 0
    if len(np.unique(lengths[known])) < 2:
        return 0.0
    x, y = np.log(lengths[known]), np.log(scores[known])
    order = np.lexsort((y, x))
    centred = x[order] - x[order].mean()
    return -float(centred @ y[order] / (centred @ centred))


def verification_ratios(
    speculative: np.ndarray, verified: np.ndarray, probes: Sequence[np.ndarray]
) -> tuple[np.ndarray, tuple[str, ...]]:
    """V_i of each region, NaN if no sample was verified, and notes about undefined ratios.

    A ratio with a zero sum of small-model scores is undefined and taken as 1. Ratios that are all zero are taken as
    1 too.
    """
    small = np.array([speculative[p].sum() for p in probes])
    target = np.array([verified[p].sum() for p in probes])
    asked = np.array([len(p) > 0 for p in probes])
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratios = np.where(asked, target / small, np.nan)
    undefined = asked & ~np.isfinite(ratios)
    notes: tuple[str, ...] = ()
    if undefined.any():
        ratios[undefined] = 1.0
        notes += (f"{undefined.sum()} region(s) with a zero sum of small-model scores: ratio taken as 1.",)
    if asked.any() and not np.nan_to_num(ratios).any():
        ratios[asked] = 1.0
        notes += ("all verification ratios are zero: taken as 1.",)
    return ratios, notes
