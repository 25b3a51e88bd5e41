"""Hand the coreset of a recorded run to others: `staff-export RUN --format jsonl`.

Writes a folder with the chosen samples and README.md, the card that tells how they were chosen and at what cost:

    jsonl  train.jsonl, {"id", "prompt", "completion"} a line, as TRL's SFTTrainer and `datasets` read it
    hf     the same as a folder for `datasets.load_from_disk`
    ids    ids.json, the ids alone, for `staff method=precomputed method.path=ids.json`

The samples are read again as the run's configuration says, and refused where they are not those of the run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import OmegaConf

from experiments.recorded import RecordedRun, recorded_run
from staff.data.splits import load_splits
from staff.data.task import Sample, Task, data_digest
from staff.errors import UserError


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
    samples = chosen_samples(recorded)
    output.mkdir(parents=True)
    WRITERS[form](samples, output)
    (output / "README.md").write_text(card(record, HOW_TO_READ[form]), "utf-8")
    return output


def chosen_samples(run: RecordedRun) -> list[Sample]:
    """The coreset's samples in the pool's order, read anew from the run's own data."""
    record, pool = run.record(), run.samples()
    chosen = set() if pool is None else set(pool.loc[pool["selected"], "id"])
    if not chosen:
        raise UserError(f"{run.name} selected no sample: export a run with a coreset.")
    task: Task = instantiate(OmegaConf.create(record["config"]["task"]), _convert_="all")
    samples = load_splits(task, evaluated=record["evaluation"] is not None).pool
    if data_digest(samples) != record["identity"]["data"]["train"]:
        raise UserError(
            f"the training samples of task {task.name!r} are no longer those that {run.name} was selected from: "
            "restore them, or carry out the run again."
        )
    return [sample for sample in samples if sample.id in chosen]


def _rows(samples: Sequence[Sample]) -> list[dict[str, str]]:
    return [{"id": s.id, "prompt": s.prompt, "completion": s.answer} for s in samples]


def _write_jsonl(samples: Sequence[Sample], folder: Path) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in _rows(samples)]
    (folder / "train.jsonl").write_text("".join(lines), "utf-8")


def _write_hf(samples: Sequence[Sample], folder: Path) -> None:
    from datasets import Dataset

    Dataset.from_list(_rows(samples)).save_to_disk(folder)


def _write_ids(samples: Sequence[Sample], folder: Path) -> None:
    (folder / "ids.json").write_text(json.dumps([s.id for s in samples], ensure_ascii=False, indent=0), "utf-8")


WRITERS: dict[str, Callable[[Sequence[Sample], Path], None]] = {
    "jsonl": _write_jsonl,
    "hf": _write_hf,
    "ids": _write_ids,
}
HOW_TO_READ = {
    "jsonl": '`datasets.load_dataset("json", data_files="train.jsonl")`',
    "hf": "`datasets.load_from_disk(FOLDER)`",
    "ids": "`staff method=precomputed method.path=ids.json`, with the same task",
}


def card(record: dict[str, Any], how_to_read: str) -> str:
    """What whoever is given the coreset should know, as Markdown."""
    about, counts, config, overhead = (record[part] for part in ("run", "counts", "config", "overhead"))
    source, data = record["identity"]["data"]["source"], config["task"]
    origin = f"{source['hub']} (commit {source['commit']})" if source else f"the training file of {data['name']}"
    settings = OmegaConf.to_yaml({k: v for k, v in config["method"].items() if k not in ("_target_", "path")})
    facts = {
        "samples": f"{counts['selected']:,} of {counts['pool']:,}, pruning rate {about['pruning_rate']:g}",
        "task": f"{data['name']}, from {origin}",
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
    return f"""# {counts["selected"]:,} samples of {data["name"]}, chosen by {facts["method"]}

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
