"""Which kernels scaled dot-product attention may use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Leave cuDNN's attention out, for passes whose batches change their shape.

    On Hopper and newer GPUs torch prefers it, and it builds an execution plan for every new shape: about 0.1 s a
    batch. The flash and memory-efficient kernels need none.
    """
    import torch

    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
