"""A Hydra sweeper for jobs that are no grid: the product of the parameters, each in every one of several cases.

    hydra:
      sweeper:
        params: {candidate: staff, seed: "0,1,2"}
        cases: [method=random, method=<candidate>, method=<candidate> finetune.match=steps]

`<candidate>` stands for the parameter of that name, which is then no setting of the job itself.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override

from experiments.configuration import check_size, params_left
from staff.errors import UserError


class CasesSweeper(BasicSweeper):
    """Hydra's basic sweeper, with cases.

    Args:
        max_batch_size, params: as of the basic sweeper.
        cases: the overrides of each case, separated by spaces; or a mapping with these under "run", of a case that
            is left out where its "when" is null.
    """

    def __init__(
        self, max_batch_size: int | None, params: dict[str, str] | None = None, cases: Sequence[Any] = ()
    ) -> None:
        super().__init__(max_batch_size, params)
        self.cases = list(cases)

    def sweep(self, arguments: list[str]) -> Any:
        self.params = params_left(self.params, arguments)
        return super().sweep(arguments)

    def split_arguments(self, overrides: list[Override], max_batch_size: int | None) -> list[list[list[str]]]:  # type: ignore[override]
        (jobs,) = BasicSweeper.split_arguments(overrides, None)
        jobs = in_cases(jobs, self.cases)
        for job in jobs:
            check_size(job)
        return list(BasicSweeper.split_overrides_to_chunks(jobs, max_batch_size))


def in_cases(jobs: Sequence[Sequence[str]], cases: Sequence[Any]) -> list[list[str]]:
    """The overrides of every job in every case; the jobs themselves if there are no cases.

    Raises:
        UserError: a case names a parameter that the sweep does not have.
    """
    texts = [case["run"] if isinstance(case, Mapping) else case for case in cases if _applies(case)]
    if not texts:
        return [list(job) for job in jobs]
    named = set(re.findall(r"<(\w+)>", " ".join(texts)))
    found = []
    for job in jobs:
        values = dict(override.split("=", 1) for override in job)
        if unknown := sorted(named - set(values)):
            raise UserError(f"hydra.sweeper.cases names <{unknown[0]}>: set hydra.sweeper.params.{unknown[0]}.")
        rest = [override for override in job if override.split("=", 1)[0] not in named]
        filled = [re.sub(r"<(\w+)>", lambda match, values=values: values[match[1]], text) for text in texts]
        found += [[*shlex.split(text), *rest] for text in filled]
    return found


def _applies(case: Any) -> bool:
    return not isinstance(case, Mapping) or case["when"] is not None
