"""Pools, fine-tunings and conversations for the embedded models, and tiny random models of many families."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from safetensors.torch import load_file

from staff.data.task import Sample
from staff.data.tokens import TokenizedSamples, Tokens, read_tokens, tokenize
from staff.models.family import Family
from staff.models.prepare import prepare
from staff.models.spec import ModelSpec
from staff.pool import Pool, Slice
from staff.selection import SelectionMethod
from staff.store.cost import Meter
from staff.store.store import Store
from staff.training.memory import finetuning_memory
from staff.training.settings import FinetuneSettings
from staff.training.stage import Finetune

# ---------------------------------------------------------------- fine-tunings


SPEC = ModelSpec("pkg://staff/assets/tiny/small")
SETTINGS = FinetuneSettings(
    learning_rate=1e-3, batch_size=4, device_batch_size=4, epochs=1, small_epochs=1, max_length=512
)


def samples_of(count: int) -> TokenizedSamples:
    """Samples of various lengths, as the small model reads them."""
    rows = [
        Sample(str(i), f"Say {i} twice:" + " please" * (7 * i % 32), f" {i} and {i}" * (1 + i % 3), ())
        for i in range(count)
    ]
    return tokenize(rows, SPEC.tokenizer())


def tuned(
    samples: TokenizedSamples,
    folder: Path,
    settings: FinetuneSettings = SETTINGS,
    *,
    epochs: float = 2,
    seed: int = 0,
    spec: ModelSpec = SPEC,
    online: str | None = None,
) -> dict[str, Any]:
    """The weights of a fine-tuning that is run in `folder`."""
    folder.mkdir()
    with Meter() as meter:
        Finetune(spec, samples, settings, epochs, seed, online).run(folder, meter)
    assert meter.cost.tokens_backward == round(epochs * samples.lengths.sum()) and meter.cost.flops > 0
    return weights_of(folder)


def weights_of(folder: Path) -> dict[str, Any]:
    (file,) = [file for file in folder.glob("*.safetensors") if "online" not in file.name]
    return load_file(file)


def history(folder: Path) -> dict[str, Any]:
    """What a fine-tuning tells of itself."""
    return json.loads((folder / "training.json").read_text())


def farthest(first: dict[str, Any], second: dict[str, Any]) -> float:
    """The largest difference between two sets of weights."""
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def difference(first: dict[str, Any], second: dict[str, Any]) -> float:
    """The norm of the difference by the norm of the first: a few roundings that Adam magnifies do not decide it."""
    assert first.keys() == second.keys()
    squares = [((first[name] - second[name]).square().sum(), first[name].square().sum()) for name in first]
    apart, whole = (float(sum(column)) for column in zip(*squares))
    return (apart / whole) ** 0.5


SIZES = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
SIZES |= {"hidden_size": 128, "intermediate_size": 384, "vocab_size": 100}


def drawn(architecture: str, dtype: str, folder: Path) -> ModelSpec:
    """A model of four blocks with random weights, without a tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **SIZES, **special)).save_pretrained(folder)
    return ModelSpec(str(folder), dtype=dtype, attention="eager" if architecture == "gemma2" else "sdpa")


def told_and_peak(architecture: str, dtype: str, folder: Path, monkeypatch: Any, **changes: Any) -> tuple[int, int]:
    """The estimate of a fine-tuning's memory, and the most bytes that its tensors take, of two steps."""
    from experiments.benchmarks.common import peak_memory

    spec, tokenizer = drawn(architecture, dtype, folder / "model"), SPEC.tokenizer()
    monkeypatch.setattr(ModelSpec, "tokenizer", lambda _: tokenizer)
    rows = np.random.default_rng(0).integers(3, 100, (8, 256)).tolist()
    samples = TokenizedSamples.of_rows([str(i) for i in range(8)], rows, [248] * 8)
    settings = replace(SETTINGS, precision=dtype, **changes)
    told = finetuning_memory(spec, settings, samples.lengths, samples.answer_lengths).total
    return told, peak_memory(lambda: Finetune(spec, samples, settings, 1, 0).run(folder, Meter()))


# ---------------------------------------------------------------- pools


CONF = Path(__file__).resolve().parents[2] / "conf"
DEV_SIZE = 6


def composed(*overrides: str) -> Any:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides))


@cache
def method_named(name: str) -> SelectionMethod:
    """The preset as it is configured for the embedded family."""
    return instantiate(composed(f"method={name}").method, _convert_="all")


def tiny_pool(
    store: Path | Store, size: int = 40, dev: bool = True, seed: int = 0, overrides: Sequence[str] = ()
) -> Pool:
    """The shortest dialogues of the embedded excerpt, or of the task that is set, in two groups; the
    longest six of them are the validation slice. Models are fine-tuned for two epochs."""
    cfg = composed("finetune.epochs=2", "finetune.small_epochs=2", *overrides)
    family, settings, task = (instantiate(cfg[part], _convert_="all") for part in ("family", "finetune", "task"))
    rows = sorted(task.load("train"), key=lambda sample: len(sample.prompt))[: size + DEV_SIZE]
    small, target = (tokenize(rows, spec.tokenizer()) for spec in (family.small, family.target))
    groups = np.where(np.arange(len(rows)) % 4 == 0, "quarter", "rest")
    parts = {"pool": np.arange(size), "dev": np.arange(size, size + DEV_SIZE)}
    slices = {name: Slice(small.take(at), target.take(at), groups[at]) for name, at in parts.items()}
    if not dev:
        del slices["dev"]
    return Pool(slices, family, settings, store if isinstance(store, Store) else Store(store), seed)


def planted_pool(store: Path, size: int = 12, dev: int = 4) -> Pool:
    """Short planted questions: `size` of them are the pool, `dev` others the validation slice."""
    cfg = composed("task=planted", "task.size=300")
    family, settings, task = (instantiate(cfg[part], _convert_="all") for part in ("family", "finetune", "task"))
    rows = task.load("train")[: size + dev]
    small, target = (tokenize(rows, spec.tokenizer()) for spec in (family.small, family.target))
    parts = {"pool": np.arange(size), "dev": np.arange(size, size + dev)}
    slices = {name: Slice(small.take(at), target.take(at)) for name, at in parts.items()}
    return Pool(slices, family, settings, Store(store), 0)


# ---------------------------------------------------------------- a pool of sums


TINY = Family("tiny", ModelSpec("pkg://staff/assets/tiny/target"), ModelSpec("pkg://staff/assets/tiny/small"))


def sums(count: int, first: int = 0) -> list[Sample]:
    """Short prompts with answers of various lengths."""
    return [
        Sample(f"sum {i}", f"Add {i} to {i * i}:", f" {i + i * i}" * (1 + i % 4), ())
        for i in range(first, first + count)
    ]


def pool_of_sums(store: Path | Store, count: int = 12, dev: int = 0, family: Family = TINY, **fields: Any) -> Pool:
    """A pool of `count` samples, and `dev` others as its validation slice.

    Args:
        fields: of `Pool`.
    """
    kept = store if isinstance(store, Store) else Store(store)
    family = prepare(family, kept)

    def read(samples: list[Sample], spec: ModelSpec) -> TokenizedSamples:
        return read_tokens(kept.get(Tokens(samples, spec, family.reading)))

    rows = {"pool": sums(count), **({"dev": sums(dev, first=count)} if dev else {})}
    slices = {
        name: Slice(read(samples, family.small), read(samples, family.target)) for name, samples in rows.items()
    }
    return Pool(slices, family, **{"settings": SETTINGS, "store": kept, "seed": 0, **fields})


# ---------------------------------------------------------------- conversations

SYSTEM, ASKED, SAID = ("system", "Be brief."), ("user", "2 + 2?"), ("assistant", "It is 4.")
AGAIN = ("user", "3 + 3?"), ("assistant", "6, of course.")
SEVERAL = (SYSTEM, ASKED, SAID, *AGAIN)


def messages(*turns: tuple[str, Any], role: str = "role", content: str = "content") -> list[dict[str, Any]]:
    return [{role: name, content: text} for name, text in turns]


# ---------------------------------------------------------------- random models of many families


LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
}
NEOX: dict[str, Any] = {name: LLAMA[name] for name in LLAMA if name != "num_key_value_heads"}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen3": {**LLAMA, "head_dim": 16},
    "gpt2": {"n_embd": 32, "n_head": 2, "n_layer": 2, "n_positions": 1024},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 32,
    },
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "gpt_neox": NEOX,
    "phi": LLAMA,
    "phi3": LLAMA,
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "expand": 2},
    "mixtral": {**LLAMA, "num_local_experts": 2, "num_experts_per_tok": 1},
    "qwen3_moe": {  # every layer is sparse, so that no intermediate_size is used
        **{name: value for name, value in LLAMA.items() if name != "intermediate_size"},
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "olmo2": LLAMA,
    "granite": LLAMA,
    "smollm3": LLAMA,
    "stablelm": LLAMA,
    "cohere": LLAMA,
    "gemma2": {**LLAMA, "head_dim": 16},
}


def config_of(family: str, **other: Any) -> Any:
    """The transformers configuration of a family's tiny model."""
    from transformers import AutoConfig

    tokenizer = ModelSpec("pkg://staff/assets/tiny/target").tokenizer()
    known = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return AutoConfig.for_model(family, vocab_size=len(tokenizer), **{**known, **FAMILIES[family], **other})


# ---------------------------------------------------------------- random models of architectures with exact batches

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
WINDOWS = {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]}
GEMMA = {**WINDOWS, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {**GEMMA, "attn_logit_softcapping": 1.0},
    "gemma3_text": GEMMA,
}


def random_model(architecture: str = "llama", **changes: Any) -> Any:
    """A model of two layers with random weights, the same at every call."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **SHAPE | ARCHITECTURES[architecture] | changes)
    return AutoModelForCausalLM.from_config(config)


def _odd_attention() -> Any:
    import torch
    from torch import nn
    from transformers.models.llama import modeling_llama

    llama: Any = modeling_llama

    class Attention(llama.LlamaAttention):
        def __init__(self, config: Any, layer: int) -> None:
            super().__init__(config, layer)
            self.q_norm, self.k_norm = nn.LayerNorm(self.head_dim), nn.LayerNorm(self.head_dim)

        def forward(
            self, hidden_states: Any, position_embeddings: Any, attention_mask: Any = None, **rest: Any
        ) -> Any:
            split = *hidden_states.shape[:-1], -1, self.head_dim
            q = self.q_norm(self.q_proj(hidden_states).view(split)).transpose(1, 2)
            k = self.k_norm(self.k_proj(hidden_states).view(split)).transpose(1, 2)
            v = self.v_proj(hidden_states).view(split).transpose(1, 2)
            half = self.head_dim // 2
            angles = [each[..., :half] for each in position_embeddings]
            turned = llama.apply_rotary_pos_emb(q[..., :half], k[..., :half], *angles)
            q, k = (torch.cat([a, b[..., half:]], -1) for a, b in zip(turned, (q, k), strict=True))
            kernels, way = llama.ALL_ATTENTION_FUNCTIONS, self.config._attn_implementation
            out, _ = kernels.get_interface(way, llama.eager_attention_forward)(
                self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling
            )
            return self.o_proj(out.flatten(2)), None

    return Attention


def _odd_block() -> Any:
    from torch import nn
    from transformers.models.llama import modeling_llama

    llama: Any = modeling_llama

    class Block(llama.LlamaDecoderLayer):
        def __init__(self, config: Any, layer: int) -> None:
            super().__init__(config, layer)
            self.reads, width = config.reads, config.hidden_size
            self.self_attn = _odd_attention()(config, layer)
            self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(width), nn.LayerNorm(width)
            self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            if self.reads == "norm":
                self.first_norm = self.__dict__["_modules"].pop("input_layernorm")

        def forward(self, hidden_states: Any, **rest: Any) -> Any:
            norm = self.first_norm if self.reads == "norm" else self.input_layernorm
            hidden_states = hidden_states + 0.7 * self.self_attn(hidden_states=norm(hidden_states), **rest)[0]
            hidden_states = hidden_states + 0.7 * self.mlp(self.post_attention_layernorm(hidden_states))
            over = {"batch": 0, "padding": 1}.get(self.reads)
            return hidden_states if over is None else hidden_states - 0.1 * hidden_states.mean(over, keepdim=True)

    return Block


@cache
def odd_llama() -> Any:
    """The configuration class of a decoder that no list knows: norms with biases, norms of queries and keys,
    rotation of half of each head, an MLP without gate, scaled residuals. Its field `reads` makes it read the
    other samples of a batch ("batch") or what comes later in a row ("padding"), or renames its first norm ("norm").
    """
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
    from transformers.models.llama import modeling_llama

    llama: Any = modeling_llama
    block = _odd_block()

    class OddConfig(LlamaConfig):
        model_type = "odd_llama"
        reads: str = ""

    class OddForCausalLM(llama.LlamaForCausalLM):
        config_class = OddConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model.layers = nn.ModuleList(block(config, i) for i in range(config.num_hidden_layers))
            self.post_init()

    AutoConfig.register("odd_llama", OddConfig)
    AutoModelForCausalLM.register(OddConfig, OddForCausalLM)
    return OddConfig


def adapted(model: Any, std: float = 0.2, **lora: Any) -> Any:
    """The model with adapters whose A and B are both away from zero; with `std` 0 as they begin, B at zero."""
    import torch
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model, LoraConfig(**{"r": 3, "target_modules": "all-linear", **lora}))
    for name, parameter in model.named_parameters():
        if std and "lora_" in name:
            torch.nn.init.normal_(parameter, std=std)
    return model
