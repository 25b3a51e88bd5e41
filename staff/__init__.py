"""Coreset selection for task-specific fine-tuning. README.md shows how to use it as a library.

Names are imported on first use. So `import staff` is quick, and torch is loaded only where a model is needed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from staff.arrays import ArrayPool as ArrayPool
    from staff.dataset import dataset_pool as dataset_pool
    from staff.dataset import select as select
    from staff.errors import UserError as UserError
    from staff.models.spec import ModelSpec as ModelSpec
    from staff.pool import Pool as Pool
    from staff.selection import Coreset as Coreset
    from staff.speculative import Staff as Staff
    from staff.training.settings import FinetuneSettings as FinetuneSettings

_HOME = {
    "ArrayPool": "staff.arrays",
    "Coreset": "staff.selection",
    "FinetuneSettings": "staff.training.settings",
    "ModelSpec": "staff.models.spec",
    "Pool": "staff.pool",
    "Staff": "staff.speculative",
    "UserError": "staff.errors",
    "dataset_pool": "staff.dataset",
    "select": "staff.dataset",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
