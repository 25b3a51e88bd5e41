"""The real configuration, shrunk until a run takes seconds; everything else about it stays as users have it."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models gain nothing from more, and a busy machine loses much

pytest.register_assert_rewrite("support")
settings.register_profile("busy", deadline=None)  # a busy machine is no failure
settings.load_profile("busy")

ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    "task.train_limit=24",
    "task.test_limit=4",
    "task.max_new_tokens=4",
    "finetune.epochs=1",
    "finetune.small_epochs=1",
    "pruning_rate=0.75",
)


def run_shrunk(results: Path, *overrides: str) -> dict[str, Any]:
    """Run one shrunk configuration in this process; its record, with its folder under "folder"."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf, open_dict

    from experiments.run import run as run_configuration

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        arguments = [*SMALL, f"results_dir={results}", "tracking=none", *overrides]
        cfg = compose("config", overrides=arguments, return_hydra_config=True)
    choices = OmegaConf.to_container(cfg.hydra.runtime.choices)
    assert isinstance(choices, dict)
    with open_dict(cfg):
        del cfg["hydra"]
    folder = run_configuration(cfg, {str(k): v for k, v in choices.items()})
    return {**json.loads((folder / "metrics.json").read_text()), "folder": folder}


def vectors(method: str) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of every case that was recorded from a method's released code, by case and name."""
    cases: dict[str, dict[str, np.ndarray]] = {}
    with np.load(ROOT / f"tests/golden/{method}.npz", allow_pickle=False) as packed:
        for key in packed.files:
            case, _, name = key.rpartition("/")
            cases.setdefault(case, {})[name] = packed[key]
    return cases


LONGEST = (
    *(
        "test_distributed.py",
        "test_sweep.py",
        "test_run.py",
        "test_report.py",
        "test_finetune.py",
        "test_same_twice.py",
    ),
    *("test_checkpoints.py", "test_experiments.py", "test_report_tables.py", "test_plan.py", "test_promises.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that the workers, each of which takes file after file, end together."""
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a real run of STAFF."""
    results = tmp_path_factory.mktemp("real")
    return run_shrunk(results, "task.test_limit=6", "method=staff", "pruning_rate=0.5")["folder"]


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on a copy of the embedded dialogues, which are in "data" beside "runs"."""
    results = tmp_path_factory.mktemp("recorded")
    shutil.copytree(ROOT / "staff/assets/dialogsum", results / "data")
    return run_shrunk(results, "method=random", f"task.data_dir={results}/data")["folder"]


@pytest.fixture
def a_user_who_is_not_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import wandb

    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    wandb.teardown()  # W&B reads its environment once a session
    yield
    wandb.teardown()


def pytest_collection_finish() -> None:
    """Every fine-tuning collects garbage: a third of a second, if all that is imported may be garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`run_shrunk`, by default with its results in a folder of the test."""
    pytest.importorskip("hydra")

    def run(*overrides: str, results: Path = tmp_path / "results", tracking: str = "none") -> dict[str, Any]:
        return run_shrunk(results, f"tracking={tracking}", *overrides)

    return run
