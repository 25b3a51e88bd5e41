"""What a run is: its configuration as typed parts, checked as far as that needs neither data nor models."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from staff.data.task import Task
from staff.errors import UserError
from staff.evaluation.generator import Generator
from staff.models.family import Family
from staff.runtime.files import local_path
from staff.scoring.stage import ScoringSettings
from staff.selection import SelectionMethod, budget_for, budget_of, check_flags, tokens_of
from staff.tracking import mirror
from staff.training.settings import FinetuneSettings


def folder_of(config: DictConfig, name: str) -> Path:
    """The folder that a setting names, a number too.

    Raises:
        UserError: it names none.
    """
    if type(config[name]) not in (str, int) or not str(config[name]).strip():
        given = "null" if config[name] is None else repr(config[name])
        raise UserError(f"{name}={given} must name a folder.")
    return local_path(str(config[name]))


@dataclass(frozen=True)
class Size:
    """The size of a coreset: by a pruning rate, in samples or in tokens. A method may bring a size of its own.

    Attributes:
        rate: the configured pruning rate.
        samples, tokens: the configured budgets; `tokens` is None where the method brings its own size.
        by_rate: whether the pruning rate sets the size.
    """

    method: SelectionMethod
    rate: float
    samples: int | None
    tokens: int | None
    by_rate: bool

    @classmethod
    def of(cls, cfg: DictConfig, method: SelectionMethod) -> Size:
        """As configured.

        Raises:
            UserError: two sizes, or one that is none.
        """
        if cfg.budget is not None and cfg.budget_tokens is not None:
            raise UserError(
                f"budget={cfg.budget} and budget_tokens={cfg.budget_tokens} both set the size of the coreset: "
                "set one of them."
            )
        fixed = hasattr(method, "fixed_size")
        tokens = None if fixed else tokens_of(cfg.budget_tokens)
        by_rate = not fixed and cfg.budget is None and tokens is None
        if by_rate:
            budget_for(cfg.pruning_rate, sys.maxsize)  # refuses what is no rate
        return cls(method, cfg.pruning_rate, cfg.budget, tokens, by_rate)

    def of_pool(self, samples: int) -> int:
        """The samples to select of so many, where the budget is not in tokens.

        Raises:
            UserError: it leaves no sample, or is beyond the pool.
        """
        return budget_of(self.method, self.rate, samples, self.samples)

    def check_tokens(self, lengths: np.ndarray) -> None:
        """Refuse a budget in tokens that a pool with samples of these lengths cannot have.

        Raises:
            UserError: it holds no sample, or is beyond the pool.
        """
        if self.tokens is None:
            return
        least, whole = int(lengths.min()), int(lengths.sum())
        if self.tokens < least:
            raise UserError(
                f"budget_tokens={self.tokens} holds no sample: the shortest of the pool has {least} tokens."
            )
        if self.tokens > whole:
            raise UserError(f"budget_tokens={self.tokens} is beyond the pool, which has {whole} tokens: lower it.")


@dataclass(frozen=True)
class Setup:
    """What a run is.

    Attributes:
        config: the resolved configuration.
        choices: the option chosen for each group of the configuration.
        selecting: the family that selects, where it is another one.
        generator: None for a run that ends with its coreset.
        tracking: "online", "offline" or "disabled".
    """

    config: dict[str, Any]
    choices: dict[str, Any]
    results: Path
    store: Path
    family: Family
    selecting: Family | None
    task: Task
    method: SelectionMethod
    finetune: FinetuneSettings
    scoring: ScoringSettings
    generator: Generator | None
    size: Size
    seed: int
    selection_seed: int
    finetune_seed: int
    memory_check: bool
    tracking: str

    @classmethod
    def of(cls, cfg: DictConfig, choices: dict[str, Any]) -> Setup:
        """What the composed configuration says.

        Raises:
            UserError: bad configuration.
        """
        results = folder_of(cfg, "results_dir")
        method: SelectionMethod = instantiate(cfg.method, _convert_="all")
        check_flags(method)
        parts: dict[str, Any] = {
            "finetune": instantiate(cfg.finetune, _convert_="all"),
            "scoring": instantiate(cfg.scoring),
            "generator": instantiate(cfg.evaluation, _convert_="all") or None,
            "family": instantiate(cfg.family, _convert_="all"),
            "selecting": instantiate(cfg.get("selection_family"), _convert_="all"),
            "task": instantiate(cfg.task, _convert_="all"),
        }
        mirror.check(OmegaConf.to_container(cfg.tracking))  # type: ignore[arg-type]
        return cls(
            config=_resolved(cfg),
            choices=choices,
            results=results,
            store=folder_of(cfg, "store_dir"),
            method=method,
            size=Size.of(cfg, method),
            tracking=cfg.tracking.mode,
            memory_check=cfg.memory_check,
            **_seeds(cfg),
            **parts,
        )

    def varied(self, cfg: DictConfig) -> Setup:
        """As `of`, for a configuration that differs in its seeds and in the size of its coreset.

        Parts that these do not change are reused: making them takes a plan most of its time.
        """
        config = _resolved(cfg)
        if any(config[name] != value for name, value in self.config.items() if isinstance(value, dict)):
            return Setup.of(cfg, self.choices)
        return replace(self, config=config, size=Size.of(cfg, self.method), **_seeds(cfg))


def _resolved(cfg: DictConfig) -> dict[str, Any]:
    return {str(name): value for name, value in OmegaConf.to_container(cfg, resolve=True).items()}  # type: ignore[union-attr]


def _seeds(cfg: DictConfig) -> dict[str, int]:
    for name in ("seed", "selection_seed", "finetune_seed"):
        if type(cfg[name]) is not int or not 0 <= cfg[name] < 2**32:
            raise UserError(f"{name}={cfg[name]!r} must be a whole number of at least 0 and below 2^32.")
    return {name: cfg[name] for name in ("seed", "selection_seed", "finetune_seed")}
