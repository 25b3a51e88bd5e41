"""The main job: what is computed, what is read, what is charged, and what is said when it cannot be."""

import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, run_shrunk
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hypothesis import given
from hypothesis import strategies as st
from support.processes import here

from experiments.configuration import with_home
from experiments.run import main
from experiments.sweep import quoted, sentence_of
from staff.errors import UserError
from staff.models.spec import ModelSpec


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory):
    """As `run`, in one results folder for all tests of this file."""
    return partial(run_shrunk, tmp_path_factory.mktemp("shared"))


def computed(record: dict) -> dict[str, bool]:
    """By what was done, whether this run did it."""
    return {
        stage["label"].split(" on ")[0].split(" of ")[0]: stage["computed"]
        for stage in record["overhead"]["stages"]
    }


def stages(record: dict) -> list[str]:
    return sorted(stage["stage"] for stage in record["overhead"]["stages"])


def scores(record: dict) -> pd.DataFrame:
    return pd.read_parquet(record["folder"] / "samples.parquet")


def test_staff_from_scores_to_metrics_and_the_same_charge_for_whoever_reads(run, tmp_path: Path):
    first = run("method=staff")
    assert first["counts"] == {
        "pool": 24,
        "dropped_too_long": 0,
        "dropped_duplicates": 0,
        "dev": 0,
        "budget": 6,
        "selected": 6,
        "pool_tokens": 5354,
        "selected_tokens": 973,
        "trained": 6,
        "test": 4,
        "test_dropped_too_long": 0,
        "test_prompts_in_pool": 0,
    }
    assert set(first["metrics"]) == {"rougeL", "rouge1", "rouge2", "nll", "output_tokens"}
    assert set(computed(first).values()) == {True}
    assert first["overhead"]["seconds"] == pytest.approx(sum(s["seconds"] for s in first["overhead"]["stages"]))
    assert first["overhead"]["flops"] > 0 and first["overhead"]["str_basis"] == "estimated from FLOPs"
    coreset = pd.read_csv(first["folder"] / "coreset.csv")
    assert list(coreset.columns) == ["id", "speculative", "verified"] and len(coreset) == 6
    assert len(pd.read_parquet(first["folder"] / "predictions.parquet")) == 4

    again = run("method=staff", "store_dir=" + str(tmp_path / "results/artifacts"), results=tmp_path / "elsewhere")
    assert set(computed(again).values()) == {False}
    for part in ("metrics", "counts", "coreset"):
        assert again[part] == first[part]
    assert again["overhead"]["seconds"] == first["overhead"]["seconds"]

    fewer = run("method=staff", "method.verification_budget=1")
    assert computed(fewer)["fine-tune small"] is False, "the small model does not depend on verification"
    assert computed(fewer)["select by Staff"] is True

    tuned_otherwise = run("method=staff", "finetune_seed=7")
    assert set(computed(tuned_otherwise).values()) == {False}, "selection has a seed of its own"
    assert tuned_otherwise["finetuning"]["fingerprint"] != first["finetuning"]["fingerprint"]


def test_the_whole_pool_gives_the_measure_for_the_overhead_of_the_others(shared):
    full, raw, chosen = shared("method=full"), shared("method=raw"), shared("method=random")
    assert (full["run"]["pruning_rate"], full["coreset"]["size"]) == (0, 24)
    assert (raw["run"]["pruning_rate"], raw["coreset"]["size"], raw["finetuning"]) == (1, 0, None)
    assert full["overhead"]["str_basis"] == chosen["overhead"]["str_basis"] == "measured"
    assert chosen["overhead"]["full_finetuning_seconds"] == full["finetuning"]["seconds"]
    assert chosen["overhead"]["flops"] == 0
    assert raw["evaluation"]["fingerprint"] != full["evaluation"]["fingerprint"]


def test_scorer_and_trainer_see_the_same_token_ids_and_labels(run, monkeypatch):
    from transformers import Trainer

    import staff.scoring.passes

    trained, scored = set(), set()

    def rows(ids: torch.Tensor, labels: torch.Tensor) -> set[tuple]:
        lengths = [int((row != -100).nonzero().max()) + 1 for row in labels]
        return {(tuple(i[:n].tolist()), tuple(y[:n].tolist())) for i, y, n in zip(ids, labels, lengths)}

    training_step, gradients = Trainer.training_step, staff.scoring.passes.batch_gradients

    def spy_on_trainer(self, model, inputs, *args, **kwargs):
        trained.update(rows(inputs["input_ids"], inputs["labels"]))
        return training_step(self, model, inputs, *args, **kwargs)

    def spy_on_scorer(model, layers, input_ids, labels, *rest):
        scored.update(rows(input_ids, labels))
        return gradients(model, layers, input_ids, labels, *rest)

    monkeypatch.setattr(Trainer, "training_step", spy_on_trainer)
    monkeypatch.setattr(staff.scoring.passes, "batch_gradients", spy_on_scorer)
    run("method=staff", "task.train_limit=8", "method.verification_budget=1")
    assert len(trained) == 8 and scored == trained


def test_scores_online_spare_the_small_models_scoring_pass(shared):
    passed, online = shared("method=staff"), shared("method=staff", "method.scores=online")
    assert stages(passed) == ["coreset", "finetune", "scores", "scores"]  # of the small model and of the target
    assert stages(online) == ["coreset", "finetune", "scores"]
    ours = scores(online).speculative
    assert np.isfinite(ours).all() and ours.corr(scores(passed).speculative, method="spearman") > 0.8


def test_several_signals_of_one_model_are_charged_one_pass(shared):
    assert stages(shared("method=d2")) == ["coreset", "finetune", "scores"]


def test_all_linear_layers_can_be_scored_by_and_outweigh_one_of_them(shared):
    one, every = shared("method=staff"), shared("method=staff", "method.gradient=all_linear")
    assert (scores(every).speculative > scores(one).speculative).all()
    assert every["metrics"].keys() == one["metrics"].keys()


def test_a_precision_for_scoring_alone_makes_other_scores_of_the_same_fine_tuning(shared):
    wide, narrow = shared("method=staff"), shared("method=staff", "scoring.dtype=bfloat16")
    tuned = [
        {s["fingerprint"] for s in r["overhead"]["stages"] if s["stage"] == "finetune"} for r in (wide, narrow)
    ]
    assert tuned[0] == tuned[1] and wide["run"]["fingerprint"] != narrow["run"]["fingerprint"]
    ours, theirs = scores(wide).speculative, scores(narrow).speculative
    assert ours.corr(theirs, method="spearman") > 0.99 and not ours.equals(theirs)


def test_samples_that_do_not_fit_are_dropped_only_when_asked_and_counted(shared):
    record = shared("method=raw", "finetune.max_length=200", "task.too_long=drop")
    assert record["counts"]["dropped_too_long"] > 0
    assert record["counts"]["pool"] + record["counts"]["dropped_too_long"] == 24


def test_methods_run_end_to_end_on_what_the_others_left(shared):
    """Every method on the embedded models: tests/stress/test_methods.py."""
    methods = ("staff", "staff_official", "random", "el2n", "grand", "ccs", "full", "raw")
    records = {method: shared(f"method={method}") for method in methods}
    sizes = {method: record["coreset"]["size"] for method, record in records.items()}
    assert sizes == dict.fromkeys(methods, 6) | {"full": 24, "raw": 0}
    assert records["staff_official"]["overhead"]["flops"] > records["staff"]["overhead"]["flops"]


def test_full_fine_tuning_is_scored_through_a_fresh_adapter(shared):
    record = shared("method=staff", "finetune=full", "task.train_limit=16", "task.test_limit=2")
    assert record["coreset"]["size"] == 4 and record["overhead"]["flops"] > 0


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("pruning_rate=1.0", r"pruning_rate=1.0 is outside \[0, 1\)"),
        ("pruning_rate=-0.1", r"pruning_rate=-0.1 is outside \[0, 1\)"),
        ("pruning_rate=0.99", "leaves none of the 24 samples"),
        ("task.metrics=[rouge7]", "'rouge7', which is unknown: choose from rouge1"),
        ("task.data_dir=/nowhere", "task.data_dir must be a folder with train.jsonl"),
        ("task.answer='{sumary}'", "line 1: no field 'sumary'"),
        ("finetune.max_length=60", "finetune.max_length=60 would cut the answer of"),
        ("finetune.learning_rate=fast", "finetune.learning_rate='fast' must be a positive number"),
        ("finetune.batch_size=0", "finetune.batch_size=0 must be a whole number"),
        ("finetune.scheduler=foo", "finetune.scheduler='foo': choose cosine"),
        ("finetune.warmup_start=one", "finetune.warmup_start='one': choose first_step or zero"),
        ("finetune.warmup_ratio=7", "finetune.warmup_ratio=7 must be a number of at least 0 and at most 1"),
        ("finetune.lora.rank=0", "LoRA rank=0 must be a whole number of at least 1"),
        ("task.max_new_tokens=null", "task.max_new_tokens=None must be a whole number"),
        ("method=staff_official ~method.fresh_adapter.alpha", "must have rank, alpha and targets"),
        ("method.num_regions=0", "method.num_regions=0 must be a whole number of at least 1"),
        ("method.pick=lowest", "method.pick='lowest' is unknown: choose random or highest"),
        ("method.scores=later", "method.scores='later' is unknown: choose pass or online"),
        ("method=staff_official method.scores=online", "method.fresh_adapter is a LoRA adapter for a scoring pass"),
        (
            "method.scores=online method.gradient=all_linear",
            "method.scores=online uses gradients of the LoRA adapter",
        ),
        ("finetune=full method.scores=online", "online scores are gradients of LoRA adapters"),
        ("finetune.match=tokens", "finetune.match='tokens' is unknown: choose epochs or steps"),
        ("scoring.batch_tokens=0", "scoring.batch_tokens=0 must be null or a whole number"),
        ("scoring.dtype=int8", "scoring.dtype='int8' is unknown: choose null, float32 or bfloat16"),
        ("scoring.one_at_a_time=no", "scoring.one_at_a_time='no' must be null, true or false"),
        ("evaluation.batch_tokens=0", "evaluation.batch_tokens=0 must be null or a whole number"),
        ("method=staff_official method.normalise=no", "method.normalise='no' must be true or false"),
        ("finetune.learning_rate=nan", "finetune.learning_rate=nan must be a positive number"),
        ("finetune.lora.dropout=2", "LoRA dropout=2 must be a number of at least 0 and at most 1"),
        ("finetune.lora.targets=nowhere", "LoRA targets='nowhere': Target modules nowhere not found"),
        ("seed=one", "seed='one' must be a whole number"),
        ("seed=99999999999", "seed=99999999999 must be a whole number of at least 0 and below"),
        ("family.target.path=3", "family path=3 must be text"),
        ("family.target.path=[a,b]", r"family path=\['a', 'b'\] must be text"),
        ("family.small.revision=[a]", r"family revision=\['a'\] must be null or a branch, a tag or a commit"),
        ("family.template_options={a:1}", "family.template_options={'a': 1} are for chat templates, which"),
        ("finetune.lora=null", "finetune.lora=None must have rank, alpha, dropout and targets"),
        ("finetune.lora.targets=null", "LoRA targets=None must be names of linear layers, or all-linear"),
        ("task.data_dir=[a,b]", r"task.data_dir=\['a', 'b'\] must name a folder by text"),
        ("task.data_dir=null task.hub=[a,b]", r"task.hub=\['a', 'b'\] must be null or one name"),
        ("task.dev_split=[a]", r"task.dev_split=\['a'\] must be null or one name"),
        ("task.test_split=null", "task.test_split=None must be one name, such as train"),
        ("task.id_field=[fname]", r"task.id_field=\['fname'\] must be null or name a field of the rows"),
        ("task.references=null", r"task.references=None must be a list of fields, or \[\] for none"),
        ("method=precomputed method.path=[a]", r"method.path=\['a'\] is not a file: set method.path=FILE"),
        (
            "method=precomputed method.path=/no.csv",
            r"method.path=/no.csv cannot be read \(No such file or directory\): name",
        ),
        ("family.small.path=null", "family path=None must be text"),
        ("task.data_dir=5", "task.data_dir=5 must name a folder"),
        ("store_dir=null", "store_dir=null must name a folder"),
        ("results_dir=null", "results_dir=null must name a folder"),
        ("family.target.path=/nowhere", "family path=/nowhere is not a folder"),
        ("method=staff_official method.drop_hardest=0.9", "a budget of 6 samples cannot be met: 3 are eligible"),
    ],
)
def test_bad_input_is_one_sentence_before_a_model_loads(run, monkeypatch, override: str, sentence: str):
    def load(self):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(ModelSpec, "load", load)
    from hydra.errors import InstantiationException

    with pytest.raises((UserError, InstantiationException), match=sentence):
        run(*override.split())


def staff(*arguments: str) -> subprocess.CompletedProcess:
    return here(main, *arguments)


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("method=staf", "method=staf is unknown: choose aum"),
        (
            "metod=staff",
            "metod is not a setting (did you mean method?): choose from budget, budget_tokens, evaluation",
        ),
        ("method.regons=3", "method.regons is not a setting (did you mean num_regions?): choose from budget_rule"),
        ("+method.foo=1", "method.foo is not a setting: choose from budget_rule"),
        ("+family.target.pth=x", "family.target.pth is not a setting (did you mean path?): choose from"),
        ("family.small.sharded=1", "family.small.sharded is a field that its YAML file leaves out: write +family"),
        ("method._target_=mine.X", "method._target_=mine.X cannot be imported (No module named 'mine'): name"),
        ("method=null", "a group takes the name of one of its options, such as method=staff"),
        ("pruning_rate=most", "pruning_rate='most' is not a number"),
        ("method=raw method.rank=3", "method.rank is not a setting here, where there are none"),
        ("method=ccs,el2n method.variant=official -m", "method.variant is not a setting: choose from budget_rule"),
    ],
)
def test_a_mistyped_group_option_setting_or_value_ends_with_the_choices(
    argument: str, sentence: str, tmp_path: Path
):
    ended = staff(*argument.split(), f"results_dir={tmp_path}")
    assert ended.returncode != 0
    assert ended.stderr.startswith(f"staff: {sentence}") and ended.stderr.count("\n") == 1
    assert ("'method.variant=choice(VALUE)'" in ended.stderr) == ("-m" in argument)


@given(st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1))
def test_a_quoted_override_gives_its_text_through_the_shell_and_hydra(text: str):
    (argument,) = shlex.split(quoted("task.prompt", text))
    value = OverridesParser.create().parse_override(argument).value()
    assert value == (text.strip("\"'") if text[0] in "'\"" else text), "quotes that do not pair are left out"


def test_a_path_from_the_home_folder_needs_no_quotes_and_results_lie_there(run, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    given = ["~hydra.x", "task.train_file=[~/a.jsonl,~/b.jsonl]", "task.data_dir=~/a b", "task.prompt='~/x,~/y'"]
    read = ["~hydra.x", f"task.train_file=[{tmp_path}/a.jsonl,{tmp_path}/b.jsonl]", f"task.data_dir={tmp_path}/a b"]
    assert with_home(given) == [*read, given[-1]]
    folder = run("method=random", "evaluation=none", "results_dir='~/mine'")["folder"]
    assert folder.parent == tmp_path / "mine/runs" and (tmp_path / "mine/artifacts").is_dir()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("task.prompt=Q: {a}", "quote its value within the shell's quotes, as in \"task.prompt='Q: {a}'\"."),
        ("results_dir=a=b", "the override 'results_dir=a=b' cannot be read as it is"),
        (
            "task.train_file=[a.jsonl, b=c.jsonl]",
            "each value of the list within the shell's quotes, as in \"task.train_file=['a.jsonl','b=c.jsonl']\".",
        ),
        ("method", "the override 'method' sets nothing: write NAME=VALUE"),
    ],
)
def test_an_override_without_quotes_is_one_line_of_every_command(override: str, sentence: str):
    from experiments.dry_run import dry_run

    with pytest.raises(HydraException) as refused:
        dry_run([override])
    assert sentence in (sentence_of(refused.value) or "")


def test_results_without_a_folder_are_one_sentence():
    command = [sys.executable, "-m", "experiments.run", "results_dir=null"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr == "staff: results_dir=null must name a folder: leave it out for the default.\n"


def test_a_comma_without_quotes_is_a_text_a_list_or_a_sweep(tmp_path: Path):
    ended = staff("task.name=a,b", f"results_dir={tmp_path}")
    assert ended.returncode == 1
    assert ended.stderr == (
        "staff: the override 'task.name=a,b' has a comma: write \"task.name='a,b'\" for one text, "
        "task.name=[a,b] for a list, or add -m to run one value after the other.\n"
    )


def test_a_fault_in_an_experiment_that_sweeps_is_named_and_not_its_commas(tmp_path: Path):
    ended = staff("experiment=planted", "method=raw,full", "outpt_dir=x", f"results_dir={tmp_path}")
    assert ended.returncode == 1 and ended.stderr.startswith(
        "staff: outpt_dir is not a setting (did you mean results_dir"
    )


def test_help_lists_groups_and_options_without_importing_torch():
    code = (
        "import atexit, sys, experiments.run as r; sys.argv[1:] = ['--help'];"
        "atexit.register(lambda: print('torch' in sys.modules)); r.run_hydra()"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "staff_official" in ended.stdout and ended.stdout.strip().endswith("False")


def test_results_that_cannot_be_written_are_one_sentence(tmp_path: Path):
    (tmp_path / "file").touch()
    ended = staff("tracking=none", f"results_dir={tmp_path / 'file'}")
    assert ended.returncode == 1 and "name another folder" in ended.stderr and ended.stderr.count("\n") == 1
