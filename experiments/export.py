"""Export the coreset of a run, or the target that was fine-tuned on it: `staff-export RUN --format jsonl`.

Writes a folder with a card, README.md (how the coreset was chosen, its cost and results), and by --format:

    jsonl     train.jsonl, your own rows with all their fields, and staff_id, staff_row (its number, from 1),
              staff_region and every score of the method, such as staff_speculative
    parquet   train.parquet, the same
    datasets  the same as a folder for `datasets.load_from_disk`
    rows      train.jsonl, your own rows unchanged, and rows.csv, the id and the number of each
    trl       train.jsonl for TRL's SFTTrainer: {"id", "prompt", "completion"} a line, or {"id", "messages"}
    ids       ids.json, the ids alone, for `staff method=precomputed method.path=ids.json`
    adapter   the LoRA adapter with tokenizer and chat template, for `AutoPeftModelForCausalLM.from_pretrained`
    merged    the whole fine-tuned model with the same, for `AutoModelForCausalLM.from_pretrained`

The samples are read again by the run's configuration; the export fails if they have changed since the run.
--push-to-hub also uploads datasets, adapter or merged to a private repository on the Hugging Face hub.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from hydra.utils import instantiate
from omegaconf import OmegaConf

from experiments import cards, command, export_model
from experiments.cards import coreset_card
from experiments.recorded import RecordedRun, recorded_run, regions_of
from staff.data.samples import Sample, data_digest
from staff.data.splits import load_splits
from staff.data.task import Task
from staff.errors import UserError, in_one_line
from staff.runtime.files import csv_of, local_path
from staff.store.store import SAMPLES

PUSHED = ("datasets", *export_model.FORMS)
"""Formats that the hub has a place for."""


def export(
    run: Path, form: str, output: Path | None = None, store: Path | None = None, push_to: str | None = None
) -> Path:
    """Write the coreset or the model of the run in folder `run` to `output`, and return that.

    The run may have been packed into the tables of its results folder.

    Args:
        form: a key of `WRITERS`, or one of `export_model.FORMS`.
        output: a folder to make; None: RUN/coreset-FORM or RUN/model-FORM.
        store: the store with the fine-tuned target; None: the one of the run.
        push_to: name of a repository on the hub, for `PUSHED`.

    Raises:
        UserError: no recorded run, nothing to export, data that has changed since, or an `output` that exists.
    """
    of_model = form in export_model.FORMS
    output = output or run / f"{'model' if of_model else 'coreset'}-{form}"
    recorded = recorded_run(run)
    if output.exists():
        raise UserError(f"{output} exists: remove it, or name another folder with --output.")
    if push_to is not None:
        if form not in PUSHED:
            raise UserError(f"--push-to-hub uploads {', '.join(PUSHED)}, not --format {form}: choose one of them.")
        cards.check_token()
    if of_model:
        tuned = export_model.tuned_target(recorded, form, store)
        if push_to is not None:
            export_model.check_base(tuned, form)
        make = partial(export_model.write, tuned)
    else:
        make = partial(_write_coreset, chosen_rows(recorded), coreset_card(recorded.record(), form))
    output.mkdir(parents=True)
    try:
        make(form, output)
    except BaseException:
        shutil.rmtree(output)
        raise
    if push_to is not None:
        cards.push(output, form, push_to)
    return output


class Chosen(NamedTuple):
    """A sample of the coreset, the row of the training data that it was made of, and its results.

    Attributes:
        number: of the row, counted from 1.
        results: region and scores, by name; None where there is none.
    """

    sample: Sample
    number: int
    row: Mapping[str, Any]
    results: Mapping[str, Any]


def chosen_rows(run: RecordedRun) -> list[Chosen]:
    """The coreset in the pool's order, read again from the run's own data.

    Raises:
        UserError: an empty coreset, or data that is not there or has changed since.
    """
    pool = run.samples()
    if pool is None or not pool["selected"].to_numpy().any():
        raise UserError(f"{run.name} selected no sample: export a run with a coreset.")
    results = _results(pool, run.regions())
    task, _ = _task_and_pool(run)
    rows = enumerate(zip(task.load("train"), task.rows("train"), strict=False), start=1)
    return [
        Chosen(sample, number, row, results[sample.id])
        for number, (sample, (_, row)) in rows
        if sample.id in results
    ]


def _results(pool: pd.DataFrame, regions: pd.DataFrame | None) -> dict[str, dict[str, Any]]:
    """Region and scores of the selected samples, by id."""
    scores = pool.drop(columns=["selected", "answer_tokens"], errors="ignore")
    region = regions_of(pool, regions)
    scores.insert(1, "region", np.full(len(pool), np.nan) if region is None else region)
    chosen = scores[pool["selected"].to_numpy()]
    names = [str(name) for name in chosen.columns[1:]]
    values = zip(*(chosen[name] for name in names))
    return {
        id: {name: _plain(name, value) for name, value in zip(names, row)} for id, row in zip(chosen["id"], values)
    }


def _plain(name: Any, value: float) -> float | int | None:
    if not math.isfinite(value):
        return None
    return int(value) if name == "region" else float(value)


def training_samples(run: RecordedRun) -> Sequence[Sample]:
    """The training samples that a run selected from, read again from its own data.

    Raises:
        UserError: the data is not there, or has changed since.
    """
    return _task_and_pool(run)[1]


def _task_and_pool(run: RecordedRun) -> tuple[Task, Sequence[Sample]]:
    record = run.record()
    task: Task = instantiate(OmegaConf.create(record["config"]["task"]), _convert_="all")
    if source := record["identity"]["data"]["source"]:
        task = replace(task, revision=source["commit"])
    store = record["config"].get("store_dir")  # records of before have none
    kept = local_path(str(store)).absolute() / SAMPLES if store and local_path(str(store)).is_dir() else None
    try:
        samples = load_splits(task, record["evaluation"] is not None, kept).pool
    except UserError as error:
        named = task.data_dir or task.train_file
        if not isinstance(named, str) or local_path(named).is_absolute():
            raise
        raise UserError(
            f"the data of {run.name} cannot be read here ({str(error).rstrip('.')}): it was named as {named}, "
            "relative to the folder where the run was started, so give this command there."
        ) from None
    if data_digest(samples) != record["identity"]["data"]["train"]:
        raise UserError(
            f"the training samples of task {task.name!r} are no longer those that {run.name} was selected from: "
            "restore them, or carry out the run again."
        )
    return task, samples


def _write_coreset(chosen: Sequence[Chosen], card: str, form: str, folder: Path) -> None:
    WRITERS[form](chosen, folder)
    (folder / "README.md").write_text(card, "utf-8")


def own_rows(chosen: Sequence[Chosen]) -> list[dict[str, Any]]:
    """The user's own rows with the run's results for each, under names that no field of theirs has."""
    prefix = "staff_"
    while any(str(field).startswith(prefix) for each in chosen for field in each.row):
        prefix = f"staff_{prefix}"
    return [
        {
            **each.row,
            **{
                f"{prefix}{name}": value
                for name, value in {"id": each.sample.id, "row": each.number, **each.results}.items()
            },
        }
        for each in chosen
    ]


def _for_trl(chosen: Sequence[Chosen]) -> list[dict[str, Any]]:
    return [
        {"id": s.id, "messages": [{"role": role, "content": text} for role, text in s.turns]}
        if s.turns
        else {"id": s.id, "prompt": s.prompt, "completion": s.answer}
        for s in (each.sample for each in chosen)
    ]


def _dataset(rows: Sequence[Mapping[str, Any]]) -> Any:
    """The rows as a `datasets.Dataset`; a field that a row lacks is null.

    Raises:
        UserError: a field with values of several types.
    """
    import pyarrow as pa
    from datasets import Dataset

    names = dict.fromkeys(name for row in rows for name in row)
    columns = {}
    for name in names:
        try:
            columns[str(name)] = pa.array([row.get(name) for row in rows])
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
            raise UserError(
                f"field {name!r} has no one type ({in_one_line(error)}), as tables need it: choose --format jsonl."
            ) from None
    return Dataset(pa.table(columns))


def _write_lines(rows: Iterable[Mapping[str, Any]], folder: Path) -> None:
    lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows]
    (folder / "train.jsonl").write_text("".join(lines), "utf-8")


def _write_jsonl(chosen: Sequence[Chosen], folder: Path) -> None:
    _write_lines(own_rows(chosen), folder)


def _write_parquet(chosen: Sequence[Chosen], folder: Path) -> None:
    _dataset(own_rows(chosen)).to_parquet(folder / "train.parquet")


def _write_datasets(chosen: Sequence[Chosen], folder: Path) -> None:
    _dataset(own_rows(chosen)).save_to_disk(folder)


def _write_rows(chosen: Sequence[Chosen], folder: Path) -> None:
    _write_lines((each.row for each in chosen), folder)
    table = pd.DataFrame({"id": [c.sample.id for c in chosen], "row": [c.number for c in chosen]})
    (folder / "rows.csv").write_text(csv_of(table), "utf-8", newline="")


def _write_trl(chosen: Sequence[Chosen], folder: Path) -> None:
    _write_lines(_for_trl(chosen), folder)


def _write_ids(chosen: Sequence[Chosen], folder: Path) -> None:
    ids = [each.sample.id for each in chosen]
    (folder / "ids.json").write_text(json.dumps(ids, ensure_ascii=False, indent=0), "utf-8")


WRITERS: dict[str, Callable[[Sequence[Chosen], Path], None]] = {
    "jsonl": _write_jsonl,
    "parquet": _write_parquet,
    "datasets": _write_datasets,
    "rows": _write_rows,
    "trl": _write_trl,
    "ids": _write_ids,
}


@command
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="staff-export", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=local_path, help="folder of a recorded run, results/runs/NAME")
    parser.add_argument("--format", choices=[*WRITERS, *export_model.FORMS], required=True, help="as listed above")
    parser.add_argument(
        "--output", type=local_path, help="folder to create (default: RUN/coreset-FORMAT or RUN/model-FORMAT)"
    )
    parser.add_argument(
        "--store", type=local_path, help="store with the fine-tuned target (default: that of the run)"
    )
    parser.add_argument("--push-to-hub", metavar="NAME", help="repository on the Hugging Face hub, such as me/mine")
    asked = parser.parse_args()
    print(export(asked.run, asked.format, asked.output, asked.store, asked.push_to_hub))


if __name__ == "__main__":
    main()
