"""Tables of a report in one file, as a campaign commits them: `python -m experiments.collect RESULTS [NAME ...]`.

Writes RESULTS/TABLES.md with the named tables of RESULTS/tables, each under a heading by its name. Without names it
takes those that TABLES.md has already, so that the command refreshes it after `staff-report`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path


def collect(results: Path, names: Sequence[str] = ()) -> Path:
    """Write TABLES.md, and return its path."""
    file = results / "TABLES.md"
    names = names or re.findall(r"^## (.+)$", file.read_text("utf-8"), re.MULTILINE)
    parts = [f"## {name}\n\n{(results / 'tables' / f'{name}.md').read_text('utf-8').strip()}\n" for name in names]
    file.write_text("\n".join([f"# Tables of {results.name}\n", *parts]), "utf-8")
    return file


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.collect", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
    print(collect(arguments.results, arguments.names))


if __name__ == "__main__":
    main()
