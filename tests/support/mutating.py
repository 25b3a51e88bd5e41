"""Changes to single functions of the source, and whether a test notices each."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COPIED = (
    *("staff", "baselines", "experiments", "hydra_plugins", "conf", "tests"),
    *("results/slice", "Makefile", "pyproject.toml", "README.md"),
)


@dataclass(frozen=True)
class Mutation:
    """In one function `old`, which it holds once, becomes `new`; without `old` its whole body does.

    Attributes:
        place: the function as "file:name", a method as "file:Class.name".
        test: "file::name" below tests/; all its cases are run, and one has to fail.
    """

    name: str
    place: str
    test: str
    new: str
    old: str = ""

    @property
    def file(self) -> str:
        return self.place.partition(":")[0]

    def applied(self, source: str) -> str:
        """The source of the file with the change.

        Raises:
            LookupError: the function is not there, or does not hold `old` once.
        """
        function = function_named(self.place.partition(":")[2], ast.parse(source))
        lines = source.splitlines(keepends=True)
        body = function.body[isinstance(function.body[0], ast.Expr) and len(function.body) > 1 :]
        first, last = body[0].lineno - 1, function.end_lineno
        text = "".join(lines[first:last])
        if not self.old:
            changed = f"{' ' * body[0].col_offset}{self.new}\n"
        elif text.count(self.old) == 1:
            changed = text.replace(self.old, self.new)
        else:
            raise LookupError(f"{self.place} does not hold {self.old!r} once")
        return "".join([*lines[:first], changed, *lines[last:]])


def function_named(name: str, tree: ast.Module) -> ast.FunctionDef:
    """A function of a module, or "Class.method".

    Raises:
        LookupError: there is none.
    """
    node: ast.Module | ast.ClassDef | ast.FunctionDef = tree
    for part in name.split("."):
        inside = chain.from_iterable(n.body if isinstance(n, ast.With) else [n] for n in node.body)
        found = [n for n in inside if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == part]
        if not found:
            raise LookupError(f"there is no function {name}")
        node = found[-1]
    assert isinstance(node, ast.FunctionDef)
    return node


def passes(tree: Path, test: str) -> bool:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n0", "-p", "no:cacheprovider", f"tests/{test}"]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        sys.exit(f"{test} could not be run:\n{done.stdout}{done.stderr}")
    return done.returncode == 0


passes_unchanged = cache(passes)
"""Several mutations may have one test, which passes as the source stands once."""


def survives(mutation: Mutation, tree: Path) -> str:
    """What happened; "noticed" is as it should be."""
    file = tree / mutation.file
    source = file.read_text("utf-8")
    try:
        changed = mutation.applied(source)
    except LookupError as error:
        return f"NO PLACE: {error}"
    if not passes_unchanged(tree, mutation.test):
        return "FAILS ALREADY"
    file.write_text(changed, "utf-8")
    try:
        return "SURVIVES" if passes(tree, mutation.test) else "noticed"
    finally:
        file.write_text(source, "utf-8")


def main(mutations: Sequence[Mutation]) -> None:
    """Try the mutations that the command line names, or all, in a copy of the tree."""
    began = time.monotonic() / 60
    names = [mutation.name for mutation in mutations]
    wanted = sys.argv[1:] or names
    if part := re.fullmatch(r"(\d+)/(\d+)", wanted[0]):
        wanted = names[int(part[1]) - 1 :: int(part[2])]
    if unknown := set(wanted) - set(names):
        sys.exit(f"no mutation is called {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for part in COPIED:
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, tree / part)
        bad = 0
        for mutation in mutations:
            if mutation.name in wanted:
                found = survives(mutation, tree)
                bad += found != "noticed"
                print(f"{found:14} {mutation.name:36} {mutation.test}", flush=True)
    spent = os.times()
    processor = (spent.children_user + spent.children_system) / 60
    print(f"{len(wanted)} mutations: {time.monotonic() / 60 - began:.0f} minutes, {processor:.0f} of a processor")
    sys.exit(f"{bad} not noticed" if bad else 0)
