"""Which way each metric is better, and how large a difference in it is of no practical interest."""

from __future__ import annotations

from dataclasses import dataclass

from staff.errors import UserError


@dataclass(frozen=True)
class Direction:
    """`sign` is 1 where higher values are better and -1 where lower ones are; `margin`, in the metric's own `unit`,
    is the difference up to which two methods count as equal unless the user names another."""

    sign: int
    margin: float
    unit: str

    @property
    def words(self) -> str:
        return "higher is better" if self.sign > 0 else "lower is better"


POINTS = Direction(sign=1, margin=1.0, unit="point")
"""A metric on the scale from 0 to 100."""

DIRECTIONS: dict[str, Direction] = {
    **dict.fromkeys(("rouge1", "rouge2", "rougeL", "bleu", "chrf", "exact_match", "accuracy"), POINTS),
    "nll": Direction(sign=-1, margin=0.02, unit="nat"),  # a token; 2 % of the perplexity
}


def direction(metric: str) -> Direction:
    """The direction of `metric`.

    Raises:
        UserError: a metric that is not listed: to guess would turn losses into gains.
    """
    if metric not in DIRECTIONS:
        raise UserError(
            f"metric {metric!r} has no known direction: add it to DIRECTIONS in staff/directions.py; listed are "
            f"{', '.join(DIRECTIONS)}."
        )
    return DIRECTIONS[metric]
