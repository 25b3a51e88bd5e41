"""The samples of a run as its models read them: tokenised, without those that do not fit."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from staff.data.task import Sample, Task
from staff.data.tokens import TokenizedSamples, Tokens, read_tokens
from staff.data.views import answerable, fitting
from staff.errors import UserError
from staff.models.family import Family
from staff.pool import Slice
from staff.store.store import Store

log = logging.getLogger("staff")


@dataclass(frozen=True)
class Reader:
    """Reads samples for the models of a run.

    Attributes:
        family: the models that are fine-tuned on the coreset.
        selecting: the models that select, where they are of another family.
        max_length: the cut-off of fine-tuning in tokens.
    """

    task: Task
    family: Family
    selecting: Family | None
    max_length: int
    store: Store

    def trained(self, samples: Sequence[Sample]) -> dict[str, TokenizedSamples]:
        """The samples as the "target", the "small" model and the "selecting" target read them: those that fit all.

        Raises:
            UserError: a sample that does not fit and is not to be dropped.
        """
        families = {"target": self.family, "small": self.selecting or self.family}
        if self.selecting is not None:
            families["selecting"] = self.selecting
        specs = {name: f.small if name == "small" else f.target for name, f in families.items()}
        how = self.task.reading(samples)
        read = {
            name: read_tokens(self.store.get(Tokens(samples, specs[name], {**f.reading, **how})))
            for name, f in families.items()
        }
        names = {"target": "target", "small": "small model", "selecting": "target that selects"}
        windows = {names[name]: spec.window() for name, spec in specs.items()}
        keep = fitting(list(read.values()), self.max_length, self.task.too_long, windows)
        if len(keep) < len(samples):
            read = {name: tokens.take(keep) for name, tokens in read.items()}
        return {"selecting": read["target"], **read}

    def slice(self, samples: Sequence[Sample], read: Mapping[str, TokenizedSamples]) -> Slice:
        """What methods see of the samples, `read` as by `trained`; with groups where the task knows them."""
        groups = None
        if self.task.group_field:
            group_of = {sample.id: sample.group for sample in samples}
            groups = np.array([group_of[id] for id in read["selecting"].ids])
        return Slice(read["small"], read["selecting"], groups)

    def asked(self, test: Sequence[Sample]) -> TokenizedSamples:
        """The test samples as the target reads them, those whose answer fits its context window."""
        read = self._by_target(test)
        keep = answerable(read, self.task.max_new_tokens, self.family.target.window(), self.task.too_long)
        return read.take(keep)

    def references(self, test: Sequence[Sample]) -> TokenizedSamples:
        """The references that fit the target's window, each behind its prompt, as the target reads them."""
        read = self._by_target(self.task.reference_samples(test))
        fits = np.flatnonzero(read.lengths <= (self.family.target.window() or sys.maxsize))
        if len(fits) < len(read):
            log.warning("nll leaves out %d references beyond the target's window", len(read) - len(fits))
        return read.take(fits)

    def choices(self, test: Sequence[Sample]) -> TokenizedSamples:
        """Every choice behind its prompt, as the target reads them.

        Raises:
            UserError: one that does not fit the target's window.
        """
        read, window = self._by_target(self.task.choice_samples(test)), self.family.target.window() or sys.maxsize
        if (longest := int(read.lengths.max())) > window:
            id = read.ids[int(read.lengths.argmax())].rpartition("#")[0]
            raise UserError(
                f"sample {id!r} has {longest} tokens with one of its choices, more than the target's window of "
                f"{window}: shorten or remove it."
            )
        return read

    def _by_target(self, samples: Sequence[Sample]) -> TokenizedSamples:
        return read_tokens(self.store.get(Tokens(samples, self.family.target, self.family.reading)))
