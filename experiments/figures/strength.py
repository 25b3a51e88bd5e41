"""Draw the metric of methods against the strength of what is planted: `python -m experiments.figures.strength`.

A line a method over a setting of the planted task, such as the share of wrong answers
(`experiment=planted task.wrong=0,0.05,0.15,0.3`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from experiments import command
from experiments.recorded import recorded_runs
from experiments.report.rendering import Drawn, figure_of, save, shown_as, styled
from staff.errors import UserError
from staff.runtime.files import local_path

SETTINGS = ("wrong", "repeats", "near", "rarity", "lengths", "size")


def measured(results: Path, rate: float) -> pd.DataFrame:
    """Method, seed, strengths and first metric of every run on the planted task that is of `rate` or keeps all."""
    rows = []
    for run in recorded_runs(results).values():
        record = run.record()
        about, task = record["run"], record["config"]["task"]
        if task["_target_"].endswith("PlantedTask") and record["metrics"] and about["pruning_rate"] in (0, rate):
            row = {"method": about["method"], "seed": str((about["selection_seed"], about["finetune_seed"]))}
            metric = {"metric": about["metric"], "value": record["metrics"][about["metric"]]}
            rows.append({**row, **{name: task[name] for name in SETTINGS}, **metric})
    return pd.DataFrame(rows, columns=["method", "seed", *SETTINGS, "metric", "value"])


def table(results: Path, setting: str, rate: float) -> pd.DataFrame:
    """The runs that `measured` finds, as far as a curve over the setting is made of them.

    Raises:
        UserError: the runs have a single value of the setting, or differ in another one too.
    """
    found = measured(results, rate)
    if len(set(found[setting])) < 2:
        raise UserError(
            f"{results} holds no planted runs at pruning rate {rate:g} with two values of task.{setting}: carry "
            f"out experiment=planted with several, or name other results, --rate or --setting."
        )
    others = [name for name in ("metric", *SETTINGS) if name != setting and len(set(found[name])) > 1]
    if others:
        raise UserError(
            f"the planted runs in {results} also differ in {', '.join(others)}: name a folder for each."
        )
    return comparable(found, setting)


def comparable(found: pd.DataFrame, setting: str) -> pd.DataFrame:
    """The runs of methods with two values of the setting or more, of seeds that ran at all the method's values."""
    values = found.groupby("method")[setting].transform("nunique").to_numpy()
    of_seed = found.groupby(["method", "seed"])[setting].transform("nunique").to_numpy()
    return found.loc[(values > 1) & (of_seed == values)]


def draw(found: pd.DataFrame, setting: str, file: Path, made_by: str) -> Drawn:
    """The mean over seeds of each method by the setting's value; bars reach from the lowest to the highest seed."""
    with styled():
        figure, axes = figure_of(height=2.8)
        for method, runs in found.groupby("method"):
            means = runs.groupby(setting)["value"].agg(["mean", "min", "max"])
            reach = [means["mean"] - means["min"], means["max"] - means["mean"]]
            axes.errorbar(means.index, means["mean"], reach, marker="o", capsize=2, label=str(method))
        axes.set(xlabel=f"task.{setting}", ylabel=shown_as(str(found["metric"].iloc[0])))
        axes.set_ylim(bottom=min(0, found["value"].min()))
        axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        seeds = len(set(found["seed"]))
        caption = (
            f"{setting} by method: means over {seeds} seed{'s' if seeds > 1 else ''}, bars from lowest to highest."
        )
        return save(figure, caption, file, made_by)


@command
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.figures.strength", description=__doc__)
    parser.add_argument("--results", type=local_path, default=Path("results"), help="default: results")
    parser.add_argument("--setting", choices=SETTINGS, default="wrong", help="of the planted task; default: wrong")
    parser.add_argument("--rate", type=float, default=0.9, help="pruning rate; default: 0.9")
    asked = parser.parse_args()
    found = table(asked.results, asked.setting, asked.rate)
    made_by = f"python -m experiments.figures.strength --results {asked.results} --setting {asked.setting}"
    drawn = draw(found, asked.setting, asked.results / "figures" / f"strength-{asked.setting}", made_by)
    print(found.pivot_table(index="method", columns=asked.setting, values="value").round(1).to_string())
    print(f"{drawn.file}.svg, {drawn.file}.png")


if __name__ == "__main__":
    main()
