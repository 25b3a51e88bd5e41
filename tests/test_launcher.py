"""The launcher for one machine, with a small Hydra application: what its workers are given, and how they end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.core.utils import JobStatus
from hydra.utils import instantiate
from omegaconf import OmegaConf
from submitit import AutoExecutor
from submitit.core.job_environment import SignalHandler
from submitit.core.utils import DelayedSubmission, JobPaths, UncompletedJobError
from submitit.slurm.slurm import SlurmJobEnvironment

from hydra_plugins import staff_cluster
from hydra_plugins.staff_cluster import result_of
from hydra_plugins.staff_launcher import LocalLauncher, environment, visible_gpus
from staff.errors import UserError

APPLICATION = """
import json, logging, os, signal, time
from pathlib import Path
import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback

HERE = Path(__file__).parent

class Listener(Callback):
    def on_job_end(self, config, job_return, **kwargs):
        told = {"by": os.getpid(), "error": str(job_return._return_value)}
        (HERE / f"{config.hydra.job.num}.ended").write_text(json.dumps(told))

def job(cfg):
    number = HydraConfig.get().job.num
    logging.getLogger("app").info("%s begins", cfg.do)
    worker = {"pid": os.getpid(), "workers": HydraConfig.get().launcher.workers, "environment": dict(os.environ)}
    (HERE / "draft").mkdir(exist_ok=True)
    (HERE / "draft" / str(number)).write_text(json.dumps(worker))
    (HERE / "draft" / str(number)).rename(HERE / f"{number}.begun")
    if cfg.do.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, cfg.do))
    elif cfg.do == "exits":
        os._exit(3)
    elif cfg.do == "raises":
        raise ValueError("a defect")
    elif cfg.do == "waits":
        while len(list(HERE.glob("*.begun"))) < cfg.until:
            time.sleep(0.01)
    return number

if __name__ == "__main__":
    hydra.main(config_path=str(HERE), config_name="app", version_base="1.3")(job)()
"""
CONFIGURATION = f"""
do: waits
until: 2 # jobs that have begun
defaults: [_self_, override hydra/launcher: local]
hydra:
  searchpath: ["file://{ROOT / "conf"}"]
  sweep: {{dir: "sweep", subdir: "."}}
  callbacks: {{listener: {{_target_: __main__.Listener}}}}
"""


def start(folder: Path, *overrides: str, application: str = APPLICATION, **environment: str) -> subprocess.Popen:
    (folder / "app.py").write_text(application)
    (folder / "app.yaml").write_text(CONFIGURATION)
    free = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "CUDA_"))}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "app.py", "-m", *overrides],
        cwd=folder,
        env={**free, "PYTHONPATH": str(ROOT), **environment},
        stdout=pipe,
        stderr=pipe,
        text=True,
        # A test run in the background of a shell ignores Ctrl-C, and so would the sweep.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        start_new_session=True,
    )


STAGED = """
import json, time
from dataclasses import dataclass
from pathlib import Path
import hydra
from hydra.core.hydra_config import HydraConfig
from staff.store.stage import Stage
from staff.store.store import Store

HERE = Path(__file__).parent

@dataclass(frozen=True)
class Named(Stage):
    name: str
    kind = "named"
    version = 1

    def key(self):
        return {"name": self.name}

    def run(self, folder, meter):
        until = time.monotonic() + 30
        while self.name == "long" and not (HERE / "2.ended").exists() and time.monotonic() < until:
            time.sleep(0.01)

def job(cfg):
    store = Store(HERE / "store")
    names = cfg.do.split(".")
    order = [store.get(Named(name)).fingerprint for name in names]
    computed = [name for name, known in zip(names, order) if known in store.computed]
    late = (HERE / "store" / "named" / Named("long").fingerprint[:32]).exists()
    number = HydraConfig.get().job.num
    (HERE / f"{number}.ended").write_text(json.dumps({"computed": computed, "after the long one": late}))

if __name__ == "__main__":
    hydra.main(config_path=str(HERE), config_name="app", version_base="1.3")(job)()
"""


def told(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(folder.glob(f"*.{kind}"))]


JOBS = ("waits", "SIGKILL", "SIGSEGV", "exits", "raises", "done", "done", "done")


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, int]:
    """Folder, output and process of a sweep whose jobs end in every way, in two workers with two pretended GPUs."""
    folder = tmp_path_factory.mktemp("ended")
    with start(folder, f"do={','.join(JOBS)}", CUDA_VISIBLE_DEVICES="0,1") as sweep:
        out, err = sweep.communicate(timeout=60)
    assert sweep.returncode == 1 and "killed by SIGKILL" in err, "Hydra raises the first failure, after all jobs"
    return folder, out, sweep.pid


def test_a_job_whose_worker_dies_fails_alone_and_says_how(ended):
    folder, _, parent = ended
    assert len(told(folder, "begun")) == len(JOBS)
    lost = {job: end["error"] for job, end in zip(JOBS, told(folder, "ended")) if end["by"] == parent}
    assert lost == {
        "SIGKILL": "its worker process was killed by SIGKILL (out of memory?).",
        "SIGSEGV": "its worker process was killed by SIGSEGV.",
        "exits": "its worker process ended with exit status 3.",
    }
    others = [end["error"] for end in told(folder, "ended") if end["by"] != parent]
    assert others == ["0", "a defect", "5", "6", "7"], "of the workers themselves: what each job returned or raised"


def test_two_workers_stay_over_several_jobs_and_are_replaced_where_they_die(ended):
    folder, _, parent = ended
    workers = {worker["pid"] for worker in told(folder, "begun")}
    assert 4 <= len(workers) <= 5 and parent not in workers


def test_each_worker_has_a_gpu_of_its_own_and_its_part_of_the_threads(ended):
    folder, out, _ = ended
    assert {worker["workers"] for worker in told(folder, "begun")} == {2}, "by default one per GPU"
    first, second, *others = (worker["environment"] for worker in told(folder, "begun"))
    assert {first["CUDA_VISIBLE_DEVICES"], second["CUDA_VISIBLE_DEVICES"]} == {"0", "1"}
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    for worker in (first, second, *others):
        assert (worker["OMP_NUM_THREADS"], worker["OMP_WAIT_POLICY"]) == (threads, "passive")
    for number in "01":
        assert f"worker {number}: a new process with OMP_NUM_THREADS={threads}" in out
        assert f"CUDA_VISIBLE_DEVICES={number}" in out


def test_every_line_of_the_log_names_worker_and_job(ended):
    _, out, _ = ended
    lines = re.findall(r"\[worker ([01]), job (\d)\] (\w+) begins", out)
    assert sorted((number, job) for _, number, job in lines) == [(str(n), job) for n, job in enumerate(JOBS)]
    assert {worker for worker, _, _ in lines} == {"0", "1"}


def test_a_worker_takes_another_job_while_a_stage_is_run_elsewhere_and_the_job_that_waits_is_ended_later(
    tmp_path: Path,
):
    jobs = "do=first.long.a,second.long.b,other"
    arguments = (tmp_path, jobs, "hydra.launcher.workers=2", "~hydra.callbacks.listener")
    with start(*arguments, application=STAGED, CUDA_VISIBLE_DEVICES="") as sweep:
        out, err = sweep.communicate(timeout=60)
    assert sweep.returncode == 0, err
    assert out.count("this one takes another job meanwhile") == 1
    first, second, other = told(tmp_path, "ended")
    assert (first["after the long one"], second["after the long one"]) == (True, True)
    assert not other["after the long one"], "it ran while both others needed the long stage"
    computed = sorted(first["computed"] + second["computed"])
    assert computed == ["a", "b", "first", "long", "second"], "each once, also before the job was put back"
    assert not list((tmp_path / "store" / "attempts").iterdir()), "to be put back is no failed attempt"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_sweep(how: signal.Signals, tmp_path: Path):
    with start(tmp_path, "do=waits,waits", "until=3", "hydra.launcher.workers=2", CUDA_VISIBLE_DEVICES="") as sweep:
        deadline = time.monotonic() + 30
        while len(told(tmp_path, "begun")) < 2:
            assert time.monotonic() < deadline and sweep.poll() is None
            time.sleep(0.01)
        if how is signal.SIGINT:  # Ctrl-C reaches all processes of a terminal
            os.killpg(sweep.pid, how)
        else:
            sweep.send_signal(how)
        _, err = sweep.communicate(timeout=20)  # until the last of them has closed it
    assert sweep.returncode in (-how, 1) and err.count("Traceback") == (how is signal.SIGINT)


def test_what_the_user_has_set_stays_and_more_workers_than_gpus_share_them(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert environment(1, 4, []) == {}
    assert [environment(n, 3, ["4", "GPU-7"])["CUDA_VISIBLE_DEVICES"] for n in range(3)] == ["4", "GPU-7", "4"]


@pytest.mark.parametrize(
    ("named", "gpus"), [("0,2", ["0", "2"]), ("GPU-7f, MIG-1", ["GPU-7f", "MIG-1"]), ("", []), ("-1", [])]
)
def test_gpus_are_those_that_cuda_would_see(monkeypatch, named: str, gpus: list[str]):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert visible_gpus() == gpus


@pytest.mark.parametrize("workers", [0, -1, 1.5, "two", True])
def test_a_number_of_workers_that_is_none_is_refused(workers):
    with pytest.raises(UserError, match=rf"hydra.launcher.workers={workers!r} must be null or a whole number"):
        LocalLauncher(workers)


class Submitted:
    """A job of submitit whose result is there."""

    job_id = "7_0"

    def results(self) -> list[str]:
        return ["done"]


def test_a_cluster_is_asked_for_a_signal_before_the_time_limit_and_requeues_the_same_job(tmp_path, monkeypatch):
    """What is handed to SLURM and what a job does at the signal; on a real cluster, tests/stress/test_slurm.py."""
    (tmp_path / "srun").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    overrides = ["hydra/launcher=cluster", "hydra.launcher.partition=gpu", "hydra.launcher.array_parallelism=2"]
    overrides += ["hydra.launcher.mem_gb=30", f"hydra.sweep.dir={tmp_path}", "hydra.job.name=staff"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides, return_hydra_config=True)
    launcher = instantiate(cfg.hydra.launcher)
    launcher.setup(hydra_context=Mock(), task_function=print, config=cfg)
    handed = []
    monkeypatch.setattr(AutoExecutor, "map_array", lambda *given: handed.append(given) or [Submitted()] * 2)
    assert launcher.launch([["seed=0"], ["seed=1"]], 5) == ["done", "done"]

    executor, function, *given = handed[0]
    slurm = executor._executor
    slurm.parameters["map_count"] = 2
    asked = set(slurm._make_submission_file_text("command", "").splitlines())
    limits = {"time=1440", "signal=USR2@120", "mem=30GB", "array=0-1%2", "partition=gpu", "open-mode=append"}
    assert asked >= {f"#SBATCH --{limit}" for limit in limits} | {"export SLURM_KILL_BAD_EXIT=1"}
    assert cfg.hydra.launcher.tasks_per_node == cfg.hydra.launcher.gpus_per_node, "a task has a GPU"
    assert function is launcher and given[2] == (5, 6) and slurm.max_num_timeout == 10

    requeued = []
    monkeypatch.setattr(SlurmJobEnvironment, "_requeue", lambda self, left: requeued.append(left))
    monkeypatch.setattr(DelayedSubmission, "dump", lambda self, file: file.touch() or requeued.append(self.args))
    job = DelayedSubmission(function, *next(zip(*given, strict=True)))
    job.set_timeout(timeout_min=0, max_num_timeout=slurm.max_num_timeout)
    at_limit = SignalHandler(SlurmJobEnvironment(), JobPaths(tmp_path, "7_0"), job)
    with pytest.raises(SystemExit):
        at_limit.checkpoint_and_try_requeue(signal.SIGUSR2)
    assert requeued == [job.args, 9], "of ten times"


class LostJob:
    """A job of submitit that was killed."""

    job_id = "7_1"

    def results(self) -> None:
        raise UncompletedJobError("slurmstepd: error: Exceeded job memory limit")

    def get_info(self) -> dict[str, str]:
        return {"State": "FAILED", "ExitCode": "137"}


def test_a_cluster_job_that_ends_without_a_result_fails_alone_and_says_how():
    context = Mock()
    context.config_loader.load_sweep_config.side_effect = lambda config, overrides: OmegaConf.create(
        {"hydra": {"job": {"num": 0}, "overrides": {"task": overrides}}}
    )
    failed = result_of(LostJob(), context, OmegaConf.create(), ["seed=1"], 3)
    assert failed.status is JobStatus.FAILED and failed.overrides == ["seed=1"]
    said = "its SLURM job 7_1 ended as FAILED with exit status 137; it took more memory than hydra.launcher.mem_gb"
    assert said in str(failed._return_value)
    assert "Exceeded" in str(failed._return_value.__cause__), "its log, for the file of the traceback"
    told = context.callbacks.on_job_end.call_args.kwargs
    assert told["config"].hydra.job.num == 3 and told["job_return"] is failed


@pytest.mark.parametrize("accounts", [True, False])
def test_states_are_read_from_the_queue_where_a_cluster_keeps_no_accounts(monkeypatch, accounts):
    monkeypatch.setattr(staff_cluster, "_succeeds", lambda *command: accounts)
    watcher = staff_cluster._watcher()
    for job in ("5_0", "5_1", "5_2"):
        watcher.register_job(job)
    if accounts:
        text = "JobID|State|ExitCode\n5_0|RUNNING|0:0\n5_1|OUT_OF_MEMORY|0:125\n5_2|COMPLETED|0:0\n"
    else:
        text = "5_0   RUNNING   0\n5_1   OUT_OF_MEMORY   125\n4   COMPLETED   0\n"
    command = {"5_0": "RUNNING", "5_1": "OUT_OF_MEMORY", "5_2": "COMPLETED" if accounts else "ENDED"}
    assert watcher._make_command()[0] == ("sacct" if accounts else "squeue")
    assert {job: info["State"] for job, info in watcher.read_info(text).items()} == command
