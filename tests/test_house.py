"""Packages import only what lies below them, and a new signal, method or metric is a new file anywhere."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from hydra.utils import instantiate
from support import any_pool
from support.tiny import pool_of_sums, sums

from staff.errors import UserError
from staff.evaluation.generator import Greedy
from staff.evaluation.metrics import check_metrics, named_metric
from staff.evaluation.stage import Generate, Measure, read_measured
from staff.models.state import ModelState
from staff.pool import Select
from staff.scoring.stage import read_scores
from staff.selection import Coreset
from staff.store.cost import Cost
from staff.store.stage import identity

# ---------------------------------------------------------------- imports

LAYERS = ("runtime", "store", "models", "data", "scoring", "signals", "training", "evaluation", "pool")
"""Of staff/, from the ground up."""
TOP = {"arrays", "dataset", "tracking"}
ALONE = {
    "errors": set(),
    "draws": set(),
    "regions": set(),
    "selection": {"draws", "errors"},
    "speculative": {"draws", "errors", "regions", "selection"},
}
"""What stands beside the layers, and all of staff/ that each imports."""
WITHIN_METHODS = {"precomputed.py": {"torch"}, "neighbours.py": {"faiss"}}
"""Libraries for files of other tools, and for an option."""
FOR_METHODS = {
    *("staff.selection", "staff.draws", "staff.regions", "staff.errors", "staff.speculative"),
    *("staff.runtime.progress", "staff.runtime.files", "staff.runtime.files"),
}


def imports(tree: ast.AST, inside: bool = True) -> Iterator[str]:
    """The modules that a source imports, those for type checkers left out; `inside`: in functions too."""
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.If(test=ast.Name(id="TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
                continue
            case ast.FunctionDef() | ast.AsyncFunctionDef() if not inside:
                continue
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                assert level == 0 and module, "imports are absolute"
                yield from (f"staff.{alias.name}" for alias in names) if module == "staff" else (module,)
        yield from imports(node, inside)


def test_imports_are_found_in_functions_and_not_for_type_checkers():
    source = (
        "import a.b\ndef f():\n from staff.pool import Pool\nfrom staff import arrays\nif TYPE_CHECKING:\n import c"
    )
    assert list(imports(ast.parse(source))) == ["a.b", "staff.pool", "staff.arrays"]
    assert list(imports(ast.parse(source), inside=False)) == ["a.b", "staff.arrays"]


def sources(folder: str) -> dict[str, ast.Module]:
    """Syntax trees by the file's path in `folder`."""
    files = sorted((ROOT / folder).rglob("*.py"))
    return {file.relative_to(ROOT / folder).as_posix(): ast.parse(file.read_text("utf-8")) for file in files}


def package(module: str) -> str:
    return module.split(".")[1].removesuffix(".py")


def allowed(importer: str) -> set[str]:
    """The packages of staff/ that one of them may import."""
    if importer in ALONE:
        return ALONE[importer]
    below = LAYERS[: LAYERS.index(importer) + 1] if importer in LAYERS else LAYERS
    return {importer, *below, *ALONE} if importer in ("pool", *TOP) else {importer, *below, "draws", "errors"}


def test_every_package_imports_only_what_lies_below_it():
    upwards = {}
    for file, tree in sources("staff").items():
        importer = package(f"staff.{file.partition('/')[0]}")
        if importer == "__init__":
            continue
        imported = {package(module) for module in imports(tree) if module.startswith("staff.")}
        upwards[file] = imported - allowed(importer)
    assert len(upwards) > 50 and not {file: found for file, found in upwards.items() if found}


def test_every_package_has_its_place():
    names = {path.stem for path in (ROOT / "staff").iterdir() if path.suffix in ("", ".py")}
    assert names - {"__init__", "__pycache__", "assets"} == {*LAYERS, *TOP, *ALONE}


def test_the_library_knows_nothing_of_the_application_the_methods_or_hydra():
    for file, tree in sources("staff").items():
        roots = {module.partition(".")[0] for module in imports(tree)}
        assert not roots & {"experiments", "baselines", "hydra", "omegaconf"}, file


def test_a_method_imports_numpy_the_interface_of_methods_and_other_methods_alone():
    roots = {"numpy", "scipy", "pandas", "baselines", *sys.stdlib_module_names}
    for file, tree in sources("baselines").items():
        others = {module for module in imports(tree, inside=False) if module.partition(".")[0] not in roots}
        assert others <= FOR_METHODS, file
        inside = {module.partition(".")[0] for module in imports(tree)} - roots - {"staff"}
        assert inside <= WITHIN_METHODS.get(file, set()), file


def test_importing_the_library_and_every_method_loads_no_model_library():
    modules = [f"baselines.{file.removesuffix('.py')}" for file in sources("baselines") if file != "__init__.py"]
    modules += ["staff", "staff.speculative", "staff.signals", "staff.store.store", "staff.runtime.processes"]
    heavy = "{'torch', 'transformers', 'wandb', 'hydra'}"
    code = f"import sys, {', '.join(modules)}; print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.split() == []


# ---------------------------------------------------------------- a signal and a method

SIGNAL = """
from dataclasses import dataclass
from math import log
from typing import ClassVar

from staff.scoring.signal import Signal


@dataclass(frozen=True)
class Entropy(Signal):
    name: ClassVar[str] = "entropy"
    base: float = 2.718281828459045

    def compute(self, batch):
        at = batch.positions("predictions")
        logs = batch.logits_at(at).log_softmax(-1)
        return at.mean(-(logs.exp() * logs).sum(-1)) / log(self.base)
"""
METHOD = """
from dataclasses import dataclass

from staff.scoring.signal import Signal
from staff.selection import Coreset, check_scores


@dataclass(frozen=True)
class MostUncertain:
    signal: Signal
    of: str = "target"

    def select(self, pool, budget, rng):
        scores = check_scores(pool.ask(self.signal, of=self.of), pool.ids, self.signal.name)
        return Coreset(rng.highest_first(scores)[:budget], scores={self.signal.name: scores})
"""
CONFIG = {"_target_": "my_methods.MostUncertain", "signal": {"_target_": "my_signals.Entropy", "base": 2.0}}


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder outside staff/ whose modules can be imported."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]


@pytest.fixture
def method(elsewhere: Path) -> Any:
    (elsewhere / "my_signals.py").write_text(SIGNAL)
    (elsewhere / "my_methods.py").write_text(METHOD)
    return instantiate(CONFIG, _convert_="all")


def entropies(model: Any, samples: Any) -> np.ndarray:
    """In bits, from each sample's own forward pass."""
    values = []
    for i, start in enumerate(samples.prompt_lengths):
        with torch.no_grad():
            logs = model(torch.tensor([samples.row(i).tolist()])).logits[0, start - 1 : -1].log_softmax(-1)
        values.append(float(-(logs.exp() * logs).sum(-1).mean() / np.log(2)))
    return np.array(values)


def test_a_new_signal_and_a_method_on_it_are_two_new_files(method: Any, tmp_path: Path):
    pool = pool_of_sums(tmp_path / "store")
    samples, model = pool.slices["pool"].target, pool.family.target
    expected = entropies(model.load(), samples)
    chosen = pool.store.get(Select(method, pool, 5))
    coreset = Coreset.load(chosen.path)
    assert coreset.indices.tolist() == sorted(np.argsort(-expected)[:5])
    np.testing.assert_allclose(coreset.scores["entropy"], expected, rtol=1e-5)
    assert pd.read_parquet(chosen.path / "samples.parquet")["id"].tolist() == pool.ids

    (scored,) = [charge for charge in chosen.charged().values() if charge.stage == "scores"]
    assert scored.label == "entropy of 12 samples, raw target" and len(chosen.charged()) == 2
    total = sum((charge.cost for charge in chosen.charged().values()), Cost.zero())
    assert (total.tokens_forward, total.tokens_backward) == (samples.lengths.sum(), 0) and total.flops > 0
    (folder,) = (tmp_path / "store/scores").iterdir()
    stored = read_scores(type("Stored", (), {"path": folder}))["entropy"]  # type: ignore[arg-type]
    assert (stored == coreset.scores["entropy"]).all()
    again = pool_of_sums(tmp_path / "store")
    assert not again.store.get(Select(method, again, 5)).computed


def test_a_new_method_keeps_the_contract_of_every_method(method: Any):
    for check in any_pool.OF_ANY_SCORES:
        check(method, False)
    for check in any_pool.OTHERS:
        check(method)


def test_a_part_without_a_version_is_known_by_the_text_of_its_file(method: Any, elsewhere: Path):
    before, inner = identity(method), identity(method.signal)
    assert before["settings"]["signal"] == inner and inner["settings"] == {"base": 2.0}
    (elsewhere / "my_signals.py").write_text(SIGNAL.replace("log(self.base)", "(2 * log(self.base))"))
    assert identity(method) != before and identity(method)["version"] == before["version"]


# ---------------------------------------------------------------- a metric

METRIC = """
from dataclasses import dataclass
from typing import ClassVar

from staff.evaluation.metrics.metric import Metric


@dataclass(frozen=True)
class Shortness(Metric):
    version: ClassVar[int] = 1

    def measure(self, predictions, references):
        scores = [100 / (1 + len(prediction)) for prediction in predictions]
        return max(scores), scores
"""


def test_a_metric_without_a_direction_is_refused_in_a_sentence(elsewhere: Path):
    plain = METRIC.replace("(Metric):", ":\n    name: str")
    unset = METRIC.replace("    version", "    higher_is_better = None\n    version")
    for number, source in enumerate((plain, unset)):
        (elsewhere / f"my_metrics{number}.py").write_text(source)
        with pytest.raises(UserError, match=rf"'my_metrics{number}.Shortness', which has no direction: derive the"):
            check_metrics([f"my_metrics{number}.Shortness"])


def test_a_new_metric_of_stored_answers_is_a_new_file_and_computes_nothing_else_again(
    elsewhere: Path, tmp_path: Path
):
    (elsewhere / "my_metrics.py").write_text(METRIC)
    pool = pool_of_sums(tmp_path / "store", 4)
    answers = Generate(ModelState(pool.family.target), pool.slices["pool"].target, Greedy(), 4)
    references = {sample.id: (sample.answer,) for sample in sums(4)}

    def measuring(*names: str) -> Measure:
        check_metrics(names)
        return Measure(answers, [named_metric(name) for name in names], references)

    old, new = measuring("rougeL"), measuring("rougeL", "my_metrics.Shortness")
    pool.store.get(old)
    known = {file.relative_to(pool.store.root) for file in pool.store.root.rglob("manifest.json")}
    pool.store.computed.clear()
    headline, table = read_measured(pool.store.get(new))
    assert pool.store.computed == {new.fingerprint}, "no answer was generated again"
    assert new.inputs == old.inputs and measuring("rougeL").fingerprint == old.fingerprint
    assert known < {file.relative_to(pool.store.root) for file in pool.store.root.rglob("manifest.json")}
    assert list(headline) == ["rougeL", "my_metrics.Shortness"]
    expected = [100 / (1 + len(prediction)) for prediction in table["prediction"]]
    assert table["my_metrics.Shortness"].tolist() == expected and headline["my_metrics.Shortness"] == max(expected)
    manifest = json.loads((pool.store.folder(new) / "manifest.json").read_text())
    assert [metric["class"] for metric in manifest["key"]["metrics"]][1] == "my_metrics.Shortness"
