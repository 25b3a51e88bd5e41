"""The page of a coreset shows every sample of the pool, as text, from the run's own data or not at all."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, run_shrunk

from experiments.export import training_samples
from experiments.recorded import recorded_run
from experiments.report import browse as browsing
from experiments.report.__main__ import main
from experiments.report.browse import browse
from staff.data.samples import Sample
from staff.errors import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a real run of STAFF, with data of its own."""
    results = tmp_path_factory.mktemp("browsed")
    shutil.copytree(ROOT / "staff/assets/dialogsum", results / "data")
    return run_shrunk(results, "method=staff", "pruning_rate=0.5", f"task.data_dir={results}/data")["folder"]


def content(page: str) -> pd.DataFrame:
    """The samples of a page, as its script reads them."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    read = json.loads(text)
    return pd.DataFrame(read["rows"], columns=[column["name"] for column in read["columns"]])


def a_pool(count: int) -> tuple[pd.DataFrame, list[Sample]]:
    ids = [f"s{i}" for i in range(count)]
    scores = np.arange(count, dtype=float)
    pool = pd.DataFrame({"id": ids, "selected": scores % 50 == 0, "answer_tokens": 3, "loss": scores})
    return pool, [Sample(id, f"prompt {id}", f" answer {id}", (f"answer {id}",)) for id in ids]


def test_every_sample_of_the_pool_is_there_with_its_text_its_scores_and_its_region(run: Path):
    recorded = recorded_run(run)
    pool, regions = recorded.samples(), recorded.regions()
    assert pool is not None and regions is not None
    table = content(browse(run).read_text())
    texts = {sample.id: (sample.prompt, sample.answer.strip()) for sample in training_samples(recorded)}
    assert table["id"].tolist() == pool["id"].tolist() and table["selected"].sum() == pool["selected"].sum() > 0
    assert [*zip(table["prompt"], table["answer"])] == [texts[id] for id in pool["id"]]
    assert np.allclose(table["speculative"], pool["speculative"], rtol=1e-5)
    sizes = table["region"].value_counts()
    assert all(sizes[r["region"]] == r["size"] for _, r in regions.iterrows())


def test_the_command_writes_beside_the_run_or_where_output_says(run: Path, tmp_path: Path, monkeypatch, capsys):
    for arguments, file in (
        ([], run / "browse.html"),
        (["--output", f"{tmp_path}/a/b.html"], tmp_path / "a/b.html"),
    ):
        file.unlink(missing_ok=True)
        monkeypatch.setattr(sys, "argv", ["staff-report", "--browse", str(run), *arguments])
        main()
        assert file.is_file() and str(file) in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["staff-report", "--output", "a.html"])
    with pytest.raises(SystemExit, match="--output is given without --browse"):
        main()


def test_changed_data_is_refused(run: Path):
    file = run.parents[1] / "data/train.jsonl"
    kept = file.read_text()
    file.write_text(kept.replace('summary": "', 'summary": "now '))
    try:
        with pytest.raises(UserError, match="no longer those"):
            browse(run)
    finally:
        file.write_text(kept)


def test_no_text_of_a_sample_becomes_markup_and_nothing_is_fetched(run: Path, monkeypatch):
    evil = "</script><script>alert(1)</script><!-- <script> {{ 7 * 7 }} \u2028 <img src=//x.y onerror=alert(1)>"
    samples = [Sample(s.id, evil, f" {evil}", (evil,), group=evil) for s in training_samples(recorded_run(run))]
    monkeypatch.setattr(browsing, "training_samples", lambda _: samples)
    page = browsing.page(recorded_run(run))
    assert page.count("<script") == 2 == page.count("</script") and "<img" not in page and "<!-- <" not in page
    assert not re.search(r"(src|href)=[\"']|https?://", page.split('id="data"')[0])
    assert not re.search(r"innerHTML|insertAdjacentHTML|fetch\(|XMLHttp|import ", page.rsplit("<script>", 1)[1])
    assert content(page)[["prompt", "group"]].eq(evil).all(axis=None)


def test_a_large_pool_keeps_every_selected_sample_and_a_spread_of_the_others():
    pool, samples = a_pool(50_000)
    shown = browsing.rows(pool, None, samples)
    assert len(shown) == browsing.MOST and shown["selected"].sum() == 1000 and shown["id"].is_unique
    assert shown["loss"].min() == 0 and shown["loss"].max() > 49_900
    assert "region" not in shown and "group" not in shown


def test_a_score_that_is_not_known_is_null():
    pool, samples = a_pool(3)
    pool["verified"] = [np.nan, np.inf, 0.123456789]
    values = [row[-1] for row in json.loads(browsing._json(browsing.rows(pool, None, samples)))["rows"]]
    assert values == [None, None, 0.123457]
