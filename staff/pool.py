"""What a selection method may ask about the training samples: scores, embeddings, lengths."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from staff.adapters import fresh_lora, load_tuned, replace_lora
from staff.artifacts import STAGE_VERSIONS, Artifact, Store
from staff.cost import Meter, scoring_flops
from staff.errors import UserError
from staff.finetune import ONLINE_SCORES, FinetuneSettings, finetune_key, finetuned, stand_in
from staff.models import PRECISIONS, Family, LoraSpec, ModelSpec, plain
from staff.selection import Coreset, Draws, SelectionMethod, run_method, source_digest
from staff.tokens import TokenizedSamples

log = logging.getLogger(__name__)

ROLES = ("small", "target", "target_tuned")


@dataclass(frozen=True)
class ScoringSettings:
    """How samples are scored.

    Attributes:
        batch_tokens: padded tokens of one batch, halved where memory runs out; None: as many as suit the device.
        dtype: precision of the model while it scores; None: its family's.
        one_at_a_time: plain autograd on single samples, for an architecture that `staff.gradients` does not know.
    """

    batch_tokens: int | None = None
    dtype: str | None = None
    one_at_a_time: bool = False

    def __post_init__(self) -> None:
        tokens = self.batch_tokens
        if tokens is not None and (type(tokens) is not int or tokens < 1):
            raise UserError(f"scoring.batch_tokens={tokens!r} must be null or a whole number of at least 1.")
        if not isinstance(self.one_at_a_time, bool):
            raise UserError(f"scoring.one_at_a_time={self.one_at_a_time!r} must be true or false.")
        if self.dtype not in (None, *PRECISIONS):
            raise UserError(f"scoring.dtype={self.dtype!r} is unknown: choose null, {' or '.join(PRECISIONS)}.")


class ArrayPool:
    """A pool whose scores are arrays that lie at hand; no model is needed.

    Args:
        ids: the samples' ids, unique.
        scores: by signal and model role, such as {("effort", "small"): array of shape (N,)}; embeddings have
            shape (N, dimensions).
        answer_lengths: of the answers in tokens, shape (N,), for methods that ask for them.
    """

    def __init__(
        self,
        ids: Sequence[str],
        scores: Mapping[tuple[str, str], np.ndarray],
        answer_lengths: np.ndarray | None = None,
    ):
        for position, given in enumerate(ids):
            if not isinstance(given, str):
                raise UserError(f"ids[{position}]={given!r} must be text: give ids as strings.")
        if len(set(ids)) != len(ids):
            raise UserError("ids must be unique: give every sample an id of its own.")
        self.ids = list(ids)
        self._scores = dict(scores)
        self._answer_lengths = answer_lengths

    @property
    def answer_lengths(self) -> np.ndarray:
        if self._answer_lengths is None:
            raise UserError("the pool has no answer lengths: give ArrayPool answer_lengths.")
        return self._answer_lengths

    def scores(self, signal: str, model: str, indices: np.ndarray | None = None, **options: Any) -> np.ndarray:
        if (signal, model) not in self._scores:
            known = ", ".join(f"{s} of {m}" for s, m in self._scores) or "none"
            raise UserError(f"the pool has no {signal!r} of {model!r}: it has {known}.")
        values = self._scores[signal, model]
        return values if indices is None else values[indices]

    def signals(
        self, signals: Sequence[str], model: str, indices: np.ndarray | None = None, **options: Any
    ) -> dict[str, np.ndarray]:
        return {signal: self.scores(signal, model, indices, **options) for signal in signals}


@dataclass(frozen=True)
class Pool:
    """The training samples and the models that can be asked about them; every answer is an artefact.

    A method names a model by its role: "small", the small model fine-tuned on the whole pool; "target", the raw
    target LLM; "target_tuned", the target fine-tuned on the whole pool. A role is fine-tuned on first need.

    Attributes:
        for_small: the samples as the small model's tokenizer reads them.
        for_target: the same samples in the same order, as the target's tokenizer does.
        seed: the selection seed; it reaches fine-tuning for scores and fresh adapters.
    """

    for_small: TokenizedSamples
    for_target: TokenizedSamples
    family: Family
    settings: FinetuneSettings
    store: Store
    seed: int
    scoring: ScoringSettings = ScoringSettings()

    @property
    def ids(self) -> Sequence[str]:
        return self.for_target.ids

    @property
    def answer_lengths(self) -> np.ndarray:
        """Tokens of each answer as the target reads it, the end token included, shape (N,)."""
        return self.for_target.answer_lengths

    def scores(self, signal: str, model: str, indices: np.ndarray | None = None, **options: Any) -> np.ndarray:
        """`signal` of the samples `indices` (all by default), in their order, from the model of role `model`.

        Args:
            signal: "effort", "el2n", "loss" or "embedding", as in `staff.scoring.Asked`.
            options: `gradient` and `variant` as there; `fresh_adapter`, {rank, alpha, targets}: differentiate by a
                new adapter in place of fine-tuning's; `online`: efforts out of the role's fine-tuning.
        """
        return self.signals((signal,), model, indices, **options)[signal]

    def signals(
        self, signals: Sequence[str], model: str, indices: np.ndarray | None = None, **options: Any
    ) -> dict[str, np.ndarray]:
        """As `scores`, several signals out of one pass over the samples, and charged as one."""
        from safetensors.numpy import load_file

        if model not in ROLES:
            raise UserError(f"the model role {model!r} is unknown: choose one of {', '.join(ROLES)}.")
        if model == "small" and self.family.small.identity() == self.family.target.identity():
            log.warning("the small model is the target itself, and asking it costs as much: name a smaller one")
        if options.pop("online", False):
            return self._online(signals, model, indices, **options)
        spec, samples = self._scoring_spec(model), self._samples(model)
        if indices is not None:
            samples = samples.take(indices)
        fresh = options.pop("fresh_adapter", None)
        adapter = LoraSpec(**fresh) if fresh else None
        self._check_scorable(spec, model, options.get("gradient"), adapter)
        how = {"gradient": "last_v_b", "variant": "standard", **options}
        gradient = how["gradient"] if "effort" in signals else None
        key = {**self._scores_key(model, adapter, signals, how), "samples": samples.fingerprint}

        def make(folder: Path, cost: Meter) -> None:
            from safetensors.numpy import save_file

            from staff.scoring import Asked, score_samples

            asked = Asked(tuple(signals), **how)
            values = score_samples(
                self._load(model, adapter, gradient),
                samples,
                asked,
                batch_tokens=self.scoring.batch_tokens,
                pad_token_id=spec.tokenizer().pad_token_id,
                one_at_a_time=self.scoring.one_at_a_time,
                meter=cost,
            )
            save_file(values, folder / "scores.safetensors")
            (folder / "ids.json").write_text(json.dumps(samples.ids))

        def foresee(folder: Path, cost: Meter) -> None:
            from safetensors.numpy import save_file

            from staff.scoring import Asked

            if model != "target":
                self.tuned(model)
            asked = Asked(tuple(signals), **how)
            shapes = self._shapes(model, adapter, gradient)
            tokens = int(samples.lengths.sum())
            flops = scoring_flops(shapes, samples.lengths, samples.answer_lengths, asked)
            cost.add(flops, tokens, tokens if gradient else 0)
            values = {signal: stand_in(len(samples), signal + model) for signal in signals}
            if "embedding" in values:
                values["embedding"] = np.stack([values["embedding"]] * 2, axis=1).astype(np.float32)
            save_file(values, folder / "scores.safetensors")

        label = f"{', '.join(signals)} of {len(samples)} samples, {model} model"
        scored = self.store.get("scores", key, make, label=label, foresee=foresee)
        return load_file(scored.path / "scores.safetensors")

    def _scores_key(
        self, model: str, adapter: LoraSpec | None, signals: Sequence[str], how: dict[str, Any]
    ) -> dict[str, Any]:
        """What scores depend on but for the samples; what a signal does not depend on is no part of its name."""
        gradient = how["gradient"] if "effort" in signals else None
        return {
            "signals": sorted(signals),
            "gradient": gradient,
            "variant": how["variant"] if "el2n" in signals else None,
            "model": self._scoring_spec(model).identity(),
            "tuned": self._tuned_key(model),
            "fresh_adapter": self._fresh_key(model, adapter) if gradient not in (None, "all_linear") else None,
        }

    def _check_scorable(self, spec: ModelSpec, model: str, gradient: str | None, adapter: LoraSpec | None) -> None:
        if adapter and gradient == "all_linear":
            raise UserError(
                "gradient=all_linear differentiates by the model's own weights: leave out fresh_adapter."
            )
        merged = gradient == "all_linear" or (adapter and model != "target")
        if (spec.quantization or spec.in_parts) and merged:
            raise UserError(
                "adapters cannot be merged into weights of 4 bits or of a model that is shared out, as "
                "gradient=all_linear and fresh_adapter ask: choose gradient=last_v_b or all_lora without "
                "fresh_adapter, or finetune=lora finetune.fsdp=false."
            )

    def _online(
        self,
        signals: Sequence[str],
        model: str,
        indices: np.ndarray | None,
        gradient: str = "last_v_b",
        fresh_adapter: Any = None,
    ) -> dict[str, np.ndarray]:
        from safetensors.numpy import load_file

        if model == "target" or tuple(signals) != ("effort",) or fresh_adapter is not None:
            raise UserError("scores online are efforts of a fine-tuned model, by its own adapter.")
        scores = load_file(self.tuned(model, online=gradient).path / ONLINE_SCORES)["effort"]
        return {"effort": scores if indices is None else scores[indices]}

    def select(self, method: SelectionMethod, budget: int) -> tuple[Artifact, Coreset]:
        """The method's coreset and the artefact it lies in, whose charges are the selection overhead."""
        key = {
            "method": [
                f"{type(method).__module__}.{type(method).__qualname__}",
                plain(method),
                source_digest(method),
            ],
            "budget": budget,
            "seed": self.seed,
            "samples": [self.for_small.fingerprint, self.for_target.fingerprint],
            "models": [self.family.small.identity(), self.family.target.identity()],
            "settings": {**self.settings.key(), "epochs": [self._epochs(role) for role in ROLES]},
            "scoring_dtype": self.scoring.dtype,
            "versions": [STAGE_VERSIONS[stage] for stage in ("finetune", "scores")],
        }

        def make(folder: Path, cost: Meter) -> None:
            coreset = run_method(method, self, budget, Draws(self.seed, self.ids))
            coreset.save(folder, self.ids)

        artifact = self.store.get("coreset", key, make, label=f"select by {type(method).__name__}")
        return artifact, Coreset.load(artifact.path)

    def tuned(self, model: str, online: str | None = None) -> Artifact:
        """The role's fine-tuning on the whole pool; `online`: with efforts by this kind of gradient."""
        spec, samples, epochs = self._spec(model), self._samples(model), self._epochs(model)
        return finetuned(self.store, spec, samples, self.settings, epochs, self.seed, online)

    def _load(self, model: str, adapter: LoraSpec | None, gradient: str | None) -> Any:
        """The role's model, ready to be differentiated as `gradient` says."""
        spec = self._scoring_spec(model)
        tuned = None if model == "target" else self.tuned(model)
        loaded = load_tuned(spec, tuned.path, self.settings.kind) if tuned else spec.load()
        own = tuned is not None and self.settings.kind == "lora"
        if gradient == "all_linear":
            return loaded.merge_and_unload() if own else loaded
        if gradient is None or (own and adapter is None):
            return loaded
        if own and adapter is not None:
            return replace_lora(loaded, adapter, self._adapter_seed)
        return fresh_lora(loaded, adapter or self.settings.lora, self._adapter_seed)

    def _shapes(self, model: str, adapter: LoraSpec | None, gradient: str | None) -> Any:
        """What `_load` gives, without weights."""
        shapes = self._scoring_spec(model).shapes()
        own = model != "target" and self.settings.kind == "lora"
        if gradient == "all_linear" or (gradient is None and not own):
            return shapes
        return fresh_lora(shapes, adapter or self.settings.lora, self._adapter_seed)

    def _fresh_key(self, model: str, adapter: LoraSpec | None) -> dict[str, Any] | None:
        if adapter is None and model != "target" and self.settings.kind == "lora":
            return None
        return {**plain(adapter or self.settings.lora), "seed": self._adapter_seed}

    def _tuned_key(self, model: str) -> str | None:
        if model == "target":
            return None
        key = finetune_key(self._spec(model), self._samples(model), self.settings, self._epochs(model), self.seed)
        return self.store.fingerprint("finetune", key)

    @property
    def _adapter_seed(self) -> int:
        return int(np.random.default_rng([self.seed, zlib.crc32(b"fresh adapter")]).integers(2**31))

    def _scoring_spec(self, model: str) -> ModelSpec:
        spec = self._spec(model)
        return replace(spec, dtype=self.scoring.dtype or spec.dtype)

    def _spec(self, model: str) -> ModelSpec:
        return self.family.small if model == "small" else self.family.target

    def _samples(self, model: str) -> TokenizedSamples:
        return self.for_small if model == "small" else self.for_target

    def _epochs(self, model: str) -> int:
        return self.settings.small_epochs if model == "small" else self.settings.epochs
