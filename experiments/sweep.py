"""A sweep seen as a whole: how far it is, what failed, and the table at its end.

Jobs may run in other processes or on other machines; they report through small files in one folder per sweep.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
import shlex
import sys
import time
import traceback
from collections.abc import Iterable
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.experimental.callback import Callback
from hydra.utils import get_object
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from experiments.configuration import params_left
from hydra_plugins.staff_sweeper import in_cases
from staff.errors import UserError, in_one_line
from staff.runtime import processes
from staff.runtime.files import local_path, storage_failure
from staff.store.manifest import digest

FOLDER = "STAFF_SWEEP_FOLDER"
_NO_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory"  # torch's word for it on a processor, a plain RuntimeError
)
_NO_FOLDER = re.compile(r"interpolation '\$\{(?:from_home:\$\{)?(\w+_dir)\}+': Incompatible value 'None'")
_AMBIGUOUS = re.compile(r"Ambiguous value for argument '(.*)'$", re.M)
_UNEXPECTED = re.compile(r"call to target '([^']+)'.*unexpected keyword argument '(\w+)'.*full_key: (\S+)", re.S)
_NOT_FOUND = re.compile(r"Error locating target '([^']+)'.*full_key: (\S+)", re.S)
_NO_OPTION = "Config group override must be a string or a list"
_CUT_OFF = ("Connection closed by peer", "Connection reset by peer")
log = logging.getLogger("staff")


class Sweep(Callback):
    """Writes the folder of a sweep, when Hydra starts it and when a job starts or ends.

    The folder's path is in the environment, which the processes of jobs inherit under every launcher.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if processes.launched():  # refused by the first job
            return
        folder = local_path(str(config.results_dir)).absolute()
        folder = folder / "sweeps" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        folder.mkdir(parents=True)
        jobs = expected_jobs(config)
        (folder / "jobs.draft").write_text(json.dumps(jobs))
        os.environ[FOLDER] = str(folder)
        log.info("a sweep of %d jobs", len(jobs))

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        if FOLDER in os.environ:
            _expect_jobs(Path(os.environ[FOLDER]))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if FOLDER not in os.environ:
            return
        failed = job_return.status is JobStatus.FAILED
        if processes.claims_error_report() if failed else processes.is_main_process():
            # The public `return_value` raises the error of a failed job. Hydra's own callbacks read this one too.
            report_job(config.hydra.job.num, " ".join(config.hydra.overrides.task), job_return._return_value)
            processes.report_done()
        processes.end()
        # The failure is reported: without this Hydra would raise the first one after the last job.
        job_return.return_value, job_return.status = None, JobStatus.COMPLETED


def _expect_jobs(folder: Path) -> None:
    """Publish the list of jobs when the first one starts: a sweep whose configuration is refused expects none."""
    with suppress(FileNotFoundError):  # another job was first
        (folder / "jobs.draft").rename(folder / "jobs.json")


def report_job(number: int, job: str, result: Path | Exception) -> None:
    """Write the report of a job that has ended: the folder of its record, or why it failed."""
    folder = Path(os.environ[FOLDER])
    _expect_jobs(folder)
    word: dict[str, Any] = {"job": job}
    if isinstance(result, Exception):
        if (folder / f"{number:05d}.json").exists():  # the job has said why, before it was ended
            return
        sentence = sentence_of(result) or f"{type(result).__name__}: {result}"
        log.error("failed: %s: %s", job, sentence)
        file = folder / f"{number:05d}.traceback.txt"
        file.write_text("".join(traceback.format_exception(result)))
        word |= {"failure": sentence, "traceback": str(file)}
    else:
        word |= {"folder": str(result)}
    draft = folder / f"{number:05d}.draft"
    draft.write_text(json.dumps(word))
    draft.rename(folder / f"{number:05d}.json")
    total = len(json.loads((folder / "jobs.json").read_text()))
    log.info("%d of %d jobs done", len(list(folder.glob("[0-9]*.json"))), total)


def end() -> int:
    """Print the table of the sweep and its failures, and return how many of its jobs are not done; 0 if this was no
    sweep. It may be called after the launcher itself has failed."""
    folder = os.environ.pop(FOLDER, None)
    if folder is None or not Path(folder, "jobs.json").is_file():
        return 0
    done, failures = [], []
    for number, job in enumerate(json.loads(Path(folder, "jobs.json").read_text())):
        report = Path(folder, f"{number:05d}.json")
        word = json.loads(report.read_text()) if report.is_file() else {"failure": "it left no report"}
        if "folder" in word:
            done.append(Path(word["folder"]))
        else:
            where = f" (traceback: {word['traceback']})" if "traceback" in word else ""
            failures.append(f"failed: {job}: {word['failure']}{where}")
    if done:
        print(table(done))
    if failures:
        missing = f"{len(failures)} of {len(done) + len(failures)} jobs failed"
        print(*failures, f"{missing}; the same command runs what is missing.", sep="\n")
    return len(failures)


def name() -> str | None:
    """A name of the sweep for readers, the same whenever the same sweep is given: what varies in it, and a digest;
    None for a single run."""
    file = Path(os.environ.get(FOLDER, ""), "jobs.json")
    if not file.is_file():
        return None
    elsewhere = ("results_dir=", "store_dir=", "tracking.", "hydra")  # where it runs changes no sweep
    jobs = [[o for o in job.split() if not o.startswith(elsewhere)] for job in json.loads(file.read_text())]
    common = set.intersection(*map(set, jobs))
    varied = list(dict.fromkeys(o.partition("=")[0].lstrip("+") for job in jobs for o in job if o not in common))
    return "-".join(["sweep", *varied, digest({"jobs": sorted(map(" ".join, jobs))})[:8]])


def workers() -> int | None:
    """How many jobs of the sweep run at the same time on this machine; None if the launcher does not say."""
    if FOLDER not in os.environ:
        return 1
    launcher = HydraConfig.get().launcher
    return launcher.get("workers", 1 if launcher._target_.endswith("BasicLauncher") else None)


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
        if why := storage_failure(error):
            where = getattr(error, "filename", None) or "a file of results_dir or of the temporary folder"
            return f"{where}: {why}; fix this or name another folder, and the same command resumes."
        if isinstance(error, OverrideParseException):
            return _unreadable(error.override)
        if isinstance(error, ConfigCompositionException) and (found := _AMBIGUOUS.search(str(error))):
            return with_comma(found[1])
        if isinstance(error, MissingConfigException) and error.options:
            group, _, option = str(error.missing_cfg_file).rpartition("/")
            return (
                f"{group}={option} is unknown: choose {', '.join(error.options)}, or name the folder of your own "
                "options with --config-dir."
            )
        if isinstance(error, ConfigKeyError | ConfigAttributeError) and isinstance(error.parent_node, DictConfig):
            key = str(error.full_key)
            if key.rpartition(".")[2] in _fields(error.parent_node):
                return f"{key} is a field that its YAML file leaves out: write +{key}=VALUE."
            return _unknown(key, [str(key) for key in error.parent_node])
        if isinstance(error, InstantiationException) and (found := _UNEXPECTED.search(str(error))):
            target, field, node = found.groups()
            return _unknown(f"{node}.{field}", list(inspect.signature(get_object(target)).parameters))
        if isinstance(error, InstantiationException) and (found := _NOT_FOUND.search(str(error))):
            while error.__cause__ is not None:
                error = error.__cause__
            return (
                f"{found[2]}._target_={found[1]} cannot be imported ({error}): name a class of "
                "an installed module, or of one in the working folder."
            )
        if isinstance(error, ValueError) and _NO_OPTION in str(error):
            return "a group takes the name of one of its options, such as method=staff: staff --help lists them."
        if isinstance(error, OmegaConfBaseException) and (found := _NO_FOLDER.search(str(error))):
            return f"{found[1]}=null must name a folder: leave it out for the default."
        if isinstance(error, HydraException | OmegaConfBaseException) and said is None:
            said = in_one_line(error)
        error = error.__cause__ or error.__context__
    return said


def _unreadable(override: str) -> str:
    """What to say of an override that Hydra cannot parse."""
    key, found, value = override.partition("=")
    if not found or not key:
        return f"the override {override!r} sets nothing: write NAME=VALUE."
    if value.startswith("[") and value.endswith("]"):
        listed = ",".join(f"'{part.strip()}'" for part in value[1:-1].split(","))
        return (
            f"the override {override!r} cannot be read as it is: quote each value of the list within the shell's "
            f'quotes, as in "{key}=[{listed}]".'
        )
    return (
        f"the override {override!r} cannot be read as it is: quote its value within the shell's quotes, as in "
        f"{quoted(key, value)}."
    )


def with_comma(override: str) -> str:
    """What to say of an override whose value could be a text, a list or several values."""
    key, _, value = override.partition("=")
    return (
        f"the override {override!r} has a comma: write {quoted(key, value)} for one text, {key}=[{value}] for a "
        "list, or add -m to run one value after the other."
    )


def quoted(key: str, value: str) -> str:
    """An override as it is written on the command line, with its value quoted for Hydra."""
    value = value.strip("\"'") if value[:1] in ("'", '"') else value  # quotes that do not pair
    plain = not re.search(r"""["$`\\!]""", value)  # to the shell, in double quotes
    override = f"{key}={QuotedString(value, Quote.single if plain else Quote.double).with_quotes()}"
    return f'"{override}"' if plain and "\\" not in override else shlex.quote(override)


def _fields(node: DictConfig) -> list[str]:
    """The fields of the class that a part of the configuration names."""
    if "_target_" not in node:
        return []
    try:
        return list(inspect.signature(get_object(node._target_)).parameters)
    except Exception:  # whatever importing a file may raise
        return []


def _unknown(key: str, known: list[str]) -> str:
    """What to say of a setting that does not exist beside `known` ones."""
    settings = sorted(set(known) - {"_target_", "args", "kwargs"})
    offered = f": choose from {', '.join(settings)}" if settings else " here, where there are none"
    near = get_close_matches(key.rpartition(".")[2], settings, 1)
    meant = f" (did you mean {near[0]}?)" if near else ""
    return f"{key} is not a setting{meant}{offered}.{_in_a_sweep(key)}"


def _in_a_sweep(key: str) -> str:
    """Hydra composes a sweep first without what is swept over: with the default option of its groups."""
    group = key.split(".")[0]
    if "--multirun" in sys.argv and any(a.startswith(f"{group}=") and "," in a for a in sys.argv):
        return f" If every {group} of the sweep has it, write it as a choice: '{key}=choice(VALUE)'."
    return ""


def table(folders: list[Path]) -> str:
    """The records in these folders, a line each, and where they lie; then the means over seeds."""
    from experiments.report import means, overview

    folders = list(dict.fromkeys(folders))
    return "\n".join(filter(None, [overview(folders), means(folders)]))


def expected_jobs(config: DictConfig) -> list[str]:
    """The overrides of every job, as Hydra's own sweeper will make them."""
    return [" ".join(job) for job in jobs_of(config, config.hydra.overrides.task)]


def jobs_of(config: DictConfig, overrides: Iterable[str]) -> list[list[str]]:
    """The overrides of every job of a sweep by these overrides, whose configuration with Hydra's own is given."""
    overrides = list(overrides)
    left = params_left(config.hydra.sweeper.get("params") or {}, overrides)
    params = [f"{key}={value}" for key, value in left.items()]
    parsed = OverridesParser.create().parse_overrides([*params, *overrides])
    # Private, as Hydra lists its jobs nowhere else; tests/test_sweep.py counts them beside those that ran.
    (jobs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    return in_cases(jobs, config.hydra.sweeper.get("cases") or [])
