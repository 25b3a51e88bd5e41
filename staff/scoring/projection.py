"""Per-sample gradients projected to few dimensions by random signs, for all parameters of a pass at once.

The projection of a gradient g (P,) is S^T g / sqrt(d) with a matrix S (P, d) of independent signs, so that inner
products of projections are those of the gradients in expectation (Johnson and Lindenstrauss, 1984; LESS, Xia et al.
2024, section 3.2). S is never held: a block of its rows is made when it is needed, from the parameter's name and
the number of the row. So every pass, on whatever device, projects alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from staff.scoring.gradients import LayerGradient
from staff.scoring.positions import widened

BLOCK_SIGNS = 2**24
"""Signs that are held at once: 64 MB."""

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""Of the Trainer's AdamW."""

Moments = Mapping[str, tuple[Tensor, Tensor]]
"""Adam's first and second moment of every parameter, by its name."""


@dataclass(frozen=True)
class Projection:
    """A reducer: gradients, or the directions in which Adam would move, projected to (B, dim).

    Attributes:
        dim: d.
        moments: None: plain gradients; otherwise of all parameters, as they stood at the model's checkpoint.
    """

    dim: int
    moments: Moments | None = None

    def of_layer(self, gradient: LayerGradient) -> Tensor:
        x, g = widened(gradient.x), widened(gradient.g)
        projected = self._projected(f"{gradient.name}.weight", g.mT @ x)
        if gradient.layer.bias is not None:
            projected = projected + self._projected(f"{gradient.name}.bias", g.sum(1))
        return projected

    def of_parameter(self, name: str, gradient: Tensor) -> Tensor:
        return self._projected(name, widened(gradient)[None])[0]

    def _projected(self, name: str, gradients: Tensor) -> Tensor:
        """(B, dim), from the gradients (B, *shape) of one parameter."""
        if self.moments is not None:
            gradients = adam_direction(gradients, *(moment.to(gradients.device) for moment in self.moments[name]))
        flat = gradients.flatten(1)
        projected = flat.new_zeros(len(flat), self.dim)
        for start, block in sign_blocks(name, flat.shape[1], self.dim, flat.device):
            projected += flat[:, start : start + len(block)] @ block.to(flat.dtype)
        return projected / self.dim**0.5


def adam_direction(gradients: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The step that Adam would take for each gradient alone, in units of the learning rate: (B, *shape).

    As in LESS' released code: without bias correction, and with epsilon inside the root.

    Args:
        gradients: (B, *shape).
        first, second: Adam's moments, (*shape,).
    """
    m = BETAS[0] * first + (1 - BETAS[0]) * gradients
    v = BETAS[1] * second + (1 - BETAS[1]) * gradients.square()
    return m / (v + EPSILON).sqrt()


def sign_blocks(name: str, rows: int, dim: int, device: torch.device | str = "cpu") -> Iterator[tuple[int, Tensor]]:
    """The signs (rows, dim) of the parameter `name`, some rows at a time: the first row's number, and the rows."""
    bytes_of_row = -(-dim // 64) * 8
    signs_of_byte = (2.0 * (torch.arange(256)[:, None] >> torch.arange(8) & 1) - 1).to(device)
    size = max(1, BLOCK_SIGNS // dim)
    for start in range(0, rows, size):
        count = min(size, rows - start)
        words = random_words(name, start * bytes_of_row // 8, count * bytes_of_row // 8, device)
        of_bytes = F.embedding(words.view(torch.uint8).int(), signs_of_byte)
        yield start, of_bytes.view(count, -1)[:, :dim]


def random_words(key: str, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """64 random bits each, (count,) int64: the words from number `start` on of the sequence that `key` names.

    SplitMix64 (Steele, Lea and Flood, 2014) in integers that overflow, which is the same on every device.
    """
    origin = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little", signed=True)
    z = torch.arange(start + 1, start + count + 1, device=device) * _signed(0x9E3779B97F4A7C15) + origin
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shifted(z, 31)


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def _shifted(words: Tensor, bits: int) -> Tensor:
    """To the right, filled up with zeros."""
    return words >> bits & 2 ** (64 - bits) - 1
