"""What a selection method may ask about the training samples: scores, embeddings, lengths."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from staff.artifacts import STAGE_VERSIONS, Artifact, Store
from staff.cost import Meter
from staff.data import TokenizedSamples
from staff.errors import UserError
from staff.finetune import FinetuneSettings, finetune_key, finetuned
from staff.models import Family, LoraSpec, ModelSpec, fresh_lora, load_tuned, plain, replace_lora
from staff.selection import Coreset, Draws, SelectionMethod, source_digest

ROLES = ("small", "target", "target_tuned")


class ArrayPool:
    """A pool whose scores are arrays that lie at hand; no model is needed.

    Args:
        ids: the samples' ids, unique.
        scores: by signal and model role, such as {("effort", "small"): array of shape (N,)}; embeddings have
            shape (N, dimensions).
    """

    def __init__(self, ids: Sequence[str], scores: Mapping[tuple[str, str], np.ndarray]):
        if len(set(ids)) != len(ids):
            raise UserError("ids must be unique: give every sample an id of its own.")
        self.ids = list(ids)
        self._scores = dict(scores)

    def scores(self, signal: str, model: str, indices: np.ndarray | None = None, **options: Any) -> np.ndarray:
        if (signal, model) not in self._scores:
            known = ", ".join(f"{s} of {m}" for s, m in self._scores) or "none"
            raise UserError(f"the pool has no {signal!r} of {model!r}: it has {known}.")
        values = self._scores[signal, model]
        return values if indices is None else values[indices]


@dataclass(frozen=True)
class Pool:
    """The training samples and the models that can be asked about them; every answer is an artefact.

    A method names a model by its role: "small", the small model fine-tuned on the whole pool; "target", the raw
    target LLM; "target_tuned", the target fine-tuned on the whole pool. A role is fine-tuned on first need.

    Attributes:
        for_small: the samples as the small model's tokenizer reads them.
        for_target: the same samples in the same order, as the target's tokenizer does.
        seed: the selection seed; it reaches fine-tuning for scores and fresh adapters.
        batch_tokens: padded tokens of one scoring batch.
    """

    for_small: TokenizedSamples
    for_target: TokenizedSamples
    family: Family
    settings: FinetuneSettings
    store: Store
    seed: int
    batch_tokens: int

    @property
    def ids(self) -> Sequence[str]:
        return self.for_target.ids

    def scores(self, signal: str, model: str, indices: np.ndarray | None = None, **options: Any) -> np.ndarray:
        """`signal` of the samples `indices` (all by default), in their order, from the model of role `model`.

        Args:
            signal: as in `staff.scoring.score_samples`, which also takes `gradient` and `variant` of `options`.
            options: `fresh_adapter`, {rank, alpha, targets}: score with a new adapter in place of fine-tuning's.
        """
        from safetensors.numpy import load_file

        if model not in ROLES:
            raise UserError(f"the model role {model!r} is unknown: choose one of {', '.join(ROLES)}.")
        spec, samples = self._spec(model), self._samples(model)
        if indices is not None:
            samples = samples.take(indices)
        fresh = options.pop("fresh_adapter", None)
        adapter = LoraSpec(**fresh) if fresh else None
        key = {
            "signal": signal,
            "options": options,
            "model": spec.identity(),
            "tuned": self._tuned_key(model),
            "fresh_adapter": self._fresh_key(model, adapter) if signal == "effort" else None,
            "samples": samples.fingerprint,
        }

        label = f"{signal} of {len(samples)} samples, {model} model"

        def make(folder: Path, cost: Meter) -> None:
            from safetensors.numpy import save_file

            from staff.scoring import score_samples

            loaded = self._load(model, adapter, adapted=signal == "effort")
            pad = spec.tokenizer().pad_token_id
            values = score_samples(
                loaded, samples, signal, **options, batch_tokens=self.batch_tokens, pad_token_id=pad, meter=cost
            )
            save_file({"scores": values}, folder / "scores.safetensors")
            (folder / "ids.json").write_text(json.dumps(samples.ids))

        return load_file(self.store.get("scores", key, make, label=label).path / "scores.safetensors")["scores"]

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
            "versions": [STAGE_VERSIONS[stage] for stage in ("finetune", "scores")],
        }

        def make(folder: Path, cost: Meter) -> None:
            coreset = method.select(self, budget, Draws(self.seed, self.ids))
            if len(np.unique(coreset.indices)) != budget:
                raise RuntimeError(f"{type(method).__name__} selected {len(coreset.indices)}, not {budget}")
            coreset.save(folder, self.ids)

        artifact = self.store.get("coreset", key, make, label=f"select by {type(method).__name__}")
        return artifact, Coreset.load(artifact.path)

    def tuned(self, model: str) -> Artifact:
        """The role's fine-tuning on the whole pool."""
        return finetuned(
            self.store, self._spec(model), self._samples(model), self.settings, self._epochs(model), self.seed
        )

    def _load(self, model: str, adapter: LoraSpec | None, adapted: bool) -> Any:
        """The role's model; `adapted`: with LoRA parameters to differentiate by."""
        spec = self._spec(model)
        if model == "target":
            loaded = spec.load()
            return fresh_lora(loaded, adapter or self.settings.lora, self._adapter_seed) if adapted else loaded
        loaded = load_tuned(spec, self.tuned(model).path, self.settings.kind)
        if not adapted or (adapter is None and self.settings.kind == "lora"):
            return loaded
        if self.settings.kind == "lora" and adapter is not None:
            return replace_lora(loaded, adapter, self._adapter_seed)
        return fresh_lora(loaded, adapter or self.settings.lora, self._adapter_seed)

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

    def _spec(self, model: str) -> ModelSpec:
        return self.family.small if model == "small" else self.family.target

    def _samples(self, model: str) -> TokenizedSamples:
        return self.for_small if model == "small" else self.for_target

    def _epochs(self, model: str) -> int:
        return self.settings.small_epochs if model == "small" else self.settings.epochs
