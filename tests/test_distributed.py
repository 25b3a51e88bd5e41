"""Several processes carry out a run together, and it ends as in one: same scores, coreset, weights and answers."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from safetensors.numpy import load_file
from support.runs_of_two import training
from support.servers import free_ports

from staff.errors import UserError
from staff.store.store import Store
from staff.training.settings import FinetuneSettings

SCRIPT = ROOT / "tests/support/runs_of_two.py"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What one process and what two have left of the same runs."""
    folder = tmp_path_factory.mktemp("distributed")
    rows = [{"prompt": f"Add {i} to {i * i}:", "answer": f"{i + i * i} " * (1 + i % 5)} for i in range(26)]
    for split, of_it in (("train", rows[:21]), ("test", rows[21:])):
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in of_it))
    commands = {"one": [sys.executable], "two": [*TORCHRUN]}
    pipe = subprocess.PIPE
    running = [
        subprocess.Popen([*command, SCRIPT, folder / name, folder], env=ENVIRONMENT, stderr=pipe, text=True)
        for name, command in commands.items()
    ]
    for process in running:
        _, said = process.communicate(timeout=600)
        assert process.returncode == 0, said
    return folder / "one", folder / "two"


def files(results: tuple[Path, Path], pattern: str) -> list[tuple[Path, Path]]:
    """The same file of one process and of two."""
    one, two = results
    found = sorted(file.relative_to(one) for file in one.glob(pattern))
    assert found and found == sorted(file.relative_to(two) for file in two.glob(pattern))
    return [(one / file, two / file) for file in found]


def test_two_processes_give_the_scores_of_one(results):
    for one, two in files(results, "*/artifacts/scores/*/scores.safetensors"):
        alone, together = load_file(one), load_file(two)
        for signal, values in alone.items():
            np.testing.assert_allclose(together[signal], values, rtol=1e-5, atol=1e-6)


def test_two_processes_select_the_same_samples_and_give_the_same_answers(results):
    for one, two in files(results, "*/runs/*/coreset.csv"):
        assert pd.read_csv(one).id.tolist() == pd.read_csv(two).id.tolist()
    for one, two in files(results, "*/artifacts/evaluation/*/predictions.parquet"):
        assert pd.read_parquet(one).equals(pd.read_parquet(two))
    for one, two in files(results, "*/runs/*/metrics.json"):
        alone, together = (json.loads(file.read_text())["metrics"] for file in (one, two))
        assert together == pytest.approx(alone, rel=1e-5), "the likelihood of references is a float's sum"


def test_two_processes_fine_tune_to_the_weights_of_one(results):
    for one, two in files(results, "*/*/finetune/*/*model.safetensors"):
        alone, together = load_file(one), load_file(two)
        for name, weights in alone.items():
            # Adam's first step divides each gradient by its own size: where that is nearly zero, rounding is seen.
            assert np.linalg.norm(together[name] - weights) <= 1e-3 * np.linalg.norm(weights), name
    # Adam divides by the size of the gradients, so that weights do not tell whether these were too large.
    for one, two in files(results, "*/runs/*/training.csv"):
        alone, together = (pd.read_csv(file)[["loss", "grad_norm"]] for file in (one, two))
        np.testing.assert_allclose(together, alone, rtol=1e-3)


@pytest.mark.parametrize("interrupted", ["one", "two"])
def test_a_signal_to_one_process_stops_all_and_one_resumes_to_the_same_weights(
    results, tmp_path, caplog, interrupted
):
    one, two = results
    stopped = two if interrupted == "two" else one
    store = shutil.copytree(stopped / "preempted/by a signal/store", tmp_path / "store")
    assert {file.read_text() for file in store.glob("status of *")} == {"75"}
    assert len(list(store.glob("status of *"))) == len(list(stopped.glob("part *")))
    assert [file.name for file in store.glob("checkpoints/*/checkpoint-*")] == ["checkpoint-4"]
    caplog.set_level("INFO", "staff")
    resumed = Store(store).get(training())
    assert "resuming after step 4" in caplog.text
    undisturbed = one / "interrupted/finetune" / resumed.path.name
    tolerance = 3e-4 if interrupted == "two" else 1e-6
    for name, weights in load_file(undisturbed / "adapter_model.safetensors").items():
        there = load_file(resumed.path / "adapter_model.safetensors")[name]
        assert np.linalg.norm(there - weights) <= tolerance * np.linalg.norm(weights), name


def test_the_losses_of_two_processes_are_those_of_one(results):
    for one, two in files(results, "*/*/finetune/*/training.json"):
        logs = [json.loads(file.read_text())["log"][:-1] for file in (one, two)]
        for name in ("loss", "grad_norm", "learning_rate"):
            alone, together = ([entry[name] for entry in log] for log in logs)
            assert together == pytest.approx(alone, rel=1e-4)


def test_scores_online_are_those_of_one_process_also_where_it_was_interrupted(results):
    for one, two in files(results, "*/*/finetune/*/online.safetensors"):
        alone, together = load_file(one)["effort"], load_file(two)["effort"]
        assert not np.isnan(alone).any()
        np.testing.assert_allclose(together, alone, rtol=1e-4)


def test_the_work_of_both_processes_is_charged(results):
    for one, two in files(results, "*/*/*/*/manifest.json"):
        alone, together = json.loads(one.read_text()), json.loads(two.read_text())
        for name in ("flops", "tokens_forward", "tokens_backward"):
            assert together["cost"][name] == alone["cost"][name]
        shared = alone["stage"] in ("finetune", "scores", "coreset", "evaluation")
        assert (alone["processes"], together["processes"]) == (1, 2 if shared else 1)
        assert together["inputs"].keys() == alone["inputs"].keys()


def test_nothing_is_left_of_the_second_process(results):
    _, two = results
    assert not list(two.glob("*/artifacts/tmp/*")) and not list(two.glob("*/checkpoints/*"))
    assert len(list(two.glob("*/runs/*/metrics.json"))) == 4


def test_under_fsdp_each_process_holds_half_of_the_weights_and_one_alone_all(results):
    one, two = results
    assert float((one / "part 0").read_text()) == 1
    for rank in (0, 1):
        assert 0.45 < float((two / f"part {rank}").read_text()) < 0.55


@pytest.mark.parametrize("other", [{"kind": "full"}, {"quantization": "nf4"}])
def test_fsdp_is_refused_where_weights_are_trained_or_packed(other):
    with pytest.raises(UserError, match="choose finetune=lora"):
        FinetuneSettings(fsdp=True, **other)


FAILURES = [(1, "waits", 1), (0, "waits", 1), (0, "fails too", 1), (0, "goes on", 0)]
"""Of two processes the one that fails, what the other does, and how both end.

"goes on": as a job of a sweep that fails in every process, none of which is to be ended."""
FAILS = """
import atexit, os, sys, time
from staff.runtime import processes
from staff.errors import UserError

def fail(failing, other):
    processes.start()
    def refuse():
        raise UserError("no such model")
    for attempt in (lambda: processes.broadcast_from_main(refuse), None):
        try:
            if attempt:
                attempt()
            with processes.raise_on_all_ranks():
                if not processes.is_main_process():
                    raise UserError("sample 7 is not finite")
        except UserError as error:
            print(processes.rank(), error, file=sys.stderr)
    try:
        if processes.rank() == int(failing):
            raise RuntimeError("a defect")
        if other == "waits":
            processes.all_gather("for this one waits in vain")
        time.sleep(1)
        raise RuntimeError("a defect of its own, later")
    except RuntimeError as error:
        if processes.claims_error_report():
            print("said:", error, file=sys.stderr)
            processes.report_done()
        if other != "goes on":
            atexit.register(os.abort)  # as a thread of gloo's may, when Python ends
            processes.leave(1)
        processes.end()

for number, failure in enumerate(sys.argv[1:]):  # each in a fork; the first imports torch as a run does
    if number == 1:
        os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
        import torch.distributed  # which takes longer than all the rest
    os.environ["MASTER_PORT"], *how = failure.split(",")
    if os.fork() == 0:
        fail(*how)
        sys.exit()
    print(f"ended with {os.waitstatus_to_exitcode(os.wait()[1])}", file=sys.stderr, flush=True)
"""


def together(*command: str) -> list[tuple[int, str]]:
    """What two processes of one run end with, as torchrun would start them: exit status and standard error."""
    group = {**ENVIRONMENT, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(*free_ports(1))}
    running = [
        subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env={**group, "RANK": rank}, stderr=subprocess.PIPE, text=True
        )
        for rank in "01"
    ]
    said = [process.communicate(timeout=120)[1] for process in running]
    return list(zip([process.returncode for process in running], said, strict=True))


@pytest.fixture(scope="module")
def failures() -> list[list[tuple[str, str]]]:
    """Of both processes, in the order of `FAILURES`, what each said and its exit status."""
    ports = free_ports(len(FAILURES))
    ended = together(
        "-c", FAILS, *(f"{port},{failing},{other}" for port, (failing, other, _) in zip(ports, FAILURES))
    )
    return [re.findall(r"(.*?)ended with (-?\d+)\n", said, re.S) for _, said in ended]


@pytest.mark.parametrize("number", range(len(FAILURES)), ids=[f"{a} fails, {b}" for a, b, _ in FAILURES])
def test_what_fails_in_one_process_ends_them_all_and_is_said_once(
    failures: list[list[tuple[str, str]]], number: int
):
    failing, _, ends = FAILURES[number]
    expected = [f"{rank} no such model\n{rank} sample 7 is not finite\n" for rank in (0, 1)]
    expected[failing] += "said: a defect\n"
    told = [(said, str(ends)) for said in expected]
    assert [ended[number] for ended in failures] == told, "and no word of torch's about a lost connection"


def test_a_sweep_under_torchrun_is_refused_once_with_what_to_do_instead(tmp_path):
    (first, said), (second, also_said) = together(
        "-m", "experiments.run", "-m", "seed=0,1", f"results_dir={tmp_path}"
    )
    assert (first, second) == (1, 1)
    refusal = "staff: torchrun is for one run: start `torchrun --no-python ... staff` once a configuration"
    assert (said + also_said).count(refusal) == 1 and (said + also_said).splitlines()[-1].startswith(refusal)
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize(("devices", "at_once"), [(1, (4, 2)), (2, (4, 1)), (4, (2, 1)), (8, (1, 1))])
def test_a_step_has_as_many_samples_on_any_number_of_devices(devices, at_once):
    assert FinetuneSettings(batch_size=8, device_batch_size=4).on_each_device(devices) == at_once


@pytest.mark.parametrize(("devices", "device_batch_size"), [(5, 12), (24, 12), (2, 4)])
def test_a_step_that_cannot_be_shared_out_evenly_is_refused(devices, device_batch_size):
    settings = FinetuneSettings(batch_size=12, device_batch_size=device_batch_size)
    with pytest.raises(UserError, match=f"batch_size=12 cannot be divided among {devices} processes"):
        settings.on_each_device(devices)
