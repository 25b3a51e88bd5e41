"""The manifest in an artefact's folder: what the artefact is, what it cost, and the checksums of its files."""

import hashlib
import importlib.metadata
import json
import os
import platform
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from staff.errors import UserError
from staff.store.cost import Cost

VISIBLE = 60.0
"""Seconds within which a published folder must be visible to every process of its run."""


class Charge(NamedTuple):
    """The cost of one artefact, with its stage and label."""

    stage: str
    label: str
    cost: Cost


Charges = dict[str, Charge]
"""Charges by the artefact's fingerprint."""


@dataclass(frozen=True)
class Artifact:
    """The published result of a stage, and its cost."""

    path: Path
    """The folder with the files, which do not change any more."""
    stage: str
    """The stage's kind."""
    label: str
    """What the stage did, in words. Not part of the fingerprint."""
    fingerprint: str
    """64 hexadecimal digits. The folder's name is the first 32."""
    cost: Cost
    """The cost of the stage itself, without its inputs."""
    inputs: Charges
    """The artefacts it was made from, and those they were made from."""
    computed: bool
    """Whether this call computed it, instead of reading it."""

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def charged(self) -> Charges:
        """Charges of the artefact and all its inputs. Merge such dictionaries to count every artefact once."""
        return {**self.inputs, self.fingerprint: Charge(self.stage, self.label, self.cost)}


def write_manifest(folder: Path, facts: dict[str, Any], cost: Cost, inputs: Charges) -> None:
    """Write the manifest of the files in `folder`, after all of them have reached the disk.

    Whoever may read the folder may then read its files: safetensors and temporary files are their owner's alone.

    Args:
        facts: further entries of the manifest: stage, version, fingerprint, label, key.
    """
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    mode = folder.stat().st_mode & 0o666
    for file in files:
        file.chmod(mode)
    manifest = {
        **facts,
        "files": {
            file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "sha256": _seal(file)}
            for file in files
        },
        "cost": cost.to_dict(),
        "inputs": {
            read: {"stage": charge.stage, "label": charge.label, "cost": charge.cost.to_dict()}
            for read, charge in inputs.items()
        },
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": library_versions(),
    }
    with (folder / "manifest.json").open("x", encoding="utf-8") as file:
        json.dump({**manifest, "checksum": digest(manifest)}, file, indent=1)
    _seal(folder / "manifest.json")


def await_manifest(folder: Path) -> None:
    """Wait until this process sees an artefact that another process has published, which may take a while on a
    network file system.

    Raises:
        UserError: it does not appear.
    """
    deadline = time.monotonic() + VISIBLE
    while not (folder / "manifest.json").exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"{folder} was published by another process of this run and cannot be seen here: store_dir must be "
                "a folder that all of them share."
            )
        time.sleep(0.1)


def read_manifest(folder: Path) -> tuple[dict[str, Any], Artifact]:
    """The manifest of a published artefact as JSON holds it, and the artefact.

    Raises:
        UserError: the manifest is damaged.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if manifest.pop("checksum") != digest(manifest):
            raise ValueError("its checksum differs")
        inputs = {
            read: Charge(entry["stage"], entry["label"], Cost.from_dict(entry["cost"]))
            for read, entry in manifest["inputs"].items()
        }
        cost = Cost.from_dict(manifest["cost"])
        stage, label, fingerprint = (manifest[name] for name in ("stage", "label", "fingerprint"))
        _ = {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'manifest.json'} is damaged ({error!r}); {_mend(folder)}") from error
    return manifest, Artifact(folder, stage, label, fingerprint, cost, inputs, computed=False)


def check_sizes(folder: Path, manifest: dict[str, Any]) -> None:
    """Refuse an artefact with a file that is missing or has another size.

    Raises:
        UserError: naming the file.
    """
    for name, entry in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file} is missing from its artefact; {_mend(folder)}")
        if (found := file.stat().st_size) != entry["size"]:
            raise UserError(f"{file} has {found} bytes where its manifest says {entry['size']}; {_mend(folder)}")


def check_contents(folder: Path, manifest: dict[str, Any]) -> None:
    """Refuse an artefact with a file whose content has changed.

    This takes about as long as loading the artefact: 1.1 times, measured on a gigabyte of safetensors.

    Raises:
        UserError: naming the file.
    """
    for name, entry in manifest["files"].items():
        if sha256(folder / name) != entry["sha256"]:
            raise UserError(f"{folder / name} is not what was written (its checksum differs); {_mend(folder)}")


@cache
def check_contents_once(folder: Path, made: int) -> None:
    """`check_contents`, once per process, since it takes as long as loading.

    Args:
        made: when the artefact was made; a folder that was made again is verified again.
    """
    check_contents(folder, read_manifest(folder)[0])


def _mend(folder: Path) -> str:
    return f"delete the folder {folder} and it is computed again"


def digest(content: dict[str, Any]) -> str:
    """SHA-256 over canonical JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def refuse_non_json(value: Any, place: str) -> None:
    """Refuse a value that JSON would not give back unchanged.

    Raises:
        TypeError: naming the place of the value.
    """
    if type(value) is dict:
        for name, entry in value.items():
            if type(name) is not str:
                raise TypeError(f"{place} has the name {name!r}, which is not a string")
            refuse_non_json(entry, f"{place}.{name}")
    elif type(value) is list:
        for position, entry in enumerate(value):
            refuse_non_json(entry, f"{place}[{position}]")
    elif type(value) not in (str, int, float, bool, type(None)):
        raise TypeError(f"{place} is {value!r}, a {type(value).__name__}: a key holds only what JSON holds")
    elif type(value) is float and not float("-inf") < value < float("inf"):
        raise TypeError(f"{place} is {value!r}, which JSON cannot hold")


def sha256(file: Path) -> str:
    """SHA-256 of a file's content, as hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _seal(file: Path) -> str:
    """Flush a file to the disk and return its SHA-256. Otherwise a power cut could publish an empty file."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
    return sha256(file)


@cache
def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that results depend on, without importing them."""
    versions = {"python": platform.python_version()}
    for name in ("numpy", "torch", "transformers", "peft", "safetensors", "pyarrow"):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
