"""Several processes that run one experiment together, one device each, started by torchrun or a launcher.

All of them do the same, with two exceptions. Samples are sharded (scoring, the batches of fine-tuning, answering),
and their results gathered. And only the main process, that of rank 0, writes: artefacts, records, logs.

The first process that fails claims the error report, in the store of the process group, and ends with a non-zero
status. Processes that wait for it lose their connection and end silently. Those that do not are
ended by what started them: torchrun does so, and SLURM with SLURM_KILL_BAD_EXIT=1.

Without `start` there is one process, and every function here returns at once.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import numpy as np

from staff.errors import UserError

Sharded = TypeVar("Sharded", list, np.ndarray)
T = TypeVar("T")

GRACE = 5.0
"""Seconds that a failed process waits for the others: for the report of the error, and for them to fail too."""


@dataclass
class _Group:
    rank: int
    world_size: int
    store: Any
    control: Any
    """A process group of its own for messages, so that none is taken for a gradient."""
    claims: bool | None = None
    """Whether this process reports the error; None before any."""


_group: _Group | None = None


def launched() -> bool:
    """Whether the environment, as torchrun sets it, says that this process is one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def start() -> None:
    """Join the processes that the environment names (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), or the tasks of a
    submitit job, and take the device LOCAL_RANK. All but the main process are silenced."""
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
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost connection is a warning with a stack trace
    import torch
    from torch import distributed
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    store, _, _ = next(rendezvous("env://"))
    # No timeout: a run may wait for hours for an artefact that another one computes.
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
    """Leave the process group when all processes have reached this point. If this process failed and the others did
    not, it exits with status 1, since they may be waiting for it."""
    global _group
    if _group is None:
        return
    from torch import distributed

    if _group.claims is None:
        distributed.barrier(_group.control)
        distributed.destroy_process_group()
    else:
        try:
            _group.store.wait([f"failed {rank}" for rank in range(_group.world_size)], timedelta(seconds=GRACE))
        except distributed.DistNetworkError:  # the main process, which holds the store, has waited and left
            pass
        except distributed.DistStoreError:
            leave(1)
    _group = None


def rank() -> int:
    """The index of this process; 0 is the main process."""
    return _group.rank if _group else 0


def world_size() -> int:
    """The number of processes in this run."""
    return _group.world_size if _group else 1


def local_world_size() -> int:
    """How many of them run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if _group else 1


def is_main_process() -> bool:
    """Whether this process has rank 0, which writes."""
    return rank() == 0


def shard(items: Sharded) -> Sharded:
    """This process's part of the items: every `world_size`-th, so that a list sorted by length is shared evenly."""
    return items[rank() :: world_size()] if _group else items


def all_reduce_sum(values: np.ndarray) -> np.ndarray:
    """The sum over all processes, element by element. It is exact where all but one give zero."""
    if _group is None:
        return values
    import torch
    from torch import distributed

    summed = torch.from_numpy(values.copy())
    distributed.all_reduce(summed, group=_group.control)
    return summed.numpy()


def all_gather(value: T) -> list[T]:
    """The values of all processes, by rank. They must be picklable."""
    if _group is None:
        return [value]
    from torch import distributed

    values: list[Any] = [None] * _group.world_size
    distributed.all_gather_object(values, value, group=_group.control)
    return values


def broadcast_from_main(decide: Callable[[], T]) -> T:
    """What `decide` returns in the main process, or raises there, in every process."""
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
    """If the body raises in one process, raise in all. Only for a body that works `apart`, that is without
    communication: otherwise this does nothing."""
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
    """The error as other processes raise it: picklable, with its message."""
    if isinstance(error, UserError):
        return UserError(str(error))
    return (MemoryError if type(error).__name__ == "OutOfMemoryError" else RuntimeError)(repr(error))


def claims_error_report() -> bool:
    """Whether this process is to report the error that ended the run, and then to call `report_done`.

    In the others it returns False, after the report is done."""
    if _group is None:
        return True
    if _group.claims is None:
        _group.claims = False  # also if the store is gone: the main process, which held it, reported or was killed
        with suppress(Exception):
            _group.store.set(f"failed {_group.rank}", "")
            _group.claims = _group.store.add("failures", 1) == 1
            if not _group.claims:
                _group.store.wait(["reported"], timedelta(seconds=GRACE))
    return bool(_group.claims)


def report_done() -> None:
    """Let the other processes end, after the error was reported."""
    if _group is not None and _group.claims:
        with suppress(Exception):  # the store is gone, and nobody waits
            _group.store.set("reported", "")


def leave_after_main(status: int) -> NoReturn:
    """Exit in all processes, in the main one first: a launcher ends the others' job with the first of them."""
    if _group is not None:
        with suppress(Exception):  # the main process, which holds the store, has left
            if is_main_process():
                _group.store.set("main has left", "")
            else:
                _group.store.wait(["main has left"], timedelta(seconds=GRACE))
    leave(status)


def leave(status: int) -> NoReturn:
    """Exit after a failure. One of several processes skips Python's own shutdown, during which a gloo thread that
    frees a tensor aborts the process."""
    if _group is not None:
        with suppress(OSError):  # the reader of a pipe may have closed it
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
