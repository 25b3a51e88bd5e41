"""Stores for a plan: one in which stages are estimated instead of run, and one that notes how fast they ran."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from staff.store.cost import Cost, Meter
from staff.store.manifest import Artifact
from staff.store.stage import Stage
from staff.store.store import Store

UTILISATION = {"finetune": 0.4, "scores": 0.24, "evaluation": 0.05}
"""Fractions of the peak. Scores: measured with Gemma-7b's shape on an H200, over batches seen before. The others
are assumed; decoding is bound by memory, not by arithmetic. A model too small to fill the GPU reaches less."""


@dataclass(frozen=True)
class PlannedStage:
    """A stage of the sweep.

    Attributes:
        speed: what stages with the same speed have in common.
        precision: that it computes in.
        exact: its FLOPs do not depend on scores or answers.
        made: the sweep's own store has it already.
    """

    stage: str
    label: str
    speed: str
    precision: str
    cost: Cost
    exact: bool
    made: bool


class DryRunStore(Store):
    """A store in which stages are estimated, and listed in `stages` by fingerprint.

    Args:
        root: a temporary folder.
        real: the store of the sweep.
    """

    def __init__(self, root: Path, real: Store) -> None:
        super().__init__(root)
        self.real = real
        self.stages: dict[str, PlannedStage] = {}
        self.certain: set[str] = set()
        """Fingerprints of the samples that are known without scores."""
        self._asked = 0

    def carry_out(self, stage: Stage, folder: Path, meter: Meter, inputs: list[Artifact]) -> None:
        stage.estimate(folder, meter, *inputs)

    def get(self, stage: Stage) -> Artifact:
        # What a method asks second may depend on the first answer; what follows the selection does not.
        self._asked = 0 if stage.kind == "coreset" else self._asked + (stage.kind == "scores")
        second = stage.kind == "scores" and self._asked > 1
        artifact = super().get(stage)
        if stage.kind == "coreset":
            self._asked = 0
        if stage.kind in UTILISATION:
            exact = stage.kind != "evaluation" and stage.key()["samples"] in self.certain and not second
            made = self.real.find(stage) is not None
            self.stages[stage.fingerprint] = PlannedStage(
                stage.kind, stage.label, speed_of(stage), precision_of(stage), artifact.cost, exact, made
            )
        return artifact


class TimedStore(Store):
    """A store that also lists FLOPs and seconds of what it made, by what determines the speed."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.times: list[tuple[str, Cost]] = []

    def get(self, stage: Stage) -> Artifact:
        artifact = super().get(stage)
        if stage.kind in UTILISATION and artifact.computed:
            self.times.append((speed_of(stage), artifact.cost))
        return artifact


def speed_of(stage: Stage) -> str:
    """Kind, model and settings, without samples, epochs and seed."""
    settings = {name: value for name, value in stage.key().items() if name not in ("samples", "epochs", "seed")}
    return json.dumps([stage.kind, settings, bool(stage.inputs)], sort_keys=True)


def precision_of(stage: Stage) -> str:
    """The precision of nearly all of a stage's matrix products: frozen weights keep their own."""
    key = stage.key()
    model = key["model"] if "model" in key else key["state"]["model"]
    narrow = model["dtype"] == "bfloat16" or "quantization" in model
    settings = key.get("settings", {"kind": "lora", "precision": "float32"})
    narrow = settings["precision"] == "bfloat16" or (settings["kind"] == "lora" and narrow)
    return "bfloat16" if narrow else "float32"
