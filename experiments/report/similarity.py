"""Do the small model and the target sort the samples into the same regions?"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
from scipy import stats

from experiments.report.records import Context
from experiments.report.tables import Table
from staff.regions import equal_width_edges, stratify


def region_similarity(small: np.ndarray, target: np.ndarray, num_regions: int) -> dict[str, float]:
    """How alike the regions of equal score width are that two models' scores make of the same samples.

    Args:
        small, target: scores, shape (N,), all finite; each model's regions span its own scores.

    Returns:
        "same region": the share of samples that lie in the region of the same rank with both; "by chance": that
        share were the scores of one model dealt out anew; "mean overlap": Jaccard's index of the two models' i-th
        regions, averaged over those in which either has samples; "Spearman": of the scores, NaN where constant.
    """
    a, b = (stratify(s, equal_width_edges(s.min(), s.max(), num_regions)) for s in (small, target))
    sizes_a, sizes_b, shared = (np.bincount(r, minlength=num_regions) for r in (a, b, a[a == b]))
    either = sizes_a + sizes_b - shared
    constant = np.ptp(small) == 0 or np.ptp(target) == 0
    return {
        "same region": float((a == b).mean()),
        "by chance": float((sizes_a / len(a)) @ (sizes_b / len(b))),
        "mean overlap": float((shared[either > 0] / either[either > 0]).mean()),
        "Spearman": np.nan if constant else float(stats.spearmanr(small, target).statistic),
    }


def similarity(context: Context) -> Table | None:
    """By variant of STAFF, at the pruning rate of most methods, where the target scored every sample."""
    rate, _ = context.shown
    rows = []
    for variant in filter(context.is_staff, context.variants):
        found = pd.DataFrame(_similarities(context, context.cells.get((variant, rate), pd.DataFrame())))
        if len(found):
            row = {"method": variant, "regions": f"{found.pop('regions')[0]:g}", "seeds": str(len(found))}
            rows.append(row | {name: f"{values.mean():.2f}" for name, values in found.items()})
    if not rows:
        return None
    caption = (
        "Regions of equal score width by the speculative scores (the small model's, unless said otherwise) and by "
        f"the target's, on {context.title}, where the target scored every sample. Same region: the part of the "
        "samples that both put into the region of the same rank; by chance: as many as would be, were the scores of"
        " one dealt out anew; mean overlap: Jaccard's index of the two i-th regions, averaged over those in which "
        "either has samples. Means over seeds."
    )
    return Table(f"similarity-{context.name}", caption, pd.DataFrame(rows))


def _similarities(context: Context, runs: pd.DataFrame) -> Iterator[dict[str, float]]:
    for run in runs.to_dict("records"):
        samples = context.recorded[run["name"]].samples()
        if samples is not None and not samples[["speculative", "verified"]].isna().any(axis=None):
            both = samples[["speculative", "verified"]].to_numpy().T
            count = int(run["num_regions"])
            yield {"regions": count, **region_similarity(both[0], both[1], count)}
