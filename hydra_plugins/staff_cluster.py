"""A Hydra launcher for SLURM: an array with one job for each configuration of a sweep, by submitit.

    staff -m hydra/launcher=cluster hydra.launcher.partition=NAME ...

It is the launcher of hydra-submitit-launcher but for two things. A job that ends without a result, since it was
killed or cancelled, fails alone, with its state, exit status and log. And the state of jobs is read from the queue
where the cluster keeps no accounts.
"""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, filter_overrides
from hydra.types import HydraContext
from omegaconf import DictConfig

from hydra_plugins.staff_launcher import failed_job
from staff.errors import UserError

log = logging.getLogger(__name__)

with suppress(ImportError):  # the extra [parallel] is not installed, and Hydra imports this module all the same
    from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher

    class ClusterLauncher(SlurmLauncher):
        """Runs each job in a job of SLURM, and goes on past those that fail. Its settings are those of submitit."""

        def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
            """Submit the jobs, wait for them, and return their results, in order."""
            import submitit

            common = BaseQueueConf.__dataclass_fields__
            settings = {name if name in common else f"slurm_{name}": value for name, value in self.params.items()}
            kept = {"folder": settings.pop("submitit_folder"), "cluster": "slurm"}
            executor = submitit.AutoExecutor(**kept, slurm_max_num_timeout=settings.pop("slurm_max_num_timeout"))
            executor.update_parameters(**settings)
            submitit.SlurmJob.watcher = _watcher()
            arguments = []
            for number, overrides in enumerate(job_overrides, initial_job_idx):
                log.info("\t#%d : %s", number, " ".join(filter_overrides(overrides)))
                state = Singleton.get_state()
                arguments.append((list(overrides), "hydra.sweep.dir", number, str(number), state))
            jobs = executor.map_array(self, *zip(*arguments, strict=True))
            log.info("submitted %s; if this process ends, they go on", ", ".join(job.job_id for job in jobs))
            assert self.hydra_context is not None and self.config is not None
            about = self.hydra_context, self.config
            return [
                result_of(job, *about, overrides, number)
                for job, (overrides, _, number, *_) in zip(jobs, arguments, strict=True)
            ]


def result_of(job: Any, context: HydraContext, config: DictConfig, overrides: list[str], number: int) -> JobReturn:
    """Wait for a job of submitit, and return its result: a failure where it has none."""
    from submitit.core.utils import FailedJobError, UncompletedJobError

    try:
        return job.results()[0]
    except (FailedJobError, UncompletedJobError) as error:
        config = context.config_loader.load_sweep_config(config, overrides)
        said = UserError(_description(job, str(error)))
        said.__cause__ = error
        return failed_job(context, config, number, said)


def _description(job: Any, log_of_it: str) -> str:
    info = job.get_info()
    state, status = info.get("State", "UNKNOWN"), info.get("ExitCode", "unknown")
    memory = state == "OUT_OF_MEMORY" or "memory limit" in log_of_it
    why = "; it took more memory than hydra.launcher.mem_gb grants" if memory else ""
    return f"its SLURM job {job.job_id} ended as {state} with exit status {status}{why}."


def _watcher() -> Any:
    from submitit.slurm.slurm import SlurmInfoWatcher

    class Watcher(SlurmInfoWatcher):
        """States of jobs from `sacct`, or where there are no accounts from `squeue`, with what has ended lately."""

        # Private, as submitit asks `sacct` alone; tests/test_launcher.py reads both lists by these methods.
        accounts = _succeeds("sacct", "-X", "-n", "-o", "JobID")

        def _make_command(self) -> list[str] | None:
            command = super()._make_command()
            if self.accounts or command is None:
                return command and [part.replace("NodeList", "ExitCode") for part in command]
            fields = "JobArrayID:40,State:40,exit_code:20"
            return ["squeue", "--me", "--states=all", "--array", "--noheader", "-O", fields]

        def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
            if self.accounts:
                return super().read_info(string)
            rows = [line.split() for line in os.fsdecode(string).splitlines()]
            listed = {
                job: {"State": state, "ExitCode": str(os.waitstatus_to_exitcode(int(status)))}
                for job, state, status in rows
            }
            return {job: listed.get(job, {"State": "ENDED"}) for job in self._registered}

    return Watcher(delay_s=60)


def _succeeds(*command: str) -> bool:
    with suppress(FileNotFoundError):
        return subprocess.run(command, capture_output=True).returncode == 0
    return False
