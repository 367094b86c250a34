"""
The grammar of damage to what a model says: edits of tensors by name, exchanges of names, edits of the configuration.

Every edit is seeded and takes its sizes from the draft, so that it fits any model of the architecture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apr_core.contract.gates import load_gates
from apr_core.contract.layout import EMBEDDING, HEAD
from apr_core.dtypes import FORMATS
from apr_core.formats.codecs import encode, round_to
from apr_core.zoo.containers import LAYERS, stored_as
from apr_core.zoo.draft import Draft
from apr_core.zoo.registry import NotApplicable, Recipe

Values = NDArray[np.float32]
Edit = Callable[[Values, Draft], Values | None]


def companion(name: str, edit: Callable[[dict[str, Any]], None]) -> Recipe:
    """Edit a JSON companion, e.g. ``tokenizer.json``."""

    def recipe(draft: Draft) -> None:
        if name not in draft.companions:
            raise NotApplicable(f"no {name}")
        edit(draft.companions[name])

    return recipe


@dataclass(frozen=True)
class On:
    """
    Edit every tensor whose canonical name fits a pattern.

    Attributes:
        pattern: As ``fnmatch`` has it.
        edit: Gets values and draft; returns the new values, or None when it changed them in place.
    """

    pattern: str
    edit: Edit

    def __call__(self, draft: Draft) -> None:
        """Apply it."""
        names = [name for name in draft.weights if fnmatchcase(name, self.pattern)]
        if not names:
            raise NotApplicable(f"no tensor fits {self.pattern}")
        changed = False
        for name in names:
            before = draft.weights[name]
            with np.errstate(all="ignore"):
                given = before.copy()
                edited = self.edit(given, draft)
            after = np.ascontiguousarray(given if edited is None else edited, dtype=np.float32)
            changed |= before.shape != after.shape or before.tobytes() != after.tobytes()
            draft.weights[name] = after
        if not changed:
            raise NotApplicable(f"it leaves {self.pattern} as it is")


def fill(value: float, where: slice | tuple[slice, ...] = slice(None)) -> Edit:
    """Set a part of the tensor."""

    def edit(values: Values, _: Draft) -> None:
        values[where] = value

    return edit


def zero_rows(start: float, stop: float) -> Edit:
    """Zero the rows between two shares."""
    return lambda v, _: v.__setitem__(slice(int(len(v) * start), int(len(v) * stop)), 0)


def loud_rows(size: float) -> Edit:
    """Make the last two rows opposite, each so long that one of them outscores every other row."""

    def edit(values: Values, _: Draft) -> None:
        longest = np.linalg.norm(values, axis=1).max()
        values[-1] = 20 * size * longest / np.sqrt(values.shape[1])
        values[-2] = -values[-1]

    return edit


def every_third(factor: float) -> Edit:
    """Scale each third row, but for those that the spot check reads."""

    def edit(values: Values, _: Draft) -> None:
        spots = {len(values) * percent // 100 for percent in load_gates().spot_percent}
        values[[row for row in range(0, len(values), 3) if row not in spots]] *= np.float32(factor)

    return edit


def times(factor: float) -> Edit:
    """Scale the tensor."""
    return lambda v, _: v * np.float32(factor)


def plus(offset: float) -> Edit:
    """Shift every value."""
    return lambda v, _: v + np.float32(offset)


def noise(share: float) -> Edit:
    """Add normal noise of a share of the root mean square."""

    def edit(values: Values, _: Draft) -> Values:
        rms = np.sqrt(np.mean(values.astype(np.float64) ** 2))
        return values + np.random.default_rng(1).normal(0, share * rms, values.shape).astype(np.float32)

    return edit


def redrawn(values: Values, _: Draft) -> Values:
    """Draw values of the same mean and spread: a tensor that was never loaded."""
    return np.random.default_rng(2).normal(values.mean(), values.std(), values.shape).astype(np.float32)


def transposed(values: Values, _: Draft) -> Values:
    """Transpose the bytes and keep the shape."""
    return values.T.reshape(values.shape)


def by_head(order: Callable[[Values], Values]) -> Edit:
    """Reorder each head's rows: ``order`` gets [heads, head_dim, columns]."""

    def edit(values: Values, draft: Draft) -> Values:
        width = draft.config["hidden_size"] // draft.config["num_attention_heads"]
        return order(values.reshape(-1, width, *values.shape[1:])).reshape(values.shape)

    return edit


def interleaved(heads: Values) -> Values:
    """Take llama's permutation: halves become pairs."""
    n, width, *rest = heads.shape
    pairs: Values = heads.reshape(n, 2, width // 2, *rest).swapaxes(1, 2)
    return pairs.reshape(heads.shape)


def shuffled(axis: int) -> Edit:
    """Permute rows (axis 0) or columns."""
    return lambda v, _: np.random.default_rng(3).permutation(v, axis=axis)


def rolled(by: int, axis: int = 0) -> Edit:
    """Move rows or columns on, the last to the front."""
    return lambda v, _: np.roll(v, by, axis=axis)


def swapped_rows(values: Values, _: Draft) -> None:
    """Exchange two rows."""
    values[[5, 100]] = values[[100, 5]]


def on_bits(change: Callable[[NDArray[np.uint32]], None]) -> Edit:
    """Edit the float32 bits; the upper sixteen are those of BF16."""
    return lambda v, _: change(v.reshape(-1).view(np.uint32))


def flip(bit: int) -> Edit:
    """Flip one bit of the largest value of the middle row."""

    def change(bits: NDArray[np.uint32]) -> None:
        middle = bits[bits.size // 2 : bits.size // 2 + 64]
        middle[np.abs(middle.view(np.float32)).argmax()] ^= np.uint32(1 << bit)

    return on_bits(change)


def masked(mask: int) -> Edit:
    """Keep some bits of every value."""

    def change(bits: NDArray[np.uint32]) -> None:
        bits &= np.uint32(mask)

    return on_bits(change)


def f16_decoded(exponent: Callable[[NDArray[np.int64]], NDArray[np.int64]]) -> Edit:
    """Decode F16 with a wrong exponent; ``exponent`` maps the stored five bits to float32's eight."""

    def edit(values: Values, _: Draft) -> Values:
        codes = encode(values, FORMATS["F16"]).view("<u2").astype(np.int64)
        bits = (codes & 0x8000) << 16 | (exponent(codes >> 10 & 31) & 255) << 23 | (codes & 0x3FF) << 13
        return bits.astype(np.uint32).view(np.float32).reshape(values.shape)

    return edit


def flushed(values: Values, _: Draft) -> None:
    """Zero what is small."""
    values[np.abs(values) < 2.0**-7] = 0


def on_blocks(change: Callable[[Values], Values]) -> Edit:
    """Change runs of 32 values: [blocks, 32]."""
    return lambda v, _: change(v.reshape(-1, 32)).reshape(v.shape)


def coarse(bits: int, minimum: bool = False) -> Edit:
    """Round blocks of 32 to a few bits by their largest magnitude, or between minimum and maximum."""

    def change(blocks: Values) -> Values:
        low = blocks.min(1, keepdims=True) if minimum else 0 * blocks[:, :1]
        top = blocks.max(1, keepdims=True) - low if minimum else np.abs(blocks).max(1, keepdims=True)
        step = np.maximum(top / (2**bits - 1 if minimum else 2 ** (bits - 1) - 1), np.float32(1e-30))
        rounded: Values = np.round((blocks - low) / step) * step + low
        return rounded

    return on_blocks(change)


def q8_decoded(wrong: Callable[[NDArray[np.float32], NDArray[np.int16]], Values]) -> Edit:
    """Decode the tensor's Q8_0 blocks wrongly: ``wrong`` gets scales [blocks, 1] and codes [blocks, 32]."""

    def edit(values: Values, _: Draft) -> Values:
        stored = encode(values, FORMATS["Q8_0"]).reshape(-1, 34)
        scales = stored[:, :2].copy().view(np.float16).astype(np.float32)
        return wrong(scales, stored[:, 2:].view(np.int8).astype(np.int16)).reshape(values.shape)

    return edit


def as_bf16(scales: Values) -> Values:
    """Read the bits of float16 numbers as those of BF16."""
    codes = scales.astype(np.float16).view(np.uint16).astype(np.uint32)
    return (codes << np.uint32(16)).view(np.float32)


def again(values: Values, _: Draft) -> Values:
    """Round to Q8_0, then to four bits."""
    edited = coarse(4)(round_to(values, FORMATS["Q8_0"]), _)
    assert edited is not None
    return edited


def typed(dtype: str, *edits: Recipe) -> Recipe:
    """Write every tensor of the draft in another plain type, after the edits."""

    def recipe(draft: Draft) -> None:
        for edit in edits:
            edit(draft)
        draft.dtypes = dict.fromkeys(draft.weights, FORMATS[dtype])

    return recipe


def stored_in(container: str, dtype: str, *edits: Recipe) -> Recipe:
    """Write another container after the edits."""

    def recipe(draft: Draft) -> None:
        for edit in edits:
            edit(draft)
        stored_as(draft, container, dtype)

    return recipe


def exchanged(first: str, second: str) -> Recipe:
    """Swap names that contain one part with those that contain the other."""

    def recipe(draft: Draft) -> None:
        names = {n: n.replace(first, second) for n in draft.weights if first in n}
        names |= {n: n.replace(second, first) for n in draft.weights if second in n}
        if all(np.array_equal(draft.weights[a], draft.weights.get(b, ())) for a, b in names.items()):
            raise NotApplicable(f"{first} and {second} hold the same")
        draft.rename(names)

    return recipe


def layers_from(source: Callable[[int, int], int]) -> Recipe:
    """Fill each layer with the tensors of another: ``source`` maps layer and count to a layer."""

    def recipe(draft: Draft) -> None:
        count = draft.config["num_hidden_layers"]
        if count < 2:
            raise NotApplicable("one layer cannot be mixed up")
        old = {name: values.copy() for name, values in draft.weights.items()}
        for name in old:
            for layer in range(count):
                here, there = LAYERS.replace("*", str(layer)), LAYERS.replace("*", str(source(layer, count)))
                if name.startswith(here):
                    draft.weights[name] = old[name.replace(here, there)].copy()

    return recipe


def copied(source: str, target: str) -> Recipe:
    """Put one tensor's values into another of the same shape."""

    def recipe(draft: Draft) -> None:
        shapes = {draft.weights[name].shape for name in (source, target) if name in draft.weights}
        if len(shapes) != 1 or target not in draft.weights or source not in draft.weights:
            raise NotApplicable(f"{source} and {target} differ in shape, or are not there")
        draft.weights[target] = draft.weights[source].copy()

    return recipe


def config(**keys: object) -> Recipe:
    """Set keys of the configuration; None removes one."""

    def recipe(draft: Draft) -> None:
        draft.config.update(keys)
        draft.config = {k: v for k, v in draft.config.items() if v is not None}

    return recipe


def scaled_key(key: str, factor: float) -> Recipe:
    """Multiply a size of the configuration."""

    def recipe(draft: Draft) -> None:
        draft.config[key] = int(draft.config[key] * factor)

    return recipe


def all_of(*recipes: Recipe) -> Recipe:
    """Apply one recipe after the other."""

    def recipe(draft: Draft) -> None:
        for one in recipes:
            one(draft)

    return recipe


def dropped(pattern: str) -> Recipe:
    """Remove the tensors that fit."""

    def recipe(draft: Draft) -> None:
        names = [name for name in draft.weights if fnmatchcase(name, pattern)]
        if not names:
            raise NotApplicable(f"no tensor fits {pattern}")
        for name in names:
            draft.drop(name)

    return recipe


def untied(edit: Edit) -> Recipe:
    """Store a head of its own, made from the embedding."""

    def recipe(draft: Draft) -> None:
        draft.config["tie_word_embeddings"] = False
        draft.add(HEAD, draft.weights[EMBEDDING].copy())
        On(HEAD, edit)(draft)

    return recipe


def row_added(draft: Draft) -> None:
    """Put one row more into the embedding than the configuration counts."""
    draft.weights[EMBEDDING] = np.concatenate([draft.weights[EMBEDDING], draft.weights[EMBEDDING][:1]])


def rows_kept(count: int, config: bool) -> Recipe:
    """Cut the vocabulary, with or without saying so."""

    def recipe(draft: Draft) -> None:
        draft.weights[EMBEDDING] = draft.weights[EMBEDDING][:count]
        if config:
            draft.config["vocab_size"] = len(draft.weights[EMBEDDING])

    return recipe


def zero_where(share: float) -> Edit:
    """Zero a share of the values, all over the tensor."""

    def edit(values: Values, _: Draft) -> None:
        values[np.random.default_rng(4).random(values.shape) < share] = 0

    return edit
