"""Several processes that run one experiment together, one device each, started by torchrun or a launcher.

All processes execute the same code, with two exceptions. Work on samples (scoring, batches of fine-tuning,
generation) is sharded, and its results are gathered. And only the main process, rank 0, writes artefacts, records
and logs. A process that fails sets a key in the rendezvous store. The others watch that store, because they would
otherwise wait for the failed process forever, and exit too.

Without `start` there is one process, and the functions here return their input at no cost.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import numpy as np

from staff.errors import UserError

Sharded = TypeVar("Sharded", list, np.ndarray)
T = TypeVar("T")

GRACE = 10.0
"""Seconds that a process has to exit by itself after another has failed."""


@dataclass
class _Group:
    rank: int
    world_size: int
    store: Any
    control: Any
    """A separate process group for messages, so that they do not mix with gradients."""
    over: threading.Event = field(default_factory=threading.Event)
    speaks: bool | None = None
    """Whether this process reports the error; None before there is one."""

    def __post_init__(self) -> None:
        self._watcher = threading.Thread(target=_watch, args=(self,), daemon=True)
        self._watcher.start()
        atexit.register(self.rest)  # a thread inside a call to torch at exit aborts the process

    def rest(self) -> None:
        """Stop watching."""
        self.over.set()
        self._watcher.join()


_group: _Group | None = None


def launched() -> bool:
    """Whether the environment, as torchrun sets it, says that this process is one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def start() -> None:
    """Join the processes of this run, and take the device LOCAL_RANK.

    They are those that the environment names (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), or the tasks of a
    submitit job. All but the main process stop logging and printing.
    """
    global _group
    if "SUBMITIT_EXECUTOR" in os.environ and not launched():
        from submitit.helpers import TorchDistributedEnvironment

        # The device is set below: SLURM may have left each task only one visible GPU.
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    if _group is not None or not launched():
        return
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank:
        os.environ["TQDM_DISABLE"] = os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        logging.disable(logging.CRITICAL)
        warnings.simplefilter("ignore")
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    import torch
    from torch import distributed
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    store, _, _ = next(rendezvous("env://"))
    # A process may wait hours for another's artefact. Failures are reported by `_watch`, not by a timeout.
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if gpu else "gloo",
        store=PrefixStore("group", store),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(days=30),
    )
    control = distributed.new_group(backend="gloo", timeout=timedelta(days=30))
    _group = _Group(rank, world_size, PrefixStore("staff", store), control)


def end() -> None:
    """Wait for the other processes, and leave the group."""
    global _group
    if _group is None:
        return
    from torch import distributed

    if _group.speaks is None:
        distributed.barrier(_group.control)
        _group.rest()
        distributed.destroy_process_group()
    _group = None


def _watch(group: _Group) -> None:
    while not group.over.wait(1.0):
        try:
            failed = group.store.check(["failed"])
        except Exception:  # the store ended with the process that hosts it
            failed = True
        if failed and not group.over.wait(GRACE):
            _shutdown(group)
            os._exit(1)


def rank() -> int:
    """The index of this process; 0 is the main process."""
    return _group.rank if _group else 0


def world_size() -> int:
    """The number of processes in this run."""
    return _group.world_size if _group else 1


def local_world_size() -> int:
    """The number of this run's processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if _group else 1


def is_main_process() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


def shard(items: Sharded) -> Sharded:
    """This process's items: every `world_size`-th, so that items sorted by length give equal work."""
    return items[rank() :: world_size()] if _group else items


def all_reduce_sum(values: np.ndarray) -> np.ndarray:
    """The elementwise sum of all processes' `values`. It is exact where all but one process give zero."""
    if _group is None:
        return values
    import torch
    from torch import distributed

    summed = torch.from_numpy(values.copy())
    distributed.all_reduce(summed, group=_group.control)
    return summed.numpy()


def all_gather(value: T) -> list[T]:
    """The values of all processes, by rank. A value can be anything that pickle can write."""
    if _group is None:
        return [value]
    from torch import distributed

    values: list[Any] = [None] * _group.world_size
    distributed.all_gather_object(values, value, group=_group.control)
    return values


def broadcast_from_main(decide: Callable[[], T]) -> T:
    """The result of `decide` in the main process, for all processes; an error is raised in all of them."""
    if _group is None:
        return decide()
    from torch import distributed

    message: list[Any] = [None, None]
    if is_main_process():
        try:
            message[0] = decide()
        except Exception as error:
            message[1] = _portable(error)
            distributed.broadcast_object_list(message, src=0, group=_group.control)
            raise
    distributed.broadcast_object_list(message, src=0, group=_group.control)
    found, error = message
    if error is not None:
        raise error
    return found


@contextmanager
def raise_on_all_ranks(apart: bool = True) -> Iterator[None]:
    """If the block raises in one process, raise in all.

    Args:
        apart: the block waits for no other process. Otherwise nothing is done: the others would wait forever.
    """
    if _group is None or not apart:
        yield
        return
    mine: Exception | None = None
    try:
        yield
    except Exception as error:
        mine = error
    errors = all_gather(mine and _portable(mine))
    if mine is not None:
        raise mine
    for error in errors:
        if error is not None:
            raise error


def _portable(error: Exception) -> Exception:
    """The error as one that pickle can write, with the same message."""
    if isinstance(error, UserError):
        return UserError(str(error))
    return (MemoryError if type(error).__name__ == "OutOfMemoryError" else RuntimeError)(repr(error))


def claims_error_report() -> bool:
    """Whether this process is to report the error that ended the run.

    True in one process, which must call `report_done` afterwards. In the others False, after that call.
    """
    if _group is None:
        return True
    group = _group
    if group.speaks is None:
        group.rest()
        try:
            group.speaks = group.store.add("failures", 1) == 1
            group.store.set("failed", "")
        except Exception:  # the store is gone, so whether another process reports is unknown
            group.speaks = True
    if not group.speaks:
        with suppress(Exception):
            group.store.wait(["told"], timedelta(seconds=GRACE))
        _shutdown(group)
    return bool(group.speaks)


def report_done() -> None:
    """Let the other processes exit: the error is reported."""
    if _group is not None:
        with suppress(Exception):
            _group.store.set("told", "")
        _shutdown(_group)


def _shutdown(group: _Group) -> None:
    """Prepare to exit after a failure.

    The process that hosts the store exits last. Otherwise those that wait for a key in it would report a lost
    connection instead.
    """
    with suppress(Exception):
        if group.rank:
            group.store.set(f"ended {group.rank}", "")
            return
        others = [f"ended {rank}" for rank in range(1, group.world_size)]
        deadline = time.monotonic() + GRACE + 2  # a process that still waits for this one is ended by its watcher
        while not group.store.check(others) and time.monotonic() < deadline:
            time.sleep(0.05)


def leave(status: int) -> NoReturn:
    """Exit after a failure without waiting for the other processes.

    One of several processes skips Python's own shutdown: a gloo thread that frees a tensor during it would abort
    the process.
    """
    if _group is not None:
        with suppress(OSError):  # the reader of a pipe may be gone
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
