"""Write scores of samples as a table: `staff-score task=file task.train_file=FILE signal=loss of=target out=FILE`.

The arguments are overrides as for `staff`, and four more:

    signal=loss,el2n      names of signals, or dotted paths of your own classes; all in one pass
    of=small_raw          the models that score: small_raw, target, small, target_tuned; also with @epochs or @2
    out=scores.csv        the table to write: .csv, .parquet or .jsonl
    options={...}         options of the signals, such as {prompt: false}

`--config-dir FOLDER` names a folder with your own configuration, as for `staff`.

The table has a row for each sample of the training split: id, tokens (prompt and answer, as the first model reads
them), and a column for each signal; with several models the columns are SIGNAL_MODEL. task.too_long decides whether
a sample that is too long is an error or is dropped. small_raw and target are not fine-tuned; small and target_tuned
are fine-tuned on these samples first. Scores are stored, and later runs reuse them. method=imported selects by the
table:

    staff method=imported method.path=scores.csv method.column=loss ...
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_class

from experiments import command
from experiments.configuration import CONF, composed, search_path, with_home
from experiments.setup import Setup
from experiments.single import Run
from staff.errors import UserError, in_one_line
from staff.pool import Pool
from staff.runtime.files import csv_of, local_path
from staff.runtime.machine import settle_threads
from staff.scoring.signal import Signal
from staff.signals import named_all

log = logging.getLogger("staff")

FORMATS = (".csv", ".parquet", ".jsonl")
OWN = ("signal", "of", "out", "options")
ALONE = ("method=random", "evaluation=none", "tracking=none", "pruning_rate=0", "budget=null", "budget_tokens=null")
"""What a run would do besides scoring."""


def scores(pool: Pool, signals: Sequence[str], models: Sequence[str], options: Mapping[str, Any]) -> pd.DataFrame:
    """A row for each sample of the pool: id, tokens, and a column for each signal of each model.

    A value of several numbers is an array.

    Args:
        signals: names, or dotted paths of classes.
        models: as in `Pool.ask`.
        options: fields of the signals.

    Raises:
        UserError: an unknown signal, option or model, or signals that need a pass each.
    """
    asked = _signals(signals, options)
    part = pool.slices["pool"]
    read = part.small if models[0].startswith("small") else part.target
    columns: dict[str, Any] = {"id": list(pool.ids), "tokens": read.lengths}
    for model in models:
        for signal, values in zip(asked, pool.ask(asked, of=model), strict=True):
            name = signal.name if len(models) == 1 else f"{signal.name}_{model}"
            columns[name] = values if values.ndim == 1 else list(values)
    return pd.DataFrame(columns)


def _signals(names: Sequence[str], options: Mapping[str, Any]) -> tuple[Signal, ...]:
    """The signals of these names, or dotted paths of classes, each with the options that it has."""
    return named_all([name if "." not in name else _own(name) for name in names], options)


def _own(path: str) -> Signal:
    try:
        return get_class(path)()
    except Exception as error:  # whatever importing a file may raise
        said = in_one_line(error)
        raise UserError(f"signal={path} cannot be made ({said}): name a signal, or a class of one.") from None


def write(table: pd.DataFrame, file: Path) -> None:
    """Write a table of scores by the file's suffix, one of `FORMATS`."""
    wide = {name: [v.tolist() for v in table[name]] for name in table if isinstance(table[name][0], np.ndarray)}
    table = table.assign(**wide)
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".csv":
        file.write_text(csv_of(table), "utf-8", newline="")
    elif file.suffix == ".parquet":
        table.to_parquet(file, index=False)
    else:
        table.to_json(file, orient="records", lines=True, force_ascii=False, double_precision=15)


def score(overrides: Sequence[str], config_dir: str | None = None) -> Path:
    """Carry out the command with these arguments; the file that it wrote.

    Args:
        config_dir: a folder with configuration of the user's own.

    Raises:
        UserError: bad arguments, before a model loads.
    """
    own: dict[str, Any] = {}
    others = []
    for text, parsed in zip(overrides, OverridesParser.create().parse_overrides(list(overrides)), strict=True):
        if parsed.key_or_group not in OWN:
            others.append(text)
        elif parsed.is_sweep_override():
            own[parsed.key_or_group] = [str(value) for value in parsed.sweep_string_iterator()]
        else:
            own[parsed.key_or_group] = parsed.value()
    for name in ("signal", "of", "out"):
        if not own.get(name):
            raise UserError(f"{name}= is missing: write it as in staff-score {USAGE}.")
    file, options = local_path(str(own["out"])), own.get("options") or {}
    if file.suffix not in FORMATS:
        raise UserError(f"out={file} is none of {', '.join(FORMATS)}: name the table by one of them.")
    if not isinstance(options, dict):
        raise UserError(f"options={options!r} must map fields of the signals to values, such as {{prompt: false}}.")
    with initialize_config_dir(CONF, version_base="1.3"):
        run = Run(Setup.of(*composed([*others, *ALONE, *search_path(config_dir)])))
    signals, models = (value if isinstance(value, list) else [str(value)] for value in (own["signal"], own["of"]))
    _check_columns(run.pool, file, _signals(signals, options), models)
    if any(run.pool.states(model)[0].training for model in models if "@online" not in model):
        run.check_machine()
    log.info(settle_threads())
    table = scores(run.pool, signals, models, options)
    write(table, file)
    return file


def _check_columns(pool: Pool, file: Path, signals: Sequence[Signal], models: Sequence[str]) -> None:
    """Refuse, before a model loads, values of several numbers in a CSV file."""
    if file.suffix != ".csv":
        return
    for model in models:
        state = pool.states(model.removesuffix("@online"))[0]
        for signal in signals:
            if signal.shape(state.spec.config()) or model.endswith("@epochs"):
                raise UserError(
                    f"{signal.name} of {model} is several numbers for each sample, which CSV cannot hold: write "
                    "out=FILE.parquet or out=FILE.jsonl."
                )


USAGE = "family=tiny task=file task.train_file=FILE signal=loss of=small_raw out=scores.csv"


@command
def main() -> None:
    if len(sys.argv) == 1 or {"-h", "--help"} & set(sys.argv):
        print(f"usage: staff-score {USAGE}\n\n{__doc__}")
        sys.exit(0 if len(sys.argv) > 1 else 2)
    parser = argparse.ArgumentParser(prog="staff-score", usage=f"staff-score {USAGE}", allow_abbrev=False)
    parser.add_argument("--config-dir")
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_intermixed_args()
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    logging.getLogger("staff").setLevel(logging.INFO)
    print(score(with_home(asked.overrides), asked.config_dir))


if __name__ == "__main__":
    main()
