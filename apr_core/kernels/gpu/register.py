"""The Triton phases in the registry, each beside its numpy reference, where they run: on a device or interpreted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apr_core.dtypes import FORMATS
from apr_core.formats.codecs import decode_bytes
from apr_core.kernels.cpu.panels import example_bytes
from apr_core.kernels.gpu import interpreted
from apr_core.kernels.gpu.planes import BLOCK, PLANES, pack
from apr_core.kernels.registry import Kernel, register

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Stored = tuple[str, Bytes, int, int]
"""Type, bytes, rows, columns."""

DIGITS = {"speed": 1, "exact": 3}
"""Digits of an activation by precision."""
EPS = 1e-6
# Measured on the examples: below 5e-7, the most by Q4_K and Q5_K, whose minima cancel against their codes.
_FLOAT_ORDER = 1e-6


def device() -> torch.device:
    """Return where the kernels run here."""
    return torch.device("cpu" if interpreted() else "cuda")


def runs_here() -> bool:
    """Say whether they run at all."""
    return interpreted() or torch.cuda.is_available()


def _put(values: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.array(values)).to(device())


def _poison(*shape: int) -> Tensor:
    """What a kernel leaves out stays NaN."""
    return torch.full(shape, float("nan"), device=device())


def _matrix(stored: Stored) -> Any:
    from apr_core.kernels.gpu.launch import Matrix

    name, data, rows, columns = stored
    return Matrix(name, rows, columns, pack(name, _put(data), rows, columns))


def _weights(stored: Stored) -> NDArray[np.float64]:
    name, data, rows, columns = stored
    return decode_bytes(FORMATS[name], data, (rows, columns)).astype(np.float64)


def _mode(digits: int) -> Any:
    from apr_core.kernels.gpu.launch import Mode

    dependent = not interpreted() and torch.cuda.get_device_capability() >= (9, 0)
    return Mode(digits, dependent)


def _published(digits: int, x: Floats) -> tuple[Tensor, Any]:
    """Publish ``x`` through the first phase, as a row of an F32 table; return the activation and its norm."""
    from apr_core.kernels.gpu import launch

    table = _matrix(("F32", x.view(np.uint8), 1, x.size))
    norm = launch.Norm(_poison(x.size // BLOCK), EPS)
    out = _poison(launch.activation(x.size, digits, device()).numel())
    state = torch.zeros(3, dtype=torch.int32, device=device())
    launch.embed(_mode(digits), table, state, _poison(x.size), norm, torch.ones(x.size, device=device()), out)
    return out, norm


def quantised(x: Floats, digits: int) -> NDArray[np.float64]:
    """Return the values that the digits of an activation stand for."""
    blocks = x.reshape(-1, BLOCK)
    largest = np.float32(127 * 256 ** (digits - 1))
    top = np.abs(blocks).max(axis=1, keepdims=True)
    inverse = np.divide(largest, top, out=np.zeros_like(top), where=top > 1e-30)
    return (np.floor(blocks * inverse + np.float32(0.5)).astype(np.float64) * (top / largest)).reshape(-1)


def _met(stored: Stored, x: Floats, digits: int) -> NDArray[np.float64]:
    """The activation as this matrix meets it: ``exact`` is held against the vector itself, as are float types."""
    return x.astype(np.float64) if digits == 3 or FORMATS[stored[0]].plain else quantised(x, digits)


def _rms(x: Floats) -> float:
    return float(np.sqrt((x.astype(np.float64) ** 2).mean() + EPS))


def _decode(*stored: Any) -> Floats:
    from apr_core.kernels.gpu import launch

    return launch.decode(_matrix(stored), torch.float32).cpu().numpy()


def _decode_reference(name: str, data: Bytes, rows: int, columns: int) -> Floats:
    return decode_bytes(FORMATS[name], data, (rows, columns))


def _residual(digits: int, stored: Stored, x: Floats, h: Floats) -> Floats:
    """The product, the residual behind it, and the digits that the next product reads of it, one after the other."""
    from apr_core.kernels.gpu import launch

    w, (given, norm) = _matrix(stored), _published(digits, x)
    y, out, left = _poison(w.rows), _poison(launch.activation(w.rows, digits, device()).numel()), _put(h)
    counters = torch.zeros(w.rows // BLOCK, dtype=torch.int32, device=device())
    norm = launch.Norm(_poison(w.rows // BLOCK), EPS)
    gain = torch.full((w.rows,), 2.0, device=device())
    launch.residual(_mode(digits), w, given, y, left, norm, gain, out, _poison(8, w.rows), counters)
    assert not counters.any(), "a counter that is left over would end the next kernel early"
    return torch.cat((y, left, norm.squares, out[: w.rows])).cpu().numpy()


def _residual_reference(digits: int, stored: Stored, x: Floats, h: Floats) -> Floats:
    y = _weights(stored) @ _met(stored, x, digits)
    left = h + y
    return np.concatenate((y, left, (left.reshape(-1, BLOCK) ** 2).sum(axis=1), 2 * left)).astype(np.float32)


def _gate_up(digits: int, gate: Stored, up: Stored, x: Floats) -> Floats:
    from apr_core.kernels.gpu import launch

    g, u, (given, norm) = _matrix(gate), _matrix(up), _published(digits, x)
    out = _poison(launch.activation(g.rows, digits, device()).numel())
    launch.gate_up(_mode(digits), g, u, given, norm, out)
    return out[: g.rows].cpu().numpy()


def _gate_up_reference(digits: int, gate: Stored, up: Stored, x: Floats) -> Floats:
    g, u = (_weights(w) @ _met(w, x, digits) / _rms(x) for w in (gate, up))
    with np.errstate(over="ignore"):
        return (g / (1 + np.exp(-g)) * u).astype(np.float32)


def _qkv(digits: int, weights: tuple[Stored, Stored, Stored], bias: Floats, x: Floats, angles: Floats) -> Floats:
    from apr_core.kernels.gpu import launch

    matrices, (given, norm) = tuple(map(_matrix, weights)), _published(digits, x)
    dim, kv = 2 * angles.size, weights[1][2] // (2 * angles.size)
    q, keys, values = _poison(weights[0][2] // dim, dim), _poison(kv, 4, dim), _poison(kv, 4, dim)
    edges = np.cumsum([w[2] for w in weights])[:2]
    rope = tuple(_put(np.stack([np.full_like(angles, np.nan), f(angles)])) for f in (np.cos, np.sin))
    state = _put(np.array([0, 1, 2], np.int32))  # position 1, third in the cache
    launch.qkv(
        _mode(digits), matrices, tuple(map(_put, np.split(bias, edges))), given, norm, rope, state, q, keys, values
    )
    assert int(torch.isnan(keys).sum()) == 3 * kv * dim, "a place of the cache that is not this position's was written"
    return torch.cat((q.flatten(), keys[:, 2].flatten(), values[:, 2].flatten())).cpu().numpy()


def _qkv_reference(digits: int, weights: tuple[Stored, ...], bias: Floats, x: Floats, angles: Floats) -> Floats:
    products = [_weights(w) @ _met(w, x, digits) / _rms(x) for w in weights]
    turned = np.concatenate(products) + bias
    rotated = turned[: weights[0][2] + weights[1][2]].reshape(-1, 2, angles.size)
    pairs = (rotated[:, 0] + 1j * rotated[:, 1]) * np.exp(1j * angles.astype(np.float64))
    rotated[:, 0], rotated[:, 1] = pairs.real, pairs.imag
    return turned.astype(np.float32)


def _attention(digits: int, q: Floats, keys: Floats, values: Floats, length: int) -> Floats:
    from apr_core.kernels.gpu import launch

    (kv, capacity, dim), heads = keys.shape, len(q)
    out = _poison(launch.activation(heads * dim, digits, device()).numel())
    pieces = launch.Pieces.of(heads, kv, capacity, dim, device())
    counters = torch.zeros(kv, dtype=torch.int32, device=device())
    state = _put(np.array([0, 0, length - 1], np.int32))
    launch.attention(_mode(digits), _put(q), _put(keys), _put(values), out, pieces, counters, state)
    return out[: heads * dim].cpu().numpy()


def _attention_reference(digits: int, q: Floats, keys: Floats, values: Floats, length: int) -> Floats:
    k, v = (np.repeat(x[:, :length].astype(np.float64), len(q) // len(keys), axis=0) for x in (keys, values))
    scores = (k @ q.astype(np.float64)[..., None])[..., 0] / np.sqrt(q.shape[1])
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    mixed = (weights[:, None] @ v)[:, 0] / weights.sum(axis=1, keepdims=True)
    return mixed.reshape(-1).astype(np.float32)


def _head(digits: int, stored: Stored, x: Floats) -> Floats:
    """Logits; then what ``pick`` leaves: the token, the position, the place, the token kept there."""
    from apr_core.kernels.gpu import launch

    w, (given, norm), mode = _matrix(stored), _published(digits, x), _mode(digits)
    count = -(-w.rows // BLOCK)
    logits, tops = _poison(w.rows), _poison(count)
    places, made = (torch.zeros(size, dtype=torch.int32, device=device()) for size in (count, 3))
    state = _put(np.array([0, 7, 2], np.int32))
    launch.head(mode, w, given, norm, logits, tops, places)
    launch.pick(mode, w.rows, tops, places, state, made)
    return torch.cat((logits, state.float(), made[2:].float())).cpu().numpy()


def _head_reference(digits: int, stored: Stored, x: Floats) -> Floats:
    logits = _weights(stored) @ _met(stored, x, digits) / _rms(x)
    token = float(logits.argmax())
    return np.array([*logits, token, 8, 3, token], np.float32)


def _stored(name: str, rows: int, columns: int, seed: int) -> Stored:
    return name, example_bytes(FORMATS[name], rows, columns, seed), rows, columns


def _normal(seed: int, *shape: int) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _decodings(name: str) -> Iterator[Stored]:
    """Rows that fill no 32, and an odd number of blocks."""
    yield _stored(name, 5, 256 if name.endswith("_K") else 96, 1)


def _residuals(name: str) -> Iterator[tuple[Stored, Floats, Floats]]:
    """Columns that several programs share, with an outlier in each block."""
    x = _normal(2, 512)
    x[::BLOCK] *= 50
    yield _stored(name, 64, 512, 2), x, _normal(3, 64)


def _gates() -> Iterator[tuple[Stored, Stored, Floats]]:
    """Of one type, and of two."""
    yield _stored("Q4_K", 64, 256, 4), _stored("Q4_K", 64, 256, 5), 0.1 * _normal(6, 256)
    yield _stored("Q8_0", 32, 96, 4), _stored("BF16", 32, 96, 5), 0.1 * _normal(6, 96)


def _projections() -> Iterator[tuple[tuple[Stored, ...], Floats, Floats, Floats]]:
    """Three types, two heads of 32 per key-value head."""
    sizes = (("Q5_0", 128), ("Q8_0", 64), ("F16", 64))
    weights = tuple(_stored(name, rows, 96, seed) for seed, (name, rows) in enumerate(sizes))
    yield weights, _normal(7, 256), _normal(8, 96), np.abs(_normal(9, 16))


def _contexts() -> Iterator[tuple[Floats, Floats, Floats, int]]:
    """One position; a piece and a rest; all of it; groups of 1, 2 and 7; float16 as well."""
    for kv, group, dim, capacity, length in ((1, 1, 32, 32, 1), (2, 2, 64, 128, 63), (1, 7, 32, 256, 256)):
        keys, values = _normal(10, kv, capacity, dim), _normal(11, kv, capacity, dim)
        keys[:, length:], values[:, length:] = np.nan, np.nan  # what is not held must not count
        yield 2 * _normal(12, kv * group, dim), keys, values, length
    yield _normal(13, 2, 32), *(x.astype(np.float16) for x in (keys, values)), 200  # type: ignore[misc]


def _heads() -> Iterator[tuple[Stored, Floats]]:
    """Rows that fill no program."""
    yield _stored("Q6_K", 70, 256, 14), _normal(15, 256)
    yield _stored("Q8_0", 33, 64, 16), _normal(17, 64)


_PHASES: tuple[tuple[str, Callable[..., Floats], Callable[..., Floats], Callable[[], Iterator[Any]]], ...] = (
    ("gate_up", _gate_up, _gate_up_reference, _gates),
    ("qkv", _qkv, _qkv_reference, _projections),
    ("attention", _attention, _attention_reference, _contexts),
    ("head", _head, _head_reference, _heads),
)

if runs_here():
    for _name in PLANES:
        register(
            Kernel("decode", _name, "cuda", "triton", "exact", _decode, _decode_reference, partial(_decodings, _name))
        )
    for _precision, _digits in DIGITS.items():
        for _name in PLANES:
            _run, _reference = partial(_residual, _digits), partial(_residual_reference, _digits)
            _examples = partial(_residuals, _name)
            register(Kernel("residual", _name, "cuda", "triton", _precision, _run, _reference, _examples, _FLOAT_ORDER))
        for _op, _phase, _expected, _cases in _PHASES:
            _run, _reference = partial(_phase, _digits), partial(_expected, _digits)
            register(Kernel(_op, "any", "cuda", "triton", _precision, _run, _reference, _cases, _FLOAT_ORDER))
