"""Every benchmark and the pretraining run to their end at a tiny size, and find what they should."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

from experiments.benchmarks import common
from staff.models.spec import ModelSpec

Rows = list[dict[str, str]]
Benchmark = Callable[..., Rows]
TINY = ("pruning_rate=0.5", "tracking=none")


def rows_of(text: str) -> Rows:
    """The rows of all Markdown tables, each as cells by their column."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    starts = [i - 1 for i, cells in enumerate(lines) if set(cells[0]) == {"-"}]
    ends = [*starts, len(lines)][1:]
    return [
        dict(zip(lines[start], row, strict=True))
        for start, end in zip(starts, ends, strict=True)
        for row in lines[start + 2 : end]
    ]


@pytest.fixture
def benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Benchmark:
    """Runs a command of experiments/ in an empty folder; the rows that it wrote, or that it printed."""

    def run(command: str, *arguments: str) -> Rows:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", [command.rpartition(".")[2], *arguments])
        importlib.import_module(f"experiments.{command}").main()
        written = list(tmp_path.glob("results/benchmarks/*.md"))
        return rows_of(written[0].read_text() if written else capsys.readouterr().out)

    return run


def test_a_benchmark_replaces_its_section_of_a_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name, cell in (("first", "1"), ("second", "2"), ("first", "3")):
        common.write(name, "How fast.\n", ["| a |", "|---|", f"| {cell} |"])
    text = (tmp_path / "results/benchmarks/README.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("#")] == ["# Benchmarks", "## first", "## second"]
    assert [row["a"] for row in rows_of(text)] == ["3", "2"]


def test_scores_are_those_of_the_authors_procedure(benchmark: Benchmark):
    rows = benchmark("benchmarks.scoring", "--samples=2", "--rounds=1", "--growth=1", *TINY)
    compared = [row for row in rows if "error" in row]
    assert [row["model, data"] for row in compared] == ["tiny small, dialogsum", "tiny target, dialogsum"]
    assert all(float(row["error"]) < 1e-4 for row in compared)
    assert sum("of the bound" in row for row in rows) == 2
    assert [row["samples"] for row in rows if "samples" in row] == ["1", "4", "16"]


def test_gradient_norms_are_those_of_plain_autograd(benchmark: Benchmark):
    rows = benchmark("benchmarks.gradients", "--samples=2", "--rounds=1", *TINY)
    assert [row["parameters"] for row in rows] == ["all_lora", "all_linear"] * 2
    assert all(float(row["error"]) < 1e-4 for row in rows)


def test_the_trainer_that_spares_logits_leads_to_the_same_scores_as_transformers_own(benchmark: Benchmark):
    rows = benchmark("benchmarks.finetuning", "--samples=6", "--rounds=1", "--epochs=1", *TINY)
    assert [row["way"] for row in rows] == ["Trainer", "ours", "grouped", "online", "Trainer", "ours"]
    assert all(float(row["loss"]) < 1e-4 for row in rows if "loss" in row)
    assert rows[0]["rank correlation"] == "1.0000" and rows[0]["same tenth"] == "1.00"


def test_answers_are_those_of_plain_generate_in_every_case(benchmark: Benchmark):
    cases = "task.max_new_tokens=3", *TINY, "--", "task.max_new_tokens=2", "evaluation.batch_tokens=1"
    rows = benchmark("benchmarks.generation", "--samples=3", "--rounds=1", *cases)
    assert [row["equal"] for row in rows] == ["3 of 3"] * 2


def test_selection_is_measured_at_every_size_and_d2_is_its_dense_form(benchmark: Benchmark):
    rows = benchmark("benchmarks.selection", "--shrink=100")
    assert [row["pool"] for row in rows if row["method"] == "D2"] == ["10", "100", "1,000", "124"]
    assert rows[-1]["method"] == "D2, dense" and "100.00% the same selection" in rows[-1]["ratio"]


def test_the_approximate_search_is_compared_with_the_exact_one(benchmark: Benchmark):
    pytest.importorskip("faiss")
    exact, approximate = benchmark("benchmarks.selection", "--search=2000x8")
    assert exact["search"] == "exact" and not exact["recall"]
    assert float(approximate["recall"]) > 0.5 and approximate["same coreset"].endswith("%")


def test_a_pool_is_measured_from_its_file_to_the_report(benchmark: Benchmark):
    rows = benchmark("benchmarks.load", "--sizes=40", "--methods=d2,staff", "--shrunk=6")
    stages = ["read", "tokenise", "identify", "select by d2", "select by staff", "run", "export", "report"]
    stages += ["start again", "start again, by the clock"]
    assert [row["stage"] for row in rows] == stages * 2


def test_small_models_cut_out_of_the_target_are_compared_with_it(benchmark: Benchmark):
    rows = benchmark("benchmarks.depth_pruning", "null", "2", "--", "task.train_limit=10", *TINY)
    assert [(row["small model"], row["parameters, M"]) for row in rows] == [
        ("small", "0.9"),
        ("target, 2 of 4 blocks", "1.7"),
        ("target, raw", ""),
    ]
    assert all(-1 <= float(row["Spearman"].split()[0]) <= 1 for row in rows)


def test_the_tiny_family_is_pretrained_without_its_reserved_samples_and_measured(
    benchmark: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from experiments.pretraining import mixture

    def dialogue(i: int) -> dict[str, str]:
        text = f"#Person1#: The number {i}?\n#Person2#: It is {i}."
        summaries = dict.fromkeys(("summary", "summary1", "summary2", "summary3"), f"They say {i}.")
        return {"fname": f"d_{i}", "dialogue": text, "topic": "numbers", **summaries}

    data = tmp_path / "data"
    for name, first, count in (("train", 0, 40), ("dev", 40, 2), ("test", 50, 4)):
        file = data / "dialogsum" / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(dialogue(i)) + "\n" for i in range(first, first + count)))
    (data / "gsm8k").mkdir()
    (data / "gsm8k/train.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2"}) + "\n")
    monkeypatch.setattr(mixture, "RESERVED", {"dialogsum": 30, "gsm8k": 0})
    monkeypatch.setattr(mixture, "EXCERPT", {"train": 20, "test": 3})
    assets = tmp_path / "assets"
    little = ("--fraction=1e-6", "--summaries=2", "--vocab-size=300", "--steps", "excerpt", "smaller")
    benchmark("pretraining.pretrain", f"--data-dir={data}", f"--output-dir={assets}", *little)

    dialogues, _ = mixture.unreserved(data)
    assert [row["fname"] for row in dialogues] == [f"d_{i}" for i in range(30, 40)]
    excerpt = mixture.read_jsonl(assets / "dialogsum/train.jsonl")
    assert len({row["fname"] for row in excerpt} - {row["fname"] for row in dialogues}) == 20
    assert ModelSpec(str(assets / "tiny/smaller")).load().num_parameters() > 0

    card = ROOT / "staff/assets/README.md"
    before = card.read_bytes()
    models = [f"family.{name}.path={assets / 'tiny/smaller'}" for name in ("small", "target")]
    rows = benchmark("pretraining.measure", *models, f"task.data_dir={assets / 'dialogsum'}", *TINY)
    assert len(rows) == 5 + 4 + 4
    assert rows[0] == {**rows[1], "model": "small, raw"}  # the same model
    assert card.read_bytes() == before
