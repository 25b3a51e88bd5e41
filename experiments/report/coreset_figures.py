"""Figures of single coresets: scores, regions, agreement of the two models, overlap and answer lengths."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import stats

from experiments.report.contrasts import IN_SETS
from experiments.report.records import Context
from experiments.report.rendering import figure_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAST = 4  # verified samples of a region, below which its rank correlation says nothing
MOST = 20_000  # points of a kind in a scatter plot, evenly spread over the pool
MANY = 12  # methods beyond which a figure is wide and has no legend, which could not be read
Made = tuple["Figure", str] | None


def coreset(context: Context) -> Made:
    """Scores of pool and coreset; each region's size, budget and verified ratio."""
    found = staffs_run(context)
    if found is None:
        return None
    variant, rate, samples, regions = found
    regions = regions.sort_values("low")
    figure, (top, middle, bottom) = figure_of(3, 1, height=4.0, sharex=True)
    scores, colour = samples["speculative"], "#0072B2"
    bins = np.linspace(scores.min(), scores.max(), 51).tolist()
    top.hist(scores, bins=bins, color="0.75", label="pool")
    top.hist(scores[samples["selected"]], bins=bins, color=colour, label="coreset")
    top.set(yscale="log", ylabel="samples", ylim=(0.7, None))
    centre, width = (regions["low"] + regions["high"]) / 2, (scores.max() - scores.min()) / 50 * 0.8
    middle.bar(centre, regions["size"], width=width, color="0.75", label="size")
    middle.bar(centre, regions["budget"], width=width, color=colour, label="budget")
    middle.set(yscale="log", ylabel="samples, by region", ylim=(0.7, None))
    bottom.axhline(1, color="0.35", linewidth=0.8, linestyle=":")
    bottom.scatter(centre, regions["ratio"], s=4 + 3 * regions["verified"], color="#D55E00", linewidth=0)
    bottom.set(ylabel="verified ratio $V_i$", xlabel="speculative score (effort of the small model)")
    for axes in (top, middle):
        axes.legend(loc="upper right")
    caption = (
        f"A coreset of {variant} on {context.title}, pruning rate {rate:g}: scores of pool and coreset; each "
        "region's size and budget; its ratio V of target scores to small-model scores (a larger dot: more samples "
        "verified). Empty regions are left out."
    )
    return figure, caption


def _spread_labels(axis: Any, shown: pd.Series) -> None:
    """On a logarithmic axis, labels that do not run into one another, whether over a part of a decade or more."""
    from matplotlib.ticker import LogLocator, NullFormatter

    decades = np.log10(shown.max() / shown.min())
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def agreement(context: Context) -> Made:
    """Scores of the small model against those of the target, and their rank correlation by region."""
    found = staffs_run(context)
    if found is None:
        return None
    variant, rate, samples, regions = found
    both = samples.dropna(subset=["verified"])
    both = both[(both["speculative"] > 0) & (both["verified"] > 0)]
    if len(both) < LEAST:
        return None
    bounds = regions.sort_values("low")
    place = np.searchsorted(bounds["low"], both["speculative"], side="right") - 1
    groups = [(bounds.iloc[i], part) for i, part in both.groupby(place) if len(part) >= LEAST]
    by_region = [
        (r["low"], r["high"], len(part), spearman(part["speculative"], part["verified"])) for r, part in groups
    ]
    figure, (left, right) = figure_of(2, 1, height=4.0)
    left.scatter(
        both["speculative"], both["verified"], s=6, color="#0072B2", alpha=0.6, linewidth=0, rasterized=True
    )
    left.set(xscale="log", yscale="log", xlabel="small model's score", ylabel="target's score")
    _spread_labels(left.xaxis, both["speculative"])
    _spread_labels(left.yaxis, both["verified"])
    overall = spearman(both["speculative"], both["verified"])
    left.set_title(f"all {len(both)} verified samples: Spearman {overall:.2f}")
    right.axhline(0, color="0.35", linewidth=0.8)
    right.axhline(overall, color="0.35", linewidth=0.8, linestyle="--")
    for low, high, count, value in by_region:
        right.plot([low, high], [value, value], color="#D55E00", linewidth=1)
        right.scatter((low + high) / 2, value, s=2 + 2 * min(count, 20), color="#D55E00", linewidth=0)
    right.set(ylim=(-1.05, 1.05), xlabel="small model's score", ylabel="Spearman in region")
    caption = (
        f"Agreement of the small model's and the target's scores where both are known ({variant}, {context.title}, "
        f"pruning rate {rate:g}). Below: within each region with {LEAST} or more verified samples (dashed: over "
        "all); of so few samples single values are mostly chance."
    )
    return figure, caption


def overlap(context: Context) -> Made:
    """How much the coresets of all methods share: of different seeds, where there are any, since at one seed
    methods that draw at random draw by the same numbers."""
    rate, shown = context.shown
    named = [v for v in shown if not v.startswith(IN_SETS)]
    coresets = {v: found for v in named if (found := _coresets(context, v, rate))}
    if len(coresets) < 2:
        return None
    apart = len({seeds for found in coresets.values() for seeds in found}) > 1
    jaccard = np.array([[_shared(a, b, apart) for b in coresets.values()] for a in coresets.values()])
    many = len(coresets) > MANY
    figure, axes = figure_of(height=min(max(2.4, 0.36 * len(coresets) + 1.1), 6.4 if many else 5.0))
    turned = {"rotation": 90, "va": "center"} if many else {"rotation": 35}
    if many:
        figure.set_figwidth(6.8)
    image = axes.imshow(jaccard, vmin=0, vmax=1)
    axes.grid(False)
    axes.set_xticks(range(len(coresets)), list(coresets), ha="right", rotation_mode="anchor", **turned)
    axes.set_yticks(range(len(coresets)), list(coresets))
    for (i, j), value in np.ndenumerate(jaccard):
        text = "–" if np.isnan(value) else f"{value:.2f}"
        axes.text(
            j, i, text, ha="center", va="center", fontsize=4 if many else 6, color="w" if value < 0.5 else "k"
        )
    figure.colorbar(image, ax=axes, label="Jaccard", shrink=0.8)
    share = 1 - rate
    seeds = "mean over pairs of different seeds, so that a method's own coresets are compared as well"
    same = (
        "one seed, at which methods that draw at random draw by the same numbers and so share more than by chance"
    )
    caption = (
        f"Overlap of coresets on {context.title}, pruning rate {rate:g}: |A and B| / |A or B|, "
        f"{seeds if apart else same}. Two independent random coresets would share {share / (2 - share):.2f}."
    )
    return figure, caption


def _coresets(context: Context, variant: str, rate: float) -> dict[int, np.ndarray]:
    """Hashes of 64 bits of the ids of the samples that were selected, by selection seed."""
    runs = context.cells[variant, rate].set_index("selection_seed")["name"]
    tables = {int(str(seed)): _selected(context.recorded[str(name)].samples()) for seed, name in runs.items()}
    return {seed: table for seed, table in tables.items() if table is not None}


def _selected(samples: pd.DataFrame | None) -> np.ndarray | None:
    if samples is None:
        return None
    return np.unique(pd.util.hash_array(samples.loc[samples["selected"], "id"].to_numpy(), categorize=False))


def _shared(a: dict[int, np.ndarray], b: dict[int, np.ndarray], apart: bool) -> float:
    """The mean Jaccard index of coresets of different seeds, or else of the same."""
    shares = [_jaccard(x, y) for i, x in a.items() for j, y in b.items() if (i != j) == apart]
    return float(np.mean(shares)) if shares else float("nan")


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)


def length(context: Context) -> Made:
    """Each method's score against the length of the answer, pool and coreset."""
    rate, runs = context.shown
    panels = []
    for variant, run in sorted(runs.items(), key=lambda item: not context.is_staff(item[0])):
        samples = run.samples()
        if samples is None or "answer_tokens" not in samples:
            continue
        score = next((c for c in samples if c not in ("id", "selected", "answer_tokens")), None)
        if score is not None and samples[score].notna().sum() >= LEAST and len(panels) < 8:
            panels.append((variant, score, samples[["selected", "answer_tokens", score]]))
    if not panels:
        return None
    rows = (len(panels) + 1) // 2
    columns = min(2, len(panels))
    figure, axes = figure_of(rows, columns, height=0.5 + 1.5 * rows, squeeze=False)
    for place, (variant, score, samples) in zip(axes.flat, panels):
        constant = samples[score].nunique() < 2
        rho = "constant" if constant else f"{spearman(samples['answer_tokens'], samples[score]):.2f}"
        for part, colour, size in ((~samples["selected"], "0.7", 3), (samples["selected"], "#0072B2", 5)):
            shown = samples[part]
            shown = shown[:: 1 + len(shown) // MOST]
            place.scatter(shown["answer_tokens"], shown[score], s=size, color=colour, linewidth=0, rasterized=True)
        place.set_title(f"{variant}: {rho}", fontsize=7)
        place.set(ylabel=score)
    for place in axes.flat[len(panels) :]:
        place.set_axis_off()
    figure.supxlabel("answer length (tokens)", fontsize=8)
    means = [f"{v} {s.loc[s['selected'], 'answer_tokens'].mean():.1f}" for v, _, s in panels]
    caption = (
        f"Score against answer length on {context.title}, pruning rate {rate:g}, lowest seed; the coreset in blue. "
        "Above each panel: Spearman's correlation. "
        f"Mean answer length: pool {panels[0][2]['answer_tokens'].mean():.1f} tokens; coresets: {', '.join(means)}."
    )
    return figure, caption


def spearman(a: pd.Series, b: pd.Series) -> float:
    """0 where one of them is constant, of which nothing can be said."""
    if a.nunique() < 2 or b.nunique() < 2:
        return 0.0
    return float(stats.spearmanr(a, b, nan_policy="omit").statistic)


def staffs_run(context: Context) -> tuple[str, float, pd.DataFrame, pd.DataFrame] | None:
    """The shown run of STAFF whose scores and regions are known."""
    rate, runs = context.shown
    for variant, run in runs.items():
        samples, regions = run.samples(), run.regions()
        if context.is_staff(variant) and samples is not None and regions is not None and "verified" in samples:
            return variant, rate, samples, regions
    return None
