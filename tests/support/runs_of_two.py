"""The runs of tests/test_distributed.py, for one process and for two: `runs_of_two.py RESULTS DATA`.

Steps have 8, 8 and 5 samples; of two processes with two samples in memory, the second has nothing to do in its last
pass.
"""

import gc
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from conftest import run_shrunk
from support.tiny import SETTINGS, SPEC, samples_of
from torch.distributed.tensor import DTensor
from transformers import Trainer

from staff.runtime import preemption, processes
from staff.store.store import Store
from staff.training import checkpoints
from staff.training.stage import Finetune


def configured_runs(results: Path, data: str) -> None:
    common = ["task=file", f"task.data_dir={data}", "task.train_limit=21", "task.test_limit=5", "pruning_rate=0.5"]
    common += ["finetune.device_batch_size=2"]
    staff = ["method=staff", "method.verification_budget=2", "method.num_regions=3"]
    run_shrunk(results / "pass", *common, *staff)
    online = ["method.scores=online", "finetune.length_grouped=true", "finetune.small_epochs=2", "evaluation=none"]
    run_shrunk(results / "online", *common, *staff, *online, "finetune.gradient_checkpointing=true")
    run_shrunk(results / "d2", *common, "method=d2", "finetune=full", "evaluation=none")
    unequal = ["scoring.batch_tokens=64", "evaluation.batch_tokens=48", "method.signal=el2n"]
    run_shrunk(
        results / "fsdp", *common, *staff, *unequal, "finetune.fsdp=true", "finetune.gradient_checkpointing=true"
    )


def interrupted(store: Path, fsdp: bool) -> None:
    """A fine-tuning that ends in its fifth step, and resumes from a checkpoint after the fourth."""
    step, checkpoints.INTERVAL = Trainer.training_step, 0.0

    class Killed(BaseException):
        pass

    def stop(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 4:
            raise Killed
        return step(self, *args, **kwargs)

    Trainer.training_step = stop
    try:
        Store(store).get(training(fsdp))
    except Killed:
        Trainer.training_step = step
    Store(store).get(training(fsdp))


def training(fsdp: bool = False) -> Finetune:
    spec, settings = replace(SPEC, sharded=fsdp), replace(SETTINGS, fsdp=fsdp)
    return Finetune(spec, samples_of(21), settings, 2, int(fsdp), "last_v_b")


def preempted(store: Path) -> None:
    """The same fine-tuning; the last process alone gets a signal in its fourth step, the first of an epoch."""
    step = Trainer.training_step

    def signalled(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3 and processes.rank() == processes.world_size() - 1:
            signal.raise_signal(signal.SIGTERM)
        return step(self, *args, **kwargs)

    Trainer.training_step = signalled
    preemption.listen()
    try:
        Store(store).get(training())
    except preemption.Preempted as end:
        (store / f"status of {processes.rank()}").write_text(str(end.code))
    Trainer.training_step = step


def part_of_the_weights() -> float:
    """Which part of a sharded model this process holds."""
    weights = list(replace(SPEC, sharded=True).load().parameters())
    held = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in weights)
    return held / sum(p.numel() for p in weights)


if __name__ == "__main__":
    gc.freeze()  # every fine-tuning looks at whatever may be garbage
    processes.start()
    results = Path(sys.argv[1])
    configured_runs(results, sys.argv[2])
    interrupted(results / "interrupted", fsdp=False)
    interrupted(results / "interrupted", fsdp=True)
    preempted(results / "preempted/by a signal/store")
    (results / f"part {processes.rank()}").write_text(str(part_of_the_weights()))
    processes.end()
