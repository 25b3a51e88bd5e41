"""Draw STAFF's method, for light and for dark pages: `python -m experiments.figures.method`.

The bars are a selection that STAFF made from scores drawn at random, with fewer regions than the paper has.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from staff import ArrayPool, Staff, select

WIDTH, HEIGHT = 760, 322
PANEL, STEP = 222, 262
"""Width of a panel, and from the left edge of one to that of the next."""
FLOOR, TALLEST = 222, 120
"""The baseline of the bars, and how high the highest rises above it."""


@dataclass(frozen=True)
class Colours:
    """Of text, of lines and less important text, of the small model, the target and the coreset."""

    text: str
    muted: str
    small: str
    target: str
    coreset: str


THEMES = {
    "light": Colours("#1f2328", "#59636e", "#0072B2", "#C2410C", "#00805A"),
    "dark": Colours("#e6edf3", "#9198a1", "#56B4E9", "#F0883E", "#3FB68B"),
}


@cache
def regions() -> pd.DataFrame:
    """STAFF's table of regions: size, ratio and budget of each, by rising score."""
    rng = np.random.default_rng(7)
    small = rng.gamma(4.0, size=400)
    target = small * (1.9 - 0.12 * small) * rng.uniform(0.8, 1.2, size=400)
    pool = ArrayPool([str(i) for i in range(400)], {("effort", "small"): small, ("effort", "target"): target})
    method = Staff(num_regions=8, verification_budget=6)
    return select(pool, method, pruning_rate=0.75).diagnostics.sort_values("region")


def svg(theme: str) -> str:
    """The picture, for "light" or "dark" pages; its background is the page's."""
    colours, table = THEMES[theme], regions()
    sizes, ratios, picked = (table[name].to_numpy(float) for name in ("size", "ratio", "picked"))
    small, target, coreset = (
        _coloured(words, colour)
        for words, colour in (
            ("small model", colours.small),
            ("target LLM", colours.target),
            ("coreset", colours.coreset),
        )
    )
    high = TALLEST / sizes.max()
    one = FLOOR - TALLEST / ratios.max()
    parts = [
        _panel(0, "1  Score", f"A {small}, fine-tuned on", "all samples, scores each one.", colours),
        _bars(0, sizes * high, f'fill="{colours.small}"'),
        _note(0, f"effort, in {_italic('K')} regions of equal width", colours),
        _panel(
            1, "2  Verify", f"The {target} scores {_italic('b', 'v')}", "samples of each region again.", colours
        ),
        _bars(1, ratios * TALLEST / ratios.max(), f'fill="{colours.target}"'),
        f'<path d="M{STEP} {one:.1f}h{PANEL}" stroke="{colours.muted}" stroke-dasharray="4 3"/>',
        f'<text x="{STEP + PANEL + 5}" y="{one + 4:.1f}" font-size="12" fill="{colours.muted}">1</text>',
        _note(1, f"ratio {_italic('V', 'i')}: target / small model", colours),
        _panel(2, "3  Select", f"Regions share the {coreset} by", "ratio, each up to its size.", colours),
        _bars(2, sizes * high, f'fill="none" stroke="{colours.muted}"'),
        _bars(2, picked * high, f'fill="{colours.coreset}"'),
        _note(2, "samples: all, and selected", colours),
        *(_arrow(panel * STEP - 33, colours) for panel in (1, 2)),
        f'<path d="M0 262.5h{WIDTH}" stroke="{colours.muted}" stroke-opacity="0.4"/>',
        f'<text y="288"><tspan font-weight="600">4  Fine-tune</tspan> the {target} on the {coreset} alone.</text>',
        '<text y="310"><tspan font-weight="600">5  Count</tspan> what selection cost: fine-tuning the small model, '
        "scoring, verification.</text>",
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-4 -4 {WIDTH + 8} {HEIGHT + 8}" font-size="14.5" '
        f'font-family="-apple-system,Segoe UI,Helvetica,Arial,sans-serif" fill="{colours.text}">\n'
        "<title>STAFF in five steps: score, verify, select, fine-tune, count</title>\n"
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _panel(panel: int, heading: str, first: str, second: str, colours: Colours) -> str:
    x = panel * STEP
    return (
        f'<text x="{x}" y="16" font-size="17" font-weight="600">{heading}</text>\n'
        f'<text x="{x}" y="42">{first}</text>\n'
        f'<text x="{x}" y="62">{second}</text>\n'
        f'<path d="M{x} {FLOOR + 0.5}h{PANEL}" stroke="{colours.muted}"/>'
    )


def _bars(panel: int, heights: np.ndarray, style: str) -> str:
    """A bar for each region, each with a little air to its right."""
    wide = PANEL / len(heights)
    bars = (
        f"M{panel * STEP + i * wide + 2:.1f} {FLOOR}v{-height:.1f}h{wide - 4:.1f}v{height:.1f}z"
        for i, height in enumerate(heights)
    )
    return f'<path d="{"".join(bars)}" {style}/>'


def _note(panel: int, words: str, colours: Colours) -> str:
    return f'<text x="{panel * STEP}" y="242" font-size="13" fill="{colours.muted}">{words}</text>'


def _arrow(x: float, colours: Colours) -> str:
    return f'<path d="M{x} 11h20m-7 -6l7 6l-7 6" fill="none" stroke="{colours.muted}" stroke-width="1.6"/>'


def _coloured(words: str, colour: str) -> str:
    return f'<tspan fill="{colour}" font-weight="600">{words}</tspan>'


def _italic(letter: str, below: str = "") -> str:
    """A letter of a formula, with another below it."""
    sub = f'<tspan dy="3" font-size="10">{below}</tspan><tspan dy="-3">&#8203;</tspan>' if below else ""
    return f'<tspan font-style="italic">{letter}</tspan>{sub}'


def main() -> None:
    for theme in THEMES:
        Path(__file__).with_name(f"method-{theme}.svg").write_text(svg(theme), "utf-8")


if __name__ == "__main__":
    main()
