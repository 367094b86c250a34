"""
Counter-examples of the gates and their benign twins: recipes on a healthy draft, each with what must happen.

Each gate has at least two recipes that it must refuse; a recipe close to a limit has a legal twin on the other side.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from apr_core.zoo.draft import Draft
from apr_core.zoo.registry import Benign, Defect, Recipe

EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
NORM = "model.norm.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
Q = "model.layers.0.self_attn.q_proj.weight"
K = "model.layers.0.self_attn.k_proj.weight"
K_BIAS = "model.layers.1.self_attn.k_proj.bias"
V_BIAS = "model.layers.0.self_attn.v_proj.bias"


def _zero_share(name: str, share: float) -> Recipe:
    """Zero the first ``share`` of the rows, in whole rows and then single values, so that the share is exact."""

    def recipe(draft: Draft) -> None:
        draft.weights[name].reshape(-1)[: round(draft.weights[name].size * share)] = 0

    return recipe


def _scatter_zeros(name: str, share: float) -> Recipe:
    """Zero values all over a tensor, so that no row dies."""

    def recipe(draft: Draft) -> None:
        values = draft.weights[name].reshape(-1)
        chosen = np.random.default_rng(0).permutation(values.size)[: round(values.size * share)]
        values[chosen] = 0

    return recipe


def _poke(name: str, value: float, at: int = 7) -> Recipe:
    def recipe(draft: Draft) -> None:
        draft.weights[name].reshape(-1)[at] = value

    return recipe


def _fill(name: str, value: float) -> Recipe:
    def recipe(draft: Draft) -> None:
        draft.weights[name][...] = value

    return recipe


def _zero_row(name: str, percent: int) -> Recipe:
    def recipe(draft: Draft) -> None:
        draft.weights[name][len(draft.weights[name]) * percent // 100] = 0

    return recipe


def _dead_rows(share: float) -> Recipe:
    """Zero a share of the vocabulary's rows behind its middle, where no spot row lies."""

    def recipe(draft: Draft) -> None:
        count = len(draft.weights[EMBED])
        draft.weights[EMBED][count // 2 + 1 : count // 2 + 1 + round(count * share)] = 0

    return recipe


def _reserved_rows(draft: Draft) -> None:
    """Zero the last 9 % of the vocabulary, as rows behind the last token may be."""
    draft.weights[EMBED][len(draft.weights[EMBED]) * 91 // 100 :] = 0


def _in_gguf(tail: Callable[[bytes], bytes]) -> Recipe:
    """Write a GGUF and append bytes that depend on it."""

    def edit(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(data + tail(data))

    def recipe(draft: Draft) -> None:
        draft.container = "gguf"
        draft.after.append(edit)

    return recipe


def _reshape(name: str, shape: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Recipe:
    def recipe(draft: Draft) -> None:
        draft.weights[name] = draft.weights[name].reshape(shape(draft.weights[name].shape))

    return recipe


def _cut(name: str, rows: int) -> Recipe:
    def recipe(draft: Draft) -> None:
        draft.weights[name] = draft.weights[name][:rows]

    return recipe


def _drop(name: str) -> Recipe:
    return lambda draft: draft.drop(name)


def _drop_all(part: str) -> Recipe:
    def recipe(draft: Draft) -> None:
        for name in [n for n in draft.weights if part in n]:
            draft.drop(name)

    return recipe


def _config(key: str, value: object) -> Recipe:
    def recipe(draft: Draft) -> None:
        draft.config[key] = value

    return recipe


def _untie_with_noise(draft: Draft) -> None:
    """Store a random head beside a tied embedding: a loader that prefers the stored one generates noise."""
    embedding = draft.weights[EMBED]
    draft.add(HEAD, np.random.default_rng(1).normal(0, 0.02, embedding.shape).astype(np.float32))


def _transposed_head(draft: Draft) -> None:
    draft.config["tie_word_embeddings"] = False
    draft.add(HEAD, np.ascontiguousarray(draft.weights[EMBED].T))


def _short_head(draft: Draft) -> None:
    draft.config["tie_word_embeddings"] = False
    draft.add(HEAD, draft.weights[EMBED][:-1])


def _as_dtype(dtype: str) -> Recipe:
    def recipe(draft: Draft) -> None:
        for name in list(draft.weights):
            draft.add(name, draft.weights[name], dtype)

    return recipe


def _reverse_order(draft: Draft) -> None:
    draft.weights = dict(reversed(draft.weights.items()))


def _twin(klass: str, cause: str, id_: str, gate: str, what: str, source: str, recipe: Recipe) -> Defect:
    """A counter-example of one gate."""
    return Defect(id_, klass, what, source, cause, (gate,), recipe=recipe, twin=True)


def _legal(id_: str, what: str, recipe: Recipe) -> Benign:
    """A benign twin of the gates."""
    return Benign(id_, what, recipe, twin=True)


DEFECTS: tuple[Defect, ...] = (
    _twin(
        "zeroed-embedding",
        "missing-data",
        "embedding-945-zero",
        "F-DATA-QUALITY-001",
        "94.5 % of the embedding is zero",
        "round 51",
        _zero_share(EMBED, 0.945),
    ),
    _twin(
        "zeroed-embedding",
        "missing-data",
        "embedding-51-zero",
        "F-DATA-QUALITY-001",
        "51 % of the embedding is zero",
        "round 51",
        _scatter_zeros(EMBED, 0.51),
    ),
    _twin(
        "zeroed-weight",
        "missing-data",
        "down-999-zero",
        "F-DATA-QUALITY-001",
        "99.9 % of down_proj is zero",
        "round 52",
        _scatter_zeros(DOWN, 0.999),
    ),
    _twin(
        "zeroed-weight",
        "missing-data",
        "q-81-zero",
        "F-DATA-QUALITY-001",
        "81 % of q_proj is zero",
        "round 51",
        _scatter_zeros(Q, 0.81),
    ),
    _twin(
        "nan",
        "tensor-values",
        "down-nan",
        "F-DATA-QUALITY-002",
        "one NaN in down_proj",
        "round 51",
        _poke(DOWN, float("nan")),
    ),
    _twin(
        "inf",
        "tensor-values",
        "norm-inf",
        "F-DATA-QUALITY-002",
        "one Inf in the final norm",
        "round 51",
        _poke(NORM, float("inf")),
    ),
    _twin(
        "inf",
        "tensor-values",
        "bias-minus-inf",
        "F-DATA-QUALITY-002",
        "one -Inf in a bias",
        "llama.cpp 7311",
        _poke(V_BIAS, float("-inf")),
    ),
    _twin(
        "zeroed-bias",
        "missing-data",
        "k-bias-zero",
        "F-DATA-QUALITY-003",
        "a k bias is all zero",
        "entrenar 258",
        _fill(K_BIAS, 0.0),
    ),
    _twin(
        "zeroed-weight",
        "missing-data",
        "down-zero",
        "F-DATA-QUALITY-003",
        "down_proj is all zero",
        "aprender 2337",
        _fill(DOWN, 0.0),
    ),
    _twin(
        "constant-tensor",
        "tensor-values",
        "q-constant",
        "F-DATA-QUALITY-003",
        "q_proj is constant",
        "round 51",
        _fill(Q, 0.01),
    ),
    _twin(
        "vanished-norm",
        "tensor-values",
        "norm-tiny",
        "F-DATA-QUALITY-003",
        "the final norm is 1e-9 throughout",
        "round 51",
        _fill(NORM, 1e-9),
    ),
    _twin(
        "dead-rows",
        "missing-data",
        "row-10-dead",
        "F-DATA-QUALITY-004",
        "the row at 10 % of the vocabulary is zero",
        "round 51",
        _zero_row(EMBED, 10),
    ),
    _twin(
        "dead-rows",
        "missing-data",
        "row-50-dead",
        "F-DATA-QUALITY-004",
        "the row at 50 % is zero",
        "round 51",
        _zero_row(EMBED, 50),
    ),
    _twin(
        "dead-rows",
        "missing-data",
        "row-90-dead",
        "F-DATA-QUALITY-004",
        "the row at 90 % is zero",
        "round 51",
        _zero_row(EMBED, 90),
    ),
    _twin(
        "dead-vocabulary",
        "missing-data",
        "rows-26-dead",
        "F-DATA-QUALITY-005",
        "26 % of the vocabulary's rows are zero, spot rows alive",
        "PMAT-325",
        _dead_rows(0.26),
    ),
    _twin(
        "dead-vocabulary",
        "missing-data",
        "rows-39-dead",
        "F-DATA-QUALITY-005",
        "39 % of the vocabulary's rows are zero, spot rows alive",
        "PMAT-325",
        _dead_rows(0.39),
    ),
    _twin(
        "trailing-page",
        "container",
        "gguf-page-behind",
        "F-CONTAINER-COVER-001",
        "a page behind the last tensor of a GGUF",
        "round 47",
        _in_gguf(lambda data: data[-4096:]),
    ),
    _twin(
        "trailing-page",
        "container",
        "gguf-byte-behind",
        "F-CONTAINER-COVER-001",
        "one byte more than the alignment explains",
        "round 47",
        _in_gguf(lambda data: bytes(-len(data) % 32 + 1)),
    ),
    _twin(
        "reversed-shape",
        "layout",
        "embedding-reversed",
        "F-LAYOUT-CONTRACT-001",
        "the embedding is [hidden, vocabulary]",
        "round 46",
        _reshape(EMBED, lambda s: s[::-1]),
    ),
    _twin(
        "reversed-shape",
        "layout",
        "down-reversed",
        "F-LAYOUT-CONTRACT-001",
        "down_proj is [intermediate, hidden]",
        "round 46",
        _reshape(DOWN, lambda s: s[::-1]),
    ),
    _twin(
        "short-tensor", "layout", "k-short", "F-LAYOUT-CONTRACT-001", "k_proj lacks a row", "aprender 2378", _cut(K, -1)
    ),
    _twin(
        "empty-placeholder",
        "layout",
        "q-empty",
        "F-LAYOUT-CONTRACT-001",
        "q_proj has shape [0, hidden]",
        "transformers 20082",
        _cut(Q, 0),
    ),
    _twin(
        "wrong-head-shape",
        "layout",
        "head-transposed",
        "F-LAYOUT-CONTRACT-002",
        "the untied head is [hidden, vocabulary]",
        "round 48",
        _transposed_head,
    ),
    _twin(
        "wrong-head-shape",
        "layout",
        "head-short",
        "F-LAYOUT-CONTRACT-002",
        "the untied head lacks a token",
        "peers N9",
        _short_head,
    ),
    _twin(
        "foreign-head",
        "tensor-values",
        "head-foreign",
        "F-LAYOUT-CONTRACT-002",
        "a random head beside a tied embedding",
        "slime 345",
        _untie_with_noise,
    ),
    _twin(
        "short-vector",
        "layout",
        "norm-short",
        "F-LAYOUT-CONTRACT-003",
        "the final norm lacks an element",
        "aprender 2378",
        _cut(NORM, -1),
    ),
    _twin(
        "short-vector",
        "layout",
        "bias-short",
        "F-LAYOUT-CONTRACT-003",
        "a k bias has half its length",
        "aprender 2378",
        _cut(K_BIAS, 64),
    ),
    _twin(
        "vector-axes",
        "layout",
        "norm-two-axes",
        "F-LAYOUT-CONTRACT-003",
        "the final norm is [1, hidden]",
        "round 46",
        _reshape(NORM, lambda s: (1, *s)),
    ),
    _twin(
        "dropped-bias",
        "naming",
        "bias-dropped",
        "F-ARCH-COMPLETE-001",
        "one k bias is missing",
        "entrenar 258",
        _drop(K_BIAS),
    ),
    _twin(
        "dropped-bias",
        "naming",
        "biases-dropped",
        "F-ARCH-COMPLETE-001",
        "all q, k and v biases are missing",
        "entrenar 258",
        _drop_all("proj.bias"),
    ),
    _twin(
        "dropped-tensor",
        "naming",
        "norm-dropped",
        "F-ARCH-COMPLETE-001",
        "the final norm is missing",
        "peers F3",
        _drop(NORM),
    ),
    _twin(
        "dropped-head",
        "naming",
        "head-dropped",
        "F-ARCH-COMPLETE-001",
        "untied, but no head is stored",
        "slime 345",
        _config("tie_word_embeddings", False),
    ),
    _twin(
        "lost-rope-base",
        "configuration",
        "theta-lost",
        "F-CONFIG-PLAUSIBLE-001",
        "rope_theta fell back to 10000",
        "bug 210",
        _config("rope_theta", 10000.0),
    ),
    _twin(
        "wrong-epsilon",
        "configuration",
        "eps-huge",
        "F-CONFIG-PLAUSIBLE-001",
        "rms_norm_eps is 0.1",
        "peers N10",
        _config("rms_norm_eps", 0.1),
    ),
    _twin(
        "wrong-context",
        "configuration",
        "context-zero",
        "F-CONFIG-PLAUSIBLE-001",
        "a context of 1 token",
        "apr qa 4.2",
        _config("max_position_embeddings", 1),
    ),
    _twin(
        "end-token",
        "configuration",
        "end-outside",
        "F-CONFIG-PLAUSIBLE-001",
        "the end token is one past the vocabulary",
        "peers K7",
        _config("eos_token_id", 1024),
    ),
    _twin(
        "wrong-vocabulary",
        "configuration",
        "vocabulary-off",
        "F-CONFIG-PLAUSIBLE-001",
        "vocab_size is one more than there are rows",
        "peers N9",
        _config("vocab_size", 1025),
    ),
)

BENIGN: tuple[Benign, ...] = (
    _legal("norms-one", "all norms are 1.0", _fill(NORM, 1.0)),
    _legal("embedding-49-zero", "49 % of the embedding is zero, no row dead", _scatter_zeros(EMBED, 0.49)),
    _legal("weight-79-zero", "79 % of q_proj is zero", _scatter_zeros(Q, 0.79)),
    _legal("bias-90-zero", "90 % of a bias is zero", _scatter_zeros(V_BIAS, 0.90)),
    _legal("rows-25-dead", "exactly a quarter of the vocabulary's rows is zero", _dead_rows(0.25)),
    _legal("reserved-rows", "the reserved rows behind the last token are zero", _reserved_rows),
    _legal("gguf-padded", "a GGUF padded to its alignment", _in_gguf(lambda data: bytes(-len(data) % 32))),
    _legal("end-tokens", "the first and the last row are end tokens", _config("eos_token_id", [0, 1023])),
    _legal("dead-row-elsewhere", "a padded row of the vocabulary is zero", _zero_row(EMBED, 99)),
    _legal(
        "head-stored",
        "a tied head is stored as well (291 tensors for 0.5B)",
        lambda d: d.add(HEAD, d.weights[EMBED].copy()),
    ),
    _legal("order", "tensors in another order", _reverse_order),
    _legal("as-f16", "F16 instead of BF16", _as_dtype("F16")),
    _legal("as-f32", "F32 instead of BF16", _as_dtype("F32")),
    _legal(
        "metadata", "other metadata", lambda d: d.metadata.update({"format": "pt", "note": "NaN and inf are words"})
    ),
    _legal("long-context", "a context of 131072", _config("max_position_embeddings", 131072)),
    _legal(
        "extra-tensor",
        "an unknown tensor",
        lambda d: d.add("rotary_emb.inv_freq", np.linspace(1, 0.01, 32, dtype=np.float32), "F32"),
    ),
)
