"""Settings in which runs differ, and ablations, in which a single setting differs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

SEEDS = ["seed", "selection_seed", "finetune_seed"]
NAMES = ["family", "task", "method", "pruning_rate"]
# Settings that change no number but by rounding, have a column of their own, or are known better by content.
IGNORED_SETTINGS = (
    *("candidate", "tracking", "results_dir", "store_dir", "memory_check", "pruning_rate", "budget", *SEEDS),
    *("scoring.batch_tokens", "scoring.one_at_a_time", "evaluation.batch_tokens"),
    *("finetune.device_batch_size", "finetune.gradient_checkpointing", "finetune.fsdp"),
    *(f"task.{name}" for name in ("data_dir", "train_file", "test_file", "dev_file", "deduplicate")),
    *("identity.data.source", "method._target_"),
)


def is_ignored(setting: str) -> bool:
    """Whether runs that differ in this setting alone are the same to a report."""
    return any(setting == ignored or setting.startswith(f"{ignored}.") for ignored in IGNORED_SETTINGS)


def varying_columns(table: pd.DataFrame) -> list[str]:
    """The columns in which runs differ beside their seeds, as few as distinguish all of them.

    Names come first, then settings in the order of the configuration. A setting is left out where the columns
    before it distinguish the same runs already, such as a method's own settings where its name says it all.
    """
    keys = list(NAMES)
    groups = pd.concat([texts(table, name) for name in NAMES], axis=1).agg("|".join, axis=1)
    for column in (str(c) for c in table.columns if str(c).startswith("setting.")):
        name = column.removeprefix("setting.")
        if is_ignored(name):
            continue
        finer = groups + "|" + texts(table, column)
        if finer.nunique() > groups.nunique():
            keys.append(column)
            groups = finer
    return keys


def texts(table: pd.DataFrame, column: str) -> pd.Series:
    """A column as text, in which a missing value is one like others, and 1.0 is 1."""
    whole = [isinstance(value, float) and value.is_integer() for value in table[column]]
    values = [str(int(value) if w else value) for value, w in zip(table[column], whole)]
    return pd.Series(values, index=table.index, name=column)


def variants(table: pd.DataFrame) -> pd.Series:
    """What each run is called in a table: its method, and the settings in which it differs from others'."""
    labels = table["method"].fillna("custom").replace({"raw": "raw target"})
    for key in varying_columns(table)[len(NAMES) :]:
        name = key.removeprefix("setting.")
        values = pd.Series([_short(value) for value in table[key]], index=table.index)
        if name.endswith("._target_"):
            values, name = _ends(values, "."), name.removesuffix("._target_")
        if name.startswith("method."):  # shown where one method has several
            several = values.groupby(texts(table, "method")).transform("nunique") > 1
            values, name = values.where(several, ""), name.removeprefix("method.")
        labels = labels + np.where(values == "", "", f" {name}=" + values)
    return labels


def _short(value: Any) -> str:
    """A value as a label shows it: digests by their first digits, what a run does not have not at all."""
    if value is None or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value)
    if text.startswith("["):  # as on the command line
        text = text.replace('"', "").replace(", ", ",")
    return text[:8] if len(text) == 64 else text


def _ends(values: pd.Series, separator: str) -> pd.Series:
    """The part of each text after the last separator, where these differ as the texts do."""
    ends = values.str.rsplit(separator, n=1).str[-1]
    return ends if ends.nunique() == values.nunique() else values


@dataclass(frozen=True)
class Ablation:
    """Runs of one method that differ in one setting, in seeds and in the pruning rate alone.

    Attributes:
        setting: its name in the configuration, without the group "method".
        title: the same, the method, and what else tells these runs from another ablation of the same setting.
        runs: with the setting's value as `variant`.
    """

    setting: str
    title: str
    runs: pd.DataFrame


def ablations(table: pd.DataFrame) -> tuple[pd.DataFrame, list[Ablation]]:
    """The runs to compare methods by, and the ablations among all, as far as the records tell.

    Where the ablations of a method have one variant in common, that is the method, and the others stand in its
    ablations alone; an ablation without it counts where its runs are in no larger one. Without such a centre (a
    grid of two settings, or a single ablation) all are compared.
    """
    keys = ["method", *varying_columns(table)[len(NAMES) :]]
    values = pd.concat([texts(table, key) for key in keys], axis=1)
    variant = values.groupby(keys).ngroup()
    values = values.groupby(variant).first()
    groups = [(k, m) for k, m in _differing_in_one(values) if _differ_in_no_other(table[variant.isin(m)], k)]
    count = Counter(member for _, members in groups for member in members)
    compared, found = set(values.index), []
    for _, of_method in values.groupby("method").groups.items():
        most = max(count[member] for member in of_method)
        centres = [member for member in of_method if count[member] == most]
        mine = [(key, members) for key, members in groups if members[0] in of_method]
        if len(centres) == 1:
            compared -= {member for member in of_method if count[member] and member != centres[0]}
            largest = {x: max((len(m) for _, m in mine if x in m), default=0) for x in of_method}
            mine = [(k, m) for k, m in mine if centres[0] in m or any(largest[x] == len(m) for x in m)]
        elif len({key for key, _ in mine}) > 1:
            continue
        for key, members in mine:
            alike = values.loc[[member for other, them in mine if other == key for member in them]]
            apart = [k for k in keys if k != key and alike[k].nunique() > 1]
            found.append(_ablation(table[variant.isin(members)], key, apart))
    return table[variant.isin(compared)], found


def _differing_in_one(values: pd.DataFrame) -> Iterator[tuple[str, list[int]]]:
    """Each setting with the rows of `values` (a row per variant) that agree in all but it, two or more."""
    for key in [key for key in values if key != "method"]:
        for _, members in values.groupby([k for k in values if k != key]).groups.items():
            if len(members) > 1:
                yield str(key), list(members)


def _differ_in_no_other(runs: pd.DataFrame, key: str) -> bool:
    """Whether no setting of the method differs but `key`: the column that tells these runs apart, or one of those
    that stand for a setting with several values."""
    setting = ".".join(key.split(".")[:3])
    own = [c for c in runs if str(c).startswith("setting.method.") and c != "setting.method._target_"]
    others = [c for c in own if c != setting and not c.startswith(f"{setting}.")]
    return all(texts(runs, other).nunique() == 1 for other in others)


def _ablation(runs: pd.DataFrame, key: str, apart: list[str]) -> Ablation:
    """Of the setting `key`; the settings `apart` tell it from others of the same."""
    named = {k: k.removeprefix("setting.").removeprefix("method.") for k in (key, *apart)}
    fixed = "".join(f", {named[k]}={_short(runs[k].iloc[0])}" for k in apart)
    values = pd.Series([_short(value) or "none" for value in runs[key]], index=runs.index)
    values = _ends(values, "/")  # of paths
    title = f"{named[key]} of {runs['method'].fillna('custom').iloc[0]}{fixed}"
    return Ablation(named[key], title, runs.assign(variant=values))
