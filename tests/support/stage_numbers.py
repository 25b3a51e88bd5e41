"""A small slice of every stage, computed on its own: on given tokens, arrays and answers and on raw models, so that
other numbers are those of the stage itself and of nothing that it reads.

A slice gives a few numbers, and names the classes whose `version` stands for them: the stage's, and those of the
parts (signal, method, metric, ...) by which its result is known.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import load_file, save_file
from support import any_pool
from support.any_pool import METHODS, DrawnPool, method_named
from support.tiny import sums

from staff.data.splits import DataView
from staff.data.tokens import TokenizedSamples, Tokens, read_tokens
from staff.evaluation.floors import FILE as FLOORS
from staff.evaluation.floors import ChooseConstant, Floors
from staff.evaluation.generator import Greedy
from staff.evaluation.in_context import AnswersInContext, read_in_context
from staff.evaluation.metrics import NAMED as METRICS
from staff.evaluation.metrics import named_metric
from staff.evaluation.stage import Generate, Measure, read_measured, read_predictions
from staff.models.adapters import LoraSpec
from staff.models.prepare import PruneDepth
from staff.models.spec import ModelSpec
from staff.models.state import ModelState
from staff.pool import Select
from staff.scoring.stage import FILE, Score, ScoringSettings, read_scores
from staff.selection import Coreset
from staff.signals import NAMED as SIGNALS
from staff.signals import named
from staff.signals.effort import Effort
from staff.signals.el2n import EL2N
from staff.signals.embedding import Embedding
from staff.signals.loss import Loss
from staff.signals.nll import AnswerNll
from staff.store.cost import Meter
from staff.store.stage import Stage
from staff.training.settings import FinetuneSettings
from staff.training.stage import Finetune, read_online_efforts

TARGET, SMALL = (ModelSpec(f"pkg://staff/assets/tiny/{name}") for name in ("target", "small"))
LORA = LoraSpec(4, 8)
VARIANTS = [
    Effort("all_lora"),
    Effort("all_linear"),
    Effort("last_v_b", {"rank": 3, "alpha": 6, "targets": ["q_proj", "v_proj"]}),
    EL2N("official"),
    Loss(text="all"),
    Loss(prompt=False),
    Embedding(layer=0, pooling="position_weighted"),
    Embedding(pooling="last_token"),
]
ANSWERS = ["the cat sat on the mats", "#### 7", "", "half of 14 is 7.0"]
REFERENCES = {
    "a": ("the cats sat on a mat", "a cat sat"),
    "b": ("it is 7\n#### 7",),
    "c": ("nothing at all",),
    "d": ("#### 8",),
}
CHOICES = {
    "a": ("a cat", "the cats sat"),
    "b": ("it is 7\n#### 7", "8"),
    "c": ("x", "nothing at all"),
    "d": ("#### 8", "7"),
}
TRAINING = ["the cat sat", "the cat ran", "a cat sat on the mat", "#### 7", "it is 7"] * 2
ASKING_MORE = ("less", "less_paper", "delift", "delift_official", "data_whisperer")
"""Methods that ask for learning rates, pairs of samples, or answers in context."""
Numbers = dict[str, Any]


def given_samples(count: int = 12, ids: Sequence[str] | None = None) -> TokenizedSamples:
    ids = [f"s{i}" for i in range(count)] if ids is None else list(ids)
    count = len(ids)
    rng = np.random.default_rng(0)
    lengths, answers = rng.integers(14, 40, count), rng.integers(2, 12, count)
    rows = [[0, *rng.integers(4, 2000, n - 2), 1] for n in lengths]
    return TokenizedSamples.of_rows(ids, rows, (lengths - answers).tolist(), begin=1)


@dataclass(frozen=True)
class Slice:
    """A stage to run, on what its inputs left in these folders, and the numbers in what it leaves."""

    stage: Stage
    parts: tuple[Any, ...]
    read: Callable[[Any], Numbers]
    inputs: tuple[Path, ...] = ()

    @property
    def versions(self) -> dict[str, int]:
        """By the class that states it, with its module."""
        return dict(version_of(part) for part in (self.stage, *self.parts))

    def numbers(self, folder: Path) -> Numbers:
        """Run the stage in an empty folder."""
        self.stage.run(folder, Meter(), *(SimpleNamespace(path=path) for path in self.inputs))  # type: ignore[misc]
        return self.read(SimpleNamespace(path=folder))


def version_of(part: Any) -> tuple[str, int]:
    """The class that states the version of a stage or of a part, and that version."""
    (owner, *_) = [kind for kind in type(part).__mro__ if "version" in vars(kind)]
    return name_of(owner), owner.version


def name_of(kind: type) -> str:
    """With its module, since a signal and a method may share a name."""
    return f"{kind.__module__}.{kind.__qualname__}"


def slices(folder: Path) -> Iterator[tuple[str, Slice]]:
    """All slices by name; what they read is written to `folder`."""
    yield "model", Slice(PruneDepth(TARGET, [0, 2]), (), of_weights)
    readings = {"plain": (SMALL, {}), "chat": (with_chat_template(folder), {"prompt_format": "chat"})}
    for name, (spec, reading) in readings.items():
        yield f"tokens {name}", Slice(Tokens(sums(12), spec, reading), (), of_tokens)
    yield from finetunings()
    for signal in (*map(named, SIGNALS), *VARIANTS):
        yield f"scores {words(signal)}", scoring(signal)
    yield from selections()
    yield "in_context", in_context()
    generate = Generate(ModelState(TARGET), given_samples(4), Greedy(), 12)
    yield "evaluation", Slice(generate, (generate.generator,), of_answers)
    yield from measurements(folder, generate)
    yield from floors(folder, generate)


def selections() -> Iterator[tuple[str, Slice]]:
    pools: dict[str, Any] = {name: GivenPool(60) for name in METHODS}
    for name in ASKING_MORE:
        pools[name] = any_pool.pool_of(60)
        pools[name].seed = 3
    for name, pool in pools.items():
        method = method_named(name)
        yield f"coreset {name}", Slice(Select(method, pool, 20), (method,), of_coreset)


def in_context() -> Slice:
    shown, queries, metric = np.array([[0, 3], [5, 1]]), np.array([[1], [2]]), named_metric("rougeL")
    stage = AnswersInContext(ModelState(TARGET), given_samples(), given_samples(4), shown, queries, metric, [30])
    return Slice(stage, (metric,), lambda answered: of_array(read_in_context(answered)))


def measurements(folder: Path, generate: Generate) -> Iterator[tuple[str, Slice]]:
    """Every metric of `ANSWERS`, which are written to `folder`."""
    table = pd.DataFrame({"id": list("abcd"), "prediction": ANSWERS, "tokens": [6, 3, 0, 5]})
    table.to_parquet(folder / "predictions.parquet")
    asked = asked_of(REFERENCES)[:-1]  # the last does not fit
    (scored := folder / "nll").mkdir()
    save_file({"nll": np.random.default_rng(0).lognormal(size=(len(asked), 2))}, scored / FILE)
    offered = asked_of(CHOICES)
    save_file({"nll": np.random.default_rng(1).lognormal(size=(len(offered), 2))}, folder / FILE)
    likelihoods = (scoring(AnswerNll(), asked).stage, scoring(AnswerNll(), offered).stage)
    for metric in map(named_metric, METRICS):
        of_references = likelihoods[0] if metric.needs == "likelihood" else None
        of_choices: Any = (likelihoods[1], CHOICES) if metric.needs == "choices" else ()
        measure = Measure(generate, [metric], REFERENCES, of_references, *of_choices)  # type: ignore[arg-type]
        others = {"likelihood": (scored,), "choices": (folder,)}.get(metric.needs, ())
        yield f"metrics {metric.name}", Slice(measure, (metric,), of_metrics, (folder, *others))


def asked_of(texts: Mapping[str, Sequence[str]]) -> list[str]:
    """The ids under which the texts of a test sample are scored."""
    return [f"{id}#{i}" for id, some in texts.items() for i in range(len(some))]


def floors(folder: Path, generate: Generate) -> Iterator[tuple[str, Slice]]:
    """Constants chosen on `TRAINING`, and the floors that they give the answers in `folder`."""
    constants = {name: ChooseConstant(named_metric(name), TRAINING) for name in ("rougeL", "chrf")}
    for name, constant in constants.items():
        yield f"constant {name}", Slice(constant, (), of_floors)
        (folder / name).mkdir()
        constant.run(folder / name, Meter())
    stage = Floors(generate, tuple(constants.values()), REFERENCES)
    yield "floors", Slice(stage, (), of_floors, (folder, *(folder / name for name in constants)))


def words(signal: Any) -> str:
    """Its name, and the options that are not its defaults."""
    plain = type(signal)()
    options = {field.name: getattr(signal, field.name) for field in fields(signal)}
    return " ".join([signal.name, *(f"{k}={v}" for k, v in options.items() if v != getattr(plain, k))])


class GivenPool(DrawnPool):
    """Has the fields of a pool that a selection reads."""

    seed = 3


def finetunings() -> Iterator[tuple[str, Slice]]:
    settings = FinetuneSettings(lora=LORA, learning_rate=1e-3, batch_size=4, device_batch_size=2)
    grouped = replace(settings, length_grouped=True, scheduler="linear")
    for name, kind, epochs, online in (
        ("lora", settings, 2, "last_v_b"),
        ("grouped by length", grouped, 1, None),
        ("full", replace(settings, kind="full", learning_rate=1e-4), 1, None),
    ):
        stage = Finetune(SMALL, given_samples(), kind, epochs, 5, online)
        yield f"finetune {name}", Slice(stage, (settings.objective,), of_training)
    stage = Finetune(SMALL, given_samples(), settings, 2, 5, schedule=np.array([[0, 1, 2, 3], [2, 5, 7, 9]]))
    yield "finetune by epoch", Slice(stage, (settings.objective,), of_training)


def scoring(signal: Any, ids: Sequence[str] | None = None) -> Slice:
    settings = ScoringSettings(batch_tokens=100)
    samples = DataView(prompt=signal.prompt, text=signal.text).of(given_samples(ids=ids))
    stage = Score(ModelState(SMALL), samples, (signal,), settings, LORA, 7)
    return Slice(stage, (signal,), lambda scored: of_array(read_scores(scored)[signal.name]))


def with_chat_template(folder: Path) -> ModelSpec:
    model = folder / "chat"
    shutil.copytree(SMALL.local or "", model, dirs_exist_ok=True)
    file = model / "tokenizer_config.json"
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))
    return ModelSpec(str(model))


# What is compared


def of_array(values: np.ndarray) -> Numbers:
    """The first five, and all of them together: of whole numbers a digest, of others sums of their magnitudes."""
    flat = values.ravel()
    if np.issubdtype(values.dtype, np.integer):
        return {"first": flat[:5].tolist(), "digest": hashlib.sha256(flat.astype("<i8").tobytes()).hexdigest()[:16]}
    magnitudes = np.abs(flat.astype(np.float64))
    by_place = 1 + np.arange(len(flat)) % 7  # the same values in another order are others
    total = [short(magnitudes.sum()), short(magnitudes @ by_place)]
    return {"first": [short(value) for value in flat[:5]], "total": total, "shape": list(values.shape)}


def short(value: Any) -> float:
    """With the digits that the tolerance can see, and some."""
    return float(f"{float(value):.7g}")


def of_weights(model: Any) -> Numbers:
    weights = load_file(model.path / "model.safetensors")
    return {
        "tensors": len(weights),
        **of_array(np.concatenate([weights[name].ravel() for name in sorted(weights)])),
    }


def of_tokens(tokens: Any) -> Numbers:
    read = read_tokens(tokens)
    return {"tokens": of_array(read.tokens), "prompts": of_array(read.prompt_lengths), "begin": read.begin}


def of_training(tuned: Any) -> Numbers:
    files = sorted(file for file in tuned.path.rglob("*.safetensors") if "online" not in file.name)
    numbers: Numbers = {}
    for file in files:
        weights = load_file(file)
        total = sum(float(np.abs(values.astype(np.float64)).sum()) for values in weights.values())
        numbers[file.relative_to(tuned.path).as_posix()] = short(total)
    log = json.loads((tuned.path / "training.json").read_text())["log"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    rates = [entry["learning_rate"] for entry in log if "learning_rate" in entry]
    numbers |= {"losses": losses, "rates": rates}
    if (tuned.path / "online.safetensors").exists():
        numbers["online"] = of_array(read_online_efforts(tuned))
    return numbers


def of_coreset(chosen: Any) -> Numbers:
    coreset = Coreset.load(chosen.path)
    sums_of = {name: short(np.nansum(values)) for name, values in coreset.scores.items()}
    return {"positions": coreset.indices.tolist(), "filled": coreset.filled, "scores": sums_of}


def of_answers(answered: Any) -> Numbers:
    return {"answers": read_predictions(answered)["prediction"].tolist()}


def of_metrics(measured: Any) -> Numbers:
    headline, table = read_measured(measured)
    return {name: {"headline": value, "samples": table[name].tolist()} for name, value in headline.items()}


def of_floors(found: Any) -> Numbers:
    return json.loads((found.path / FLOORS).read_text())


def differences(first: Any, second: Any, tolerance: float, place: str = "") -> list[str]:
    """Where two sets of numbers differ. Those that are not whole may by this tolerance, relative to themselves
    or to the mean of their list."""
    if isinstance(first, Mapping) and isinstance(second, Mapping) and first.keys() == second.keys():
        return [d for name in first for d in differences(first[name], second[name], tolerance, f"{place}.{name}")]
    some, other = (value if isinstance(value, list) else [value] for value in (first, second))
    are_floats = float in map(type, some) and all(isinstance(value, int | float) for value in other)
    if not are_floats or len(some) != len(other):
        return [] if first == second else [place]
    scale = tolerance * np.abs(np.nan_to_num(some)).mean()
    return [] if np.allclose(some, other, rtol=tolerance, atol=scale, equal_nan=True) else [place]
