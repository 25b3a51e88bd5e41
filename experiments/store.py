"""List, check and remove the stored results of stages (artefacts): `staff-store list`, `verify` and `prune`.

list     shows every artefact: size, age, cost, seconds of failed attempts, and how many recorded runs need it.
verify   compares every file with its checksum.
prune    lists artefacts that no recorded run needs, that are damaged or of an older version of their stage, and
         checkpoints of unfinished fine-tunings. With --yes it removes them.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from experiments import command
from experiments.recorded import recorded_runs
from staff.data.tokens import Tokens
from staff.errors import UserError
from staff.evaluation.floors import ChooseConstant, Floors
from staff.evaluation.stage import Generate, Measure
from staff.models.prepare import ConvertGguf
from staff.pool import Select
from staff.runtime.files import local_path
from staff.scoring.stage import Score
from staff.store.cost import failed_attempts
from staff.store.manifest import check_contents, check_sizes, read_manifest
from staff.store.store import RESERVED, SAMPLES, Store
from staff.training.stage import Finetune

STAGES = (ConvertGguf, Tokens, Finetune, Score, Select, Generate, Measure, ChooseConstant, Floors)
VERSIONS = {stage.kind: stage.version for stage in STAGES}
"""The present version of every shipped stage, by kind."""


@dataclass(frozen=True)
class Entry:
    """One artefact, as far as its manifest can be read."""

    folder: Path
    stage: str
    label: str = ""
    fingerprint: str = ""
    size: int = 0  # bytes
    age: float = 0.0  # days
    seconds: float = 0.0
    failed: float = 0.0  # seconds of failed attempts
    older: bool = False
    damage: str = ""


def entries(store: Path, *, contents: bool = False) -> list[Entry]:
    """Every artefact in the store, by stage and age; `contents`: its files compared with their checksums."""
    manifests = [f for f in store.glob("*/*/manifest.json") if f.parts[-3] not in RESERVED]
    found = [_entry(file.parent, contents) for file in manifests]
    return sorted(found, key=lambda entry: (entry.stage, -entry.age))


def _entry(folder: Path, contents: bool) -> Entry:
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    try:
        manifest, artifact = read_manifest(folder)
    except UserError as error:
        return Entry(folder, folder.parent.name, size=size, damage=str(error))
    try:
        check_sizes(folder, manifest)
        if contents:
            check_contents(folder, manifest)
        damage = ""
    except UserError as error:
        damage = str(error)
    return Entry(
        folder,
        artifact.stage,
        artifact.label,
        artifact.fingerprint,
        size,
        max(0.0, (datetime.now(UTC) - datetime.fromisoformat(manifest["created"])).total_seconds() / 86400),
        artifact.cost.seconds,
        sum(attempt["seconds"] for attempt in manifest.get("failed_attempts", [])),
        manifest["version"] < VERSIONS.get(artifact.stage, 0),
        damage,
    )


def needed(results: Sequence[Path]) -> Counter[str]:
    """By fingerprint, how many records under these folders rest on the artefact."""
    records = [run.text("metrics.json") or "" for folder in results for run in recorded_runs(folder).values()]
    if not records:
        where = ", ".join(map(str, results))
        raise UserError(f"{where} holds no record, so nothing says what is needed: name the folders by --results.")
    return Counter(name for text in records for name in set(re.findall(r'"([0-9a-f]{64})"', text)))


def show(store: Path, results: Sequence[Path]) -> None:
    found = entries(store)
    try:
        records = needed(results)
    except UserError:
        records = Counter[str]()
    rows = [
        {
            "stage": entry.stage,
            "artefact": entry.label or entry.folder.name,
            "fingerprint": entry.fingerprint[:8],
            "MB": f"{entry.size / 1e6:.1f}",
            "days old": f"{entry.age:.1f}",
            "cost (s)": f"{entry.seconds:.1f}",
            "failed (s)": f"{entry.failed:.1f}" if entry.failed else "-",
            "records": records[entry.fingerprint],
            "": "damaged" if entry.damage else "older version" if entry.older else "",
        }
        for entry in found
    ]
    if rows:
        print(pd.DataFrame(rows).to_string(index=False))
    print(f"{_sum(found)}; they cost {sum(entry.seconds for entry in found):.1f} s")
    for file in sorted(store.glob("attempts/*.json")):
        attempts = failed_attempts(file)
        seconds = sum(attempt["seconds"] for attempt in attempts)
        print(f"not finished: {file.stem[:8]}, {len(attempts)} attempt(s), {seconds:.1f} s")


def verify(store: Path) -> None:
    found = entries(store, contents=True)
    damaged = [entry for entry in found if entry.damage]
    for entry in damaged:
        print(f"damaged: {entry.damage}")
    print(f"{len(found) - len(damaged)} of {len(found)} artefacts are what was written")
    if damaged:
        sys.exit(1)


def prune(store: Path, results: Sequence[Path], really: bool) -> None:
    records = needed(results)
    doomed: list[Entry] = []
    for entry in entries(store, contents=True):
        why = "damaged" if entry.damage else "older version" if entry.older else "no record needs it"
        if entry.damage or entry.older or not records[entry.fingerprint]:
            doomed.append(entry)
            what = f"{entry.folder}, {entry.size / 1e6:.1f} MB, {entry.seconds:.1f} s"
            print(f"{why}: {entry.label or entry.stage} ({what})")
    unfinished = [folder for folder in sorted(store.glob("checkpoints/*")) if any(folder.iterdir())]
    for folder in unfinished:
        print(f"not finished: checkpoints of {folder.name[:8]} ({folder})")
    if (samples := store / SAMPLES).is_dir():
        print(f"samples of large files, to be read again when they are needed ({samples})")
    if not really:
        print(f"{_sum(doomed)} to remove; nothing is removed without --yes")
        return
    shared = Store(store)
    shared.remove_dead_drafts()
    if held := shared.held_locks():
        raise UserError(f"another process is using {store} ({held[0].name}): run prune when it has ended.")
    for entry in doomed:
        shared.remove(entry.folder)
    for folder in unfinished:
        shutil.rmtree(folder)
    shutil.rmtree(samples, ignore_errors=True)
    print(f"{_sum(doomed)} removed")


def _sum(found: Sequence[Entry]) -> str:
    return f"{len(found)} artefacts, {sum(entry.size for entry in found) / 1e6:.1f} MB"


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("list", "verify", "prune"))
    parser.add_argument("--results", type=local_path, nargs="+", help="folders with runs (default: results)")
    parser.add_argument("--store", type=local_path, help="store (default: artifacts/ in the results folder)")
    parser.add_argument("--yes", action="store_true", help="with prune: remove what is listed")
    arguments = parser.parse_args()
    results = arguments.results or [arguments.store.resolve().parent if arguments.store else Path("results")]
    store = arguments.store or results[0] / "artifacts"
    if not store.is_dir():
        raise UserError(f"{store} is not there: name the folder of the artefacts by --store.")
    if arguments.command == "list":
        show(store, results)
    elif arguments.command == "verify":
        verify(store)
    else:
        prune(store, results, arguments.yes)


if __name__ == "__main__":
    main()
