"""
Defects written after the experiments of ``diagnose``, labelled by the glossary, and never edited once diagnosed.

``HELD_OUT`` came first: what it taught has been mended since, and docs/LOG.md has the rate of the first try. Nothing
was changed for ``UNSEEN``. Their author had read the experiments and had run them on none, so a stranger may find more
that is missed. They are no part of the zoo: no claim promises to kill them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from apr_core.contract.layout import EMBEDDING
from apr_core.dtypes import FORMATS
from apr_core.engines.wrap import At, Hook
from apr_core.formats.codecs import encode
from apr_core.model.config import Qwen2Config
from apr_core.zoo.backend import (
    ATTN,
    F32,
    KV,
    QK,
    RESID,
    Seen,
    _angles,
    _as,
    _decode,
    _from,
    _heads,
    _integers,
    _narrow,
    _on,
    _turn,
)
from apr_core.zoo.containers import written
from apr_core.zoo.draft import Draft
from apr_core.zoo.edits import Edit, On, Values, companion, config, copied, exchanged, stored_in
from apr_core.zoo.registry import Defect, MakeHook, Recipe

L0, L1 = "model.layers.0.", "model.layers.1."


def _hole(values: Values, _: Draft) -> None:
    values[64:128, 64:128] = 0


def _noise_page(values: Values, _: Draft) -> None:
    flat = values.reshape(-1)
    drawn = np.random.default_rng(11).integers(0, 1 << 15, 2048).astype(np.uint32) << np.uint32(16)
    flat[4096 : 4096 + 2048] = np.where(drawn >> 23 == 255, np.uint32(1 << 16), drawn).view(np.float32)


def _eighths(values: Values, _: Draft) -> Values:
    """Round to the nearest of three mantissa bits, as a detour through an 8-bit float does."""
    fraction, exponent = np.frexp(values)
    rounded: Values = np.ldexp(np.round(fraction * 16) / 16, exponent)
    return rounded


def _offset_seven(values: Values, _: Draft) -> Values:
    """Decode 4-bit codes with an offset of 7 instead of 8."""
    stored = encode(values, FORMATS["Q4_0"]).reshape(-1, 18)
    scales = stored[:, :2].copy().view(np.float16).astype(np.float32)
    codes = np.concatenate([stored[:, 2:] & 15, stored[:, 2:] >> 4], axis=1).astype(np.float32)
    decoded: Values = (scales * (codes - 7)).reshape(values.shape)
    return decoded


def _runs(width: int, steps: int) -> Edit:
    """Round runs of a width to so many steps of their largest magnitude."""

    def change(values: Values, _: Draft) -> Values:
        blocks = values.reshape(-1, width)
        step = np.abs(blocks).max(axis=1, keepdims=True) / steps
        rounded: Values = (np.round(blocks / step) * step).reshape(values.shape)
        return rounded

    return change


def _heads_of_columns(values: Values, draft: Draft) -> Values:
    """Move the columns of each head one head on."""
    width = draft.config["hidden_size"] // draft.config["num_attention_heads"]
    return np.roll(values, width, axis=1)


def _row_late(values: Values, _: Draft) -> Values:
    """Read every row one too late; the last comes twice."""
    return np.concatenate([values[1:], values[-1:]])


def _centred(values: Values, _: Draft) -> Values:
    centred: Values = values - values.mean(axis=1, keepdims=True)
    return centred


def _clip(values: Values, _: Draft) -> Values:
    limit = np.quantile(np.abs(values), 0.99)
    return np.clip(values, -limit, limit)


def _zipped(draft: Draft) -> None:
    """Deal the rows of a fused gate and up by turns instead of by halves."""
    names = [f"{L1}mlp.{x}_proj.weight" for x in ("gate", "up")]
    both = np.concatenate([draft.weights[n] for n in names])
    for at, name in enumerate(names):
        draft.weights[name] = np.ascontiguousarray(both[at::2])


def _late_bytes(data: bytes) -> bytes:
    """Let every tensor begin one value late in its own data section."""
    start = 8 + int.from_bytes(data[:8], "little")
    return data[:start] + data[-2:] + data[start:-2]


def _line_ends(data: bytes) -> bytes:
    return data.replace(b"\n", b"\r\n")


def _merges_late(document: dict[str, Any]) -> None:
    merges = document["model"]["merges"]
    document["model"]["merges"] = merges[40:] + merges[:40]


def _threes(document: dict[str, Any]) -> None:
    pattern = document["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    pattern["Regex"] = pattern["Regex"].replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def _space_behind_end(settings: dict[str, Any]) -> None:
    settings["chat_template"] = settings["chat_template"].replace("<|im_end|>", "<|im_end|> ")


def _no_ends(draft: Draft) -> None:
    draft.companions["generation_config.json"]["eos_token_id"] = [draft.config["bos_token_id"] - 1]
    draft.config["eos_token_id"] = draft.config["bos_token_id"] - 1


def _by(edit: Edit, pattern: str) -> Recipe:
    return On(pattern, edit)


# --- backends


def _turned_again(heads: F32, seen: Seen) -> Any:
    return _turn(heads, _angles()(seen))


def _first_head(heads: F32, seen: Seen) -> Any:
    return np.broadcast_to(heads[:, :1], heads.shape)


def _wrapped(x: F32, seen: Seen) -> Any:
    """Return the rows of 16 positions earlier: a ring of too few slots."""
    rows = seen.__dict__.setdefault("rows", {}).setdefault(seen.name, {})
    rows.update(zip(seen.positions.tolist(), x.copy(), strict=True))
    return np.stack([rows.get(p - 16, x[i]) for i, p in enumerate(seen.positions.tolist())])


def _limited(x: F32, seen: Seen) -> Any:
    return np.clip(x, -0.05, 0.05)


def _columns_lost(x: F32, seen: Seen) -> Any:
    return x * (np.arange(x.shape[1]) % 64 != 63)


def _penalised(x: F32, seen: Seen) -> Any:
    """Divide the logits of tokens that were heard: a repetition penalty nobody asked for."""
    x, heard = x.copy(), seen.now["ids"][:, 0].astype(np.int64)
    for row in range(len(x)):
        x[row, heard[: row + 1]] /= 1.3
    return x


def _log_length(x: F32, seen: Seen) -> Any:
    """Scale queries by the logarithm of their position, as other models do."""
    factor = np.log(np.maximum(seen.positions, 32) + 1) / np.log(33)
    return x * factor[:, None].astype(np.float32)


def _sixteenth(seen: Seen) -> Any:
    return seen.positions % 16 == 15


def _ids_below(most: int) -> MakeHook:
    def make(_: Qwen2Config) -> Hook:
        def hook(name: str, values: F32, at: At) -> F32 | None:
            return np.minimum(values, most).astype(np.float32) if name == "ids" else None

        return hook

    return make


# --- the second set, written after the experiments had learned from the first


def _shuffled_rows(values: Values, _: Draft) -> Values:
    return np.random.default_rng(12).permutation(values)


def _head_on(values: Values, draft: Draft) -> Values:
    """Move the rows of each head one head on."""
    width = draft.config["hidden_size"] // draft.config["num_attention_heads"]
    return np.roll(values, width, axis=0)


def _upper_half_of_the_next(draft: Draft) -> None:
    name, other = f"{L0}mlp.down_proj.weight", f"{L1}mlp.down_proj.weight"
    half = len(draft.weights[name]) // 2
    draft.weights[name][half:] = draft.weights[other][half:]


def _one_scale(values: Values, _: Draft) -> Values:
    """Round to 127 steps of one scale for the whole tensor."""
    step = np.abs(values).max() / 127
    rounded: Values = np.round(values / step) * step
    return rounded


def _no_small(values: Values, _: Draft) -> None:
    values[np.abs(values) < 2.0**-9] = 0


def _words_turned(document: dict[str, Any]) -> None:
    vocab = document["model"]["vocab"]
    names = [name for name, i in vocab.items() if 400 <= i < 420]
    ids = [vocab[name] for name in names]
    vocab.update(zip(names, ids[1:] + ids[:1], strict=True))


def _capital(settings: dict[str, Any]) -> None:
    settings["chat_template"] = settings["chat_template"].replace("<|im_start|>assistant", "<|im_start|>Assistant")


def _ends_at_text_alone(draft: Draft) -> None:
    draft.companions["generation_config.json"]["eos_token_id"] = draft.config["bos_token_id"]
    draft.config["eos_token_id"] = draft.config["bos_token_id"]


def _tenth_of_a_turn(heads: F32, seen: Seen) -> Any:
    return _turn(heads, np.full((len(heads), heads.shape[2] // 2), 0.1))


def _one_head_louder(heads: F32, seen: Seen) -> Any:
    return heads * np.where(np.arange(heads.shape[1]) == 0, 1.1, 1.0)[:, None].astype(np.float32)


def _one_head_empty(heads: F32, seen: Seen) -> Any:
    return heads * (np.arange(heads.shape[1]) != heads.shape[1] - 1)[:, None]


def _held(x: F32, seen: Seen) -> Any:
    limit = 3 * x.std()
    return np.clip(x, -limit, limit)


def _top_banned(x: F32, seen: Seen) -> Any:
    x, best = x.copy(), x.argmax(axis=1)
    x[np.arange(len(x)), best] = -1e4
    return x


def _file(id_: str, cause: str, what: str, recipe: Recipe) -> Defect:
    return Defect(id_, "held out", what, "held out", cause, ("held out",), recipe=recipe)


def _fault(id_: str, cause: str, what: str, hook: MakeHook) -> Defect:
    return Defect(id_, "held out", what, "held out", cause, ("held out",), hook=hook)


# fmt: off
HELD_OUT: tuple[Defect, ...] = (
    _file("held-data-late", "container", "every tensor begins one value late", written(_late_bytes)),
    _file("held-line-ends", "container", "line ends were translated", written(_line_ends)),
    _file("held-tile-zero", "missing-data", "a tile of up_proj is zero", _by(_hole, f"{L0}mlp.up_proj.weight")),
    _file("held-noise-page", "tensor-values", "a page of the embedding is noise", _by(_noise_page, EMBEDDING)),
    _file("held-bias-x8", "tensor-values", "the q bias of a layer is eightfold",
          _by(lambda v, _: v * np.float32(8), f"{L1}self_attn.q_proj.bias")),
    _file("held-embedding-centred", "tensor-values", "each row of the embedding has its mean taken out",
          _by(_centred, EMBEDDING)),
    _file("held-o-heads-moved", "layout", "the columns of o_proj stand one head on",
          _by(_heads_of_columns, f"{L0}self_attn.o_proj.weight")),
    _file("held-rows-late", "layout", "down_proj is read one row late", _by(_row_late, f"{L1}mlp.down_proj.weight")),
    _file("held-gate-up-zipped", "layout", "gate and up are dealt by turns", _zipped),
    _file("held-k-v-bias", "naming", "k and v biases are exchanged", exchanged("k_proj.bias", "v_proj.bias")),
    _file("held-norm-doubled", "naming", "a layer's second norm is its first",
          copied(f"{L0}input_layernorm.weight", f"{L0}post_attention_layernorm.weight")),
    _file("held-head-promised", "configuration", "an untied head is promised and not there",
          config(tie_word_embeddings=False)),
    _file("held-gelu", "configuration", "the activation is another", config(hidden_act="gelu")),
    _file("held-rope-linear", "configuration", "positions are stretched twofold",
          config(rope_scaling={"rope_type": "linear", "type": "linear", "factor": 2.0})),
    _file("held-offset-seven", "codec", "4-bit codes are decoded with an offset of 7",
          _by(_offset_seven, f"{L0}mlp.gate_proj.weight")),
    _file("held-five-bits", "codec", "an 8-bit GGUF whose v_proj had been of five bits",
          stored_in("gguf", "Q8_0", On(f"{L1}self_attn.v_proj.weight", _runs(32, 15)))),
    _file("held-eighths", "numerics", "o_proj went through an 8-bit float",
          _by(_eighths, f"{L1}self_attn.o_proj.weight")),
    _file("held-clipped", "numerics", "the largest percent of up_proj is clipped",
          _by(_clip, f"{L1}mlp.up_proj.weight")),
    _file("held-merges-late", "tokenizer", "forty merges come last", companion("tokenizer.json", _merges_late)),
    _file("held-digits-by-three", "tokenizer", "digits are taken by three", companion("tokenizer.json", _threes)),
    _file("held-space-behind-end", "template", "a space behind each end of turn",
          companion("tokenizer_config.json", _space_behind_end)),
    _file("held-ends-at-a-word", "stop", "answers end at a word", _no_ends),
    _fault("held-turned-twice", "backend-position", "RoPE is applied twice", _on(QK, _heads(_turned_again))),
    _fault("held-first-kv-head", "backend-attention", "the last layer's keys are all of head 0",
           _on(r"layers\.LAST\.k", _heads(_first_head))),
    _fault("held-ring-wraps", "backend-cache", "from position 48 on the cache returns what stood 16 earlier",
           _on(KV, _wrapped, lambda seen: np.logical_and(_from(48)(seen), _decode(seen)))),
    _fault("held-keys-of-six-bits", "backend-cache", "cached keys and values have six bits",
           _on(KV, _integers(31), lambda seen: seen.at.cached)),
    _fault("held-attention-clipped", "backend-kernel", "attention's output is clipped", _on(ATTN, _limited)),
    _fault("held-columns-lost", "backend-kernel", "each 64th column of the last hidden state is zero",
           _on("final_hidden", _columns_lost)),
    _fault("held-ffn-skipped", "backend-kernel", "each 16th position skips the second half of a layer",
           _on(RESID, _as("layers.{i}.resid_attn"), _sixteenth)),
    _fault("held-log-length", "backend-attention", "queries grow with the logarithm of their position",
           _on(r"layers\.\d+\.q", _log_length)),
    _fault("held-penalty", "backend-sampling", "tokens that were heard score less", _on("logits", _penalised)),
    _fault("held-ids-clamped", "backend-kernel", "ids beyond 511 read row 511", _ids_below(511)),
)
UNSEEN: tuple[Defect, ...] = (
    _file("unseen-q8-rows-shuffled", "layout", "the rows of up_proj are shuffled in an 8-bit GGUF",
          stored_in("gguf", "Q8_0", On(f"{L0}mlp.up_proj.weight", _shuffled_rows))),
    _file("unseen-q-heads-on", "layout", "heads of q_proj stand one on",
          _by(_head_on, f"{L1}self_attn.q_proj.weight")),
    _file("unseen-norm-negated", "tensor-values", "the last norm is negated",
          _by(lambda v, _: -v, "model.norm.weight")),
    _file("unseen-half-foreign", "tensor-values", "half of down_proj is another layer's", _upper_half_of_the_next),
    _file("unseen-columns-zero", "missing-data", "each fourth column of o_proj is zero",
          _by(lambda v, _: v.__setitem__((slice(None), slice(None, None, 4)), 0), f"{L1}self_attn.o_proj.weight")),
    _file("unseen-wide-blocks", "codec", "gate_proj was of four bits in runs of 128",
          _by(_runs(128, 7), f"{L1}mlp.gate_proj.weight")),
    _file("unseen-one-scale", "codec", "k_proj was of 8 bits by one scale",
          _by(_one_scale, f"{L0}self_attn.k_proj.weight")),
    _file("unseen-small-flushed", "numerics", "small values of up_proj are zero",
          _by(_no_small, f"{L0}mlp.up_proj.weight")),
    _file("unseen-eps", "configuration", "epsilon is fivefold", config(rms_norm_eps=5e-6)),
    _file("unseen-one-kv-head", "configuration", "one key-value head is stated", config(num_key_value_heads=1)),
    _file("unseen-words-turned", "tokenizer", "twenty words have each other's ids",
          companion("tokenizer.json", _words_turned)),
    _file("unseen-capital", "template", "the assistant has a capital",
          companion("tokenizer_config.json", _capital)),
    _file("unseen-ends-at-text", "stop", "only the end of text ends an answer", _ends_at_text_alone),
    _file("unseen-cut", "container", "the last thousand bytes are missing", written(lambda data: data[:-1000])),
    _file("unseen-q-o", "naming", "q_proj and o_proj have each other's names",
          exchanged("q_proj.weight", "o_proj.weight")),
    _fault("unseen-turn", "backend-position", "the last layer's queries are a tenth of a radian on",
           _on(r"layers\.LAST\.q", _heads(_tenth_of_a_turn))),
    _fault("unseen-loud-head", "backend-attention", "one head of the keys is a tenth larger",
           _on(r"layers\.\d+\.k", _heads(_one_head_louder))),
    _fault("unseen-cached-values", "backend-cache", "cached values have three bits of mantissa",
           _on(r"layers\.\d+\.v", _narrow(3), lambda seen: seen.at.cached)),
    _fault("unseen-cache-head", "backend-cache", "a head of the keys is lost in decoding",
           _on(r"layers\.\d+\.k", _heads(_one_head_empty), _decode)),
    _fault("unseen-held", "backend-kernel", "the residual is held within three deviations", _on(RESID, _held)),
    _fault("unseen-top-banned", "backend-sampling", "the best token is banned", _on("logits", _top_banned)),
)
# fmt: on
