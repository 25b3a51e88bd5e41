"""Sweeps on a SLURM cluster of one node, undisturbed and disturbed: records are those of a sweep without SLURM."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.processes import check_left_behind, computed, finish, records, stages, start
from support.servers import free_ports

# ---------------------------------------------------------------- a cluster


NEEDED = ("setpriv", "munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "squeue", "scontrol")
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
MpiDefault=none
SlurmdParameters=config_overrides
KillWait=60
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
DefMemPerCPU=1000
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=20000
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """What this machine lacks to run a cluster, in a sentence; empty if it lacks nothing."""
    absent = [name for name in NEEDED if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not found: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "starting SLURM's daemons needs root"


@contextmanager
def slurm(folder: Path) -> Iterator[None]:
    """A running cluster, found by SLURM_CONF in the environment. It ends with the block, its jobs too."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    configuration = folder / "slurm.conf"
    host = socket.gethostname().partition(".")[0]
    configuration.write_text(CONFIGURATION.format(folder=folder, host=host, ports=free_ports(2)))
    munge = {"key-file": key, "socket": folder / "munge.socket", "pid-file": folder / "munge.pid"}
    munge |= {"log-file": folder / "munge.log", "seed-file": folder / "munge.seed"}
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(configuration)
    daemons: list[subprocess.Popen] = []
    commands = (
        ["munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in munge.items())],
        ["slurmctld", "-D", "-c", "-i", "-f", configuration],
        ["slurmd", "-D", "-c", "-f", configuration],
    )
    try:
        for command in commands:
            ended = ["setpriv", "--pdeathsig", "TERM", *command]  # with this process, however it ends
            daemons.append(subprocess.Popen(ended, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            time.sleep(0.5)
        deadline = time.monotonic() + 30
        while "idle" not in said("sinfo", "-h", "-o", "%T", check=False):
            assert time.monotonic() < deadline, (folder / "slurmctld.log").read_text()
            time.sleep(0.2)
        yield
    finally:
        said("scancel", "--me", check=False)
        deadline = time.monotonic() + 30
        while said("squeue", "-h", check=False) and time.monotonic() < deadline:
            time.sleep(0.2)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(timeout=30)
        os.environ.pop("SLURM_CONF")
        if before is not None:
            os.environ["SLURM_CONF"] = before


def said(*command: str, check: bool = True) -> str:
    """What a command of SLURM prints."""
    return subprocess.run(command, check=check, capture_output=True, text=True).stdout.strip()


if missing():
    pytest.skip(missing(), allow_module_level=True)

# ---------------------------------------------------------------- sweeps on it


GRID = ("method=random,longest", "pruning_rate=0.5,0.75", "seed=0,1")
LONG = ("method=full", "family=tiny_small", "task.train_limit=64", "finetune.epochs=60")
"""A fine-tuning of 480 steps, half a minute on an idle machine."""
ONE = ("hydra/launcher=cluster", "hydra.launcher.partition=test", "hydra.launcher.gpus_per_node=null")
CLUSTER = (*ONE, "hydra.launcher.tasks_per_node=1", "hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=3")


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with slurm(tmp_path_factory.mktemp("slurm")):
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("undisturbed")
    finish(start(results, *GRID))
    return results


@pytest.fixture(scope="module")
def undisturbed_long(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """Its results, and the seconds that it took."""
    results, began = tmp_path_factory.mktemp("undisturbed long"), time.monotonic()
    finish(start(results, *LONG))
    return results, time.monotonic() - began


def logs(results: Path) -> str:
    """What the jobs have printed."""
    return "".join(file.read_text() for file in sorted(results.glob("sweeps/.submitit/*/*.err")))


def until(true: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, said("squeue")
        time.sleep(0.1)


def running() -> list[str]:
    return said("squeue", "-h", "-t", "running", "--array", "-o", "%i").split()


def test_an_array_runs_two_jobs_at_a_time_and_says_nothing_of_missing_accounts(tmp_path: Path, undisturbed: Path):
    sweep = start(tmp_path, *GRID, *CLUSTER, "hydra.launcher.array_parallelism=2")
    most = 0
    while sweep.poll() is None:
        most = max(most, len(running()))
        time.sleep(0.2)
    said = finish(sweep)
    assert most == 2
    assert "sacct" not in said and "accounting" not in said
    assert records(tmp_path) == records(undisturbed) and stages(tmp_path) == stages(undisturbed)
    check_left_behind(tmp_path)


def test_two_tasks_carry_out_a_run_together(tmp_path: Path, undisturbed: Path):
    finish(start(tmp_path, "method=longest", "pruning_rate=0.5", *CLUSTER, "hydra.launcher.tasks_per_node=2"))
    (record,) = (json.loads(file.read_text()) for file in tmp_path.glob("runs/*/metrics.json"))
    assert record["provenance"]["processes"] == 2
    (name,) = records(tmp_path)
    alone = records(undisturbed)[name]
    assert record["metrics"] == pytest.approx(alone["metrics"], rel=1e-4)
    coreset = f"runs/{name}/coreset.csv"
    assert (tmp_path / coreset).read_text() == (undisturbed / coreset).read_text()


def test_a_cancelled_fine_tuning_resumes_from_its_checkpoint_by_the_same_command(tmp_path, undisturbed_long):
    sweep = start(tmp_path, *LONG, *CLUSTER)
    until(lambda: ": 480 steps" in logs(tmp_path))
    (job,) = running()
    subprocess.run(["scancel", job], check=True)
    out, err = sweep.communicate(timeout=180)
    assert sweep.returncode == 1 and f"its SLURM job {job} ended as CANCELLED" in out, out + err
    assert list(tmp_path.glob("artifacts/checkpoints/*/checkpoint-*")) and not records(tmp_path)
    finish(start(tmp_path, *LONG, *CLUSTER))
    assert "resuming after step" in logs(tmp_path)
    assert records(tmp_path) == records(undisturbed_long[0])


def test_a_job_at_its_time_limit_is_requeued_and_goes_on_from_its_checkpoint_by_itself(tmp_path, undisturbed_long):
    """The signal comes after three fifths of the time that the whole takes, or a little earlier."""
    after = int(0.6 * undisturbed_long[1])
    minutes = after // 60 + 2
    limit = (f"hydra.launcher.timeout_min={minutes}", f"hydra.launcher.signal_delay_s={60 * minutes - after}")
    out, err = (sweep := start(tmp_path, *LONG, *CLUSTER, *limit)).communicate(timeout=1200)
    assert sweep.returncode == 0, out + err
    said = logs(tmp_path)
    assert "asked to end: saving a checkpoint" in said and "resuming after step" in said
    assert records(tmp_path) == records(undisturbed_long[0])
    check_left_behind(tmp_path)


HUNGRY = """
from dataclasses import dataclass
from baselines.random import Random

@dataclass(frozen=True)
class Hungry(Random):
    def select(self, pool, budget, rng):
        held = [bytearray(b"1" * 2**28) for _ in range(40)]
        raise AssertionError(len(held))
"""


def test_a_job_that_takes_too_much_memory_fails_alone_with_its_exit_status_and_log(tmp_path: Path, undisturbed):
    (tmp_path / "conf/method").mkdir(parents=True)
    (tmp_path / "conf/method/hungry.yaml").write_text("_target_: hungry.Hungry\n")
    (tmp_path / "hungry.py").write_text(HUNGRY)
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    os.environ["PYTHONPATH"], before = path, os.environ.get("PYTHONPATH", "")
    try:
        jobs = ("method=hungry,random", "pruning_rate=0.5", f"hydra.searchpath=[file://{tmp_path}/conf]")
        out, err = (sweep := start(tmp_path / "results", *jobs, *CLUSTER)).communicate(timeout=300)
    finally:
        os.environ["PYTHONPATH"] = before
    assert sweep.returncode == 1, out + err
    assert "1 of 2 jobs failed" in out and "exit status 137; it took more memory than hydra.launcher.mem_gb" in out
    (trace,) = (tmp_path / "results").glob("sweeps/*/*.traceback.txt")
    assert "memory limit" in trace.read_text()
    (name,) = records(tmp_path / "results")
    assert records(tmp_path / "results")[name] == records(undisturbed)[name]


def test_jobs_outlive_the_process_that_submitted_them_and_the_same_command_collects_them(tmp_path, undisturbed):
    sweep = start(tmp_path, *GRID, *CLUSTER, "hydra.launcher.array_parallelism=2")
    until(running)
    os.killpg(sweep.pid, signal.SIGKILL)
    sweep.communicate()
    finish(start(tmp_path, *GRID, *CLUSTER, "hydra.launcher.array_parallelism=2"))
    until(lambda: not running())
    assert "recorded already" in logs(tmp_path)
    assert records(tmp_path) == records(undisturbed)
    assert max(computed(logs(tmp_path)).values()) == 1


def test_two_sweeps_share_a_store_and_compute_each_artefact_once(tmp_path: Path, undisturbed: Path):
    shared = f"store_dir={tmp_path / 'store'}"
    sweeps = [start(tmp_path / name, *GRID, *CLUSTER, shared) for name in ("a", "b")]
    for sweep in sweeps:
        finish(sweep)
    counted = computed(logs(tmp_path / "a") + logs(tmp_path / "b"))
    assert set(counted.values()) == {1} and len(counted) == sum(stages(undisturbed).values())
    assert records(tmp_path / "a").keys() == records(tmp_path / "b").keys() == records(undisturbed).keys()
