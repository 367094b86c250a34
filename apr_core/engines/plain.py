"""
The second opinion: Qwen2 again, in numpy and float64, written from the equations and from nothing in ``model/``.

It shares with the reference the configuration, the names of a trace and the tokenizer, and no line of the forward: a
loop over heads and positions instead of batched products, a rotation of complex numbers instead of two real products,
one growing array per head instead of a stacked cache. Slow on purpose; a mistake has to be made twice to go unseen.

Exactness: float64 arithmetic on the float32 values that the stored types decode to. In float32 it is the yardstick of
    rounding: how far honest float32 arithmetic lies from it, in this code and not in the code that is judged.
Cost: every tensor is decoded when it is used, each time; beyond the cache it holds one tensor in float32, and the rows
    that are being multiplied in float64.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import DTypeLike, NDArray

from apr_core.contract.types import Validated, ValidatedModel
from apr_core.model.config import Qwen2Config
from apr_core.model.tokens import Tokenizer
from apr_core.model.trace import Trace

F64 = NDArray[np.float64]  # float32 where the forward was asked for that
_ROWS = 8192  # rows of a matrix that are in float64 at a time


class PlainCache:
    """Per layer and key-value head: rotated keys and values, [length, head_dim] in the precision of the forward."""

    def __init__(self, config: Qwen2Config, start: int = 0, dtype: DTypeLike = np.float64) -> None:
        self.start = self.length = start  # positions before ``start`` are counted and not held
        empty = np.empty((0, config.head_dim), dtype)
        grid = [[empty] * config.num_key_value_heads for _ in range(config.num_hidden_layers)]
        self.keys, self.values = grid, [list(row) for row in grid]


class PlainQwen2:
    """
    An admitted model, computed the slow way. Implements `TracedForward`.

    Args:
        validated: The admitted weights and their configuration.
        tokenizer: The model's own, when it has one.
        dtype: Precision of every step; the angles of RoPE are float64 in any.
        order: Seed of another order in which the terms of each product are summed; None for theirs.

    Raises:
        LoadError: The configuration asks for arithmetic that is not written here.
    """

    backend = "plain"
    device = "cpu"

    def __init__(
        self,
        validated: ValidatedModel,
        tokenizer: Tokenizer | None = None,
        dtype: DTypeLike = np.float64,
        order: int | None = None,
    ) -> None:
        self._dtype, self._order = dtype, order
        self.config = Qwen2Config.of(validated)
        self.tokenizer = tokenizer
        self.bypassed = validated.bypassed
        self._tensors, self._head = validated.tensors, validated.head

    def new_cache(self, start: int = 0) -> PlainCache:
        """Return an empty cache whose first token stands at position ``start``."""
        return PlainCache(self.config, start, self._dtype)

    def forward(
        self, ids: NDArray[np.int64], cache: PlainCache | None = None, trace: Trace | None = None
    ) -> NDArray[np.float32]:
        """
        Return the logits, float32 [tokens, vocab_size], of ``ids`` int64 [tokens].

        Raises:
            InferenceError: An id outside the vocabulary, nothing to compute, or more positions than the model has.
        """
        state = self.new_cache() if cache is None else cache
        ids = self.config.check_input(ids, state.length)
        hidden = self._tensors["model.embed_tokens.weight"].values()[ids].astype(self._dtype)
        seen: dict[str, F64] = {}
        for layer in range(self.config.num_hidden_layers):
            hidden = hidden + self._attend(layer, self._normed(hidden, layer, "input_layernorm"), state, seen)
            seen[f"layers.{layer}.resid_attn"] = hidden
            hidden = hidden + self._feed(layer, self._normed(hidden, layer, "post_attention_layernorm"))
            seen[f"layers.{layer}.resid_ffn"] = hidden
        state.length += ids.size
        seen["final_hidden"] = hidden = self._rms(hidden, "model.norm.weight")
        seen["logits"] = logits = self._logits(hidden)
        if trace is not None:
            for name, values in seen.items():
                trace.record(name, values)
        return logits.astype(np.float32)

    def _attend(self, layer: int, x: F64, cache: PlainCache, seen: dict[str, F64]) -> F64:
        """Attention of one layer, one query head and one position at a time."""
        config, start = self.config, cache.length
        held = start - cache.start
        width, name = config.head_dim, f"model.layers.{layer}.self_attn"
        q, k, v = (self._times(x, f"{name}.{part}_proj") for part in "qkv")
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
        q, k = (
            np.hstack([self._turned(y[:, h * width : (h + 1) * width], start) for h in range(heads[part])])
            for part, y in (("q", q), ("k", k))
        )
        seen |= {f"layers.{layer}.q": q, f"layers.{layer}.k": k, f"layers.{layer}.v": v}
        for h in range(heads["k"]):
            mine = slice(h * width, (h + 1) * width)
            cache.keys[layer][h] = np.vstack([cache.keys[layer][h][:held], k[:, mine]])
            cache.values[layer][h] = np.vstack([cache.values[layer][h][:held], v[:, mine]])
        mixed = np.empty_like(q)
        for h in range(heads["q"]):
            shared, mine = self._shared(h), slice(h * width, (h + 1) * width)
            mixed[:, mine] = self._mixed(q[:, mine], cache.keys[layer][shared], cache.values[layer][shared])
        seen[f"layers.{layer}.attn_output"] = out = self._times(mixed, f"{name}.o_proj")
        return out

    def _shared(self, head: int) -> int:
        """Return the key-value head that a query head reads: consecutive query heads share one."""
        return head * self.config.num_key_value_heads // self.config.num_attention_heads

    def _mixed(self, q: F64, keys: F64, values: F64) -> F64:
        """Mix the values of one head; the rows of ``q`` stand at the end of ``keys``, and see what is not behind."""
        out = np.empty_like(q)
        for row in range(len(q)):
            visible = len(keys) - len(q) + row + 1
            similarity = keys[:visible] @ q[row] / math.sqrt(q.shape[1])
            share = np.exp(similarity - similarity.max())
            out[row] = share @ values[:visible] / share.sum()
        return out

    def _turned(self, x: F64, start: int) -> F64:
        """Rotate ``x`` [tokens, head_dim]: its two halves are the real and the imaginary parts."""
        half = x.shape[1] // 2
        speed = np.array([self.config.rope_theta ** (-2 * i / x.shape[1]) for i in range(half)])
        position = np.arange(start, start + x.shape[0])
        turn = np.exp(1j * position[:, None] * speed[None, :])
        turned = (x[:, :half] + 1j * x[:, half:]) * turn.astype(np.result_type(x, np.complex64))
        return np.hstack([turned.real, turned.imag])

    def _feed(self, layer: int, x: F64) -> F64:
        """Return the gated feed-forward of one layer."""
        gate, up = (self._times(x, f"model.layers.{layer}.mlp.{part}_proj") for part in ("gate", "up"))
        # The logistic function through tanh: exp(-gate) overflows for a gate below -709.
        opened = gate * (0.5 * (1 + np.tanh(0.5 * gate)))
        return self._times(opened * up, f"model.layers.{layer}.mlp.down_proj")

    def _normed(self, x: F64, layer: int, part: str) -> F64:
        return self._rms(x, f"model.layers.{layer}.{part}.weight")

    def _rms(self, x: F64, name: str) -> F64:
        """Divide each row by its root mean square and multiply by the gain ``name``."""
        size = np.sqrt((x * x).sum(axis=1) / x.shape[1] + self.config.rms_norm_eps)
        scaled: F64 = x / size[:, None] * self._tensors[name].values().astype(x.dtype)
        return scaled

    def _logits(self, x: F64) -> F64:
        return _product(x, self._head, self._order)

    def _times(self, x: F64, name: str) -> F64:
        """Apply the projection ``name`` to each row of ``x``, its bias included when it has one."""
        out = _product(x, self._tensors[f"{name}.weight"], self._order)
        if f"{name}.bias" in self._tensors:
            out += self._tensors[f"{name}.bias"].values()
        return out


def _product(x: F64, weight: Validated, order: int | None) -> F64:
    """Multiply each row of ``x`` with each row of a matrix in its natural layout, [out, in], in the precision of x."""
    rows = weight.values()
    terms = slice(None) if order is None else np.random.default_rng(order).permutation(x.shape[1])
    x, out = x[:, terms], np.empty((x.shape[0], rows.shape[0]), x.dtype)
    for at in range(0, rows.shape[0], _ROWS):
        out[:, at : at + _ROWS] = x @ rows[at : at + _ROWS, terms].astype(x.dtype, copy=False).T
    return out
