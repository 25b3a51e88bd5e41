"""Documents state what is so: names, links, numbers, and the commands of the README."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SMALL
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from omegaconf import OmegaConf
from support import any_pool
from support.processes import here

import baselines
from experiments.figures import method
from experiments.run import main
from staff import select
from staff.selection import SelectionMethod

# ---------------------------------------------------------------- all documents


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


def test_a_signal_a_method_and_a_metric_of_ones_own_run_as_shown(tmp_path: Path, monkeypatch):
    readme = (ROOT / "conf/README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.S)
    (yaml,) = re.findall(r"```yaml\n(_target_: mine.*?)```", readme, re.S)
    (line,) = re.findall(r"^staff (--config-dir conf method=highest .*)$", readme, re.M)
    (tmp_path / "conf/method").mkdir(parents=True)
    (tmp_path / "mine.py").write_text(code)
    (tmp_path / "conf/method/highest.yaml").write_text(yaml)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    ended = here(main, *shlex.split(line), "tracking=none", *SMALL)
    assert ended.returncode == 0, ended.stderr
    (record,) = tmp_path.glob("results/runs/*-highest-*/metrics.json")
    assert json.loads(record.read_text())["metrics"].keys() >= {"mine.Accuracy", "rougeL"}
    assert "entropy" in (record.parent / "coreset.csv").read_text().partition("\n")[0]


def test_a_family_of_ones_own_takes_from_a_shipped_one_what_it_does_not_set(tmp_path: Path):
    readme = (ROOT / "conf/README.md").read_text()
    (yaml,) = re.findall(r"`conf/family/mine.yaml`:\n\n```yaml\n(.*?)```", readme, re.S)
    (tmp_path / "family").mkdir()
    (tmp_path / "family/mine.yaml").write_text(yaml)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", overrides=["family=mine", f"hydra.searchpath=[file://{tmp_path}]"])
    family, shipped = instantiate(config.family), OmegaConf.load(ROOT / "conf/family/qwen2_5.yaml")
    assert (family.name, family.target.path, family.small.path) == ("mine", "Qwen/Qwen3-8B", "Qwen/Qwen3-0.6B")
    assert family.prompt_format == shipped.prompt_format and family.small.dtype == shipped.target.dtype


# ---------------------------------------------------------------- the README


METHODS = (ROOT / "baselines/README.md").read_text()
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


@pytest.fixture
def overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Of a run by the worked example, whose two files lie where it says, in folders beside the real ones."""
    (code,) = re.findall(r"```python\n(.*?)```", METHODS, re.DOTALL)
    (yaml,) = re.findall(r"```yaml\n(.*?)```", METHODS, re.DOTALL)
    for name, text in (("baselines/highest_loss.py", code), ("conf/method/highest_loss.yaml", yaml)):
        assert f"`{name}`" in METHODS
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(baselines, "__path__", [*baselines.__path__, str(tmp_path / "baselines")])
    yield ["method=highest_loss", f"hydra.searchpath=[file://{tmp_path / 'conf'}]"]
    del sys.modules["baselines.highest_loss"], baselines.highest_loss  # type: ignore[attr-defined]


def test_the_worked_example_of_a_method_keeps_the_contract_of_every_method(overrides: list[str]):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        method: SelectionMethod = instantiate(compose("config", overrides=overrides).method, _convert_="all")
    for check in any_pool.OF_ANY_SCORES:
        for constant in (False, True):
            check(method, constant)
    for check in any_pool.OTHERS:
        check(method)
    pool = any_pool.DrawnPool(150)
    hardest = np.argsort(-pool.ask("loss", of="target"))[:15]
    assert select(pool, method, pruning_rate=0.9).indices.tolist() == sorted(hardest)


def test_the_worked_example_of_a_method_runs_as_written(run, overrides: list[str]):
    """From a folder of one's own: test_promises.py."""
    record = run(*overrides)
    assert record["run"]["method"] == "highest_loss" and record["counts"]["selected"] == 6


def test_every_method_is_listed():
    for preset in (ROOT / "conf/method").glob("*.yaml"):
        name = preset.stem.removesuffix("_official").removesuffix("_paper")
        assert f"`{name}`" in METHODS, preset.name


READMES = [file for file in sorted(ROOT.glob("**/README.md")) if not set(file.parts) & {".venv", "build"}]


def commands() -> list[tuple[str, str]]:
    """Every line of every shell block in a README, with the file it stands in; continued lines as one."""
    blocks = [(file, block) for file in READMES for block in re.findall(r"```sh\n(.*?)```", file.read_text(), re.S)]
    lines = [(file, line) for file, block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [(str(file.relative_to(ROOT)), line) for file, line in lines if line.strip()]


def words(line: str) -> list[str]:
    """A command as the shell takes it apart, without the variables set for it."""
    script = f'words() {{ printf "%s\\0" "$@"; }}; words {line}'
    said = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.split("\0")
    first = next(i for i, word in enumerate(said) if not re.match(r"[A-Z_]+=", word))
    return said[first:-1]


def jobs(arguments: list[str]) -> list[list[str]]:
    """Overrides of as many jobs as the longest sweep among the arguments has values, each value named in one."""
    parsed = OverridesParser.create().parse_overrides([word for word in arguments if not word.startswith("-")])
    values = [
        [*o.sweep_string_iterator()] if o.is_sweep_override() else [o.get_value_element_as_str()] for o in parsed
    ]
    longest = range(max(map(len, values), default=0))
    return [[f"{o.key_or_group}={v[min(job, len(v) - 1)]}" for o, v in zip(parsed, values)] for job in longest]


def composes(arguments: list[str]) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for overrides in jobs(arguments):
            compose("config", overrides=overrides, return_hydra_config=True)


def source_of(module: str) -> str:
    path = ROOT / module.replace(".", "/")
    return next(file for file in (path.with_suffix(".py"), path / "__main__.py") if file.is_file()).read_text()


@pytest.mark.parametrize(("file", "line"), commands())
def test_every_command_in_a_readme_is_one(file: str, line: str):
    program, *arguments = words(line)
    if program == "torchrun":
        program, *arguments = arguments[arguments.index("--no-python") + 1 :]
    if program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.M)
    elif program == "staff" and "--config-dir" not in arguments:  # which the user's own options lie in
        composes(arguments)
    elif program in SCRIPTS or program == "python":
        module = arguments[1] if program == "python" else SCRIPTS[program].partition(":")[0]
        for option in [word for word in arguments if word.startswith("--") and program != "staff"]:
            named = rf'"{option}"|\b{option.removeprefix("--")}='  # a benchmark's is a default by its name
            assert re.search(named, source_of(module)), option
        if program == "staff-plan":
            composes([word for word in arguments if "=" in word])
    else:
        assert program in (".", "pip", "hf", "git"), f"{file}: {program}"
