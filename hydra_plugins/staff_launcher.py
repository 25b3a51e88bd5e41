"""A Hydra launcher for one machine: worker processes that take the jobs of a sweep, one job at a time each.

    staff -m hydra/launcher=local hydra.launcher.workers=2 ...

A worker is a fresh process that stays for several jobs, since importing torch takes seconds. If it dies, the job it
had fails, the others go on, and a new process takes its place. Workers end when their parent process ends, even if
that is killed.

Hydra finds launchers only in the namespace package `hydra_plugins`, and imports every module there whenever any
application starts. So this file lies here, imports torch late, and registers the resolvers of the configuration.
"""

import logging
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from hydra import version
from hydra.core.utils import JobReturn, JobStatus, env_override, filter_overrides, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from experiments.configuration import register_resolvers
from experiments.schedule import Queue, starting_order
from staff.errors import UserError
from staff.runtime import preemption
from staff.runtime.machine import worker_threads
from staff.store.locks import Busy, Turn, is_free, turn

log = logging.getLogger(__name__)

register_resolvers()

LOOK = 0.1
"""Seconds after which it is seen whether a stage that a job waits for has ended."""

TURNS = 20
"""After so many turns without waiting for others, a job waits on its worker."""

PATIENCE = 30.0
"""Seconds that a worker has, once its sweep is ended, to finish a step and save a checkpoint."""


class LocalLauncher(Launcher):
    """Runs each job in one of several worker processes. Each has a GPU of its own and its part of the threads.

    The task function must be importable by its name, undecorated: workers receive its name.

    Args:
        workers: number of worker processes; None: one per GPU, or one on a machine without. If there are more
            workers than GPUs, they share them.

    Raises:
        UserError: `workers` is not a positive whole number.
    """

    config: DictConfig
    hydra_context: HydraContext
    task_function: TaskFunction

    def __init__(self, workers: int | None = None) -> None:
        if workers is not None and (type(workers) is not int or workers < 1):
            raise UserError(f"hydra.launcher.workers={workers!r} must be null or a whole number of at least 1.")
        self.workers = workers

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs and return their results, in order.

        A job whose worker died is returned as failed, with a `UserError` that says how the worker ended. Its
        `on_job_end` callbacks are called in this process; those of all other jobs in their worker.
        """
        gpus = visible_gpus()
        count = self.workers or len(gpus) or 1
        log.info("Launching %d jobs in %d worker processes", len(job_overrides), count)
        workers = [_Worker(n, environment(n, count, gpus), self) for n in range(count)]
        queue: Queue[Path] = Queue(starting_order(job_overrides))
        turns = [Turn(may_wait=count == 1)] * len(job_overrides)
        put_back, returns = Counter[int](), dict[int, JobReturn]()
        try:
            while queue or any(worker.job for worker in workers):
                for worker in workers:
                    if not worker.job and (at := queue.take(is_free)) is not None:
                        overrides, number = job_overrides[at], initial_job_idx + at
                        log.info("\t#%d : %s", number, " ".join(filter_overrides(overrides)))
                        worker.start_job(self._compose(number, overrides, count), turns[at])
                busy = [worker for worker in workers if worker.job]
                wait([worker.connection for worker in busy], timeout=LOOK if queue.held else 1)
                for worker in busy:
                    job = worker.job
                    if not job or (result := worker.result()) is None:
                        continue
                    if not isinstance(result, Busy):
                        returns[job.hydra.job.num] = result
                        continue
                    at = job.hydra.job.num - initial_job_idx
                    put_back[at] += 1
                    turns[at] = Turn(put_back[at] >= TURNS, result.computed)
                    queue.put_back(at, result.lock)
        finally:
            for worker in workers:
                worker.stop()
            for worker in workers:
                worker.join()
        return [returns[number] for number in sorted(returns)]

    def _compose(self, number: int, overrides: Sequence[str], workers: int) -> DictConfig:
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
            config.hydra.launcher.workers = workers
        return config


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES takes."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        import torch

        return [str(index) for index in range(torch.cuda.device_count())]
    return [name.strip() for name in named.split(",") if name.strip() not in ("", "-1")]


def environment(number: int, workers: int, gpus: Sequence[str]) -> dict[str, str]:
    """The variables that worker `number` does not inherit. Threads that the user has set are left alone."""
    own = worker_threads(workers)
    return {**own, "CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else own


def failed_job(context: HydraContext, config: DictConfig, number: int, error: UserError) -> JobReturn:
    """The return of a job that ended without one, after its `on_job_end` callbacks have been called here."""
    with open_dict(config):
        config.hydra.job.num = number
    failure = JobReturn(overrides=list(config.hydra.overrides.task), hydra_cfg=config, status=JobStatus.FAILED)
    failure.return_value = error
    context.callbacks.on_job_end(config=config, job_return=failure)
    return failure


class _Worker:
    """Runs one job at a time in a process of its own, started for its first job, and again after it has died."""

    def __init__(self, number: int, environment: dict[str, str], launcher: LocalLauncher) -> None:
        self.number, self.environment = number, environment
        self.context, self.task_function = launcher.hydra_context, launcher.task_function
        self.process: Any = None
        self.connection: Any = None
        self.job: DictConfig | None = None

    def start_job(self, job: DictConfig, turn: Turn) -> None:
        if self.process is None or not self.process.is_alive():
            self._start()
        self.job = job
        with suppress(BrokenPipeError):  # it has just died, as `result` will find
            self.connection.send((job, turn))

    def _start(self) -> None:
        known = " ".join(f"{name}={value}" for name, value in self.environment.items())
        log.info("worker %d: a new process%s", self.number, f" with {known}" if known else "")
        spawn = multiprocessing.get_context("spawn")
        self.connection, theirs = spawn.Pipe()
        self.process = spawn.Process(
            target=_work,
            args=(self.number, theirs, self.context, self.task_function, str(version.getbase())),
            name=f"worker {self.number}",
        )
        # Set before the process starts: OpenMP and CUDA read their variables once, when they are loaded.
        # Bars of several processes would overwrite each other on a terminal.
        variables = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", **self.environment}
        with env_override(variables), _ignoring_interrupts():
            self.process.start()
        theirs.close()

    def result(self) -> JobReturn | Busy | None:
        """The result of the job, or what it would wait for, after which the worker is free for another; None while
        the job is running."""
        alive = self.process.is_alive()
        try:
            result = self.connection.recv() if self.connection.poll() else None
        except (EOFError, OSError):  # the process has died, which closed the other end
            result, alive = None, False
        if result is None and not alive:
            self.process.join()
            result = self._failure()
        if result is not None:
            self.job = None
        return result

    def _failure(self) -> JobReturn:
        assert self.job is not None
        said = UserError(f"its worker process {_describe_exit(self.process.exitcode)}.")
        return failed_job(self.context, self.job, self.job.hydra.job.num, said)

    def stop(self) -> None:
        """Have the process end: an idle one by closing its connection, a busy one by SIGTERM."""
        if self.process is not None:
            self.connection.close()
            if self.job:
                self.process.terminate()

    def join(self) -> None:
        """Wait for the process to end; one that has not within `PATIENCE` seconds is killed."""
        if self.process is not None:
            self.process.join(timeout=PATIENCE)
            self.process.kill()
            self.process.join()


def _describe_exit(exitcode: int) -> str:
    if exitcode >= 0:
        return f"ended with exit status {exitcode}"
    name = signal.Signals(-exitcode).name
    return f"was killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"


@contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Processes started meanwhile ignore Ctrl-C, which a terminal sends to them too: their parent ends them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _work(number: int, connection: Connection, context: HydraContext, task: TaskFunction, base: str) -> None:
    """The main function of a worker: run the jobs that arrive, until the connection is closed."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    preemption.listen()
    version.setbase(base)
    setup_globals()
    while True:
        try:
            config, this = connection.recv()
        except EOFError:
            return
        _prefix_log_lines(f"[worker {number}, job {config.hydra.job.num}]")
        turn.set(this)
        try:
            result: JobReturn | Busy = run_job(
                task_function=task,
                config=config,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
                hydra_context=context,
            )
        except Busy as busy:
            log.info("%s: another worker is at it; this one takes another job meanwhile", busy.stage)
            result = busy
        connection.send(result)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _prefix_log_lines(prefix: str) -> None:
    """Put `prefix` before every message of this process's log, whatever the format of its handlers."""

    def prefixed(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = logging.LogRecord(*args, **kwargs)
        record.msg = f"{prefix} {record.msg}"
        return record

    logging.setLogRecordFactory(prefixed)
