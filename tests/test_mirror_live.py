"""A run that fails, and goes on: its page on Weights & Biases as it grows. All else of pages: test_mirror.py."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import run_shrunk
from support.records import pages, stages_of, table_of

from staff.errors import UserError
from staff.evaluation.stage import Generate
from staff.tracking.mirror import check

pytestmark = pytest.mark.usefixtures("a_user_who_is_not_logged_in")


REASON = "the disk of the answers is full: free it."


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run that fails when the answers are to be generated, and then the same run again; its record."""
    results = tmp_path_factory.mktemp("twice")
    run = (
        "tracking=wandb",
        "tracking.mode=offline",
        "tracking.tags=[pilot]",
        "method=staff",
        "method.num_regions=3",
    )

    def fail(*arguments: Any) -> None:
        raise UserError(REASON)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Generate, "run", fail)
        with pytest.raises(UserError):
            run_shrunk(results, *run)
    return run_shrunk(results, *run)


@pytest.fixture(scope="module")
def failed(twice: dict[str, Any]) -> dict[str, Any]:
    return pages(twice["folder"])[0]


@pytest.fixture(scope="module")
def resumed(twice: dict[str, Any]) -> dict[str, Any]:
    return pages(twice["folder"])[1]


def test_the_same_run_goes_on_with_its_own_page(twice, failed, resumed):
    assert failed["run_id"] == resumed["run_id"] == twice["run"]["fingerprint"][:16]
    assert failed["display_name"] == resumed["display_name"] == twice["run"]["name"]


def test_a_page_is_tagged_with_family_task_method_rate_seed_and_the_users_own_tags(failed):
    assert failed["tags"] == ["tiny", "dialogsum", "staff", "pruning_rate=0.75", "seed=0", "pilot"]
    assert failed["job_type"] == "staff" and failed["run_group"] == "", "a single run is in no group"


def test_a_page_has_the_configuration_grouped_as_in_yaml_from_its_start(twice, failed):
    config = {key: value for key, value in failed["config"].items() if key != "_wandb"}
    facts = config.pop("run")
    assert config == twice["config"] and config["method"]["num_regions"] == 3
    assert facts["method"] == "staff" and facts["fingerprint"] == twice["run"]["fingerprint"]


def test_a_failed_run_ends_as_failed_with_its_sentence_and_the_next_one_as_finished(failed, resumed):
    assert (failed["exit"], failed["summary"]["status"]) == (1, f"failed: {REASON}")
    assert "metrics" not in failed["summary"]
    assert (resumed["exit"], resumed["summary"]["status"]) == (0, "finished")


def test_stages_show_as_they_start_and_end_and_a_resumed_run_reads_them(failed, resumed):
    tuned = [("fine-tune", "started"), ("fine-tune", "computed"), ("answer", "started"), ("answer", "failed")]
    shown = stages_of(failed)
    assert shown[-4:] == tuned
    selected = shown[shown.index(("select", "started")) : shown.index(("select", "computed")) + 1]
    scored = [("effort", "started"), ("fine-tune", "started"), ("fine-tune", "computed"), ("effort", "computed")]
    assert selected == [selected[0], *scored, ("effort", "started"), ("effort", "computed"), selected[-1]]
    assert {("select", "read"), ("fine-tune", "read"), ("answer", "computed")} <= set(stages_of(resumed))
    once = [stage for stage in stages_of(resumed) if stage[0] not in ("tokenise", "choose")]
    assert len(set(once)) == len(once), "of several models and metrics are tokens and constants alone"


def test_curves_arrive_while_a_model_trains_by_stage_and_model_each_over_its_own_steps(twice, failed):
    written = pd.read_csv(twice["folder"] / "training.csv")
    assert set(written["curve"]) == {"finetune/small", "finetune/target"}
    for curve, points in written.groupby("curve"):
        assert failed["metrics"][f"{curve}/*"] == f"{curve}/step"
        for name in ("step", "loss", "learning_rate", "grad_norm"):
            np.testing.assert_allclose(failed["curves"][f"{curve}/{name}"], points[name], rtol=1e-6)
        assert min(failed["curves"][f"{curve}/tokens_per_second"]) > 0
        assert 0.05 < min(failed["curves"][f"{curve}/memory_gb"]) < 100
    events = [row.get("stage/event", "point") for row in failed["rows"]]
    assert events.index("point") < len(events) - events[::-1].index("computed"), "not after the stages"


def test_no_name_of_a_value_depends_on_a_number_of_samples(failed, resumed):
    names = {name for page in (failed, resumed) for name in page["curves"] if not name.startswith("_")}
    names -= {name for name in names if name.endswith("sha256")}
    assert "finetune/target/loss" in names and not any(re.search(r"\d", name) for name in names)


def test_a_resumed_run_writes_no_point_of_a_curve_a_second_time(resumed):
    assert not [name for name in resumed["curves"] if name.startswith("finetune/")]


def test_system_metrics_and_the_log_are_on_the_page(failed):
    assert any(name.startswith("memory") or name == "cpu" for name in failed["system"])
    assert any("fine-tuning small on 24 samples" in line for line in failed["lines"])


def test_a_finished_page_has_the_record_as_its_summary_with_the_metrics_first(twice, resumed):
    left_out = ("config", "artifacts", "folder", "overhead", "coreset")
    record = {key: value for key, value in twice.items() if key not in left_out}
    summary = resumed["summary"]
    assert {key: summary[key] for key in record} == record
    assert next(key for key in summary if key in record) == "metrics"
    assert summary["selection"] == twice["coreset"] and summary["coreset"]["_type"] == "table-file"
    assert summary["overhead"]["seconds"] == twice["overhead"]["seconds"]


def test_the_coreset_is_a_table_with_text_score_region_and_group(twice, resumed):
    shown, written = table_of(resumed, "coreset"), pd.read_csv(twice["folder"] / "coreset.csv")
    assert list(shown) == ["id", "text", "score", "region", "group", "verified"]
    assert shown["id"].tolist() == written["id"].tolist()
    np.testing.assert_allclose(shown["score"], written["speculative"])
    assert all(re.match(r"Summarize the following dialogue\.[\s\S]+Summary: .", text) for text in shown["text"])
    regions = pd.read_csv(twice["folder"] / "regions.csv").query("picked > 0").set_index("region")
    assert shown["region"].value_counts().to_dict() == dict(regions["picked"])


def test_answers_are_a_table_with_prompt_and_reference(twice, resumed):
    shown = table_of(resumed, "predictions")
    assert list(shown)[:4] == ["id", "prompt", "answer", "reference"] and "rougeL" in shown and len(shown) == 4
    answers = pd.read_parquet(twice["folder"] / "predictions.parquet")
    assert shown["answer"].tolist() == answers["prediction"].tolist()
    assert shown["reference"][0] == "\n\n".join(answers["references"][0])
    assert all(prompt.startswith("Summarize") for prompt in shown["prompt"])


def test_scores_are_histograms_and_the_overhead_a_table_by_stage(twice, resumed):
    scores = pd.read_parquet(twice["folder"] / "samples.parquet")["speculative"]
    histogram = resumed["history"]["scores/speculative"]
    assert histogram["_type"] == "histogram" and sum(histogram["values"]) == len(scores)
    overhead = table_of(resumed, "overhead_stages")
    assert overhead["seconds"].sum() == pytest.approx(twice["overhead"]["seconds"])


@pytest.mark.parametrize("tags", ["pilot", [""], ["x" * 65], 7])
def test_tags_that_wandb_would_refuse_are_refused_beforehand(tags):
    with pytest.raises(UserError, match=r"tracking\.tags=.* must be a list of tags"):
        check({"mode": "auto", "tags": tags})


@pytest.mark.parametrize(
    ("said", "line"),
    [
        (
            "502: <!DOCTYPE html>\n<html><head><title>Bad\n Gateway</title></head>\n<body>x</body>",
            "502: Bad Gateway",
        ),
        (r'upload: "\u003chtml\u003e\n\u003cbody\u003eblocked"', 'upload: "a page of HTML'),
        ("a < b\nmore", "a < b"),
        ("x" * 999, "x" * 200),
        ("", ""),
    ],
)
def test_a_page_of_a_proxy_or_server_is_one_short_line(said: str, line: str):
    from staff.tracking.pages import sentence

    assert sentence(ValueError(said)) == f"ValueError: {line}".removesuffix(": ")
