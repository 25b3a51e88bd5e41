"""The state of a model: which model, what it was trained on, and at which point of the training."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from staff.errors import UserError
from staff.models.adapters import LoraSpec, fresh_lora, load_trained, replace_lora, shapes
from staff.models.spec import ModelSpec
from staff.store.manifest import Artifact
from staff.store.stage import Stage

MOMENTS = "moments.safetensors"
"""The optimiser's moments at the end of an epoch: two tensors a parameter, NAME.exp_avg and NAME.exp_avg_sq."""


class Training(Stage):
    """A stage that leaves a model: an adapter, or all its weights.

    Attributes:
        epochs: how many it takes, whole or not.
        moments: whether it keeps Adam's moments of every epoch.
    """

    epochs: float
    moments: bool = False

    @property
    @abstractmethod
    def adapter(self) -> LoraSpec | None:
        """The adapter that it trains; None if it trains all weights."""

    @abstractmethod
    def checkpoint(self, folder: Path, epoch: int) -> Path:
        """The folder, inside the stage's `folder`, with the model at the end of this epoch (1 is the first).

        Raises:
            UserError: the training saves no checkpoints.
        """

    @abstractmethod
    def moments_file(self, folder: Path, epoch: int | None) -> Path:
        """Where the stage's `folder` keeps the optimiser's moments at the end of this epoch (None: of the last)."""


@dataclass(frozen=True)
class ModelState:
    """A model in one state.

    Attributes:
        spec: which model, and how it is loaded.
        training: how it was trained; None: the raw model.
        checkpoint: the epoch at whose end the model is taken; None: the end of the training.
    """

    spec: ModelSpec
    training: Training | None = None
    checkpoint: int | None = None

    def __post_init__(self) -> None:
        if self.training is not None and self.checkpoint is not None:
            self.training.checkpoint(Path(), self.checkpoint)  # refuses one that is not kept, before it is trained

    @property
    def inputs(self) -> tuple[Stage, ...]:
        """The stages whose artefacts `load` is given."""
        return () if self.training is None else (self.training,)

    def key(self) -> dict[str, Any]:
        """Everything besides `inputs` that determines the model, as JSON holds it."""
        return {"model": self.spec.identity(), "checkpoint": self.checkpoint}

    @property
    def adapted(self) -> bool:
        """Whether the model that `load` returns has a trained adapter."""
        return self.training is not None and self.training.adapter is not None

    @property
    def words(self) -> str:
        """The state in words, such as "fine-tuned Llama-2-7b after epoch 2"."""
        after = "" if self.checkpoint is None else f" after epoch {self.checkpoint}"
        return f"{'raw' if self.training is None else 'fine-tuned'} {self.spec.name}{after}"

    def at(self, moment: str, of: str) -> list[ModelState]:
        """The states at the end of an epoch of the training, such as "2", or of all ("epochs").

        Args:
            of: what the user asked for, such as "small@2".

        Raises:
            UserError: a raw model, or an epoch that there is not.
        """
        if self.training is None:
            raise UserError(f"of={of!r}: the raw model has no epochs; ask small, target_tuned or warmup.")
        epochs = list(range(1, int(self.training.epochs) + 1))
        if moment != "epochs" and moment not in map(str, epochs):
            name = of.partition("@")[0]
            raise UserError(f"of={of!r}: {name} has the epochs 1 to {epochs[-1]}, or write {name}@epochs.")
        wanted = epochs if moment == "epochs" else [int(moment)]
        # The last epoch's checkpoint is the trained model.
        return [replace(self, checkpoint=None if k == epochs[-1] else k) for k in wanted]

    def load(self, *trained: Artifact) -> Any:
        """The model in evaluation mode, from the artefacts of `inputs`."""
        if self.training is None:
            return self.spec.load()
        folder = trained[0].path
        if self.checkpoint is not None:
            folder = self.training.checkpoint(folder, self.checkpoint)
        return load_trained(self.spec, folder)

    def load_moments(self, *trained: Artifact) -> dict[str, tuple[Any, Any]]:
        """Adam's first and second moment of every trained parameter, by its name; as for `load`."""
        from safetensors.torch import load_file

        assert self.training is not None
        file = load_file(self.training.moments_file(trained[0].path, self.checkpoint))
        names = {key.rpartition(".")[0] for key in file}
        return {name: (file[f"{name}.exp_avg"], file[f"{name}.exp_avg_sq"]) for name in names}

    def shapes(self) -> Any:
        """The model without its weights, on the meta device."""
        return shapes(self.spec, None if self.training is None else self.training.adapter)


@dataclass(frozen=True)
class FreshAdapter:
    """A new LoRA adapter to differentiate by: A is drawn from `seed`, B is zero."""

    lora: LoraSpec
    seed: int

    def put_on(self, model: Any, adapted: bool) -> Any:
        """`model` with this adapter.

        A model that is `adapted` has it in place of its own on the same layers; on all other layers its own adapter
        is merged into the weights.
        """
        if adapted:
            return replace_lora(model, self.lora, self.seed)
        return fresh_lora(model, self.lora, self.seed)


def check_mergeable(spec: ModelSpec) -> None:
    """Refuse a model with weights that adapters cannot be merged into.

    Raises:
        UserError: quantised or sharded weights.
    """
    if spec.quantization or spec.is_partitioned:
        raise UserError(
            "adapters cannot be merged into 4-bit or sharded weights, as gradient=all_linear and "
            "fresh_adapter require: choose gradient=last_v_b or all_lora without "
            "fresh_adapter, or finetune=lora finetune.fsdp=false."
        )
