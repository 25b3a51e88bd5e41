"""The documents are short, plain, and link to what exists."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
from conftest import ROOT, SMALL

from experiments.figures import method

SENTENCE, PARAGRAPH, README = 35, 90, 900
"""The most words of a sentence, of a paragraph and of the top README."""

FOLDERS = ("baselines", "conf", "experiments", "staff", "tests")
"""Besides the top folder; what lies in results/ is made by the report, but for its README."""

DOCUMENTS = sorted(
    chain(ROOT.glob("*.md"), (ROOT / "results").glob("README.md"), *((ROOT / f).rglob("*.md") for f in FOLDERS))
)
every_document = pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))


def paragraphs(text: str) -> list[str]:
    """Paragraphs and list items in words, without code blocks, tables and headings; a code span is one word."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    text = re.sub(r"^( {4}|\||#|Contents:).*$", "", text, flags=re.M)
    text = re.sub(r"`[^`]+`", "Code", text)
    text = re.sub(r"<!--.*?-->|</?[a-z][^>]*>", "", text, flags=re.S)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    blocks = re.split(r"\n\s*\n|^\s*(?:[-*]|\d+\.) ", text, flags=re.M)
    return [" ".join(block.split()) for block in blocks if block.strip()]


def sentences(paragraph: str) -> list[str]:
    return re.split(r"(?<=[.?!])[*_)\"]* (?=[^a-z])", paragraph)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a document."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    headings = [re.sub(r"[`*]|\]\([^)]*\)|\[", "", line) for line in re.findall(r"^#+ (.+)$", text, re.M)]
    slugs = [re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings]
    seen: Counter[str] = Counter()
    found = set()
    for slug in slugs:
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def links(text: str) -> list[str]:
    """Targets of links and pictures within the repository."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset|href)="([^"\s]+)"', text)
    return [link for link in found if "://" not in link and not link.startswith("mailto:")]


def leads_somewhere(file: Path, link: str) -> bool:
    path, _, anchor = link.partition("#")
    target = file.parent / path if path else file
    return target.exists() and (not anchor or anchor in anchors(target.read_text()))


@every_document
def test_sentences_and_paragraphs_are_short(file: Path):
    text = paragraphs(file.read_text())
    long = [s for s in chain(*map(sentences, text)) if len(s.split()) > SENTENCE]
    assert not long
    assert not [p for p in text if len(p.split()) > PARAGRAPH]


@every_document
def test_every_link_leads_to_a_file_and_a_heading(file: Path):
    assert [link for link in links(file.read_text()) if not leads_somewhere(file, link)] == []


def test_the_first_page_is_short():
    assert len((ROOT / "README.md").read_text().split()) < README


def test_the_picture_of_the_method_is_what_the_method_gives():
    for theme in method.THEMES:
        assert (ROOT / f"experiments/figures/method-{theme}.svg").read_text() == method.svg(theme)


def test_a_signal_a_method_and_a_metric_of_ones_own_run_as_shown(tmp_path: Path):
    readme = (ROOT / "conf/README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.S)
    (yaml,) = re.findall(r"```yaml\n(.*?)```", readme, re.S)
    (line,) = re.findall(r"^staff (--config-dir conf method=highest .*)$", readme, re.M)
    (tmp_path / "conf/method").mkdir(parents=True)
    (tmp_path / "mine.py").write_text(code)
    (tmp_path / "conf/method/highest.yaml").write_text(yaml)
    command = [sys.executable, "-m", "experiments.run", *shlex.split(line), "tracking=none", *SMALL]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    (record,) = tmp_path.glob("results/runs/*-highest-*/metrics.json")
    assert json.loads(record.read_text())["metrics"].keys() >= {"mine.Accuracy", "rougeL"}
    assert "entropy" in (record.parent / "coreset.csv").read_text().partition("\n")[0]
