"""A Hydra launcher for one machine: worker processes that take the jobs of a sweep, one job at a time each.

    staff -m hydra/launcher=local hydra.launcher.workers=2 ...

A worker is a fresh process that stays for several jobs, since importing torch takes seconds. One that dies fails the
job it had and nothing else; another takes its place. Workers end with the process that started them, however that
ends.

Hydra finds launchers in the namespace package `hydra_plugins` alone, which is why this file lies here. It imports
every module there whenever any application starts: torch is imported late.
"""

import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from hydra import version
from hydra.core.utils import JobReturn, JobStatus, env_override, filter_overrides, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from staff.errors import UserError

log = logging.getLogger(__name__)


class LocalLauncher(Launcher):
    """Runs each job in one of several worker processes, each with a GPU of its own and its part of the threads.

    The task function must be found by its name in its module, undecorated: workers are told where it is.

    Args:
        workers: how many; None: one for each GPU, or one where there is none. More workers than GPUs share them.

    Raises:
        UserError: `workers` is something else.
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
        """Run the jobs.

        Returns:
            What each job came to, in their order. The job of a worker that died has failed, with a `UserError` that
            says how; the callbacks' `on_job_end` has heard of it here, as of all others in their worker.
        """
        gpus = visible_gpus()
        count = self.workers or len(gpus) or 1
        log.info("Launching %d jobs in %d worker processes", len(job_overrides), count)
        workers = [_Worker(n, environment(n, count, gpus), self) for n in range(count)]
        waiting = deque(enumerate(job_overrides, initial_job_idx))
        returns: dict[int, JobReturn] = {}
        try:
            while waiting or any(worker.job for worker in workers):
                for worker in workers:
                    if waiting and not worker.job:
                        number, overrides = waiting.popleft()
                        log.info("\t#%d : %s", number, " ".join(filter_overrides(overrides)))
                        worker.begin(self._composed(number, overrides, count))
                busy = [worker for worker in workers if worker.job]
                wait([worker.connection for worker in busy], timeout=1)
                for worker in busy:
                    if (result := worker.result()) is not None:
                        returns[worker.finish().hydra.job.num] = result
        finally:
            for worker in workers:
                worker.end()
        return [returns[number] for number in sorted(returns)]

    def _composed(self, number: int, overrides: Sequence[str], workers: int) -> DictConfig:
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
            config.hydra.launcher.workers = workers
        return config


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls the GPUs that this process may use."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        import torch

        return [str(index) for index in range(torch.cuda.device_count())]
    return [name.strip() for name in named.split(",") if name.strip() not in ("", "-1")]


def environment(number: int, workers: int, gpus: Sequence[str]) -> dict[str, str]:
    """What worker `number` has in its environment beside what it inherits; what the user has set stays, but for the
    list of GPUs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Threads that spin while they wait slow the other workers down.
    threads = {"OMP_NUM_THREADS": str(max(1, cores // workers)), "OMP_WAIT_POLICY": "passive"}
    own = {name: value for name, value in threads.items() if name not in os.environ}
    return {**own, "CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else own


class _Worker:
    """A place for one job at a time, and the process that works there: started for the first job, and anew for the
    first one after it died."""

    connection: Connection

    def __init__(self, number: int, environment: dict[str, str], launcher: LocalLauncher) -> None:
        self.number, self.environment = number, environment
        self.context, self.task_function = launcher.hydra_context, launcher.task_function
        self.process: Any = None
        self.job: DictConfig | None = None

    def begin(self, job: DictConfig) -> None:
        if self.process is None or not self.process.is_alive():
            self._start()
        self.job = job
        with suppress(BrokenPipeError):  # it has died since; `result` will tell
            self.connection.send(job)

    def _start(self) -> None:
        known = " ".join(f"{name}={value}" for name, value in self.environment.items())
        log.info("worker %d: a new process%s", self.number, known and f" with {known}")
        spawn = multiprocessing.get_context("spawn")
        self.connection, theirs = spawn.Pipe()
        self.process = spawn.Process(
            target=_work,
            args=(self.number, theirs, self.context, self.task_function, str(version.getbase())),
            name=f"worker {self.number}",
        )
        # libgomp and CUDA read the environment once, before any code of ours could set it.
        with env_override(self.environment), _deaf_to_interrupts():
            self.process.start()
        theirs.close()

    def result(self) -> JobReturn | None:
        """What the job came to; None while it is running."""
        alive = self.process.is_alive()
        try:
            if self.connection.poll():
                return self.connection.recv()
        except (EOFError, OSError):  # it died: the other end is closed
            self.process.join()
            alive = False
        return None if alive else self._lost()

    def _lost(self) -> JobReturn:
        assert self.job is not None
        overrides = list(self.job.hydra.overrides.task)
        lost = JobReturn(overrides=overrides, hydra_cfg=self.job, status=JobStatus.FAILED)
        lost.return_value = UserError(f"its worker process {_end_of(self.process.exitcode)}.")
        self.context.callbacks.on_job_end(config=self.job, job_return=lost)
        return lost

    def finish(self) -> DictConfig:
        """The job that is done; the worker is free for another."""
        assert self.job is not None
        job, self.job = self.job, None
        return job

    def end(self) -> None:
        """End the process: one that has nothing to do in its own way, one at work at once."""
        if self.process is None:
            return
        self.connection.close()
        if self.job:
            self.process.terminate()
        self.process.join(timeout=10)
        self.process.kill()
        self.process.join()


def _end_of(exitcode: int) -> str:
    if exitcode >= 0:
        return f"ended with exit status {exitcode}"
    name = signal.Signals(-exitcode).name
    return f"was killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes started meanwhile ignore Ctrl-C, which a terminal sends to all of them: their parent ends them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _work(number: int, connection: Connection, context: HydraContext, task: TaskFunction, base: str) -> None:
    """A worker's life: jobs come by the connection until that is closed, and what they come to goes back."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    version.setbase(base)
    setup_globals()
    while True:
        try:
            config = connection.recv()
        except EOFError:
            return
        _sign_log_lines(f"[worker {number}, job {config.hydra.job.num}]")
        connection.send(
            run_job(
                task_function=task,
                config=config,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
                hydra_context=context,
            )
        )


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _sign_log_lines(signature: str) -> None:
    """Whatever format the log has, let its messages begin with the signature."""

    def signed(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = logging.LogRecord(*args, **kwargs)
        record.msg = f"{signature} {record.msg}"
        return record

    logging.setLogRecordFactory(signed)
