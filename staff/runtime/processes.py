"""Several processes that carry out one run together, on one device each: started by torchrun or by a launcher.

All of them do the same, with two exceptions. What is counted in samples (scoring, the batches of fine-tuning,
answering) is shared out, and what comes of it is brought together. And the process of rank 0 alone writes:
artefacts, records, logs. A process that fails says so in the store through which the processes found each other;
those that wait for it, which nothing else would ever tell, watch that store and end as well.

Without `start`, one process is the whole world, and every function here does nothing, at no cost.
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
"""Seconds that a process has to end by itself after another has failed."""


@dataclass
class _Group:
    rank: int
    world_size: int
    store: Any
    control: Any
    """A process group of its own for messages, so that none is taken for a gradient."""
    over: threading.Event = field(default_factory=threading.Event)
    speaks: bool | None = None
    """Whether this process is the one to say what went wrong."""

    def __post_init__(self) -> None:
        self._watcher = threading.Thread(target=_watch, args=(self,), daemon=True)
        self._watcher.start()
        atexit.register(self.rest)  # a thread in the midst of a call to torch ends a process by SIGABRT

    def rest(self) -> None:
        """Watch no more."""
        self.over.set()
        self._watcher.join()


_group: _Group | None = None


def launched() -> bool:
    """Whether the environment says, as torchrun's does, that this process is one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def start() -> None:
    """Find the other processes that the environment tells of (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), or else
    the other tasks of a submitit job, and take the device LOCAL_RANK; those but the first fall silent."""
    global _group
    if "SUBMITIT_EXECUTOR" in os.environ and not launched():
        from submitit.helpers import TorchDistributedEnvironment

        # Which GPU is whose is decided below: SLURM may have left each task one visible GPU.
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
    # As long as it takes: one waits for another's artefact for hours, and who fails says so.
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
    """Wait for the others, and leave them."""
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
        except Exception:  # the store is gone with the process that held it
            failed = True
        if failed and not group.over.wait(GRACE):
            _shutdown(group)
            os._exit(1)


def rank() -> int:
    return _group.rank if _group else 0


def world_size() -> int:
    """How many processes carry out this run."""
    return _group.world_size if _group else 1


def local_world_size() -> int:
    """How many of them work on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if _group else 1


def is_main_process() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


def shard(items: Sharded) -> Sharded:
    """Every world-th of the items: of a list that is sorted by length, each process gets as much work."""
    return items[rank() :: world_size()] if _group else items


def all_reduce_sum(values: np.ndarray) -> np.ndarray:
    """The sum of what all processes give, element by element; where all but one give zero, that one's, exactly."""
    if _group is None:
        return values
    import torch
    from torch import distributed

    summed = torch.from_numpy(values.copy())
    distributed.all_reduce(summed, group=_group.control)
    return summed.numpy()


def all_gather(value: T) -> list[T]:
    """What each process gives, by rank; whatever pickle can write."""
    if _group is None:
        return [value]
    from torch import distributed

    values: list[Any] = [None] * _group.world_size
    distributed.all_gather_object(values, value, group=_group.control)
    return values


def broadcast_from_main(decide: Callable[[], T]) -> T:
    """What rank 0 finds, for all; what it raises, all raise."""
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
    """Around a process's own part of shared work: if one fails, all do. That takes that it works `apart`, and waits
    for no other."""
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
    """The error in words: of what another process raised, it needs no more."""
    if isinstance(error, UserError):
        return UserError(str(error))
    return (MemoryError if type(error).__name__ == "OutOfMemoryError" else RuntimeError)(repr(error))


def claims_error_report() -> bool:
    """To be asked where an error has ended the run: True in one process, which is to tell of it and then to call
    `report_done`; in the others False, once that was done."""
    if _group is None:
        return True
    group = _group
    if group.speaks is None:
        group.rest()
        try:
            group.speaks = group.store.add("failures", 1) == 1
            group.store.set("failed", "")
        except Exception:  # the store is gone: nobody can know whether another has spoken
            group.speaks = True
    if not group.speaks:
        with suppress(Exception):
            group.store.wait(["told"], timedelta(seconds=GRACE))
        _shutdown(group)
    return bool(group.speaks)


def report_done() -> None:
    """What went wrong has been told: the others may end."""
    if _group is not None:
        with suppress(Exception):
            _group.store.set("told", "")
        _shutdown(_group)


def _shutdown(group: _Group) -> None:
    """To be called before a process ends after a failure. The one that holds the store ends last: who waits for a
    word there would hear of a lost connection instead."""
    with suppress(Exception):
        if group.rank:
            group.store.set(f"ended {group.rank}", "")
            return
        others = [f"ended {rank}" for rank in range(1, group.world_size)]
        deadline = time.monotonic() + GRACE + 2  # who waits in vain for this process is ended by its watcher
        while not group.store.check(others) and time.monotonic() < deadline:
            time.sleep(0.05)


def leave(status: int) -> NoReturn:
    """End this process after a failure, whatever the others do. Among several not by Python's own way: a thread of
    gloo's that lets go of a tensor meanwhile would abort the process."""
    if _group is not None:
        with suppress(OSError):  # whoever reads may have had enough
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
