"""A sweep seen as a whole: how far it is, what failed, and the table at its end.

Jobs may run in other processes or on other machines; they report through small files in one folder per sweep.
"""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from experiments import threads
from staff.errors import UserError
from staff.runtime import processes

FOLDER, TOTAL, WORKERS = "STAFF_SWEEP_FOLDER", "STAFF_SWEEP_TOTAL", "STAFF_SWEEP_WORKERS"
PROCESS = "STAFF_SWEEP_PROCESS"
ALONE = "alone"
_NO_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory"  # torch's word for it on a processor, a plain RuntimeError
)
_NOT_WRITABLE = (errno.EACCES, errno.EEXIST, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS)
_CUT_OFF = ("Connection closed by peer", "Connection reset by peer")
log = logging.getLogger("staff")
_failed = 0
_at_work = threading.Lock()


def folder_of(config: DictConfig, name: str) -> Path:
    """The folder that a setting names, a number too.

    Raises:
        UserError: it names none.
    """
    if type(config[name]) not in (str, int) or not str(config[name]).strip():
        raise UserError(f"{name}={config[name]!r} must name a folder.")
    return Path(str(config[name]))


class Sweep(Callback):
    """Hydra tells it when a sweep starts and ends."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if FOLDER in os.environ or processes.launched():  # once more, for the jobs that are left; or refused
            return
        folder = Path(str(config.results_dir)).absolute()
        folder = folder / "sweeps" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        folder.mkdir(parents=True)
        expected = expected_jobs(config)
        (folder / "jobs.draft").write_text(json.dumps(expected))
        os.environ[FOLDER], os.environ[TOTAL] = str(folder), str(len(expected))
        os.environ[PROCESS] = str(os.getpid())
        basic = "basic" in config.hydra.launcher._target_
        jobs = config.hydra.launcher.get("n_jobs", 1 if basic else 0)
        workers = threads.cores() if jobs < 0 else jobs
        os.environ[WORKERS] = str(workers)
        several = f", {workers} at a time, {threads.share_cores(workers)}" if workers else ""
        log.info("a sweep of %s jobs%s", os.environ[TOTAL], several)


def end() -> None:
    """The table of a sweep and what failed; also where the launcher itself broke down."""
    global _failed
    if FOLDER not in os.environ:
        return
    folder, total = Path(os.environ.pop(FOLDER)), int(os.environ[TOTAL])
    jobs = [json.loads(file.read_text()) for file in sorted(folder.glob("[0-9]*.json"))]
    if not jobs:
        return
    failures = [job for job in jobs if "failure" in job]
    _failed = total - len(jobs) + len(failures)
    print(table([Path(job["folder"]) for job in jobs if "folder" in job]))
    for job in failures:
        print(f"failed: {job['job']}: {job['failure']} (traceback: {job['traceback']})")
    if _failed:
        print(f"{_failed} of {total} jobs failed; the same command runs what is missing.")


def workers() -> int | None:
    """How many jobs of the sweep run at the same time on this machine; None where the launcher does not say."""
    return int(os.environ.get(WORKERS, "1")) or None


def exit_status() -> int:
    """0 if no job of this process's sweep failed."""
    return 1 if _failed else 0


@contextmanager
def begin_job(number: int) -> Iterator[bool]:
    """Around a job's work: whether it is to be done now.

    A worker that is killed takes its fellows with it, and nobody can tell which job was too much. All that were at
    work are left until the others are done, and then have the machine to themselves, one after the other.
    """
    sweep = Path(os.environ[FOLDER])
    if multiprocessing.current_process().name.startswith("Loky"):
        _end_with_parent()
    with suppress(FileNotFoundError):  # another job was first; a sweep whose jobs never ran expects none
        (sweep / "jobs.draft").rename(sweep / "jobs.json")
    begun, alone = sweep / f"{number:05d}.begun", sweep / ALONE
    if begun.with_suffix(".json").exists() or (begun.exists() and not alone.exists()):
        yield False
    elif alone.exists():
        with _at_work, FileLock(alone):
            # Whose worker is killed lets go of the lock before its fellows are taken along.
            wanted = not any(other.read_text() == ALONE for other in _unfinished(sweep))
            if wanted:
                begun.write_text(ALONE)
            yield wanted
    else:
        begun.touch()
        with _at_work:
            yield True


@cache
def _end_with_parent() -> None:
    """Have this worker of joblib's end, once its job is done, if the sweep's own process is gone: it would wait for
    ever."""

    def watch() -> None:
        while os.getppid() == int(os.environ[PROCESS]):
            time.sleep(1)
        with _at_work:
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def go_on(killed: BrokenExecutor | None) -> bool:
    """Whether the sweep's command is to be carried out once more for jobs that are left, after its workers came to
    an end or one was `killed`, which is raised where nothing can be gained by that."""
    if FOLDER not in os.environ:
        if killed:
            raise killed
        return False
    sweep = Path(os.environ[FOLDER])
    left = _unfinished(sweep)
    if killed is None:
        if left:
            (sweep / ALONE).touch()
        return bool(left)
    guilty = [begun for begun in left if begun.read_text() == ALONE]
    new = [begun for begun in left if not begun.read_text()]
    if not guilty and not new:
        raise killed
    for begun in new:
        begun.write_text("left for later")
    log.warning("a worker was killed by the system (out of memory?): %d job(s) left for later", len(new))
    for begun in guilty:
        number = int(begun.stem)
        job = json.loads((sweep / "jobs.json").read_text())[number]
        report_job(number, job, UserError("the worker was killed by the system (out of memory?); it was alone."))
    return True


def _unfinished(sweep: Path) -> list[Path]:
    return [begun for begun in sorted(sweep.glob("*.begun")) if not begun.with_suffix(".json").exists()]


def report_job(number: int, job: str, result: Path | Exception) -> None:
    """Leave word of a finished job: the folder of its record, or what made it fail."""
    sweep = Path(os.environ[FOLDER])
    word: dict[str, Any] = {"job": job}
    if isinstance(result, Exception):
        file = sweep / f"{number:05d}.traceback.txt"
        file.write_text("".join(traceback.format_exception(result)))
        sentence = sentence_of(result) or f"{type(result).__name__}: {result}"
        word |= {"failure": sentence, "traceback": str(file)}
        log.error("failed: %s: %s", job, sentence)
    else:
        word |= {"folder": str(result)}
    draft = sweep / f"{number:05d}.draft"
    draft.write_text(json.dumps(word))
    draft.rename(sweep / f"{number:05d}.json")
    log.info("%d of %s jobs done", len(list(sweep.glob("[0-9]*.json"))), os.environ[TOTAL])


def sentence_of(error: BaseException | None) -> str | None:
    """The sentence meant for the user, wherever in the chain of causes it was said; None for a defect."""
    said = None
    while error is not None:
        if isinstance(error, UserError):
            return str(error)
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _NO_MEMORY in str(error):
            return (
                f"out of memory ({str(error).splitlines()[0][:200] if str(error) else 'no more said'}): lower "
                "finetune.device_batch_size, scoring.batch_tokens or evaluation.batch_tokens."
            )
        if processes.world_size() > 1 and any(words in str(error) for words in _CUT_OFF):
            return "another process of this run was killed (by the system, out of memory?)."
        if isinstance(error, OSError) and error.errno in _NOT_WRITABLE and error.filename:
            return f"{error.filename}: {error.strerror}; mend that or name another folder."
        if isinstance(error, MissingConfigException) and error.options:
            group, _, option = str(error.missing_cfg_file).rpartition("/")
            return f"{group}={option} is unknown: choose {', '.join(error.options)}."
        if isinstance(error, ConfigKeyError | ConfigAttributeError) and isinstance(error.parent_node, DictConfig):
            settings = ", ".join(sorted(str(key) for key in error.parent_node if key != "_target_"))
            offered = f": choose from {settings}" if settings else " here, where there are none"
            return f"{error.full_key} is no setting{offered}.{_in_a_sweep(str(error.full_key))}"
        if isinstance(error, HydraException | OmegaConfBaseException) and said is None:
            said = " ".join(str(error).split())
        error = error.__cause__ or error.__context__
    return said


def _in_a_sweep(key: str) -> str:
    """Hydra composes a sweep first without what is swept over: with the default option of its groups."""
    group = key.split(".")[0]
    if "--multirun" in sys.argv and any(a.startswith(f"{group}=") and "," in a for a in sys.argv):
        return f" If every {group} of the sweep has it, write it as a choice: '{key}=choice(VALUE)'."
    return ""


def table(folders: list[Path]) -> str:
    """The records in these folders, a line each, and where they lie."""
    from experiments.report import overview

    return overview(list(dict.fromkeys(folders)))


def expected_jobs(config: DictConfig) -> list[str]:
    """The overrides of every job, as Hydra's own sweeper will make them."""
    return [" ".join(job) for job in jobs_of(config, config.hydra.overrides.task)]


def jobs_of(config: DictConfig, overrides: Iterable[str]) -> list[list[str]]:
    """The overrides of every job of a sweep by these overrides, whose configuration with Hydra's own is given."""
    params = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    parsed = OverridesParser.create().parse_overrides([*params, *overrides])
    (jobs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    return [list(job) for job in jobs]
