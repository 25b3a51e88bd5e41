"""What a plan tells of a sweep, against the sweep itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SMALL
from support.records import write_runs

from experiments.dry_run import UTILISATION
from experiments.plan import GPUS, main, plan, table
from experiments.report.planned import Planned, sentences
from staff.models.spec import ModelSpec

METHODS, RATES = ("random", "staff"), (0.5, 0.75)


def test_a_plan_counts_the_stages_of_a_sweep_once_and_their_flops_as_the_records_have_them(
    run, tmp_path: Path, monkeypatch
):
    results = tmp_path / "results"
    sweep = [*SMALL, f"results_dir={results}", "tracking=none", f"method={','.join(METHODS)}"]
    sweep += [f"pruning_rate={','.join(map(str, RATES))}"]
    with monkeypatch.context() as patch:
        patch.setattr(ModelSpec, "weights", lambda *args, **options: pytest.fail("weights were loaded"))
        stages, seconds, memory, _ = plan(sweep, GPUS["h100"], calibrate=False)
    assert not results.exists(), "a plan leaves nothing behind"
    assert all(time > 0 for time in seconds) and set(memory) == {"small", "target"}
    assert {stage.precision for stage in stages} == {"float32"}

    for method in METHODS:
        for rate in RATES:
            run(f"method={method}", f"pruning_rate={rate}")
    manifests = [json.loads(file.read_text()) for file in results.glob("artifacts/*/*/manifest.json")]
    done = [manifest for manifest in manifests if manifest["stage"] in UTILISATION]
    assert len(stages) == len(done)
    exact = [stage for stage in stages if stage.exact]
    assert {stage.label for stage in exact} == {
        "fine-tune small on 24 samples",
        "effort of 24 samples, fine-tuned small",
        "fine-tune target on 12 samples",
        "fine-tune target on 6 samples",
        "nll of 12 samples, fine-tuned target",
    }
    names = ("flops", "tokens_forward", "tokens_backward")
    for stage in exact:
        costs = [manifest["cost"] for manifest in done if manifest["label"] == stage.label]
        planned = pytest.approx([getattr(stage.cost, name) for name in names], rel=1e-12)
        assert any([cost[name] for name in names] == planned for cost in costs), stage.label

    def flops(which: str) -> float:
        return sum(m["cost"]["flops"] for m in done if which in m["label"])

    for label in ("answer", "raw target"):
        assert flops(label) <= sum(stage.cost.flops for stage in stages if label in stage.label), "at most"
    again, *_ = plan(sweep, None, calibrate=False)
    missing = [stage.label for stage in again if stage.exact and not stage.made]
    assert missing == ["nll of 12 samples, fine-tuned target"] * 2, "what rests on a coreset of unknown scores"
    told = table(again, [0.0] * len(again))
    assert told.loc["together", "stages"] == len(done)
    assert told.loc["together", "made"] == sum(stage.made for stage in again)


def test_a_plan_of_a_preset_takes_the_command_of_the_sweep_and_prints_hours_and_memory(tmp_path: Path):
    command = [sys.executable, "-m", "experiments.plan", "-m", "experiment=table1", "family=tiny", "seed=0"]
    command += ["method=random,full", f"results_dir={tmp_path}", *SMALL[:-1], "--gpu", "h100"]
    before = write_runs(tmp_path / "before", {"random": 0.0, "staff": 0.5})
    command += ["--measured", str(before), "--effect", "0.5"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    lines = {line[:30].rstrip(): line for line in said.stdout.splitlines()}
    assert lines["fine-tune target on N samples"[:30]].split()[-4] == "6", "five rates, and the whole pool once"
    assert "fine-tuning target takes about" in said.stdout
    assert "seeds for 0.5 points of ROUGE-L on dialogsum: " in said.stdout
    wrong = subprocess.run([*command, "method=nobody"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 1 and wrong.stderr.splitlines()[-1].startswith("plan: method=nobody is unknown")


def test_hours_follow_the_precision_that_a_stage_computes_in():
    def planned(*settings: str) -> tuple[dict[str, str], dict[str, float]]:
        common = ("pruning_rate=0.5", "method=random", "tracking=none", *SMALL)
        stages, seconds, *_ = plan((*settings, *common), GPUS["h100"], calibrate=False)
        return {s.stage: s.precision for s in stages}, {s.stage: t for s, t in zip(stages, seconds, strict=True)}

    precision, wide = planned()
    assert precision == {"finetune": "float32", "evaluation": "float32", "scores": "float32"}
    precision, narrow = planned("finetune.precision=bfloat16")
    assert precision == {"finetune": "bfloat16", "evaluation": "float32", "scores": "float32"}
    assert wide["finetune"] / narrow["finetune"] == pytest.approx(989 / 67)
    frozen = "family.target.dtype=bfloat16", "finetune.precision=float32"
    of_answers = {"evaluation": "bfloat16", "scores": "bfloat16"}
    assert planned(*frozen)[0] == {"finetune": "bfloat16", **of_answers}
    assert planned(*frozen, "finetune=full")[0] == {"finetune": "float32", **of_answers}


def test_a_plan_says_the_seeds_for_an_effect_from_the_variances_that_were_measured(tmp_path: Path):
    write_runs(tmp_path, {"random": 0.0, "ccs": 0.3, "staff": 0.5}, seeds=4)

    def said(effect: float, rates: set[float], task: str = "dialogsum", samples: int = 40) -> str:
        sweep = Planned("gemma", task, "rougeL", samples, rates, {(0, 0), (1, 1)})
        (sentence,) = sentences([sweep], tmp_path, effect)
        return sentence

    def counts(sentence: str) -> list[int]:
        return [int(part.split()[0]) for part in sentence.split(": ", 1)[1].split(" (")[0].split(", ")]

    near = said(0.3, {0.5, 0.9})
    assert near.startswith("seeds for 0.3 points of ROUGE-L on dialogsum: ")
    assert "at pruning rate 0.5" in near and "at pruning rate 0.9 (the sweep has 2)" in near
    assert "by the variances between methods of dialogsum, tiny family with 4 seeds" in near, "another family's"
    assert min(counts(near)) > max(counts(said(1.0, {0.5, 0.9}))) >= 2
    assert counts(said(0.3, {0.9})) == counts(near)[1:], "of the rates that are planned"
    assert "unknown, since" in said(1.0, {0.9}, task="gsm8k") and "--measured" in said(1.0, {0.9}, task="gsm8k")


def test_more_test_samples_need_fewer_seeds_and_with_too_few_no_seeds_suffice():
    sweeps = [Planned("tiny", "dialogsum", "rougeL", samples, {0.9}) for samples in (250, 3000, 30)]
    few, many, none = (said.split(": ")[1] for said in sentences(sweeps, ROOT / "results/tiny", 1.0))
    assert 3 < int(many.split()[0]) < int(few.split()[0])
    assert none.startswith("no number up to 1,000 (too few test samples) at pruning rate 0.9")


def test_an_effect_that_is_none_is_refused_before_anything_is_planned(monkeypatch: pytest.MonkeyPatch):
    for effect in ("0", "-1", "nan"):
        monkeypatch.setattr(sys, "argv", ["staff-plan", "method=nobody", f"--effect={effect}"])
        with pytest.raises(SystemExit, match=f"^plan: --effect {effect} must be a number above 0, in the metric's"):
            main()
