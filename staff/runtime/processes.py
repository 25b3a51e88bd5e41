"""Several processes that carry out one run together, on one device each: started by torchrun or by a launcher.

All of them do the same, with two exceptions. What is counted in samples (scoring, the batches of fine-tuning,
answering) is shared out, and what comes of it is brought together. And the process of rank 0 alone writes:
artefacts, records, logs. The first process to fail claims, in the store through which the processes found each
other, that it tells of the failure; then it ends with a status that is not zero. That cuts the connections of those
that wait for it, and torchrun and SLURM end whoever is still at work.

Without `start`, one process is the whole world, and every function here does nothing, at no cost.
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
"""Seconds that a process that failed waits for another: to tell of it, or to fail as well."""


@dataclass
class _Group:
    rank: int
    world_size: int
    store: Any
    control: Any
    """A process group of its own for messages, so that none is taken for a gradient."""
    speaks: bool | None = None
    """Whether this process is the one to say what went wrong; None while nothing did."""


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
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else a lost connection is told with a stack
    import torch
    from torch import distributed
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    store, _, _ = next(rendezvous("env://"))
    # As long as it takes: one waits for another's artefact for hours, and who fails ends.
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
    """Leave the others, once they are done too. After a failure that they do not come to by themselves, which they
    may wait for without end, this process ends."""
    global _group
    if _group is None:
        return
    from torch import distributed

    if _group.speaks is None:
        distributed.barrier(_group.control)
        distributed.destroy_process_group()
    else:
        try:
            _group.store.wait([f"failed {rank}" for rank in range(_group.world_size)], timedelta(seconds=GRACE))
        except distributed.DistNetworkError:  # the process that holds the store has ended, and waited before that
            pass
        except distributed.DistStoreError:
            leave(1)
    _group = None


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
    """To be asked where an error has ended the run: True in the process that is to tell of it and then to call
    `report_done`; False in the others, once that was done."""
    if _group is None:
        return True
    if _group.speaks is None:
        _group.speaks = False  # where the store is gone with its process, which told what failed or was killed
        with suppress(Exception):
            _group.store.set(f"failed {_group.rank}", "")
            _group.speaks = _group.store.add("failures", 1) == 1
            if not _group.speaks:
                _group.store.wait(["told"], timedelta(seconds=GRACE))
    return bool(_group.speaks)


def report_done() -> None:
    """What went wrong has been told: the others may end."""
    if _group is not None and _group.speaks:
        with suppress(Exception):  # the store is gone, and nobody waits for it
            _group.store.set("told", "")


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
