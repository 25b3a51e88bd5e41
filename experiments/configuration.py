"""Where the shipped configuration lies, and what Hydra does not check of overrides itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hydra import compose
from omegaconf import DictConfig, OmegaConf, open_dict

from staff.errors import UserError

_PACKAGE = Path(__file__).resolve().parent

CONF = str(next(folder for folder in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if folder.is_dir()))
"""Inside the package where it was installed, beside it in a checkout."""

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


def _if_files(*arguments: Any) -> Any:
    """Resolver ${if_files:DATA_DIR,TRAIN_FILE,THIS,OTHER}: `THIS` where a task names files, `OTHER` on the hub."""
    data_dir, train_file, this, other = arguments
    chosen = other if data_dir is None and train_file is None else this
    return OmegaConf.create(chosen) if isinstance(chosen, list) else chosen


def register_resolvers() -> None:
    """Register what the configuration interpolates by."""
    OmegaConf.register_new_resolver("if_files", _if_files, replace=True)


def composed(overrides: Sequence[str]) -> tuple[DictConfig, dict[str, Any]]:
    """The configuration of a run, and its choices from the groups, inside `hydra.initialize_config_dir`."""
    cfg = compose("config", overrides=list(overrides), return_hydra_config=True)
    choices: Any = OmegaConf.to_container(cfg.hydra.runtime.choices)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg, choices
