"""The Hydra application: one configuration in, one record out. `staff --help` lists what can be composed."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from experiments import quiet, reader_gone, sweep
from experiments.configuration import CONF, check_size, with_home, within_groups
from staff.errors import UserError
from staff.runtime import preemption, processes
from staff.runtime.machine import settle_threads
from staff.store.locks import Busy, file_lock
from staff.store.stage import listening
from staff.tracking.mirror import Mirror

if TYPE_CHECKING:
    from experiments.single import Run

log = logging.getLogger("staff")


def run(cfg: DictConfig, choices: dict[str, Any]) -> Path:
    """Select, fine-tune, evaluate, record: the folder of the run. What is recorded already is not done again.

    Args:
        cfg: the composed configuration.
        choices: the option chosen for each group of the configuration.
    """
    from experiments import record
    from experiments.setup import Setup
    from experiments.single import Run

    page = Mirror()
    with listening(page):
        setup = Setup.of(cfg, choices)
        log.info("reading %s", setup.task.origin)
        this = Run(setup)
        with _locked(this), _failure_noted(this, page):
            if processes.broadcast_from_main(lambda: this.recorded):
                log.info("%s: recorded already", this.name)
                return this.folder
            this.check_machine()
            log.info(settle_threads())
            origin, pool = this.task.origin, len(this.pool.ids)
            size = this.budget if this.size.tokens is None else f"{this.size.tokens} tokens"
            log.info("%s: a coreset of %s from %d samples of %s", this.name, size, pool, origin)
            if origin.startswith("pkg://") and not this.family.target.path.startswith("pkg://"):
                log.warning(
                    "these are the %d samples that are shipped: name all by task.data_dir, or on the hub", pool
                )
            page.open(this.about, this.setup.tracking)
            outcome = this.carry_out()
            folder = processes.broadcast_from_main(lambda: record.write(this, outcome))
            page.finish(lambda: record.tables(this, outcome))
            return folder


def _locked(this: Run) -> AbstractContextManager[Any]:
    """Keeps two workers of a sweep from carrying out the same run side by side."""
    this.folder.parent.mkdir(parents=True, exist_ok=True)
    lock = this.folder.parent / f".{this.name}.lock"
    return file_lock(lock) if processes.is_main_process() else nullcontext()


@contextmanager
def _failure_noted(this: Run, page: Mirror) -> Iterator[None]:
    """If the block fails, end the page with the reason, and write the traceback to where the record would be. That
    of an earlier failure is removed."""
    note = this.folder / "failure.txt"
    if processes.is_main_process():
        note.unlink(missing_ok=True)
    try:
        yield
    except Busy:
        page.pause()
        raise
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        page.fail("interrupted" if interrupted else sweep.sentence_of(error) or repr(error))
        if isinstance(error, Exception) and processes.claims_error_report():
            with suppress(OSError):  # a full disk does not hide what failed
                note.parent.mkdir(parents=True, exist_ok=True)
                note.write_text(traceback.format_exc())
        raise


def job(cfg: DictConfig) -> Path | None:
    """Hydra's task function. A job of a sweep returns the folder of its run or raises, and `sweep.Sweep` reports
    either. A single run prints its record or ends the process with an error."""
    hydra_config = HydraConfig.get()
    choices: Any = OmegaConf.to_container(hydra_config.runtime.choices)
    if hydra_config.mode is RunMode.MULTIRUN:
        if processes.launched():
            how = "start `torchrun --no-python ... staff` once a configuration, without --multirun"
            _leave(UserError(f"torchrun is for one run: {how}, or let a cluster do so: hydra/launcher=cluster."))
        processes.start()  # where a launcher has started several tasks for this job
        try:
            return run(cfg, choices)
        except SystemExit as end:
            if processes.world_size() > 1:
                processes.leave_after_main(int(end.code or 0))
            raise
    try:
        check_size(hydra_config.overrides.task)
        folder = run(cfg, choices)
    except Exception as error:
        _leave(error)
    if processes.is_main_process():
        print(sweep.table([folder]))
    return None


def run_hydra() -> None:
    """Run the application with the arguments of the command line."""
    hydra.main(config_path=CONF, config_name="config", version_base="1.3")(job)()


def main() -> None:
    """Entry point of the console script: errors in one sentence, and an honest exit status."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # so that errors reach us instead of being printed
    sweeping = {"-m", "--multirun"}
    if sweeping & set(sys.argv):  # Hydra takes it before the overrides alone
        sys.argv[1:] = ["--multirun", *(argument for argument in sys.argv[1:] if argument not in sweeping)]
    quiet()
    preemption.listen()
    try:
        sys.argv[1:] = within_groups(with_home(sys.argv[1:]))
        processes.start()
        run_hydra()
        failed = sweep.end()
        processes.end()
    except (KeyboardInterrupt, preemption.Preempted) as end:
        status = 130 if isinstance(end, KeyboardInterrupt) else preemption.RESUMABLE
        if processes.is_main_process():
            said = "what is finished is kept, and the same command resumes"
            print(f"staff: asked to end; {said} (exit status {status}).", file=sys.stderr)
        processes.leave_after_main(status)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and reader_gone():
            processes.leave(1)
        sweep.end()
        _leave(error)
    sys.exit(1 if failed else 0)


def _leave(error: Exception) -> NoReturn:
    if processes.claims_error_report():
        sentence = sweep.sentence_of(_of_a_sweep(error))
        if sentence is None:
            traceback.print_exception(error)
        print(f"staff: {sentence or repr(error)}", file=sys.stderr)
        processes.report_done()
    processes.leave(1)


def _of_a_sweep(error: Exception) -> Exception:
    """`error`; but where the command line is wrong even as a sweep's, that fault.

    An experiment may sweep without --multirun. If it cannot be composed, Hydra takes the command for a single run,
    and complains of the first comma in place of the fault.
    """
    arguments = sys.argv[1:]
    if "Ambiguous value" in str(error) and not any(argument.startswith("-") for argument in arguments):
        with hydra.initialize_config_dir(CONF, version_base="1.3"):
            try:
                loader = GlobalHydra.instance().config_loader()
                loader.load_configuration("config", arguments, RunMode.MULTIRUN, validate_sweep_overrides=False)
            except Exception as fault:
                return fault
    return error


if __name__ == "__main__":
    main()
