"""The stages that measure the floors under generated metrics (`staff.evaluation.floors`), from stored answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from staff.evaluation.floors import Constant, best_constant, specificity
from staff.evaluation.metrics import NAMED
from staff.evaluation.metrics.metric import Metric
from staff.evaluation.stage import Generate, read_predictions
from staff.store.cost import Meter
from staff.store.manifest import Artifact, digest
from staff.store.stage import Stage, identity, plain

FILE = "floors.json"
EMPTY = 0.05  # a larger share of empty answers is worth a warning


def with_floors(metrics: Sequence[Metric]) -> list[Metric]:
    """The included metrics of answers. One of a user's own may be slow, and floors take thousands of pairs."""
    return [metric for metric in metrics if metric.needs == "answers" and metric.name in NAMED]


@dataclass(frozen=True)
class ChooseConstant(Stage):
    """The best constant answer by a metric, chosen on the answers of the pool."""

    kind: ClassVar[str] = "constant"
    version: ClassVar[int] = 1
    one_process: ClassVar[bool] = True

    metric: Metric
    answers: Sequence[str] = field(repr=False)

    @property
    def label(self) -> str:
        return f"choose the best constant answer by {self.metric.name}"

    def key(self) -> dict[str, Any]:
        return {"metric": identity(self.metric), "answers": digest({"answers": list(self.answers)})}

    def run(self, folder: Path, meter: Meter, *inputs: Artifact) -> None:
        (folder / FILE).write_text(json.dumps(asdict(best_constant(self.metric.name, self.answers))))


@dataclass(frozen=True)
class Floors(Stage):
    """What stored answers, and the best constant one, score by each metric without their own prompts.

    Attributes:
        constants: of each metric.
        references: by the sample's id.
    """

    kind: ClassVar[str] = "floors"
    version: ClassVar[int] = 1
    one_process: ClassVar[bool] = True

    answers: Generate
    constants: tuple[ChooseConstant, ...]
    references: dict[str, tuple[str, ...]] = field(repr=False)

    @property
    def label(self) -> str:
        return f"floors of {', '.join(constant.metric.name for constant in self.constants)}"

    @property
    def inputs(self) -> tuple[Stage, ...]:
        return (self.answers, *self.constants)

    def key(self) -> dict[str, Any]:
        return {"references": plain(self.references)}

    def run(self, folder: Path, meter: Meter, *inputs: Artifact) -> None:
        answered, *chosen = inputs
        table = read_predictions(answered)
        ids, answers = table["id"].tolist(), table["prediction"].tolist()
        references = [self.references[id] for id in ids]
        found = {}
        for stage, artifact in zip(self.constants, chosen, strict=True):
            name, constant = stage.metric.name, Constant(**json.loads((artifact.path / FILE).read_text()))
            split = specificity(name, answers, references, ids)
            found[name] = {
                "score": float(split.own.mean()),
                "shuffled": float(split.others.mean()),
                "error": split.error,
                "constant": float(constant.scores(name, references).mean()),
                "constant_answer": constant.text,
                "constant_kind": constant.kind,
            }
        (folder / FILE).write_text(json.dumps(found))


def read_floors(measured: Artifact) -> dict[str, dict[str, Any]]:
    """What `Floors` stored, by metric: means over the samples of each one's own value.

    "score" of the answers, "shuffled" on other samples' references, with the Monte Carlo "error" of that mean,
    "constant" of the best constant answer, with its text and kind.
    """
    return json.loads((measured.path / FILE).read_text())


def warnings(floors: dict[str, dict[str, Any]], answers: Sequence[str], model: str) -> list[str]:
    """A sentence where `model` is below the floor by its first metric, and where over 5 % of answers are empty."""
    said = []
    for name, floor in [*floors.items()][:1]:
        if floor["score"] < floor["constant"]:
            text = " ".join(floor["constant_answer"].split())
            shown = text if len(text) <= 60 else f"{text[:60]}..."
            said.append(
                f"{model} scores {floor['score']:.2f} {name}, less than {floor['constant']:.2f} of the constant "
                f'answer "{shown}".'
            )
    empty = sum(not answer.strip() for answer in answers) / max(len(answers), 1)
    return [*said, f"{empty:.0%} of the answers of {model} are empty."] if empty > EMPTY else said
