"""Pack recorded runs into four tables: `staff-campaign pack RESULTS --into FOLDER`.

    runs.parquet         a row per run: every field of its record by dotted name, and the texts of metrics.json,
                         training.csv and regions.csv in columns of these names
    predictions.parquet  a row per run and test sample: id, prediction, tokens, references, every metric
    selections.parquet   a row per run: the coreset's positions in the pool, and the vectors of scores.parquet that
                         are the columns of the run's samples.parquet
    scores.parquet       a row per sample of every distinct vector of scores or answer lengths: id, value

The report, `compare`, `export` and `store` read tables and run folders alike (`experiments.recorded`).

    pack    writes the tables of all runs in RESULTS, then checks them
    check   compares the tables with the run folders in RESULTS: every field, answer, position and score
    unpack  writes the run folders again, for `staff-replay` and method=precomputed
    tables  writes RESULTS/TABLES.md with the named tables of RESULTS/tables, or refreshes those that it has
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow.parquet import read_table, write_table

from experiments import command
from experiments.recorded import TEXTS, RecordedRun, packed_runs, recorded_runs, run_folders
from staff.errors import UserError
from staff.runtime.files import csv_of, local_path

TEXT, RUN = pa.string(), pa.field("run", pa.string())
PREDICTIONS = pa.schema([RUN])
SELECTIONS = pa.schema([RUN, ("positions", pa.list_(pa.int32())), ("vectors", pa.list_(TEXT))])
SCORES = pa.schema([("vector", TEXT), ("signal", TEXT), ("type", TEXT), ("id", TEXT), ("value", pa.float64())])
SMALL: dict[str, Any] = {"compression": "zstd", "compression_level": 19, "write_statistics": False}
# Dictionaries and pages that hold a whole column: zstd then finds what runs have in common.
SMALL |= {"row_group_size": 1 << 22, "dictionary_pagesize_limit": 1 << 26, "data_page_size": 1 << 26}
ENCODINGS: dict[str, dict[str, Any]] = {
    "selections": {
        "use_dictionary": ["run", "vectors.list.element"],
        "column_encoding": {"positions.list.element": "DELTA_BINARY_PACKED"},
    },
    "scores": {"use_dictionary": ["vector", "signal", "type", "id"], "use_byte_stream_split": ["value"]},
}


def pack(runs: Mapping[str, RecordedRun], folder: Path) -> None:
    """Write the tables of `runs` to `folder`.

    Raises:
        UserError: `folder` has tables with other runs, or a column of a run's samples.parquet is not numeric.
    """
    if others := packed_runs(folder).keys() - runs.keys():
        raise UserError(
            f"the tables in {folder} hold {len(others)} other run(s), such as {min(others)}: "
            "pack into another folder, or delete these tables first."
        )
    rows, predictions, selections = [], [], []
    vectors: dict[str, pa.Table] = {}
    for name, run in runs.items():
        rows.append({"run": name, **dict(fields(run.record())), **{file: run.text(file) for file in TEXTS}})
        if (answers := run.predictions()) is not None:
            predictions.append(_predictions(name, answers))
        if (samples := run.samples()) is not None:
            own = dict(_vectors(name, samples))
            positions = np.flatnonzero(samples["selected"])
            selections.append({"run": name, "positions": positions, "vectors": list(own)})
            vectors |= own
    names = dict.fromkeys(name for row in rows for name in row)
    tables = {
        "runs": pa.table({name: _column([row.get(name) for row in rows]) for name in names}),
        "predictions": pa.concat_tables([PREDICTIONS.empty_table(), *predictions], promote_options="permissive"),
        "selections": pa.Table.from_pylist(selections, SELECTIONS),
        "scores": pa.concat_tables([SCORES.empty_table(), *vectors.values()]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        draft = folder / f".{name}.draft"
        write_table(table.combine_chunks(), draft, **SMALL, **ENCODINGS.get(name, {}))
        os.replace(draft, folder / f"{name}.parquet")


def fields(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a record by dotted name, without those that are None; lists as JSON."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from fields(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", json.dumps(value) if isinstance(value, list | dict) else value


def _column(values: list[Any]) -> pa.Array:
    """Values of one type; as JSON where runs have several, such as a setting that is a number or a word."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array([None if value is None else json.dumps(value) for value in values])


def _predictions(run: str, answers: pd.DataFrame) -> pa.Table:
    table = pa.Table.from_pandas(answers, preserve_index=False).replace_schema_metadata()
    for i, field in enumerate(table.schema):
        if pa.types.is_floating(field.type):  # null means that a run has no such column
            table = table.set_column(i, field, pc.fill_null(table[i], np.nan))
    return table.add_column(0, RUN, [np.full(len(table), run)])


def _vectors(run: str, samples: pd.DataFrame) -> Iterator[tuple[str, pa.Table]]:
    """The columns of a samples.parquet, each named by its content."""
    ids = samples["id"].to_numpy(object)
    of_ids = hashlib.sha256(json.dumps(ids.tolist()).encode()).digest()
    for name, column in samples.drop(columns=["id", "selected"]).items():
        values, kind = column.to_numpy(), str(column.dtype)
        if not pd.api.types.is_numeric_dtype(column):
            raise UserError(f"{run}: the column {name!r} of samples.parquet is {kind}: only numbers can be packed.")
        vector = f"{name}-{hashlib.sha256(of_ids + kind.encode() + values.tobytes()).hexdigest()[:16]}"
        same = (np.full(len(ids), text) for text in (vector, name, kind))
        yield vector, pa.table([*same, ids, values.astype(np.float64)], SCORES)


def coreset(samples: pd.DataFrame) -> str:
    """The text of a coreset.csv: ids and scores of the selected samples."""
    chosen: pd.DataFrame = samples.loc[samples["selected"]].drop(
        columns=["selected", "answer_tokens"], errors="ignore"
    )
    return csv_of(chosen)


def unpack(run: RecordedRun, folder: Path) -> None:
    """Write what `run` left to its own folder, as the run did."""
    folder.mkdir(parents=True, exist_ok=True)
    if (answers := run.predictions()) is not None:
        answers.to_parquet(folder / "predictions.parquet")
    if (samples := run.samples()) is not None:
        samples.to_parquet(folder / "samples.parquet")
        (folder / "coreset.csv").write_bytes(coreset(samples).encode())
    for file in reversed(TEXTS):  # metrics.json last: it says that the folder is complete
        if (text := run.text(file)) is not None:
            (folder / file).write_bytes(text.encode())


def differences(results: Path, tables: Path) -> Iterator[str]:
    """What the tables do not give back to the last bit of the run folders in `results`, a line each."""
    packed = packed_runs(tables)
    for name, run in sorted(run_folders(results).items()):
        if name not in packed:
            yield f"{name}: not in the tables"
            continue
        again = packed[name]
        unlike = [file for file in TEXTS if run.text(file) != again.text(file)]
        samples = again.samples()
        unlike += [f"predictions.parquet, {column}" for column in _unlike(run.predictions(), again.predictions())]
        unlike += [f"samples.parquet, {column}" for column in _unlike(run.samples(), samples)]
        chosen = results / "runs" / name / "coreset.csv"
        if chosen.is_file() and samples is not None and chosen.read_bytes().decode() != coreset(samples):
            unlike.append(chosen.name)
        yield from (f"{name}: {what}" for what in unlike)
    yield from _unlike_fields(tables, packed)


def _unlike(first: pd.DataFrame | None, again: pd.DataFrame | None) -> list[str]:
    """The columns in which two tables differ."""
    if first is None or again is None:
        return [] if first is again else ["one of them is missing"]
    left, right = dict(first.items()), dict(again.items())
    return [str(name) for name in left | right if not _same(left.get(name), right.get(name))]


def _same(first: pd.Series | None, again: pd.Series | None) -> bool:
    if first is None or again is None or first.dtype != again.dtype:
        return False
    if first.dtype.kind == "f":
        return first.to_numpy().tobytes() == again.to_numpy().tobytes()
    return pa.array(first).equals(pa.array(again))


def _unlike_fields(tables: Path, packed: Mapping[str, RecordedRun]) -> Iterator[str]:
    """Fields in runs.parquet that are not those of the record beside them."""
    for row in read_table(tables / "runs.parquet").to_pylist() if packed else ():
        name = row.pop("run")
        known = {field: value for field, value in row.items() if value is not None and field not in TEXTS}
        of_record = dict(fields(packed[name].record()))
        for field in known.keys() | of_record.keys():
            value = of_record.get(field)
            if known.get(field) not in (value, json.dumps(value)):
                yield f"{name}: the column {field} of runs.parquet"


def _check(results: Path, tables: Path) -> None:
    folders = run_folders(results)
    if not folders:
        raise UserError(f"{results}/runs holds no record to compare the tables with.")
    found = list(differences(results, tables))
    for line in found:
        print(f"differs: {line}")
    if found:
        raise UserError(f"{len(found)} differences between the tables in {tables} and {results}/runs.")
    print(f"{len(folders)} runs: the tables in {tables} hold what their folders hold")


def _pack(results: Path, folder: Path) -> None:
    runs = recorded_runs(results)
    if not runs:
        raise UserError(f"{results} holds no record: name the folder that holds runs/.")
    pack(runs, folder)
    size = sum(file.stat().st_size for file in folder.glob("*.parquet"))
    print(f"{len(runs)} runs packed: {size / 1e6:.2f} MB in {folder}")
    if run_folders(results):
        _check(results, folder)


def _unpack(results: Path, folder: Path) -> None:
    packed = packed_runs(results)
    if not packed:
        raise UserError(f"{results} holds no runs.parquet: name the folder of a packed campaign.")
    wanted = packed.keys() - run_folders(folder).keys()
    for name in sorted(wanted):
        unpack(packed[name], folder / "runs" / name)
    print(f"{len(wanted)} run folders written to {folder / 'runs'}, {len(packed) - len(wanted)} were there")


def collect(results: Path, names: Sequence[str] = ()) -> Path:
    """Write RESULTS/TABLES.md, which a campaign commits: tables of RESULTS/tables in one file. Returns its path.

    Args:
        names: of the tables, each a heading; without any, those that TABLES.md has already.

    Raises:
        UserError: a table is not there, or without names TABLES.md.
    """
    file = results / "TABLES.md"
    if not names and not file.is_file():
        raise UserError(f"{file} is not there: name the tables, of those in {results / 'tables'}.")
    names = names or re.findall(r"^## (.+)$", file.read_text("utf-8"), re.MULTILINE)
    for name in names:
        if not (results / "tables" / f"{name}.md").is_file():
            raise UserError(f"{results / 'tables'} has no table {name!r}: run staff-report, or name another table.")
    parts = [f"## {name}\n\n{(results / 'tables' / f'{name}.md').read_text('utf-8').strip()}\n" for name in names]
    file.write_text("\n".join([f"# Tables of {results.name}\n", *parts]), "utf-8")
    return file


@command
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="staff-campaign",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    forms = parser.add_subparsers(required=True, dest="command", metavar="{pack,check,unpack,tables}")
    for carry_out, option, help in (
        (_pack, "--into", "folder to write the tables to"),
        (_check, "--tables", "folder of the tables"),
        (_unpack, "--into", "folder to write runs/ to"),
    ):
        form = forms.add_parser(carry_out.__name__.removeprefix("_"))
        form.add_argument("results", type=local_path, help="results folder")
        form.add_argument(option, dest="folder", type=local_path, help=f"{help} (RESULTS)")
        form.set_defaults(carry_out=carry_out)
    form = forms.add_parser("tables")
    form.add_argument("results", type=local_path, help="results folder")
    form.add_argument("names", metavar="NAME", nargs="*", help="name of a table (those of TABLES.md)")
    arguments = parser.parse_args()
    if arguments.command == "tables":
        print(collect(arguments.results, arguments.names))
    else:
        arguments.carry_out(arguments.results, arguments.folder or arguments.results)


if __name__ == "__main__":
    main()
