"""Where the shipped configuration is, how jobs are composed, and checks of overrides that Hydra does not make."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose
from omegaconf import DictConfig, OmegaConf, open_dict

from staff.errors import UserError

_PACKAGE = Path(__file__).resolve().parent

CONF = str(next(folder for folder in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if folder.is_dir()))
"""Inside the package where it was installed, beside it in a checkout."""

VALUES = ("pruning_rate", "budget", "budget_tokens", "seed", "selection_seed", "finetune_seed")
"""Settings that choose no file of the configuration: Hydra, which is slow, composes the jobs that differ in them
once."""

SIZES = ("pruning_rate", "budget", "budget_tokens")


def check_size(overrides: Iterable[str]) -> None:
    """Refuse the overrides of a job that set the size of its coreset twice. A preset's pruning rate gives way.

    Raises:
        UserError: naming two of them.
    """
    pairs = (override.partition("=")[::2] for override in overrides)
    given = {name: f"{name}={value}" for name, value in pairs if name in SIZES and value != "null"}
    if len(given) > 1:
        first, second, *_ = (given[name] for name in SIZES if name in given)
        raise UserError(f"{first} and {second} both set the size of the coreset: leave one out, or set it to null.")


def params_left(params: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """The parameters of a preset's sweep, without its sizes where the command line sets another one."""
    given = {override.partition("=")[0] for override in overrides if not override.endswith("=null")}
    return {key: value for key, value in params.items() if key not in SIZES or not given & set(SIZES) - {key}}


def with_home(arguments: Iterable[str]) -> list[str]:
    """Arguments of a command line with the home folder in place of ~ before a path, which Hydra cannot read
    outside quotes."""
    home = os.path.expanduser("~")
    return [a if set("'\"") & set(a) else re.sub(r"(?<=[=\[,])~(?=/)", lambda _: home, a) for a in arguments]


def within_groups(arguments: Iterable[str]) -> list[str]:
    """Arguments of a command line in which `method=NAME method.within=group` is written out as
    `method=within_groups method@method.inner=NAME`, with NAME's own settings beside it.

    Raises:
        UserError: another value than group or null, or no method beside it.
    """
    within, others = None, []
    for argument in arguments:
        if argument.startswith("method.within="):
            within = argument.partition("=")[2]
        else:
            others.append(argument)
    if within in (None, "null"):
        return others
    if within != "group":
        raise UserError(f"method.within={within!r} is unknown: choose group, or null.")
    if not any(argument.startswith("method=") for argument in others):
        raise UserError("method.within=group needs a method beside it: method=staff method.within=group.")
    inner = [re.sub(r"^method=", "method@method.inner=", argument) for argument in others]
    own = re.compile(r"^([+~]*|method@)method\.(?!inner=)")
    return [*(own.sub(r"\1method.inner.", argument) for argument in inner), "method=within_groups"]


def _if_files(*arguments: Any) -> Any:
    """Resolver ${if_files:DATA_DIR,TRAIN_FILE,THIS,OTHER}: `THIS` where a task names files, `OTHER` on the hub."""
    data_dir, train_file, this, other = arguments
    chosen = other if data_dir is None and train_file is None else this
    return OmegaConf.create(chosen) if isinstance(chosen, list) else chosen


def register_resolvers() -> None:
    """Register what the configuration interpolates by."""
    OmegaConf.register_new_resolver("if_files", _if_files, replace=True)
    OmegaConf.register_new_resolver("from_home", lambda path: path and os.path.expanduser(str(path)), replace=True)


def search_path(config_dir: str | None) -> list[str]:
    """The override by which Hydra finds a folder of the user's own, in front of the shipped one.

    Raises:
        UserError: it is no folder.
    """
    if config_dir is None:
        return []
    folder = Path(config_dir).expanduser().absolute()
    if not folder.is_dir():
        raise UserError(f"--config-dir {config_dir} is not a folder: name one with groups such as method/ in it.")
    return [f"hydra.searchpath=[{json.dumps(f'file://{folder}')}]"]


def composed(overrides: Sequence[str]) -> tuple[DictConfig, dict[str, Any]]:
    """The configuration of a run, and its choices from the groups, inside `hydra.initialize_config_dir`."""
    cfg = compose("config", overrides=list(overrides), return_hydra_config=True)
    choices: Any = OmegaConf.to_container(cfg.hydra.runtime.choices)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg, choices
