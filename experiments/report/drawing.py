"""How figures of a report are made: one style, each as PNG and SVG."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = Path(__file__).with_name("style.mplstyle")
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

    with matplotlib.rc_context(), matplotlib.rc_context(fname=STYLE):
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
