"""Stored results are found by the version of the code that made them, so changed code needs a new version.

After raising a version in staff/artifacts.py, or adding a file, re-record with

    python -m tests.test_stage_sources

which refuses while a changed file has no new version. Comments, docstrings and layout do not count as changes.
"""

import ast
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from staff.artifacts import STAGE_SOURCES, STAGE_VERSIONS

ROOT = Path(__file__).parent.parent
RECORD = Path(__file__).with_name("stage_sources.json")
COMMAND = "python -m tests.test_stage_sources"


def digest(source: str) -> str:
    """Hash of what a source does, the same under every version of Python."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [statement for statement in node.body if not is_documentation(statement)]
    return hashlib.sha256(shape(tree).encode()).hexdigest()[:32]


def is_documentation(statement: ast.stmt) -> bool:
    match statement:
        case ast.Expr(value=ast.Constant(value=str())):
            return True
    return False


def shape(node: Any) -> str:
    # not ast.dump, whose text of empty fields differs between versions of Python
    if isinstance(node, ast.AST):
        fields = [f"{name}={shape(value)}" for name, value in ast.iter_fields(node) if value not in (None, [])]
        return f"{type(node).__name__}({','.join(fields)})"
    if isinstance(node, list):
        return f"[{','.join(map(shape, node))}]"
    return repr(node)


def current(root: Path = ROOT) -> dict[str, dict[str, Any]]:
    """Version and {file: digest} of every stage."""
    stages = {}
    for stage, patterns in STAGE_SOURCES.items():
        files = sorted({file for pattern in patterns for file in root.glob(pattern)})
        digests = {file.relative_to(root).as_posix(): digest(file.read_text("utf-8")) for file in files}
        stages[stage] = {"version": STAGE_VERSIONS[stage], "files": digests}
    return stages


def recorded() -> dict[str, dict[str, Any]]:
    return json.loads(RECORD.read_text("utf-8")) if RECORD.exists() else {}


def missing_versions(before: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]]) -> list[str]:
    """One sentence for every stage with a file changed or gone, and no higher version; new files need none."""
    sentences = []
    for stage in before.keys() & now.keys():
        old, new = before[stage], now[stage]
        changed = [file for file, content in old["files"].items() if new["files"].get(file) != content]
        if changed and new["version"] <= old["version"]:
            raise_it = f"raise STAGE_VERSIONS[{stage!r}] in staff/artifacts.py above {old['version']}"
            sentences.append(f"{', '.join(changed)} changed: {raise_it}, then run {COMMAND}")
    return sorted(sentences)


@pytest.mark.parametrize("stage", STAGE_VERSIONS)
def test_every_listed_source_exists(stage):
    assert not [pattern for pattern in STAGE_SOURCES[stage] if not list(ROOT.glob(pattern))]


def test_a_changed_source_has_a_new_version():
    assert not missing_versions(recorded(), current())


def test_the_record_is_up_to_date():
    assert recorded() == current(), f"run {COMMAND}"


SOURCE = '''
"""Module."""
def f(x):
    """Function."""
    return x + 1  # one more
'''


@pytest.mark.parametrize(
    ("edit", "counts"),
    [
        (("x + 1", "x + 2"), True),
        (("def f(x)", "def g(x)"), True),
        (("x + 1", "x + None"), True),
        (("# one more", "# another word"), False),
        (('"""Function."""', '"""Something else."""\n'), False),
        (("x + 1", "(\n        x + 1\n    )"), False),
    ],
)
def test_code_counts_and_comments_docstrings_and_layout_do_not(edit, counts):
    assert (digest(SOURCE.replace(*edit)) != digest(SOURCE)) == counts


def test_a_change_is_reported_until_its_stage_has_a_new_version():
    before = {"scores": {"version": 1, "files": {"a.py": digest(SOURCE)}}}
    files = {"a.py": digest(SOURCE + "y = 1"), "new.py": digest("")}
    (sentence,) = missing_versions(before, {"scores": {"version": 1, "files": files}})
    assert "a.py changed: raise STAGE_VERSIONS['scores']" in sentence and "new.py" not in sentence
    assert missing_versions(before, {"scores": {"version": 1, "files": {}}})
    assert not missing_versions(before, {"scores": {"version": 2, "files": files}})
    assert not missing_versions(
        before, {"scores": {"version": 1, "files": {"new.py": "0"} | before["scores"]["files"]}}
    )


if __name__ == "__main__":
    if sentences := missing_versions(recorded(), current()):
        sys.exit("\n".join(sentences))
    RECORD.write_text(json.dumps(current(), indent=1) + "\n", "utf-8")
