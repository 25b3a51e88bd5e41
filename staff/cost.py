"""What a stage costs: wall seconds, FLOPs, tokens, peak memory, and the device it ran on.

The paper reports selection overhead in hours (figure 4); hours depend on the machine, FLOPs do not, so both are
kept. FLOPs follow from the shapes in the model's configuration and the real token counts, padding apart.
"""

import platform
import re
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

import numpy as np


@dataclass(frozen=True)
class Cost:
    """What a piece of work took; costs add up, ``sum(costs, Cost.zero())``."""

    seconds: float
    """Wall time; when costs are added it is the time one after the other, whatever ran side by side."""
    flops: float
    """Floating point operations, two to a multiply-add."""
    tokens_forward: int
    """Tokens through a forward pass, padding not counted."""
    tokens_backward: int
    """Tokens through a backward pass."""
    peak_memory_bytes: int
    """Most memory held at once: allocated on the GPUs, or resident in RAM where none was used."""
    device: str
    """Name of the GPU or processor; several are joined by " + "."""

    def __add__(self, other: "Cost") -> "Cost":
        devices = {*self.device.split(" + "), *other.device.split(" + ")} - {""}
        return Cost(
            self.seconds + other.seconds,
            self.flops + other.flops,
            self.tokens_forward + other.tokens_forward,
            self.tokens_backward + other.tokens_backward,
            max(self.peak_memory_bytes, other.peak_memory_bytes),
            " + ".join(sorted(devices)),
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Cost":
        """The inverse of ``to_dict``, exact to the digit; a missing or unknown field is a TypeError."""
        return cls(**fields)

    @classmethod
    def zero(cls) -> "Cost":
        """Nothing, on no device."""
        return cls(0.0, 0.0, 0, 0, 0, "")


class Meter:
    """Measures the ``with`` block it is opened for; the work inside reports its FLOPs and tokens by ``add``.

    Memory is that of this process: data-loading workers and other ranks are not seen.
    """

    def __init__(self) -> None:
        self._seconds = self._kept = 0.0
        self._started: float | None = None
        self._flops = 0.0
        self._tokens_forward = 0
        self._tokens_backward = 0
        self._peak_memory_bytes = 0
        self._device = ""

    def add(self, flops: float = 0, tokens_forward: int = 0, tokens_backward: int = 0) -> None:
        """Count work that was done: FLOPs, and tokens through a forward or a backward pass."""
        self._flops += float(flops)
        self._tokens_forward += int(tokens_forward)
        self._tokens_backward += int(tokens_backward)

    def __enter__(self) -> Self:
        for gpu in _gpus_in_use():
            _cuda().synchronize(gpu)
            _cuda().reset_peak_memory_stats(gpu)
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of what ran before
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        gpus = _gpus_in_use()
        for gpu in gpus:
            _cuda().synchronize(gpu)
        self._seconds, self._started = self.seconds, None
        peak = sum(_cuda().max_memory_allocated(gpu) for gpu in gpus) if gpus else _peak_resident_bytes()
        self._peak_memory_bytes = max(self._peak_memory_bytes, peak)
        self._device = _cuda().get_device_name(gpus[0]) if gpus else processor_name()

    @property
    def seconds(self) -> float:
        """Measured so far; to be read at any time, from any thread."""
        started = self._started
        return self._seconds + (0.0 if started is None else time.perf_counter() - started)

    @property
    def lost(self) -> float:
        """Seconds that would be lost if the process were killed now: those that no checkpoint stands for."""
        return self.seconds - self._kept

    def keep(self) -> Cost:
        """What a checkpoint stands for that is written now."""
        with self.paused():
            self._kept = self._seconds
        return self.cost

    def take_over(self, checkpoint: Cost) -> None:
        """Count the time that an earlier process had spent on the checkpoint that the block goes on from; its FLOPs
        and tokens are left to whoever counts those of the whole."""
        self._seconds += checkpoint.seconds
        self._kept = checkpoint.seconds
        self._peak_memory_bytes = max(self._peak_memory_bytes, checkpoint.peak_memory_bytes)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave a part of the block out: neither its time nor its memory counts here."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    @property
    def cost(self) -> Cost:
        """What was measured and reported so far; to be read after the block."""
        return Cost(
            self._seconds,
            self._flops,
            self._tokens_forward,
            self._tokens_backward,
            self._peak_memory_bytes,
            self._device,
        )


def _cuda() -> Any:
    return sys.modules["torch"].cuda


def _gpus_in_use() -> list[int]:
    """The GPUs on which this process holds or held memory; asking neither imports torch nor wakes a device."""
    if "torch" not in sys.modules or not _cuda().is_initialized():
        return []
    return [gpu for gpu in range(_cuda().device_count()) if _cuda().max_memory_allocated(gpu)]


def _peak_resident_bytes() -> int:
    with suppress(OSError):
        if peak := re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text()):
            return int(peak[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@cache
def processor_name() -> str:
    with suppress(OSError):
        if name := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return name[1].strip()
    return platform.processor() or platform.machine()


def forward_flops(config: Any, lengths: Iterable[int], label_positions: int | Iterable[int] | None = None) -> float:
    """FLOPs of one forward pass of a decoder with gated MLPs (Llama, Mistral, Qwen2, Gemma 1 to 3).

    Two to a multiply-add of every linear layer and of both attention products, each over the full T x T of a
    sample, as torch's FlopCounterMode counts them (causal masks and sliding windows save nothing there);
    norms, activations, rotary embeddings and softmax are left out, as they are there.

    Args:
        config: a transformers configuration; a multimodal one counts by its text model.
        lengths: real tokens of every sample, shape (N,).
        label_positions: positions at which logits are computed, in all or for each sample; None: at all tokens.
    """
    linear, attention = _matrix_products(config, lengths, label_positions)
    return float(linear + attention)


def training_flops(
    config: Any,
    lengths: Iterable[int],
    label_positions: int | Iterable[int] | None = None,
    *,
    adapter_parameters: int | None = None,
) -> float:
    """FLOPs of one forward and backward pass over the samples: one epoch.

    Full fine-tuning: a backward pass costs two forward passes, one for the gradients of the activations and one
    for those of the weights (Kaplan et al. 2020, arXiv:2001.08361, section 2.1), so three in all. With LoRA the
    frozen weights need no gradient of their own: linear layers count twice, attention (no weights, both factors
    are activations) three times, and each adapter parameter 6 FLOPs a token. The gradients at the input of the
    first block, which a frozen embedding may save, are counted; recomputation by gradient checkpointing is not.

    Args:
        config, lengths, label_positions: as in ``forward_flops``; a trainer computes logits at all tokens.
        adapter_parameters: entries of all LoRA matrices A and B together; None: all weights are trained.
    """
    lengths = [int(length) for length in lengths]
    linear, attention = _matrix_products(config, lengths, label_positions)
    if adapter_parameters is None:
        return float(3 * (linear + attention))
    return float(2 * linear + 3 * attention + 6 * adapter_parameters * sum(lengths))


def _matrix_products(
    config: Any, lengths: Iterable[int], label_positions: int | Iterable[int] | None
) -> tuple[int, int]:
    """Forward FLOPs of the linear layers and of the attention products."""
    config = config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    projections = config.hidden_size * head_dim * 2 * (heads + key_value_heads)
    block = projections + 3 * config.hidden_size * config.intermediate_size

    lengths = [int(length) for length in lengths]
    if label_positions is None:
        label_positions = sum(lengths)
    elif not isinstance(label_positions, int):
        label_positions = sum(int(count) for count in label_positions)
    head = config.hidden_size * config.vocab_size * label_positions
    linear = 2 * (config.num_hidden_layers * block * sum(lengths) + head)
    attention = 4 * config.num_hidden_layers * heads * head_dim * sum(length**2 for length in lengths)
    return linear, attention


def scoring_flops(model: Any, lengths: np.ndarray, answer_lengths: np.ndarray, asked: Any) -> float:
    """FLOPs of scoring samples, padding apart: a forward pass, and for "effort" a backward pass.

    A backward pass through frozen linear layers costs what their forward pass cost, through attention twice that;
    "last_v_b" wants of attention only the gradient of the values, half of it. What a fused kernel computes besides
    is not counted.

    Args:
        model: its shapes count; it may lie on the meta device.
        lengths, answer_lengths: tokens of every sample and of its answer, shape (N,).
        asked: `staff.scoring.Asked`.
    """
    config = model.config.get_text_config()
    tokens, labels = int(lengths.sum()), int(answer_lengths.sum())
    at = labels + (len(lengths) if asked.at_both else 0)
    attention_width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    attention = 4 * attention_width * int(np.square(lengths).sum())
    after_attention = 2 * config.hidden_size * (attention_width + 3 * config.intermediate_size)
    adapters = 2 * tokens * sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    head_positions = 0 if tuple(asked.signals) == ("embedding",) else at
    forward = forward_flops(config, lengths, head_positions) - after_attention * (tokens - at)
    if "effort" not in asked.signals:
        return forward + adapters
    if asked.gradient == "last_v_b":
        head = 2 * config.hidden_size * config.vocab_size
        return forward + adapters + labels * (after_attention + head) + attention // 2
    backward = forward + 2 * adapters + config.num_hidden_layers * attention
    if asked.gradient == "all_linear":
        backward += _contraction_flops(model, lengths, answer_lengths)
    return forward + adapters + backward


def _contraction_flops(model: Any, lengths: np.ndarray, answer_lengths: np.ndarray) -> float:
    """Of activations with output gradients, for all linear layers; the head sees the answer tokens alone."""
    from staff.gradients import gradient_layers, gram_is_cheaper

    total = 0.0
    for layer in gradient_layers(model, "all_linear").values():
        wide, tall = layer.in_features, layer.out_features
        seen = (answer_lengths if layer is model.get_output_embeddings() else lengths).astype(float)
        gram = gram_is_cheaper(int(seen.max()), wide, tall)
        total += 2 * float((np.square(seen) * (wide + tall) if gram else seen * wide * tall).sum())
    return total
