"""What a plan tells of a sweep, against the sweep itself."""

import json
import sys
from itertools import permutations, product
from pathlib import Path

import pytest
from conftest import ROOT, SMALL
from support.processes import here
from support.records import write_runs

from experiments import sizes
from experiments.dry_run import dry_run
from experiments.plan import main, report, seconds_of, table
from experiments.report.seeds import Planned, sentences
from experiments.schedule import starting_order, wall_seconds
from experiments.sizes import ASSUMED, GPUS, SIZES, SPEEDS, KnownShape, line, speed_on
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
        planned = dry_run(sweep)
    stages, memory = list(planned.stages.values()), planned.memory
    assert not results.exists(), "a plan leaves nothing behind"
    assert all(seconds_of(stage, "h100", {}) > 0 for stage in stages) and set(memory) == {"small", "target"}
    assert len(planned.jobs) == len(METHODS) * len(RATES)
    assert {stage.precision for stage in stages} == {"float32"}

    for method in METHODS:
        for rate in RATES:
            run(f"method={method}", f"pruning_rate={rate}")
    manifests = [json.loads(file.read_text()) for file in results.glob("artifacts/*/*/manifest.json")]
    done = [manifest for manifest in manifests if manifest["stage"] in ASSUMED]
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
    again = list(dry_run(sweep).stages.values())
    missing = [stage.label for stage in again if stage.exact and not stage.made]
    assert missing == ["nll of 12 samples, fine-tuned target"] * 2, "what rests on a coreset of unknown scores"
    told = table(again, [0.0] * len(again))
    assert told.loc["total", "stages"] == len(done)
    assert told.loc["total", "stored"] == sum(stage.made for stage in again)


def test_a_plan_of_a_preset_takes_the_command_of_the_sweep_and_prints_hours_and_memory(tmp_path: Path):
    command = ["-m", "experiment=table1", "family=tiny", "seed=0"]
    command += ["method=random,full", f"results_dir={tmp_path}", *SMALL[:-1], "--gpu", "h100"]
    write_runs(tmp_path, {"random": 0.0, "staff": 0.5})
    command += ["--effect", "0.5"]
    said = here(main, *command)
    assert said.returncode == 0, said.stderr
    lines = {line[:30].rstrip(): line for line in said.stdout.splitlines()}
    assert lines["fine-tune target on N samples"[:30]].split()[-4] == "6", "five rates, and the whole pool once"
    assert "fine-tuning target takes about" in said.stdout
    assert "assumed: the speed of a h100 at fine-tuning 2.56 M parameters in float32, " in said.stdout
    assert "seeds for 0.5 points of ROUGE-L on dialogsum: " in said.stdout
    wrong = here(main, *command, "method=nobody")
    assert wrong.returncode == 1 and wrong.stderr.splitlines()[-1].startswith("staff: method=nobody is unknown")


def test_flops_that_cannot_be_counted_are_unknown_in_a_plan_and_in_its_total(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("staff.models.flops.head_flops", lambda config: float("nan"))
    planned = dry_run([*SMALL, "method=random", "tracking=none", f"results_dir={tmp_path}"])
    said = report(planned, {known: float("nan") for known in planned.stages}, "h100", 1, {})
    assert all(line.split()[-2] == "unknown" for line in said.splitlines()[2:6]), said
    assert "hours: unknown, since the FLOPs of a model cannot be counted" in said


def test_hours_follow_the_precision_that_a_stage_computes_in():
    def planned(*settings: str) -> tuple[dict[str, str], dict[str, float]]:
        common = ("pruning_rate=0.5", "method=random", "tracking=none", *SMALL)
        stages = list(dry_run((*settings, *common)).stages.values())
        return {s.stage: s.precision for s in stages}, {s.stage: seconds_of(s, "h100", {}) for s in stages}

    precision, wide = planned()
    assert precision == {"finetune": "float32", "evaluation": "float32", "scores": "float32"}
    precision, narrow = planned("finetune.precision=bfloat16")
    assert precision == {"finetune": "bfloat16", "evaluation": "float32", "scores": "float32"}
    assert wide["finetune"] / narrow["finetune"] == pytest.approx(989 / 67)
    frozen = "family.target.dtype=bfloat16", "finetune.precision=float32"
    of_answers = {"evaluation": "bfloat16", "scores": "bfloat16"}
    assert planned(*frozen)[0] == {"finetune": "bfloat16", **of_answers}
    assert planned(*frozen, "finetune=full")[0] == {"finetune": "float32", **of_answers}


def test_speeds_are_interpolated_in_the_logarithm_between_measured_sizes_and_assumed_beyond():
    points = json.loads(SPEEDS.read_text())["h200"]["speeds"]
    known = {p["parameters"]: p["utilisation"] for p in points if (p["stage"], p["precision"]) == SCORES}
    (low, at_low), (high, at_high) = sorted(known.items())[-2:]
    assert all(speed_on("h200", *SCORES, size)[1:] == pytest.approx((part, True)) for size, part in known.items())
    between = speed_on("h200", *SCORES, (low * high) ** 0.5)
    assert between.measured and between.utilisation == pytest.approx((at_low * at_high) ** 0.5)
    assert speed_on("h200", *SCORES, 1.9 * high) == (0.0, pytest.approx(at_high), True)
    assert speed_on("h200", *SCORES, 2.1 * high) == (0.0, pytest.approx(at_high), False)
    assert speed_on("a100", *SCORES, low) == (0.0, ASSUMED["scores"], False)
    assert speed_on("h200", *SCORES, high).seconds(1e15, GPUS["h200"].bfloat16) == pytest.approx(
        1 / 0.989 / at_high
    )


SCORES = "scores", "bfloat16"


def test_a_line_through_measured_seconds_has_no_negative_part():
    assert line([(1.0, 3.0), (2.0, 5.0)]) == pytest.approx((1.0, 2.0))
    assert line([(1.0, 1.0), (2.0, 3.0)]) == pytest.approx((0.0, 4 / 3)), "it would start below zero"
    assert line([(1.0, 3.0), (2.0, 2.0)]) == pytest.approx((0.0, 5 / 3)), "it would fall"
    assert line([(2.0, 3.0)]) == (0.0, 1.5)


def test_every_measured_speed_names_its_machine_and_is_a_fraction_of_the_peak():
    for gpu, entry in json.loads(SPEEDS.read_text()).items():
        assert gpu in GPUS and entry["machine"]
        for point in entry["speeds"]:
            assert point["stage"] in ASSUMED and point["precision"] in ("float32", "bfloat16")
            assert point["constant"] >= 0 and 0 < point["utilisation"] <= 1 and point["parameters"] > 0


def test_what_a_stage_leaves_in_the_store_is_counted(run, tmp_path: Path):
    results = tmp_path / "results"
    planned = dry_run([*SMALL, f"results_dir={results}", "tracking=none", "method=staff", "pruning_rate=0.5"])
    run("method=staff", "pruning_rate=0.5")
    kept = [file for file in results.rglob("*.safetensors") if file.parent.parent.name != "tokens"]
    assert sum(stage.bytes for stage in planned.stages.values()) == pytest.approx(
        sum(file.stat().st_size for file in kept), rel=0.1
    )


def test_workers_take_other_jobs_while_a_stage_runs_elsewhere_and_the_last_job_ends_the_sweep():
    seconds = {"small": 10.0, "a": 1.0, "b": 2.0, "c": 4.0}
    jobs = [["small", "a"], ["small", "b"], ["c"]]
    assert wall_seconds(jobs, seconds, workers=1) == 17
    assert wall_seconds(jobs, seconds, workers=2) == 12, "the third job runs while the second waits"
    assert wall_seconds(jobs, seconds, workers=3) == 12
    assert wall_seconds(jobs, seconds, 1, order=[2, 0, 1]) == 17


def test_jobs_with_other_first_stages_start_first():
    jobs = [[f"method={m}", f"pruning_rate={p}", f"seed={s}"] for m in "ab" for p in (0.5, 0.9) for s in (0, 1)]
    assert starting_order(jobs) == [0, 1, 4, 5, 2, 3, 6, 7]


@pytest.mark.parametrize("workers", [2, 4, 8])
@pytest.mark.parametrize("axes", [*permutations(("method", "rate", "seed"))], ids="-".join)
def test_a_grid_takes_at_most_1_3_times_what_work_and_longest_chain_allow(workers: int, axes: tuple[str, ...]):
    """With the times, in seconds, of the tiny family on two cores: six methods, five rates, three seeds."""
    values = {"method": CHAINS, "rate": (0.2, 0.3, 0.5, 0.7, 0.9), "seed": (0, 1, 2)}
    seconds, jobs, overrides = {}, [], []
    for combination in product(*(values[axis] for axis in axes)):
        job = dict(zip(axes, combination))
        method, rate, seed = (job[axis] for axis in ("method", "rate", "seed"))
        stages = {f"{name}{seed}": time for name, time in CHAINS[method].items()}
        coreset = f"{'el2n' if method == 'ccs' and rate == 0.2 else method} {rate} {seed}"
        stages |= {f"finetune {coreset}": 20 * (1 - rate), f"evaluate {coreset}": 4.0}
        seconds |= stages
        jobs.append([*stages])
        overrides.append([f"{'pruning_rate' if axis == 'rate' else axis}={job[axis]}" for axis in axes])
    bound = max(sum(seconds.values()) / workers, max(sum(seconds[s] for s in job) for job in jobs))
    assert bound <= wall_seconds(jobs, seconds, workers, starting_order(overrides)) < 1.3 * bound


CHAINS = {
    "random": {},
    "el2n": {"full": 20.0, "el2n": 3.0},
    "grand": {"full": 20.0, "grand": 6.0},
    "ccs": {"full": 20.0, "el2n": 3.0},
    "d2": {"full": 20.0, "el2n and embedding": 4.0},
    "staff": {"small": 5.0, "effort": 1.0},
}
PUBLISHED = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "google/gemma-7b": 8_537_680_896,
    "google/gemma-2b": 2_506_172_416,
    "google/gemma-3-1b-it": 999_885_952,
    "google/gemma-3-270m-it": 268_098_176,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "mistralai/Mistral-Nemo-Instruct-2407": 12_247_782_400,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-32B-Instruct": 32_763_876_352,
}


def test_the_known_shapes_have_the_published_numbers_of_parameters():
    assert set(json.loads(SIZES.read_text())["models"]) == set(PUBLISHED)
    for name, parameters in PUBLISHED.items():
        assert KnownShape(name).shapes().num_parameters() == parameters, name


@pytest.mark.parametrize("family", ["gemma", "qwen2_5"])
def test_a_plan_needs_no_hub_for_the_shipped_families_and_tasks(tmp_path: Path, family: str, monkeypatch):
    monkeypatch.setattr(sizes, "_has_model", lambda *of: False)
    monkeypatch.setattr(sizes, "_has_data", lambda *of: False)
    asked = [f"family={family}", "task=gsm8k", "method=random", "pruning_rate=0.9", "memory_check=false"]
    planned = dry_run([*asked, "tracking=none", f"results_dir={tmp_path}"])
    assert "7,473 samples of" in planned.sizes[0] and "1,319 test prompts" in planned.sizes[0]
    assert len(planned.replaced) == 3 and not any(stage.exact for stage in planned.stages.values())


def test_a_plan_says_the_seeds_for_an_effect_from_the_variances_that_were_measured(tmp_path: Path):
    write_runs(tmp_path, {"random": 0.0, "ccs": 0.3, "staff": 0.5}, seeds=4)

    def said(effect: float, rates: set[float], task: str = "dialogsum", samples: int = 40) -> str:
        sweep = Planned("gemma", task, "rougeL", samples, tmp_path, rates, {(0, 0), (1, 1)})
        (sentence,) = sentences([sweep], effect)
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
    sweeps = [Planned("tiny", "dialogsum", "rougeL", samples, Path(), {0.9}) for samples in (250, 3000, 30)]
    few, many, none = (said.split(": ")[1] for said in sentences(sweeps, 1.0, ROOT / "results/tiny"))
    assert 3 < int(many.split()[0]) < int(few.split()[0])
    assert none.startswith("no number up to 1,000 (too few test samples) at pruning rate 0.9")


def test_an_effect_that_is_none_is_refused_before_anything_is_planned(monkeypatch: pytest.MonkeyPatch):
    for effect in ("0", "-1", "nan"):
        monkeypatch.setattr(sys, "argv", ["staff-plan", "method=nobody", f"--effect={effect}"])
        with pytest.raises(SystemExit, match=f"^staff: --effect {effect} must be a number above 0, in the"):
            main()


def test_a_plan_of_the_papers_table_reads_the_whole_data_set_by_the_fields_of_the_hub(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(sizes, "_has_model", lambda *of: False)
    monkeypatch.setattr(sizes, "_has_data", lambda *of: False)
    asked = [
        "experiment=table1",
        "family=gemma",
        "method=random",
        "pruning_rate=0.9",
        "seed=0",
        "memory_check=false",
    ]
    planned = dry_run([*asked, "tracking=none", f"results_dir={tmp_path}"])
    assert "12,459 samples of" in planned.sizes[0] and "500 test prompts" in planned.sizes[0]
