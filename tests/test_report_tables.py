"""Tables and figures of the report: nothing averaged that differs, every interval from what was drawn apart."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from support.records import copied, grid, only_context

from experiments.benchmarks.common import configured
from experiments.report import overhead, performance, supplementary, verdicts
from experiments.report.__main__ import summary, write
from experiments.report.comparisons import mean, of_finetuning, pairs
from experiments.report.figures import overlap
from experiments.report.records import collect, contexts
from experiments.report.settings import variants, varying_columns
from experiments.report.supplementary import similarity
from staff.tracking import write_record

PAPER = pd.read_csv(ROOT / "experiments/report/table1.csv")


def texts(table: Any) -> list[str]:
    return [str(text) for text in table.cells.to_numpy().ravel()]


def test_from_the_fifth_seed_on_a_table_says_what_is_decided_and_which_seeds_to_add(real: Path, tmp_path: Path):
    grid(real, tmp_path, {"random": 0, "staff": 0.1}, seeds=4, rates=(0.9,))
    assert verdicts.looks(only_context(tmp_path)) is None
    grid(real, tmp_path, {"random": 0, "staff": 0.1}, seeds=6, rates=(0.9,))
    question = verdicts.Question(margin=9.0)
    table = verdicts.looks(only_context(tmp_path), question) or pytest.fail("no table")
    assert table.cells["looked at"].tolist() == ["5 seeds"] and table.cells["verdict"].tolist() == ["equal"]
    for file in tmp_path.glob("runs/staff-*/predictions.parquet"):
        answers = pd.read_parquet(file)
        chance = np.random.default_rng(int(re.search(r"-s(\d)", file.parent.name)[1])).normal(0, 3)  # type: ignore[index]
        answers.assign(rougeL=answers["rougeL"] + chance).to_parquet(file)
    table = verdicts.looks(only_context(tmp_path), question) or pytest.fail("no table")
    assert table.cells["verdict"].tolist() == ["open"] and "seeds to add next: 6, 7, 8, 9." in table.caption


def test_contrasts_at_one_of_several_rates_are_corrected_for_one_another_alone(real: Path, tmp_path: Path):
    grid(real, tmp_path, {"random": 0, "staff": 0.1, "ccs": 0.2}, seeds=5, rates=(0.5, 0.9))
    every, one = verdicts.Question(), verdicts.Question(rates=(0.9,))
    tables = [
        verdicts.table(only_context(tmp_path), question) or pytest.fail("no table") for question in (every, one)
    ]
    assert [len(table.cells) for table in tables] == [3 * len(tables[1].cells), len(tables[1].cells)]
    assert set(tables[1].cells["pruning rate"]) == {"0.9"}
    looks = [
        verdicts.looks(only_context(tmp_path), question) or pytest.fail("no table") for question in (every, one)
    ]
    wide, narrow = (
        table.cells.loc[table.cells["pruning rate"] == "0.9", "difference"].iloc[0].split("±") for table in looks
    )
    assert wide[0] == narrow[0] and float(wide[1]) > float(narrow[1])


def test_the_pairs_difference_is_the_difference_of_the_means_that_are_shown(real: Path, tmp_path: Path):
    grid(real, tmp_path, {"random": 0, "staff": 1})
    context = only_context(tmp_path)
    for pair in pairs(context):
        a, b = mean(context, pair.a, pair.rate), mean(context, pair.b, pair.rate)
        assert a and b and pair.difference.mean == pytest.approx(a.value - b.value)


def test_one_seed_has_no_interval_and_the_caption_says_so(real: Path, tmp_path: Path):
    grid(real, tmp_path, {"random": 0, "staff": 1}, seeds=1)
    context = only_context(tmp_path)
    table = performance.performance(context, pairs(context))
    assert "One seed" in table.caption and "±" not in "".join(texts(table))
    alone = performance.differences(context, pairs(context)) or pytest.fail("no table")
    assert set(alone.cells["interval over"]) == {"samples alone"} and set(alone.cells["p"]) == {"–"}
    told = verdicts.table(context) or pytest.fail("no table")
    assert set(told.cells["verdict"]) == {"one seed: no verdict"} and set(told.cells["p (Holm)"]) == {"–"}


def test_a_model_that_nothing_random_touched_has_no_interval(real: Path, tmp_path: Path):
    grid(real, tmp_path, {"raw": 0, "staff": 1})
    found = mean(only_context(tmp_path), "raw target", 1.0)
    assert found and found.half is None and found.units == 1


def test_what_fine_tuning_gives_is_told_over_all_seeds_though_the_raw_target_was_asked_once(real, tmp_path: Path):
    grid(real, tmp_path, {"raw": -5, "full": 0, "random": -2})
    for seed in (1, 2):
        shutil.rmtree(next(tmp_path.glob(f"runs/raw-*-s{seed}-*")))
    context = only_context(tmp_path)
    gain = of_finetuning(context)
    assert gain and gain.seeds == 3 and abs(gain.mean - 5) < 3 * gain.error and gain.p < 0.001
    said = performance.performance(context, []).caption
    assert f"raw target: {gain.mean:+.2f} ± {gain.half:.2f}, p < 0.001" in said
    grid(real, tmp_path / "alone", {"full": 0, "random": -2})
    assert of_finetuning(only_context(tmp_path / "alone")) is None


def test_runs_that_differ_in_anything_but_the_seed_are_never_averaged(real: Path, tmp_path: Path):
    low, high = np.full(8, 20.0), np.full(8, 30.0)
    for seed in range(2):
        copied(real, tmp_path, "staff", 0.5, (seed, seed), low + seed)
        copied(real, tmp_path, "staff", 0.5, (seed, seed), high + seed, config__method__num_regions=20)
        copied(real, tmp_path, "staff", 0.5, (seed, seed), high + 9, config__finetune__learning_rate=0.5)
    table = collect(tmp_path)
    assert varying_columns(table)[4:] == ["setting.method.num_regions", "setting.finetune.learning_rate"]
    assert sorted(variants(table)) == 2 * ["staff num_regions=20 finetune.learning_rate=0.003"] + (
        2 * ["staff num_regions=50 finetune.learning_rate=0.003"]
        + 2 * ["staff num_regions=50 finetune.learning_rate=0.5"]
    )
    centre, *ablated = contexts(table, tmp_path)
    means = {(c.varied, v): mean(c, v, 0.5).value for c in (centre, *ablated) for v in c.variants}  # type: ignore[union-attr]
    assert means == {
        ("method", "staff"): 20.5,
        ("num_regions", "20"): 30.5,
        ("num_regions", "50"): 20.5,
        ("finetune.learning_rate", "0.003"): 20.5,
        ("finetune.learning_rate", "0.5"): 39.0,
    }
    assert "runs differ by method, pruning_rate, method.num_regions" in summary(table)
    write(tmp_path, table)
    head, _, *rows = (
        (tmp_path / "tables/performance-tiny-dialogsum-num_regions-of-staff.md").read_text().split("\n")
    )
    assert [cell.strip() for cell in head.split("|")[1:-1]] == ["num_regions", "p = 0.5"]
    assert rows[0].split("|")[1].strip() == "20" and "30.50" in rows[0]
    drawn = {file.name.split("-")[0] for file in tmp_path.glob("figures/*-num_regions-of-staff.svg")}
    assert drawn == {"performance", "pareto", "overlap"}


NO_NUMBER = {
    "finetune.fsdp": True,
    "finetune.device_batch_size": 4,
    "finetune.gradient_checkpointing": True,
    "scoring.batch_tokens": 64,
    "scoring.one_at_a_time": True,
    "evaluation.batch_tokens": 64,
    "memory_check": False,
}


def test_a_setting_that_changes_no_number_changes_no_name_of_a_run_and_tells_no_runs_apart(
    real: Path, tmp_path: Path
):
    def name(*settings: str) -> str:
        return configured("method=el2n", "task.train_limit=16", f"results_dir={tmp_path}", *settings).name

    assert name(*(f"{setting}={value}" for setting, value in NO_NUMBER.items())) == name()
    assert name("scoring.dtype=bfloat16") != name()
    changes: dict[str, Any] = {f"config.{name}".replace(".", "__"): value for name, value in NO_NUMBER.items()}
    for seed, of_seed in enumerate(({}, changes)):
        copied(real, tmp_path, "staff", 0.5, (seed, seed), np.full(8, 20.0), **of_seed)
    assert varying_columns(collect(tmp_path))[4:] == []
    copied(real, tmp_path, "staff", 0.5, (2, 2), np.full(8, 20.0), config__scoring__dtype="bfloat16")
    assert varying_columns(collect(tmp_path))[4:] == ["setting.scoring.dtype"]


def test_a_setting_that_some_runs_do_not_have_tells_apart_too(real: Path, tmp_path: Path):
    for seed, value in enumerate((None, 5, None)):
        copied(real, tmp_path, "staff", 0.5, (seed, seed), np.full(4, 20.0), config__task__train_limit=value)
    assert sorted(len(runs) for runs in only_context(tmp_path).cells.values()) == [1, 2]


def test_a_field_that_records_of_an_earlier_version_lack_has_its_default(real: Path, tmp_path: Path):
    copied(real, tmp_path, "staff", 0.5, (0, 0), np.full(8, 20.0))
    copied(real, tmp_path, "staff", 0.5, (1, 1), np.full(8, 21.0))
    file = next((tmp_path / "runs").glob("*/metrics.json"))
    record = json.loads(file.read_text())
    assert record["config"]["task"].pop("evaluate_on") == "test"
    file.write_text(json.dumps(record))
    assert varying_columns(collect(tmp_path))[4:] == []


def test_what_all_ablations_have_in_common_is_the_method_and_each_ablation_has_its_own_table(
    real: Path, tmp_path: Path
):
    def ran(method: str, points: float, **changes: Any) -> None:
        for seed in range(2):
            copied(real, tmp_path, method, 0.5, (seed, seed), np.full(8, points) + np.arange(8) * seed, **changes)

    ran("random", 20)
    ran("staff", 21)
    for regions in (100, 5):
        ran("staff", regions / 10, config__method__num_regions=regions)
        ran("staff", 1, config__method__num_regions=regions, config__method__verification_budget=99)
    ran("staff", 22, config__method__verification_budget=99)
    ran("staff", 23, config__family__small__path="pkg://staff/assets/tiny/smaller")
    ran("staff", 24, config__method__fresh_adapter={"rank": 4, "alpha": 16, "targets": ["v_proj"]})
    transferred = {"identity__selection": {"models": "other"}, "run__selection_family": "tiny_small"}
    ran("staff", 25, config__selection_family={"name": "tiny_small"}, **transferred)
    main, *ablated = contexts(collect(tmp_path), tmp_path)
    assert main.variants == ["random", "staff"]
    assert {c.title.split(": ")[1]: c.variants for c in ablated} == {
        "num_regions of staff, verification_budget=10": ["5", "50", "100"],
        "num_regions of staff, verification_budget=99": ["5", "50", "100"],
        "verification_budget of staff": ["10", "99"],
        "family.small.path of staff": ["small", "smaller"],
        "fresh_adapter.rank of staff": ["4", "none"],
        "selection_family.name of staff": ["tiny", "tiny_small"],
    }
    together = supplementary.ablations(main, ablated)
    assert together is not None
    differences = together.cells.set_index(["setting", "value"])["difference"].str.split(" ").str[0].to_dict()
    assert differences == {
        ("num_regions", "5"): "-20.50",
        ("num_regions", "100"): "-11.00",
        ("verification_budget", "99"): "+1.00",
        ("family.small.path", "smaller"): "+2.00",
        ("fresh_adapter.rank", "4"): "+3.00",
        ("selection_family.name", "tiny_small"): "+4.00",
    }, "each variant minus the method as it is; ablations without it are left out"


def test_a_grid_of_two_settings_is_compared_as_a_whole(real: Path, tmp_path: Path):
    for regions in (5, 50):
        for probes in (1, 10):
            changes = {"config__method__num_regions": regions, "config__method__verification_budget": probes}
            copied(real, tmp_path, "staff", 0.5, (0, 0), np.full(4, 20.0), **changes)
    (context,) = contexts(collect(tmp_path), tmp_path)
    assert len(context.variants) == 4


def test_region_similarity_is_told_where_the_target_scored_every_sample(real: Path, tmp_path: Path):
    grid(real, tmp_path, {"random": 0, "staff": 1})
    folders = sorted(tmp_path.glob("runs/staff-p0.9*"))
    assert len(folders) == 3
    for folder in folders:
        samples = pd.read_parquet(folder / "samples.parquet")
        partly = samples.assign(verified=samples["verified"].where(samples.index > 0))
        whole = samples.assign(verified=2 * samples["speculative"])
        (partly if folder == folders[2] else whole).to_parquet(folder / "samples.parquet")
    table = similarity(only_context(tmp_path))
    assert table is not None and len(table.cells) == 1
    row = table.cells.iloc[0]
    assert (row["regions"], row["seeds"], row["same region"], row["Spearman"]) == ("50", "2", "1.00", "1.00")


def test_two_test_sets_of_one_task_never_share_a_table(real: Path, tmp_path: Path):
    for digest in ("a" * 64, "b" * 64):
        copied(real, tmp_path, "staff", 0.5, (0, 0), np.full(4, 20.0), identity__data__test=digest)
    assert len(contexts(collect(tmp_path), tmp_path)) == 2


def test_runs_without_their_predictions_have_means_but_no_differences(real: Path, tmp_path: Path):
    grid(real, tmp_path, {"random": 0, "staff": 1})
    for file in tmp_path.glob("runs/*/predictions.parquet"):
        file.unlink()
    context = only_context(tmp_path)
    assert pairs(context) == []
    assert "±" in "".join(texts(performance.performance(context, [])))
    assert performance.differences(context, []) is None


def test_measured_and_estimated_ratios_are_kept_apart(real: Path, tmp_path: Path):
    answers = np.full(4, 20.0)
    for seed, (basis, ratio) in enumerate((("measured", 0.5), ("estimated from FLOPs", 3.0))):
        changes = {"overhead__str": ratio, "overhead__str_basis": basis, "overhead__seconds": 9.0}
        copied(real, tmp_path, "staff", 0.5, (seed, seed), answers, **changes)
    table = overhead.overhead(only_context(tmp_path))
    assert table is not None
    assert table.cells.loc[0, ["STR", "STR, estimated"]].tolist() == ["0.500", "~3.00"]
    said = summary(collect(tmp_path))
    assert "1.75" not in said and "0.500" in said and "3.000" in said


def test_runs_that_answered_other_test_samples_stand_in_tables_of_their_own(real: Path, tmp_path: Path):
    for seed, dropped in enumerate((0, 0, 3)):
        copied(real, tmp_path, "staff", 0.5, (seed, seed), np.full(4, 20.0), counts__test_dropped_too_long=dropped)
    found = contexts(collect(tmp_path), tmp_path)
    assert [len(context.runs) for context in found if context.varied == "method"] == [2, 1]
    assert "without 3" in found[-1].title


def test_captions_tell_that_stages_were_made_beside_others_or_by_several_processes(real: Path, tmp_path: Path):
    own = {"workers": 1, "processes": 1}
    for seed, stage in enumerate((own, {**own, "workers": 4}, {**own, "processes": 8})):
        record = copied(real, tmp_path, "staff", 0.5, (seed, seed), np.full(4, 20.0))
        assert {(s["workers"], s["processes"]) for s in record["overhead"]["stages"]} == {(1, 1)}
        record["overhead"]["stages"][0] |= stage
        write_record(tmp_path / "runs" / record["run"]["name"], record)
        caption = (overhead.overhead(only_context(tmp_path)) or pytest.fail("no table")).caption
        assert ("several runs shared the machine" in caption) == (seed > 0)
        assert ("by 1 or 8 processes" in caption) == (seed > 1)


def test_overlap_compares_coresets_of_different_seeds_where_there_are_any(real: Path, tmp_path: Path):
    grid(real, tmp_path / "one", {"random": 0, "staff": 1}, seeds=1)
    grid(real, tmp_path / "two", {"random": 0, "staff": 1}, seeds=2)
    for folder in sorted((tmp_path / "two/runs").glob("*")):
        other = json.loads((folder / "metrics.json").read_text())["run"]["seed"] == 1
        samples = pd.read_parquet(folder / "samples.parquet")
        samples.assign(selected=samples["selected"] ^ other).to_parquet(folder / "samples.parquet")
    for folder, said, shares in (("one", "one seed", 1.0), ("two", "of different seeds", 0.0)):
        figure, caption = overlap(only_context(tmp_path / folder)) or pytest.fail("no figure")
        assert said in caption and {float(text.get_text()) for text in figure.axes[0].texts} == {shares}
        plt.close(figure)


def test_break_even_counts_the_fine_tunings_after_which_a_selection_has_paid(real: Path, tmp_path: Path):
    changes = {"overhead__seconds": 10.0, "finetuning__seconds": 2.0}
    estimated = {"overhead__str_basis": "estimated from FLOPs", "overhead__full_finetuning_seconds": 60.0}
    copied(real, tmp_path, "staff", 0.5, (0, 0), np.full(4, 20.0), **changes, **estimated)
    table = overhead.break_even(only_context(tmp_path))
    assert table is not None and table.cells.iloc[0]["on everything"] == "~60.0"
    measured = {"overhead__str_basis": "measured", "overhead__full_finetuning_seconds": 6.0}
    copied(real, tmp_path, "staff", 0.5, (1, 1), np.full(4, 20.0), **changes, **measured)
    table = overhead.break_even(only_context(tmp_path))
    assert table is not None
    row = table.cells.iloc[0]
    assert (row["in"], row["ratio"], row["pays from"]) == ("seconds", "2.00", "3")  # 10 + 3 x 2 < 3 x 6


def test_the_papers_differences_stand_beside_ours(real: Path, tmp_path: Path):
    grid(real, tmp_path, {"random": 0, "staff": 1})
    table = performance.against_paper(only_context(tmp_path), PAPER)
    assert table is not None and "not comparable" in table.caption
    row = table.cells[table.cells["pruning rate"] == "0.9"].iloc[0]
    at = PAPER[(PAPER["task"] == "dialogsum") & (PAPER["pruning_rate"] == 0.9) & (PAPER["target"] == "Gemma-7b")]
    value = at.set_index("method")["rouge_l"]
    assert row["Gemma-7b"] == f"{value['staff'] - value['random']:+.1f}"
