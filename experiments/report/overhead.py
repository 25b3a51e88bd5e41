"""Tables of what selection costs: in all, by stage, against one another, and against fine-tuning on everything."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from experiments.report.records import Context
from experiments.report.rendering import NONE, Table, average, machine, number


def tables(context: Context) -> list[Table]:
    """Those that the context's runs have something to say to."""
    made = [overhead(context)]
    if context.varied == "method":
        made += [stages(context), savings(context), break_even(context)]
    return [table for table in made if table is not None]


def _selecting(context: Context) -> Iterator[tuple[str, float, pd.DataFrame]]:
    """The cells of methods that select, method by method."""
    for variant in context.variants:
        for rate in context.rates:
            if variant not in ("raw target", "full") and (variant, rate) in context.cells:
                yield variant, rate, context.cells[variant, rate]


def overhead(context: Context) -> Table | None:
    """What selecting cost, every stage that was read included."""
    rows = []
    for variant, rate, runs in _selecting(context):
        measured = runs["overhead_str_basis"] == "measured"
        row = {
            "method": variant,
            "pruning rate": f"{rate:g}",
            "seconds": average(runs["overhead_seconds"]),
            "TFLOPs": average(runs["overhead_flops"] / 1e12),
            "STR": average(runs.loc[measured, "overhead_str"]),
            "STR, estimated": average(runs.loc[~measured, "overhead_str"], "~"),
            "peak memory (GiB)": average(runs["overhead_peak_memory_bytes"] / 2**30),
        }
        rows.append(row)
    if not rows:
        return None
    cells = pd.DataFrame(rows)
    if (cells["STR, estimated"] == NONE).all():
        cells = cells.drop(columns="STR, estimated")
    caption = (
        f"Overhead of selection on {context.title}, means over seeds; whatever a selection read is charged to it. "
        "STR: selection time / time to fine-tune the target on the whole pool, where that was measured; estimated "
        f"from FLOPs elsewhere, and never averaged with the measured.{machine(context)}"
    )
    return Table(f"overhead-{context.name}", caption, cells)


def stages(context: Context) -> Table | None:
    """The overhead by stage."""
    rows = []
    for variant, rate, runs in _selecting(context):
        parts = pd.DataFrame([stage for charged in runs["stages"] for stage in charged])
        parts["label"] = parts["label"].str.replace(r"\b\d+\b", "N", regex=True)
        for label, part in parts.groupby("label", sort=False):
            totals = {name: part[name].sum() / len(runs) for name in ("seconds", "flops")}
            row = {"method": variant, "pruning rate": f"{rate:g}", "stage": str(label)}
            row |= {"seconds": number(totals["seconds"]), "TFLOPs": number(totals["flops"] / 1e12)}
            rows.append(row | {"peak memory (GiB)": number(part["peak_memory_bytes"].max() / 2**30)})
    if not rows:
        return None
    caption = f"Overhead of selection by stage on {context.title}, means over seeds.{machine(context)}"
    return Table(f"stages-{context.name}", caption, pd.DataFrame(rows))


def savings(context: Context) -> Table | None:
    """What STAFF saves of each other's overhead, beside what the paper claims."""
    rows = []
    for variant, rate, runs in _selecting(context):
        for other in context.baselines if context.is_staff(variant) else ():
            theirs = context.cells.get((other, rate))
            if theirs is None or not theirs["overhead_flops"].mean():
                continue
            saved = {
                c: 1 - runs[f"overhead_{c}"].mean() / theirs[f"overhead_{c}"].mean() for c in ("seconds", "flops")
            }
            row = {"method": variant, "against": other, "pruning rate": f"{rate:g}"}
            rows.append(row | {f"{name} saved": f"{100 * part:+.1f} %" for name, part in saved.items()})
    if not rows:
        return None
    caption = (
        f"The part of another method's selection overhead that STAFF saves on {context.title}; the paper claims "
        "up to 70.5 %. Negative: STAFF costs more. Methods that ask no model have nothing to save and are left out."
        f"{machine(context)}"
    )
    return Table(f"savings-{context.name}", caption, pd.DataFrame(rows))


def break_even(context: Context) -> Table | None:
    """Selection and fine-tuning on the coreset against fine-tuning on everything."""
    rows = []
    for unit, scale, name in (("seconds", 1.0, "seconds"), ("flops", 1e12, "TFLOPs")):
        for variant, rate, runs in _selecting(context):
            measured = runs["overhead_str_basis"] == "measured"
            mark = "" if unit == "flops" or measured.any() else "~"
            known = runs[measured] if measured.any() else runs
            select, tune = (runs[f"{of}_{unit}"].astype(float).mean() / scale for of in ("overhead", "finetuning"))
            full = known[f"overhead_full_finetuning_{unit}"].astype(float).mean() / scale
            if np.isnan(full) or np.isnan(tune):
                continue
            pays = f"{max(1, np.ceil(select / (full - tune))):.0f}" if tune < full else "never"
            row = {"in": name, "method": variant, "pruning rate": f"{rate:g}", "selection": number(select)}
            row |= {"fine-tuning on the coreset": number(tune), "on everything": mark + number(full)}
            rows.append(row | {"ratio": f"{mark}{(select + tune) / full:.2f}", "pays from": mark + pays})
    if not rows:
        return None
    caption = (
        f"Does a coreset pay on {context.title}? Selection and one fine-tuning of the target on the coreset, "
        "against one on everything; a ratio below 1 pays at once. Pays from: so many fine-tunings on one coreset "
        "(of several settings, say) cost less than as many on everything, selection included. Means over seeds "
        "(on everything: over those that were measured; ~: estimated from FLOPs, where none was); "
        f"whether the result is as good stands in the table of performance.{machine(context)}"
    )
    return Table(f"break-even-{context.name}", caption, pd.DataFrame(rows))
