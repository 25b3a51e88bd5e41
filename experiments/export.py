"""Hand the coreset of a recorded run to others: `staff-export RUN --format jsonl`.

Writes a folder with the chosen samples and README.md, the card that tells how they were chosen and at what cost:

    jsonl  train.jsonl, {"id", "prompt", "completion"} a line, or {"id", "messages"} for conversations, as TRL's
           SFTTrainer and `datasets` read it
    hf     the same as a folder for `datasets.load_from_disk`
    rows   train.jsonl, your own rows with all their fields, and rows.csv, the id and the number of each (from 1)
    ids    ids.json, the ids alone, for `staff method=precomputed method.path=ids.json`

The samples are read again as the run's configuration says, and refused where they are not those of the run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from hydra.utils import instantiate
from omegaconf import OmegaConf

from experiments.recorded import RecordedRun, recorded_run
from staff.data.files import files_of
from staff.data.splits import load_splits
from staff.data.task import Sample, Task, data_digest
from staff.errors import UserError
from staff.runtime.spreadsheets import csv_of


def export(run: Path, form: str, output: Path | None = None) -> Path:
    """Write the coreset of the run in folder `run` to `output` (RUN/coreset-FORM by default), and return that.

    The run may have been packed into the tables of its results folder.

    Args:
        form: a key of `WRITERS`.

    Raises:
        UserError: no recorded run, an empty coreset, data that has changed since, or an `output` that exists.
    """
    output = output or run / f"coreset-{form}"
    recorded = recorded_run(run)
    if output.exists():
        raise UserError(f"{output} exists: remove it, or name another folder with --output.")
    record = recorded.record()
    chosen = chosen_rows(recorded)
    output.mkdir(parents=True)
    WRITERS[form](chosen, output)
    (output / "README.md").write_text(card(record, HOW_TO_READ[form]), "utf-8")
    return output


class Chosen(NamedTuple):
    """A sample of the coreset, and the row of the training data that it was made of, counted from 1."""

    sample: Sample
    number: int
    row: Mapping[str, Any]


def chosen_samples(run: RecordedRun) -> list[Sample]:
    """The coreset's samples in the pool's order, read anew from the run's own data."""
    return [chosen.sample for chosen in chosen_rows(run)]


def chosen_rows(run: RecordedRun) -> list[Chosen]:
    """The same with their rows.

    Raises:
        UserError: an empty coreset, or data that is not there or has changed since.
    """
    pool = run.samples()
    chosen = set() if pool is None else set(pool.loc[pool["selected"], "id"])
    if not chosen:
        raise UserError(f"{run.name} selected no sample: export a run with a coreset.")
    task, _ = _task_and_pool(run)
    rows = enumerate(zip(task.load("train"), task.rows("train"), strict=False), start=1)
    return [Chosen(sample, number, row) for number, (sample, (_, row)) in rows if sample.id in chosen]


def training_samples(run: RecordedRun) -> list[Sample]:
    """The training samples that a run selected from, read anew from its own data.

    Raises:
        UserError: the data is not there, or has changed since.
    """
    return _task_and_pool(run)[1]


def _task_and_pool(run: RecordedRun) -> tuple[Task, list[Sample]]:
    record = run.record()
    task: Task = instantiate(OmegaConf.create(record["config"]["task"]), _convert_="all")
    samples = load_splits(task, evaluated=record["evaluation"] is not None).pool
    if data_digest(samples) != record["identity"]["data"]["train"]:
        raise UserError(
            f"the training samples of task {task.name!r} are no longer those that {run.name} was selected from: "
            "restore them, or carry out the run again."
        )
    return task, samples


def _rows(chosen: Sequence[Chosen]) -> list[dict[str, Any]]:
    return [
        {"id": s.id, "messages": [{"role": role, "content": text} for role, text in s.turns]}
        if s.turns
        else {"id": s.id, "prompt": s.prompt, "completion": s.answer}
        for s, _, _ in chosen
    ]


def _write_lines(rows: Iterable[Mapping[str, Any]], folder: Path) -> None:
    lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows]
    (folder / "train.jsonl").write_text("".join(lines), "utf-8")


def _write_jsonl(chosen: Sequence[Chosen], folder: Path) -> None:
    _write_lines(_rows(chosen), folder)


def _write_hf(chosen: Sequence[Chosen], folder: Path) -> None:
    from datasets import Dataset

    Dataset.from_list(_rows(chosen)).save_to_disk(folder)


def _write_rows(chosen: Sequence[Chosen], folder: Path) -> None:
    _write_lines((row for _, _, row in chosen), folder)
    table = pd.DataFrame({"id": [c.sample.id for c in chosen], "row": [c.number for c in chosen]})
    (folder / "rows.csv").write_text(csv_of(table), "utf-8", newline="")


def _write_ids(chosen: Sequence[Chosen], folder: Path) -> None:
    ids = [sample.id for sample, _, _ in chosen]
    (folder / "ids.json").write_text(json.dumps(ids, ensure_ascii=False, indent=0), "utf-8")


WRITERS: dict[str, Callable[[Sequence[Chosen], Path], None]] = {
    "jsonl": _write_jsonl,
    "hf": _write_hf,
    "rows": _write_rows,
    "ids": _write_ids,
}
HOW_TO_READ = {
    "jsonl": '`datasets.load_dataset("json", data_files="train.jsonl")`',
    "hf": "`datasets.load_from_disk(FOLDER)`",
    "rows": "whatever read the data that it comes from",
    "ids": "`staff method=precomputed method.path=ids.json`, with the same task",
}


def card(record: dict[str, Any], how_to_read: str) -> str:
    """What whoever is given the coreset should know, as Markdown."""
    about, counts, config, overhead = (record[part] for part in ("run", "counts", "config", "overhead"))
    origin = _origin(record)
    settings = OmegaConf.to_yaml({k: v for k, v in config["method"].items() if k not in ("_target_", "path")})
    facts = {
        "samples": f"{counts['selected']:,} of {counts['pool']:,}, pruning rate {about['pruning_rate']:g}",
        "task": f"{config['task']['name']}, from {origin}",
        "method": about["method"] or config["method"]["_target_"],
        "models that selected": about["selection_family"] or "custom",
        "selection seed": about["selection_seed"],
        "selection took": f"{overhead['seconds']:,.1f} s, {overhead['flops']:.3g} FLOPs",
        "on": overhead["device"] or "-",
        "fine-tuned on it": _measured(record),
        "run": f"{about['name']}, fingerprint {about['fingerprint']}",
        "coreset": f"fingerprint {record['coreset']['fingerprint']}",
        "training split": f"SHA-256 {record['identity']['data']['train']}",
        "code": f"commit {record['provenance']['git_commit']}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    notes = "".join(f"- {note}\n" for note in record["coreset"]["notes"])
    return f"""# {counts["selected"]:,} samples of {config["task"]["name"]}, chosen by {facts["method"]}

Read it with {how_to_read}. Prompt and completion are tokenised apart and joined as they are; the run gave \
them to the models in the prompt format `{config["family"]["prompt_format"]}`.

| | |
|---|---|
{table}

The method's settings:

```yaml
{settings.strip()}
```

{notes}
**Licence**: the texts come from {origin} and stay under its licence; look it up, and name it here, before passing \
them on.
"""


def _origin(record: dict[str, Any]) -> str:
    """Where the texts come from, without a folder of whoever reads it."""
    if source := record["identity"]["data"]["source"]:
        return f"{source['hub']} (commit {source['commit']})"
    data = record["config"]["task"]
    if "train_file" not in data:
        return f"generated rows of {data['name']}"
    files = files_of("train", data["train_file"], data["data_dir"])
    return f"{files[0].name if len(files) == 1 else f'{len(files)} files'} of {data['name']}"


def _measured(record: dict[str, Any]) -> str:
    metric = record["run"]["metric"]
    value = record["metrics"].get(metric)
    return "-" if value is None else f"{metric} {value:.2f} ({record['run']['family']})"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="staff-export", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a recorded run, results/runs/NAME")
    parser.add_argument("--format", choices=WRITERS, required=True)
    parser.add_argument("--output", type=Path, help="folder to make; RUN/coreset-FORMAT without it")
    arguments = parser.parse_args()
    try:
        print(export(arguments.run, arguments.format, arguments.output))
    except UserError as error:
        sys.exit(f"{parser.prog}: {error}")


if __name__ == "__main__":
    main()
