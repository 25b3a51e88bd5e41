"""Use without Hydra: a pool from a data set and models, and selection from a pool."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from staff.data.samples import Sample
from staff.data.splits import check_vocabulary, fitting
from staff.data.task import Task
from staff.data.tokens import Tokens, read_tokens
from staff.models.family import Family
from staff.models.prepare import from_objects, prepare
from staff.models.spec import ModelSpec
from staff.pool import Pool, Select, Slice
from staff.selection import Coreset, Draws, ScorePool, SelectionMethod, budget_of, check_flags, run_method
from staff.store.store import Store
from staff.training.settings import FinetuneSettings

Model = str | Path | ModelSpec | tuple[Any, Any]
"""A folder or a name on the hub (loaded in float32); a `ModelSpec`, which also has precision and revision; or a
transformers model with its tokenizer."""


def dataset_pool(
    data: Iterable[Mapping[str, Any]],
    target: Model,
    small: Model | None = None,
    *,
    prompt: str | None = "{prompt}",
    answer: str | None = "{completion}",
    id_field: str | None = None,
    prompt_format: str = "plain",
    finetune: FinetuneSettings | None = None,
    store: Path | str = "results/artifacts",
) -> Pool:
    """A pool with the rows of a data set, in their order: position i of a coreset is row i.

    Models are fine-tuned when a method first asks for their signals, and all results are stored in `store`. A model
    that is given as an object is saved there once, and not changed.

    Args:
        data: a `datasets.Dataset`, or any iterable of rows.
        target: the model to select for.
        small: the small model; None: the target, for methods that ask the target alone.
        prompt, answer: templates with a row's fields, as in `staff.data.task.Task`; by default the columns of TRL.
            None for both: the columns tell, which may hold conversations.
        id_field: field with the rows' ids; None: ids are digests of the texts.
        prompt_format: "plain" or "chat", as in `staff.models.family.Family`.
        finetune: how models are fine-tuned; None: as in the paper, in the target's precision.
        store: folder for all results.

    Raises:
        UserError: bad rows, a sample that does not fit `finetune.max_length` or a model's context window, or a
            model that cannot be loaded.
    """
    kept = Store(store)
    of_target = _spec(target, kept)
    of_small = of_target if small is None else _spec(small, kept)
    family = prepare(Family("custom", of_target, of_small, prompt_format), kept)
    settings = finetune or FinetuneSettings(precision=family.target.dtype)
    task = Task("dataset", prompt, answer, metrics=(), max_new_tokens=1, data_dir="", id_field=id_field)
    samples = task.samples((f"row {i}", row) for i, row in enumerate(data))
    whole = _read(samples, family, {**family.reading, **task.reading(samples)}, settings.max_length, kept)
    return Pool({"pool": whole}, family, settings, kept, seed=0)


def _read(
    samples: Sequence[Sample], family: Family, reading: Mapping[str, Any], max_length: int, store: Store
) -> Slice:
    """The samples as both models read them, none of which may exceed the cut-off or a context window."""
    models = (family.small, family.target)
    for_small, for_target = (read_tokens(store.get(Tokens(samples, m, reading))) for m in models)
    for read, spec in zip((for_small, for_target), models, strict=True):
        check_vocabulary(read, spec)
    windows = {"small model": family.small.window(), "target": family.target.window()}
    fitting([for_small, for_target], max_length, "refuse", windows)
    return Slice(for_small, for_target)


def select(pool: ScorePool, method: SelectionMethod, pruning_rate: float, seed: int = 0) -> Coreset:
    """The coreset that `method` selects.

    Args:
        pruning_rate: the fraction of the pool that is removed.
        seed: seed of all draws and, in a pool with models, of their fine-tuning.

    Returns:
        The coreset; its `indices` are positions in the pool.

    Raises:
        UserError: a rate outside [0, 1), or input that the method refuses.
    """
    check_flags(method)
    budget = budget_of(method, pruning_rate, len(pool.ids))
    if isinstance(pool, Pool):
        chosen = pool.store.get(Select(method, replace(pool, seed=seed), budget))
        return Coreset.load(chosen.path)
    return run_method(method, pool, budget, Draws(seed, pool.ids))


def _spec(model: Model, store: Store) -> ModelSpec:
    if isinstance(model, tuple):
        return from_objects(*model, store)
    return model if isinstance(model, ModelSpec) else ModelSpec(str(model))
