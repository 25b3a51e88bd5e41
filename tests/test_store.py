"""The cost of what is in a store, and the command that lists, verifies and prunes it."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from support.processes import KILLED_WHILE_WRITING, Clock, Job, flip_a_bit, run, wait_for
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from experiments import store as tool
from experiments.campaign import pack
from experiments.recorded import recorded_runs
from staff.models.flops import forward_flops, training_flops
from staff.store import cost
from staff.store.cost import Cost, Meter
from staff.store.manifest import Artifact
from staff.store.store import Store

# ---------------------------------------------------------------- cost


SHAPES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "Llama": {},
    "Mistral": {"sliding_window": 4, "head_dim": 16},
    "Qwen2": {},
    "Gemma": {"head_dim": 12},
    "Gemma2": {"head_dim": 12, "sliding_window": 4},
    "Gemma3Text": {"head_dim": 12, "sliding_window": 4},
}


def make_model(family: str = "Llama", attention: str = "eager"):
    config = getattr(transformers, f"{family}Config")(**SHAPES | FAMILIES[family])
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def counted(work) -> int:
    # torch has no formula for the fused attention kernel of the CPU and would count it as nothing
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def batch(samples: int, tokens: int) -> torch.Tensor:
    return torch.randint(1, 96, (samples, tokens))


# FLOPs


@pytest.mark.parametrize(("family", "attention"), [*((family, "eager") for family in FAMILIES), ("Llama", "sdpa")])
def test_forward_flops_are_what_torch_counts(family, attention):
    model = make_model(family, attention)
    measured = counted(lambda: [model(batch(3, 20)), model(batch(1, 7))])
    assert forward_flops(model.config, [20, 20, 20, 7]) == measured


def test_logits_are_counted_where_they_are_computed():
    model = make_model()
    measured = counted(lambda: model(batch(3, 20), logits_to_keep=5))
    assert forward_flops(model.config, [20] * 3, label_positions=15) == measured
    assert forward_flops(model.config, np.full(3, 20), label_positions=np.array([5, 4, 6])) == measured


def test_full_training_is_three_forward_passes_as_torch_counts():
    model = make_model()
    ids = batch(3, 20)
    measured = counted(lambda: model(ids, labels=ids).loss.backward())
    assert training_flops(model.config, [20] * 3) == measured == 3 * forward_flops(model.config, [20] * 3)


def test_lora_training_is_what_torch_counts():
    model = get_peft_model(make_model(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.enable_input_require_grads()
    adapters = sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" in name)
    ids = batch(3, 20)
    measured = counted(lambda: model(input_ids=ids, labels=ids).loss.backward())
    assert training_flops(model.config, [20] * 3, adapter_parameters=adapters) == measured


def test_a_multimodal_configuration_counts_by_its_text_model():
    text = transformers.Gemma3TextConfig(**SHAPES | FAMILIES["Gemma3Text"])
    nested = transformers.Gemma3Config(text_config=text.to_dict())
    assert forward_flops(nested, [9]) == forward_flops(text, [9])


# Costs


def test_costs_add_up_except_memory_and_devices():
    a = Cost(1.5, 2.0, 3, 4, 50, "H100")
    b = Cost(0.25, 1.0, 1, 0, 70, "EPYC")
    assert a + b == b + a == Cost(1.75, 3.0, 4, 4, 70, "EPYC + H100")
    assert sum([a, b, a], Cost.zero()).device == "EPYC + H100"
    assert a + Cost.zero() == a == Cost.from_dict(a.to_dict())


def test_a_meter_counts_what_it_is_told_and_names_the_device():
    with Meter() as meter:
        meter.add(flops=1e12, tokens_forward=5)
        meter.add(tokens_forward=2, tokens_backward=3)
    told = meter.cost
    assert (told.flops, told.tokens_forward, told.tokens_backward) == (1e12, 7, 3)
    assert told.device


@pytest.fixture
def clock(monkeypatch) -> Clock:
    monkeypatch.setattr(cost, "time", clock := Clock())
    return clock


def test_a_pause_is_not_counted_nor_is_one_that_ends_with_an_exception(clock):
    with Meter() as meter:
        clock.sleep(1)
        with meter.paused():
            clock.sleep(10)
        clock.sleep(2)
        with pytest.raises(ZeroDivisionError), meter.paused():
            clock.sleep(20)
            raise ZeroDivisionError
        clock.sleep(4)
    clock.sleep(40)
    assert meter.cost.seconds == meter.seconds == 7


def test_what_a_checkpoint_saved_is_added_to_the_process_that_resumes_and_the_rest_is_lost(clock):
    with Meter() as killed:
        killed.add(flops=5)
        clock.sleep(3)
        saved = killed.checkpoint()
        clock.sleep(2)
        assert (saved.seconds, killed.unsaved) == (3, 2)
    with Meter() as resumed:
        resumed.resume(saved)
        clock.sleep(1)
        assert resumed.unsaved == 1
    assert (resumed.cost.seconds, resumed.cost.flops) == (4, 0), "FLOPs are counted of the whole stage, at its end"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_meter_waits_for_it_and_sees_its_memory():
    a = torch.ones(8192, 8192, device="cuda")
    with Meter() as meter:
        for _ in range(20):
            a @ a
        queued = time.perf_counter() - meter._started
    assert meter.cost.seconds > queued
    assert meter.cost.peak_memory_bytes >= 2 * a.nbytes
    assert meter.cost.device == torch.cuda.get_device_name()


def test_the_store_and_its_meter_do_not_load_torch():
    script = """
import sys
from staff.store.store import Store
from staff.store.cost import Meter
with Meter() as meter: pass
assert meter.cost.device and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


# ---------------------------------------------------------------- staff-store


def write(folder, meter):
    (folder / "scores.json").write_text("[1, 2]" * 100_000)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "results"


@pytest.fixture(autouse=True)
def version_five(monkeypatch: pytest.MonkeyPatch) -> None:
    """The present version of the stage."""
    monkeypatch.setitem(tool.VERSIONS, "scores", 5)


@pytest.fixture
def made(results: Path) -> dict[str, Artifact]:
    """A scoring that a record needs, one that none needs, and one that an older version of the stage made."""
    store = Store(results / "artifacts")
    versions = {"needed": 5, "forgotten": 5, "old": 4}
    found = {
        name: store.get(Job({"name": name}, write, version=version, label=f"scores {name}"))
        for name, version in versions.items()
    }
    record = results / "runs/some-run/metrics.json"
    record.parent.mkdir(parents=True)
    fingerprints = [found[name].fingerprint for name in ("needed", "old")]
    record.write_text(json.dumps({"overhead": {"stages": [{"fingerprint": name} for name in fingerprints]}}))
    return found


def store(*arguments: object, monkeypatch: pytest.MonkeyPatch) -> str | int | None:
    """Run it; returns what it exits with."""
    monkeypatch.setattr(sys, "argv", ["store", *map(str, arguments)])
    try:
        tool.main()
    except SystemExit as exit:
        return exit.code
    return None


def test_list_shows_size_age_cost_and_how_many_records_need_it(made, results, monkeypatch, capsys):
    assert store("list", "--results", results, monkeypatch=monkeypatch) is None
    out = capsys.readouterr().out
    rows = {line.split()[2]: line.split() for line in out.splitlines() if line.startswith("scores")}
    assert rows["needed"][3:6] == [made["needed"].fingerprint[:8], "0.6", "0.0"]
    assert (rows["needed"][-1], rows["forgotten"][-1]) == ("1", "0") and rows["old"][-2:] == ["older", "version"]
    assert "3 artefacts, 1.8 MB; they cost 0.0 s" in out


def test_a_packed_record_needs_its_artefacts_too(made, results, tmp_path):
    pack(recorded_runs(results), tmp_path / "packed")
    assert tool.needed([tmp_path / "packed"]) == tool.needed([results])


def test_list_shows_attempts_that_led_to_nothing(made, results, tmp_path, monkeypatch, capsys):
    with run(KILLED_WHILE_WRITING, results / "artifacts", tmp_path / "started") as process:
        wait_for(tmp_path / "started")
        process.kill()
    store("list", "--results", results, monkeypatch=monkeypatch)
    unfinished = Job({"seed": 0}).fingerprint[:8]
    assert f"not finished: {unfinished}, 1 attempt(s), 0.0 s" in capsys.readouterr().out


def test_verify_names_every_damaged_artefact_and_ends_with_an_error(made, results, monkeypatch, capsys):
    assert store("verify", "--results", results, monkeypatch=monkeypatch) is None
    assert "3 of 3 artefacts are what was written" in capsys.readouterr().out
    flip_a_bit(made["needed"].path / "scores.json")
    (made["forgotten"].path / "manifest.json").write_text("{")
    assert store("verify", "--results", results, monkeypatch=monkeypatch) == 1
    out = capsys.readouterr().out
    assert f"damaged: {made['needed'].path}/scores.json is not what was written" in out
    assert f"damaged: {made['forgotten'].path}/manifest.json is damaged" in out and "1 of 3" in out


def test_prune_removes_what_no_record_needs_and_only_after_saying_so(made, results, tmp_path, monkeypatch, capsys):
    other = (elsewhere := tmp_path / "elsewhere") / "results/runs/other"
    other.mkdir(parents=True)
    (other / "metrics.json").write_text("{}")
    (checkpoints := results / "artifacts/checkpoints/0123456789").mkdir(parents=True)
    (checkpoints / "checkpoint-1").mkdir()
    assert store("prune", "--results", results, monkeypatch=monkeypatch) is None
    said = capsys.readouterr().out
    assert f"no record needs it: scores forgotten ({made['forgotten'].path}, 0.6 MB" in said
    assert "older version: scores old" in said and "needed (" not in said
    assert "2 artefacts, 1.2 MB to remove; nothing is removed without --yes" in said
    assert f"not finished: checkpoints of 01234567 ({checkpoints})" in said and checkpoints.exists()
    assert all(artefact.path.exists() for artefact in made.values())
    monkeypatch.chdir(elsewhere)  # with results of its own, which say nothing of another store
    assert store("prune", "--yes", "--store", results / "artifacts", monkeypatch=monkeypatch) is None
    assert not checkpoints.exists()
    assert [name for name, artefact in made.items() if artefact.path.exists()] == ["needed"]
    assert not list((results / "artifacts/tmp").iterdir())


def test_prune_removes_nothing_while_a_process_is_at_work_or_where_no_record_is(
    made, results, tmp_path, monkeypatch
):
    elsewhere = tmp_path / "elsewhere"
    arguments = ("prune", "--yes", "--store", results / "artifacts", "--results")
    assert "holds no record, so nothing says what is needed" in str(
        store(*arguments, elsewhere, monkeypatch=monkeypatch)
    )
    with run(KILLED_WHILE_WRITING, results / "artifacts", tmp_path / "started") as process:
        wait_for(tmp_path / "started")
        assert "another process is using" in str(store(*arguments, results, monkeypatch=monkeypatch))
        process.kill()
    assert all(artefact.path.exists() for artefact in made.values())


def test_a_store_that_is_not_there_is_a_sentence(tmp_path, monkeypatch):
    said = store("list", "--results", tmp_path, monkeypatch=monkeypatch)
    assert said == f"staff: {tmp_path}/artifacts is not there: name the folder of the artefacts by --store."
