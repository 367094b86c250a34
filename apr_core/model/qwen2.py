"""
Qwen2, the ground truth: what every other forward in this project is compared with.

    ids -> embed_tokens -> layers -> norm -> lm_head -> logits

    layer:      x = x + self_attn(input_layernorm(x))
                x = x + mlp(post_attention_layernorm(x))
    self_attn:  q, k, v = projections with bias;  q, k rotated by their position (RoPE)
                softmax(q k' / sqrt(head_dim), no later position) v, then o_proj
                each of the num_key_value_heads serves a group of query heads (GQA)
    mlp:        down_proj(silu(gate_proj(x)) * up_proj(x))

All arithmetic is float32, one sequence at a time, written to be read. Parts carry their Hugging Face names. How a
weight is stored and where it lives is behind `Weights`: this file knows neither formats nor devices.

Exactness: float32 throughout; the angles of RoPE are computed in float64, because at position 30000 their float32
    values are off by up to 0.0009 radians (measured, theta 1e6).
Cost: 4 bytes per weight, 8 * num_key_value_heads * head_dim bytes per layer and position; attention holds one score
    per query head, token and position.
Source: Qwen2 technical report (arXiv:2407.10671) and the Hugging Face implementation, whose answers are the oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from apr_core.contract.types import ValidatedModel
from apr_core.model.config import Qwen2Config
from apr_core.model.linear import Place, Sealed, Weights
from apr_core.model.tokens import Tokenizer
from apr_core.model.trace import Trace


class KVCache:
    """Keys (rotated) and values of the positions seen so far, per layer [num_key_value_heads, length, head_dim]."""

    def __init__(self, num_hidden_layers: int, start: int = 0) -> None:
        self.start = self.length = start  # positions before ``start`` are counted and not held
        self._keys: list[Tensor | None] = [None] * num_hidden_layers
        self._values: list[Tensor | None] = [None] * num_hidden_layers

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put new positions behind the first ``length`` and return all of them; ``advance`` makes them stay."""
        old_keys, old_values = self._keys[layer], self._values[layer]
        if old_keys is not None and old_values is not None:
            # Cut at `held`: a forward that failed half way must not leave its positions in the first layers only.
            held = self.length - self.start
            keys = torch.cat((old_keys[:, :held], keys), dim=1)
            values = torch.cat((old_values[:, :held], values), dim=1)
        self._keys[layer], self._values[layer] = keys, values
        return keys, values

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` positions as seen, once every layer has them."""
        self.length += tokens


class Rotary:
    """Rotary position embedding: element i of a head is paired with i + head_dim / 2 (the NEOX halves)."""

    def __init__(
        self,
        config: Qwen2Config,
        start: int,
        tokens: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device=device) / config.head_dim
        positions = torch.arange(start, start + tokens, dtype=torch.float64, device=device)
        angles = torch.outer(positions, config.rope_theta**-exponents)  # [tokens, head_dim / 2]
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """Turn each pair of ``x`` [heads, tokens, head_dim] by the angle of its position and frequency."""
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * self.cos - second * self.sin, second * self.cos + first * self.sin), dim=-1)


# (q [heads, tokens, head_dim], k, v [kv_heads, positions, head_dim]) -> mixed values [heads, tokens, head_dim]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Mix the values: the tokens of ``q`` are the last positions of ``k``, and none sees a later one."""
    tokens, head_dim = q.shape[1:]
    # Query head h reads key-value head h // group: [kv_heads, group, tokens, head_dim] against [kv_heads, 1, ...].
    grouped = q.reshape(k.shape[0], -1, tokens, head_dim)
    scores = grouped @ k.unsqueeze(1).transpose(-1, -2) * head_dim**-0.5
    earlier = k.shape[1] - tokens
    later = torch.ones(tokens, k.shape[1], dtype=torch.bool, device=q.device).triu(earlier + 1)
    shares = scores.masked_fill(later, -torch.inf).softmax(dim=-1)
    mixed: Tensor = (shares @ v.unsqueeze(1)).flatten(0, 1)
    return mixed


class Attention(Sealed):
    """Causal self-attention with grouped key-value heads."""

    def __init__(self, config: Qwen2Config, weights: Weights, layer: int, attend: Attend) -> None:
        name = f"model.layers.{layer}.self_attn"
        self.q_proj = weights.linear(f"{name}.q_proj")
        self.k_proj = weights.linear(f"{name}.k_proj")
        self.v_proj = weights.linear(f"{name}.v_proj")
        self.o_proj = weights.linear(f"{name}.o_proj")
        self.layer, self.head_dim, self.attend = layer, config.head_dim, attend

    def __call__(self, x: Tensor, rotary: Rotary, cache: KVCache, trace: Trace | None) -> Tensor:
        """Map [tokens, hidden_size] to the same shape."""
        q = rotary(self._heads(self.q_proj(x)))
        k = rotary(self._heads(self.k_proj(x)))
        v = self._heads(self.v_proj(x))
        q, k, v = (
            note(trace, f"layers.{self.layer}.{name}", heads.transpose(0, 1)).transpose(0, 1)
            for name, heads in (("q", q), ("k", k), ("v", v))
        )
        k, v = cache.append(self.layer, k, v)

        mixed = self.attend(q, k, v)
        return note(trace, f"layers.{self.layer}.attn_output", self.o_proj(mixed.transpose(0, 1).flatten(1)))

    def _heads(self, x: Tensor) -> Tensor:
        """Split [tokens, heads * head_dim] into [heads, tokens, head_dim]."""
        return x.reshape(x.shape[0], -1, self.head_dim).transpose(0, 1)


class MLP(Sealed):
    """SwiGLU."""

    def __init__(self, weights: Weights, layer: int) -> None:
        name = f"model.layers.{layer}.mlp"
        self.gate_proj = weights.linear(f"{name}.gate_proj")
        self.up_proj = weights.linear(f"{name}.up_proj")
        self.down_proj = weights.linear(f"{name}.down_proj")

    def __call__(self, x: Tensor) -> Tensor:
        """Map [tokens, hidden_size] to the same shape."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(Sealed):
    """Attention and MLP, each on a normalised copy of the residual that it is added to."""

    def __init__(self, config: Qwen2Config, weights: Weights, layer: int, attend: Attend = attend) -> None:
        name = f"model.layers.{layer}"
        self.input_layernorm = weights.norm(f"{name}.input_layernorm", config.rms_norm_eps)
        self.self_attn = Attention(config, weights, layer, attend)
        self.post_attention_layernorm = weights.norm(f"{name}.post_attention_layernorm", config.rms_norm_eps)
        self.mlp = MLP(weights, layer)
        self.layer = layer

    def __call__(self, x: Tensor, rotary: Rotary, cache: KVCache, trace: Trace | None) -> Tensor:
        """Map the residual [tokens, hidden_size] to the next one."""
        x = x + self.self_attn(self.input_layernorm(x), rotary, cache, trace)
        x = note(trace, f"layers.{self.layer}.resid_attn", x)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return note(trace, f"layers.{self.layer}.resid_ffn", x)


class Qwen2(Sealed):
    """
    A whole model that has passed the contract. Implements `TracedForward`.

    Args:
        validated: The admitted weights and their configuration.
        device: A torch device.
        tokenizer: The model's own, when it has one.
        weights: Hands out the parts; None for all of them in float32 on ``device``.
        attend: The core of attention.

    Raises:
        LoadError: The configuration asks for arithmetic that is not written here.
    """

    backend = "torch"

    def __init__(
        self,
        validated: ValidatedModel,
        device: str = "cpu",
        tokenizer: Tokenizer | None = None,
        *,
        weights: Weights | None = None,
        attend: Attend = attend,
    ) -> None:
        self.config = config = Qwen2Config.of(validated)
        self.tokenizer = tokenizer
        self.bypassed = validated.bypassed
        weights = weights or Weights(validated, Place(device))
        self.torch_device = weights.place.device
        self.embed_tokens = weights.embedding("model.embed_tokens")
        self.layers = self.make_layers(weights, attend)
        self.norm = weights.norm("model.norm", config.rms_norm_eps)
        self.lm_head = weights.head(self.embed_tokens)

    def make_layers(self, weights: Weights, attend: Attend) -> Iterable[DecoderLayer]:
        """Build the layers; each forward goes through them once, in order."""
        return tuple(DecoderLayer(self.config, weights, at, attend) for at in range(self.config.num_hidden_layers))

    @property
    def device(self) -> str:
        """Where the arithmetic runs, e.g. ``cpu``."""
        return str(self.torch_device)

    def new_cache(self, start: int = 0) -> KVCache:
        """Return an empty cache whose first token stands at position ``start``."""
        return KVCache(self.config.num_hidden_layers, start)

    @torch.inference_mode()
    def forward(
        self, ids: NDArray[np.int64], cache: KVCache | None = None, trace: Trace | None = None
    ) -> NDArray[np.float32]:
        """
        Return the logits, float32 [tokens, vocab_size], of ``ids`` int64 [tokens].

        Positions continue from ``cache``, which then holds these tokens too; without one they start at 0.

        Raises:
            InferenceError: An id outside the vocabulary, nothing to compute, or more positions than the model has.
        """
        cache = self.new_cache() if cache is None else cache
        ids = self.config.check_input(ids, cache.length)
        x = self.embed_tokens(torch.tensor(ids, device=self.torch_device))
        rotary = Rotary(self.config, cache.length, ids.size, self.torch_device, x.dtype)
        for layer in self.layers:
            x = layer(x, rotary, cache, trace)
            del layer  # of streamed layers the next is built now, and this one must be gone by then
        x = note(trace, "final_hidden", self.norm(x))
        logits = note(trace, "logits", self.lm_head(x))

        cache.advance(ids.size)
        result: NDArray[np.float32] = logits.float().cpu().numpy()
        return result


def note(trace: Trace | None, name: str, values: Tensor) -> Tensor:
    """
    Record ``values`` [tokens, ...] as [tokens, dim] when there is a trace; return what the forward goes on with.

    That is ``values`` itself, but for a fault that is planted through ``engines.wrap``.
    """
    if trace is None:
        return values
    planted = trace.record(name, values.flatten(1).cpu().numpy())
    return (
        values
        if planted is None
        else torch.tensor(planted, device=values.device).to(values.dtype).reshape(values.shape)
    )
