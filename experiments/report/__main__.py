"""Write metrics.csv, tables/, figures/ and report.html from recorded runs, and print means over seeds."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

import pandas as pd

from experiments import command
from experiments.recorded import recorded_runs
from experiments.report import audit, contrasts, floors, overhead, performance, supplementary, verdicts
from experiments.report.browse import browse
from experiments.report.comparisons import pairs
from experiments.report.records import by_metric, collect, contexts
from experiments.report.settings import varying_columns
from experiments.report.supplementary import similarity
from experiments.report.verdicts import DEFAULT, Question
from staff.errors import UserError
from staff.runtime.files import local_path

PAPER = Path(__file__).resolve().parent / "table1.csv"


def write(results: Path, table: pd.DataFrame, question: Question = DEFAULT, options: str = "") -> Path:
    """Write everything under `results` that the records in `table` give; the page's path.

    `options` are those of the command that asks `question`, for the files to name. A report by another metric than
    the first one of a task has tables, figures and a page beside those of the first.
    """
    from experiments.report import figures, page

    apart = "-by-" + table["metric"].iloc[0] if "first_metric" in table else ""
    nested = ["stages", "floors", "groups", "planted", "by_group"]
    flat = table.drop(columns=nested).assign(warnings=table["warnings"].str.join(" "))
    flat.to_csv(results / "metrics.csv", index=False)
    paper = pd.read_csv(PAPER)
    sections, every = [], contexts(table, results)
    for context in every:
        found = pairs(context)
        tables = [
            *verdicts.tables(context, question),
            *audit.tables(context),
            *performance.tables(context, found, paper, question),
            floors.recorded(context),
            *supplementary.groups(context),
            supplementary.ablations(
                context, [each for each in every if each.title.startswith(f"{context.title}: ")]
            ),
            *overhead.tables(context),
            similarity(context),
            supplementary.warnings(context),
        ]
        tables = [table.headed(context.varied) for table in tables if table is not None]
        drawn = figures.draw(context, results / "figures")
        for each in tables:
            each.write(results / "tables", context.made_by + options)
        sections.append(page.Section(context, tables, drawn))
    figures.draw_contrasts(
        [context for context in every if context.varied == "method"],
        *(paper, results / "figures" / f"contrasts{apart}", question),
    )
    return page.write(results / f"report{apart}.html", sections, table, question, options)


def asked(table: pd.DataFrame, results: Path, arguments: argparse.Namespace) -> tuple[Question, str]:
    """What the options of the command ask of the records in `table`, and these options as text.

    Raises:
        UserError: methods or a pruning rate that the records do not have, or a margin or effect that is not above
            zero.
    """
    options, named = f" --metric {arguments.metric}" if arguments.metric else "", None
    for name in ("margin", "effect"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name} {value:g} must be a number above 0, in the metric's units.")
        options += "" if value is None else f" --{name} {value:g}"
    if arguments.contrasts:
        methods = dict.fromkeys(v for context in contexts(table, results) for v in context.variants)
        named = tuple(contrasts.parse(arguments.contrasts, [*methods]))
        options += f" --contrasts {shlex.join(arguments.contrasts)}"
    if arguments.rates and (unknown := set(arguments.rates) - set(table["pruning_rate"])):
        recorded = ", ".join(f"{rate:g}" for rate in sorted(set(table["pruning_rate"])))
        raise UserError(f"--rates {min(unknown):g} is not a pruning rate of the records: choose from {recorded}.")
    rates = tuple(arguments.rates) if arguments.rates else None
    options += "".join([" --rates", *(f" {rate:g}" for rate in rates)]) if rates else ""
    return Question(named, rates, arguments.margin, arguments.effect), options


def left_over(results: Path) -> list[Path]:
    """Tables and figures that the latest report, whose `metrics.csv` came first, did not write, but for tables of
    floors, which have a command of their own."""
    written = (results / "metrics.csv").stat().st_mtime_ns
    files = sorted(file for folder in ("tables", "figures") for file in (results / folder).glob("*"))
    return [file for file in files if file.stat().st_mtime_ns < written and not file.name.startswith("floors-")]


def summary(table: pd.DataFrame) -> str:
    """Mean and standard deviation over seeds, never over runs that differ in anything else."""
    varied = varying_columns(table)
    keys = [k for k in varied if k in ("method", "pruning_rate") or len({str(v) for v in table[k]}) > 1]
    for basis, column in (("measured", "STR"), ("estimated from FLOPs", "STR estimated")):
        table = table.assign(**{column: table["overhead_str"].where(table["overhead_str_basis"] == basis)})
    numbers = [*table["metric"].unique(), "overhead_seconds", "STR", "STR estimated"]
    numbers = [name for name in numbers if table[name].notna().any()]
    grouped = table.groupby(keys, dropna=False)[numbers].agg(["mean", "std"])
    grouped.columns = [" ".join(column) for column in grouped.columns]
    grouped.insert(0, "runs", table.groupby(keys, dropna=False).size())
    text = grouped.astype(object).map(lambda v: "-" if pd.isna(v) else v if isinstance(v, int) else f"{v:.3f}")
    said = f"runs differ by {', '.join(key.removeprefix('setting.') for key in keys)}"
    return f"{text.reset_index().to_string(index=False)}\n\n{said}; averaged over seeds."


def unfinished(results: Path) -> tuple[list[str], list[str]]:
    """Jobs of sweeps and single runs that failed, and jobs of sweeps that were never finished."""
    recorded = recorded_runs(results)
    expected: dict[str, None] = {}
    failed: dict[str, str] = {}
    done: set[str] = set()
    for jobs in sorted(results.glob("sweeps/*/jobs.json")):
        sweep = jobs.parent
        expected |= dict.fromkeys(json.loads(jobs.read_text()))
        for file in sorted(sweep.glob("[0-9]*.json")):
            word = json.loads(file.read_text())
            if "failure" in word:
                failed[word["job"]] = word["failure"]
            elif Path(word["folder"]).name in recorded:
                done.add(word["job"])
    failures = [f"{job}: {why}" for job, why in failed.items() if job not in done]
    alone = [file.parent for file in sorted(results.glob("runs/*/failure.txt"))]
    failures += [f"{f.name}: see {f / 'failure.txt'}" for f in alone if f.name not in recorded]
    return failures, [job for job in expected if job not in done and job not in failed]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="staff-report", description=__doc__)
    parser.add_argument(
        "--results",
        type=local_path,
        default=Path("results"),
        help="folder with runs/ or packed runs (default: results)",
    )
    parser.add_argument(
        "--contrasts",
        nargs="+",
        metavar="METHOD-METHOD",
        help="differences that the runs were made to measure, such as staff-random staff-best (default: STAFF, or "
        "your own method, minus random, minus the best other method, and minus random draws of its answer lengths)",
    )
    parser.add_argument(
        "--rates",
        nargs="+",
        type=float,
        metavar="RATE",
        help="pruning rates of the contrasts, which are corrected for one another (default: all, and their mean)",
    )
    parser.add_argument(
        "--metric", help="compare by this metric, in separate files (default: the first of each task)"
    )
    parser.add_argument("--margin", type=float, help="largest difference that counts as equal (default: by metric)")
    parser.add_argument(
        "--effect", type=float, help="plan seeds for a difference of this size (default: the margin)"
    )
    parser.add_argument(
        "--allow-missing", action="store_true", help="exit with 0 although runs failed or are missing"
    )
    parser.add_argument(
        "--browse",
        type=local_path,
        metavar="RUN",
        help="write a page with all samples of a run, selected or not; RUN is a name in RESULTS/runs or a folder",
    )
    parser.add_argument("--output", type=local_path, help="file for --browse (default: RUN/browse.html)")
    return parser


@command
def main() -> None:
    arguments = _parser().parse_args()
    if arguments.output and not arguments.browse:
        raise UserError("--output is given without --browse: name a run to browse, or leave it out.")
    if arguments.browse:
        by_name = len(arguments.browse.parts) == 1 and not arguments.browse.exists()
        run = arguments.results / "runs" / arguments.browse if by_name else arguments.browse
        print(browse(run, arguments.output))
        return
    table = collect(arguments.results)
    if table.empty:
        raise UserError(
            f"{arguments.results}/runs holds no record: run `staff` first, or name another folder by --results."
        )
    if arguments.metric:
        table = by_metric(table, arguments.metric)
    page = write(arguments.results, table, *asked(table, arguments.results, arguments))
    print(f"{summary(table)}\n\n{len(table)} runs: {arguments.results / 'metrics.csv'}, tables/, figures/, {page}")
    if warned := int(table["warnings"].astype(bool).sum()):
        print(f"{warned} runs with warnings: {arguments.results / 'tables'}/warnings-*.md")
    for file in [] if arguments.metric else left_over(arguments.results):
        print(f"not written by this report: {file}")
    failures, missing = unfinished(arguments.results)
    for kind, jobs in (("failed", failures), ("missing", missing)):
        for job in jobs:
            print(f"{kind}: {job}")
    if (failures or missing) and not arguments.allow_missing:
        sys.exit(
            f"{len(failures)} failed, {len(missing)} missing: the sweep's command again runs them "
            "(to forget a sweep, delete its folder under sweeps/; a run that failed alone, its folder under runs/)."
        )


if __name__ == "__main__":
    main()
