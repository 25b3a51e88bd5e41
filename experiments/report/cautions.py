"""The table of warnings: fine-tunings that taught little, and seeds that change no answer."""

from __future__ import annotations

from collections import defaultdict

import pandas as pd

from experiments.report.records import Context
from experiments.report.settings import SEEDS
from experiments.report.tables import Table, rate_column


def table(context: Context) -> Table | None:
    """Every warning of the runs' records, and runs of different seeds with the same answers; None without any."""
    rows = []
    for (variant, rate), runs in context.cells.items():
        seeds_by_text = defaultdict(list)
        for _, run in runs.iterrows():
            for text in run["warnings"]:
                seeds_by_text[text].append(_seed(run))
        for alike in context.same_answers(runs):
            text = f"{len(alike)} seeds, and the same answer to every test sample: these runs count as one"
            seeds_by_text[text] += [_seed(run) for _, run in alike.iterrows()]
        for text, seeds in seeds_by_text.items():
            where = {"method": variant, "pruning rate": rate_column(rate), "seeds": ", ".join(seeds)}
            rows.append({**where, "warning": text})
    if not rows:
        return None
    caption = (
        f"Results on {context.title} to be read with care. A fine-tuning of few optimiser steps, or that moved no "
        "weight, leaves the model nearly or exactly as it was. Answers that score less than a constant one tell "
        "little of their prompts. Seeds that give the same answers say nothing of how results vary by seed."
    )
    return Table(f"warnings-{context.name}", caption, pd.DataFrame(rows))


def _seed(run: pd.Series) -> str:
    """The run's seed, or selection and fine-tuning seed where they differ."""
    _, selection, finetune = (str(run[name]) for name in SEEDS)
    return selection if selection == finetune else f"{selection}/{finetune}"
