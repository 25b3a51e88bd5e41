"""A change to one function of the source, and whether a test notices it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


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
        found = [n for n in node.body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == part]
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


def survives(mutation: Mutation, tree: Path) -> str:
    """What happened; "noticed" is as it should be."""
    file = tree / mutation.file
    source = file.read_text("utf-8")
    try:
        changed = mutation.applied(source)
    except LookupError as error:
        return f"NO PLACE: {error}"
    if not passes(tree, mutation.test):
        return "FAILS ALREADY"
    file.write_text(changed, "utf-8")
    try:
        return "SURVIVES" if passes(tree, mutation.test) else "noticed"
    finally:
        file.write_text(source, "utf-8")
