"""
The reference on a CUDA device: the same module in eager torch, with everything off that rounds without being asked.

TF32 and reduced-precision sums are off while it runs. Attention goes through torch's own function with an explicit mask
and scale, in its plain form: the fused float32 kernel of a device multiplies in pieces of TF32. Keys and values are
float32. It runs on the CPU too (``device="cpu"``), which is how a machine without a device tests this file. That it
really ran on a device is attested, never assumed: an engine that falls back in silence would agree with itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from apr_core.contract.layout import HEAD
from apr_core.contract.types import ValidatedModel
from apr_core.model.linear import Place, Weights
from apr_core.model.qwen2 import KVCache, Qwen2
from apr_core.model.tokens import Tokenizer
from apr_core.model.trace import Trace, TracedForward


def fused_attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Mix the values as `model.qwen2.attend` does, through torch's own function."""
    heads, tokens, head_dim = q.shape
    # An explicit mask: `is_causal` would align the first query with the first key, not the last with the last, and so
    # hide the past from every cached step of several tokens.
    seen = torch.ones(tokens, k.shape[1], dtype=torch.bool, device=q.device).tril(k.shape[1] - tokens)
    group = heads // k.shape[0]
    k, v = (x.repeat_interleave(group, dim=0) for x in (k, v))
    return functional.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=seen, scale=head_dim**-0.5)[0]


@contextmanager
def exact_products() -> Iterator[None]:
    """Turn TF32, reduced-precision sums and fused attention off, and leave the settings as they were."""
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    switches = (
        (matmul, "allow_tf32"),
        (matmul, "allow_fp16_reduced_precision_reduction"),
        (matmul, "allow_bf16_reduced_precision_reduction"),
        (cudnn, "allow_tf32"),
    )
    before = [getattr(owner, name) for owner, name in switches]
    for owner, name in switches:
        setattr(owner, name, False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for (owner, name), value in zip(switches, before, strict=True):
            setattr(owner, name, value)


class CudaQwen2(Qwen2):
    """
    The reference with torch's own attention and exact products. Implements `TracedForward`.

    Args:
        validated: The admitted weights and their configuration.
        device: ``cuda``; ``cpu`` runs the same code for tests.
        tokenizer: The model's own, when it has one.
        weights: As `Qwen2`.
    """

    backend = "torch, its own attention"

    def __init__(
        self,
        validated: ValidatedModel,
        device: str = "cuda",
        tokenizer: Tokenizer | None = None,
        weights: Weights | None = None,
    ) -> None:
        weights = weights or Weights(validated, Place(device))
        super().__init__(validated, device, tokenizer, weights=weights, attend=fused_attend)

    def forward(
        self, ids: NDArray[np.int64], cache: KVCache | None = None, trace: Trace | None = None
    ) -> NDArray[np.float32]:
        """Return the logits; as `Qwen2.forward`."""
        with exact_products():
            return super().forward(ids, cache, trace)


@dataclass(frozen=True)
class Attestation:
    """
    What a device did for one forward.

    Attributes:
        device: What the model says it runs on.
        allocated_bytes: Held on the device by this process.
        expected_bytes: What the weights take at least.
        kernels: Kernels that ran on the device during the forward; copies and fills are none.
    """

    device: str
    allocated_bytes: int
    expected_bytes: int
    kernels: int

    @property
    def doubt(self) -> str:
        """Say why it cannot be said that the device computed, or nothing."""
        if not self.device.startswith("cuda"):
            return f"the CUDA side ran on {self.device}"
        if self.allocated_bytes < self.expected_bytes:
            return f"{self.allocated_bytes} bytes on the device, the weights alone take {self.expected_bytes}"
        return "" if self.kernels else "no kernel ran on the device"


def attest(model: TracedForward, ids: NDArray[np.int64], expected_bytes: int) -> Attestation:
    """
    Run one forward and say what the device did.

    Args:
        model: The engine in question.
        ids: What it is fed.
        expected_bytes: What its weights take on the device at least.
    """
    if not model.device.startswith("cuda") or not torch.cuda.is_available():
        return Attestation(model.device, 0, expected_bytes, 0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        model.forward(ids)
        torch.cuda.synchronize()
    return Attestation(model.device, torch.cuda.memory_allocated(), expected_bytes, count_kernels(seen.events() or ()))


def count_kernels(events: Iterable[Any]) -> int:
    """Count what computed on the device: a forward on the host copies its ids there and back too."""
    on_device = (str(event.name) for event in events if str(event.device_type).endswith("CUDA"))
    return sum(1 for name in on_device if not name.startswith(("Memcpy", "Memset")))


def weight_bytes(validated: ValidatedModel) -> int:
    """Bytes that the weights take in float32; a tied head that the file stores besides is not held twice."""
    tensors = {n: t for n, t in validated.tensors.items() if not (validated.tied and n == HEAD)}
    return sum(4 * prod(tensor.shape) for tensor in tensors.values())
