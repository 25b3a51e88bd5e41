"""Which job of a sweep a free worker takes: the launcher's rule, and the time that a sweep takes by it.

Jobs with different first stages start first. A job that needs a stage that another worker runs gives its worker up
(`staff.store.locks`), and is taken again when that stage has ended.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Held = TypeVar("Held")

AFTER_SELECTION = ("pruning_rate", "budget", "budget_tokens", "finetune_seed")
"""Settings that change only what comes after the longest stages of a selection: jobs that differ in them alone have
those in common."""


def starting_order(jobs: Sequence[Sequence[str]]) -> list[int]:
    """Numbers of the jobs, given by their overrides, in the order in which they start: first one of each group that
    shares its first stages, in the order of the sweep, then the others."""
    groups = [frozenset(o for o in job if o.partition("=")[0] not in AFTER_SELECTION) for job in jobs]
    first = [number for number, group in enumerate(groups) if group not in groups[:number]]
    return [*first, *(number for number in range(len(jobs)) if number not in set(first))]


@dataclass
class Queue(Generic[Held]):
    """The jobs that wait for a worker.

    Attributes:
        order: their numbers in the order in which they start.
        held: what each job that was put back waits for.
    """

    order: list[int]
    held: dict[int, Held] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.order)

    def take(self, is_free: Callable[[Held], bool]) -> int | None:
        """The first job that can run; None if all wait for what is not free."""
        free: dict[Held, bool] = {}
        for place, number in enumerate(self.order):
            waits = self.held.get(number)
            if waits is not None and waits not in free:
                free[waits] = is_free(waits)
            if waits is None or free[waits]:
                self.held.pop(number, None)
                return self.order.pop(place)
        return None

    def put_back(self, number: int, held: Held) -> None:
        """Have a job wait until `held` is free; it comes before those that have not started."""
        self.held[number] = held
        behind = (place for place, other in enumerate(self.order) if other not in self.held)
        self.order.insert(next(behind, len(self.order)), number)


def wall_seconds(
    jobs: Sequence[Sequence[str]], seconds: dict[str, float], workers: int, order: Sequence[int] | None = None
) -> float:
    """Seconds until the last job ends, where so many workers take the jobs by this rule.

    Args:
        jobs: the stages of every job, in order.
        seconds: of every stage.
        order: as by `starting_order`; None: as they are given.
    """
    queue: Queue[str] = Queue(list(range(len(jobs)) if order is None else order))
    left, ends = [list(job) for job in jobs], dict[str, float]()
    at_work: list[tuple[float, int, int | None]] = [(0.0, worker, None) for worker in range(workers)]
    now = 0.0
    while at_work:
        now, worker, job = heapq.heappop(at_work)
        while job is not None and left[job] and ends.get(left[job][0], now + 1) <= now:
            left[job].pop(0)
        if job is not None and left[job]:
            stage = left[job][0]
            if stage not in ends:
                ends[stage] = now + seconds[stage]
                heapq.heappush(at_work, (ends[stage], worker, job))
                continue
            queue.put_back(job, stage)
        job = queue.take(lambda stage, now=now: ends[stage] <= now)
        if job is not None:
            heapq.heappush(at_work, (now, worker, job))
        elif queue:
            heapq.heappush(
                at_work, (min(ends[stage] for stage in queue.held.values() if ends[stage] > now), worker, None)
            )
    return now
