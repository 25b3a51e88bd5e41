"""How a report looks: tables as Markdown and as LaTeX (booktabs), figures as PNG and SVG, and how numbers and
captions are worded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from experiments.report.comparisons import mean
from experiments.report.records import Context
from staff.evaluation.metrics import named_metric

if TYPE_CHECKING:
    from matplotlib.figure import Figure


NONE = "–"
INTERVAL_OVER = {True: "seeds and samples", False: "samples alone"}
"""What the interval of a difference holds the errors of, by whether there are two seeds or more."""
LATEX = str.maketrans(
    {**{c: f"\\{c}" for c in "%_&#${}"}, "~": r"\textasciitilde{}", "^": r"\^{}", "\\": r"\textbackslash{}"}
)
SHOWN_AS = {
    "rougeL": "ROUGE-L",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "bleu": "BLEU",
    "chrf": "chrF",
    "exact": "exact match",
    "exact_match": "exact match of the final number",
}


@dataclass(frozen=True)
class Table:
    """Cells as text; `marks` says which are "bold" or "italic", by row position and column."""

    name: str
    caption: str
    cells: pd.DataFrame
    marks: dict[tuple[int, str], str] = field(default_factory=dict)

    def headed(self, varied: str) -> Table:
        """With `varied` at the head of the column of methods, where the rows are not methods."""
        return replace(self, cells=self.cells.rename(columns={"method": varied}))

    def markdown(self) -> str:
        signs = {"bold": "**{}**", "italic": "*{}*"}
        cells = self.cells.map(lambda text: str(text).replace("|", r"\|").replace("*", r"\*"))
        for (row, column), mark in self.marks.items():
            cells.loc[row, column] = signs[mark].format(cells.loc[row, column])
        headed = cells.rename(columns=lambda text: str(text).replace("|", r"\|"))
        align = ["left" if is_text(cells[c]) else "right" for c in cells]
        return f"{headed.to_markdown(index=False, disable_numparse=True, colalign=align)}\n\n{self.caption}\n"

    def latex(self) -> str:
        css = pd.DataFrame("", index=self.cells.index, columns=self.cells.columns)
        for (row, column), mark in self.marks.items():
            css.loc[row, column] = {"bold": "font-weight: bold", "italic": "font-style: italic"}[mark]
        style = self.cells.style.hide(axis="index").apply(lambda _: css, axis=None).format(escape="latex")
        style = style.format_index(escape="latex", axis=1)
        align = "".join("l" if is_text(self.cells[c]) else "r" for c in self.cells)
        caption, label = self.caption.translate(LATEX), f"tab:{self.name}"
        return style.to_latex(
            hrules=True, convert_css=True, column_format=align, caption=caption, label=label, position="tb"
        )

    def write(self, folder: Path, made_by: str) -> None:
        """Both files, each with the command that makes it."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.name}.md").write_text(f"{self.markdown()}\nMade by `{made_by}`.\n", encoding="utf-8")
        (folder / f"{self.name}.tex").write_text(f"% made by {made_by}\n{self.latex()}", encoding="utf-8")


def is_text(column: pd.Series) -> bool:
    """Whether a column holds names rather than numbers."""
    return not any(str(text)[:1].isdigit() or str(text)[:1] in "+-~<" for text in column)


def seeds(context: Context) -> str:
    """What an interval in a cell is, or why there is none, in a sentence."""
    counts = {m.units for (v, r) in context.cells if (m := mean(context, v, r)) and v != "raw target"}
    if counts <= {1}:
        return "One seed: no interval over seeds can be given, and differences know nothing of seeds."
    many = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    return (
        f"Means over {many} seeds, ± 95 % t-interval over seeds, on these test samples: their error is not in it "
        "(no interval where one seed ran or all seeds answer the same)."
    )


def digits_for(margin: float) -> int:
    """Decimals that show a difference of a tenth of the margin, at least two."""
    return max(2, 1 - math.floor(math.log10(margin)))


def signed(value: float, digits: int) -> str:
    """With its sign, and zero as +0."""
    return f"{round(value, digits) + 0.0:+.{digits}f}"


def digits(context: Context) -> int:
    """Decimals of the metric's values, by its margin."""
    return digits_for(named_metric(context.metric).margin)


def around(value: float, half: float, digits: int) -> str:
    """A difference and half the width of its interval."""
    return f"{signed(value, digits)} ± {half:.{digits}f}"


def basis(context: Context) -> str:
    """What differences rest on where the metric is no mean over samples, as a sentence of a caption."""
    measured = named_metric(context.metric)
    if not measured.of_samples:
        return ""
    whole = f"{'corpus ' if measured.has_parts else ''}{metric(context)}"
    return f" Means are {whole}; differences and marks rest on the means of {measured.of_samples}."


def machine(context: Context) -> str:
    """What seconds do not tell, as a sentence of a caption."""
    devices = ", ".join(sorted({str(d) for d in context.runs["overhead_device"] if d == d and d}))
    stages = [stage for charged in context.runs["stages"] for stage in charged]
    alone = (context.runs["concurrent_workers"] == 1).all() and all(s.get("workers", 1) == 1 for s in stages)
    shared = "" if alone else "; several runs shared the machine, which seconds depend on and FLOPs do not"
    processes = sorted({s.get("processes") or 1 for s in stages})
    several = f"; stages were carried out by {' or '.join(map(str, processes))} processes" if processes[1:] else ""
    return f" Measured on {devices or 'an unnamed device'}{shared}{several}."


def p_value(p: float | None) -> str:
    if p is None:
        return NONE
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def metric(context: Context) -> str:
    return shown_as(context.metric)


def shown_as(metric: str) -> str:
    """Such as ROUGE-L (zh)."""
    name, _, tokenizer = metric.partition("_")
    return SHOWN_AS.get(metric) or (f"{SHOWN_AS[name]} ({tokenizer})" if name in SHOWN_AS else metric)


def value(context: Context, variant: str, rate: float) -> float | None:
    """The mean of a cell; None where there is none."""
    found = mean(context, variant, rate)
    return None if found is None else found.value


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0 or not np.isfinite(value):
        return "0" if value == 0 else NONE
    digits = max(0, 2 - int(np.floor(np.log10(abs(value)))))
    return f"{value:.{min(digits, 6)}f}"


def average(values: pd.Series, mark: str = "") -> str:
    """The mean of what is known, as text."""
    known = values.dropna().astype(float)
    return NONE if known.empty else mark + number(known.mean())


def rate_column(rate: float) -> str:
    names = {0.0: "all (p = 0)", 1.0: "none (p = 1)"}
    return names.get(rate, f"p = {rate:g}")


COLOURS = ["0072B2", "D55E00", "009E73", "CC79A7", "E69F00", "56B4E9", "000000", "882255", "999999"]
"""Those of Okabe and Ito (2008), which colour-blind readers can distinguish, and two more."""
STYLE = {
    "figure.figsize": (3.4, 2.5),
    "figure.dpi": 110,
    "savefig.dpi": 220,
    "savefig.bbox": "standard",
    "figure.constrained_layout.use": True,
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.frameon": False,
    "axes.prop_cycle": f"cycler('color', {COLOURS})",
    "image.cmap": "cividis",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "DDDDDD",
    "grid.linewidth": 0.4,
    "lines.linewidth": 1.2,
    "lines.markersize": 4.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "staff",
}
"""Of every figure, which is one column of a paper wide."""
SVG_DPI = 110  # of clouds of dots, which would be larger as paths


@dataclass(frozen=True)
class Drawn:
    """A figure on the disk; `file` is without its suffix."""

    file: Path
    caption: str


@contextmanager
def styled() -> Iterator[None]:
    """Figures drawn within have the report's style."""
    import matplotlib

    with matplotlib.rc_context(), matplotlib.rc_context(STYLE):
        matplotlib.use("agg")
        yield


def save(figure: Figure, caption: str, file: Path, made_by: str) -> Drawn:
    """A figure as FILE.png and FILE.svg, each with the command that makes it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file.with_name(f"{file.name}.png"), metadata={"Software": made_by})
    figure.set_layout_engine("none")  # it stands
    figure.savefig(file.with_name(f"{file.name}.svg"), metadata={"Creator": made_by, "Date": None}, dpi=SVG_DPI)
    return Drawn(file, caption)


def figure_of(rows: int = 1, columns: int = 1, height: float = 2.5, **options: Any) -> tuple[Figure, Any]:
    """A figure without pyplot, whose state would outlive it, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4, height))
    return figure, figure.subplots(rows, columns, **options)
