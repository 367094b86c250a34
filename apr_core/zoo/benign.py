"""
Legal oddities: what a careful suite must not complain about.

Each is a recipe on the healthy model (or a hook in its forward) and is held against the healthy model itself; those
that change values on purpose are judged ``alone``, without a reference and without golden answers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apr_core.engines.wrap import At, Hook
from apr_core.formats.checkpoint import TensorSource, open_checkpoint
from apr_core.formats.safetensors import write_safetensors
from apr_core.model.config import Qwen2Config
from apr_core.rosetta.chatml import default_system
from apr_core.zoo.draft import Draft
from apr_core.zoo.edits import companion
from apr_core.zoo.k_quants import ranged_q4_k
from apr_core.zoo.parcels import LZ4, ZSTD, packed, pickle_beside, shard_apr, split_gguf
from apr_core.zoo.plants import DOWN, EMBED, HEAD, NORM, V_BIAS, Q
from apr_core.zoo.registry import Benign, NotApplicable, Recipe
from apr_core.zoo.words import (
    END,
    GENERATION,
    LLAMA3_PRE_TOKENIZER,
    SETTINGS,
    TEXT_END,
    TOKENIZER,
    Edit,
    Json,
    Tensors,
    rewrite,
)

_MEMBERS = ("model.safetensors", "config.json", TOKENIZER, SETTINGS, GENERATION, "golden.json", "transformers_f64.npz")
K_MIXES = ("Q4_K_M", "Q5_K_M", "Q6_K")
LOGITS = "transformers_f64.npz"  # recorded from the weights as they are: they say nothing of eight-bit ones


def _written(container: str, dtype: str = "keep", stem: str = "model.{container}", edit: Edit | None = None) -> Recipe:
    """Write another container; then edit its metadata and tensors."""

    def recipe(draft: Draft) -> None:
        draft.container, draft.dtype, draft.stem = container, dtype, stem
        if dtype in ("Q8_0", *K_MIXES):
            draft.carried.pop(LOGITS, None)
        if edit is not None:
            draft.after.append(lambda path: rewrite(path, edit))

    return recipe


def _typed(dtype: str) -> Recipe:
    """Store the same weights in another float type."""

    def recipe(draft: Draft) -> None:
        for name, values in draft.weights.items():
            if dtype == "F16" and (np.abs(values[values != 0]) < 2.0**-14).any():
                values = np.where(np.abs(values) < 2.0**-14, values.astype(np.float16).astype(np.float32), values)
            draft.add(name, values, dtype)

    return recipe


def _ordered(key: Callable[[str], Any]) -> Callable[[Path], None]:
    """Lay the tensors of a SafeTensors file out in another order (our writer sorts them by name)."""

    def edit(path: Path) -> None:
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        ordered, pieces, position = {"__metadata__": header.pop("__metadata__", {})}, [], 0
        for name in sorted(header, key=key):
            first, last = header[name]["data_offsets"]
            pieces.append(data[start + first : start + last])
            ordered[name] = {**header[name], "data_offsets": [position, position + last - first]}
            position += last - first
        text = json.dumps(ordered).encode()
        text += b" " * (-len(text) % 8)
        path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(pieces))

    return edit


def _other_order(_: Json, tensors: Tensors) -> None:
    """Turn the order of a GGUF around."""
    for name in list(tensors)[::-1]:
        tensors[name] = tensors.pop(name)


def _noted(**notes: str) -> Recipe:
    return lambda draft: draft.metadata.update(notes)


def _config(edit: Callable[[Json], None]) -> Recipe:
    return lambda draft: edit(draft.config)


def _templated(change: Callable[[str], str]) -> Recipe:
    return companion(SETTINGS, lambda settings: settings.update(chat_template=change(settings["chat_template"])))


def _without(*names: str) -> Recipe:
    """Leave companions out."""

    def recipe(draft: Draft) -> None:
        for name in names:
            draft.companions.pop(name, None)
            draft.carried.pop(name, None)

    return recipe


def _after(*edits: Callable[[Path], object]) -> Recipe:
    """Edit the written files; each edit gets the weights file."""
    return lambda draft: draft.after.extend(edits)  # type: ignore[arg-type]


def _beside(**files: str) -> Recipe:
    """Put further files beside the weights; ``__`` in a name stands for a dot."""

    def write(path: Path) -> None:
        for name, text in files.items():
            (path.parent / name.replace("__", ".")).write_text(text, "utf-8")

    return _after(write)


def _rewritten(name: str, change: Callable[[str], str]) -> Recipe:
    """Change how a text beside the weights is written."""

    def edit(path: Path) -> None:
        file = path.parent / name
        if file.is_file():
            file.write_bytes(change(file.read_text("utf-8")).encode())

    return _after(edit)


def _sharded(count: int) -> Recipe:
    """Cut the file into shards with an index, as large models come."""

    def cut(path: Path) -> None:
        with open_checkpoint(path) as whole:
            sources = [
                TensorSource(n, t.dtype, t.shape, partial(list, [whole.raw(n).data.copy()]))
                for n, t in whole.tensors.items()
            ]
        parts = min(count, len(sources))
        where: dict[str, str] = {}
        for part in range(parts):
            name = f"model-{part + 1:05}-of-{parts:05}.safetensors"
            write_safetensors(path.parent / name, sources[part::parts], {"format": "pt"})
            where |= dict.fromkeys((s.name for s in sources[part::parts]), name)
        path.unlink()
        index = {"metadata": {"total_size": 0}, "weight_map": where}
        (path.parent / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")

    return _after(cut)


def _cached_by_hub(path: Path) -> None:
    """Turn the folder into links to blobs, as the hub's cache keeps files."""
    blobs = path.parent.parent / "blobs"
    blobs.mkdir()
    for number, name in enumerate(_MEMBERS):
        file = path.parent / name
        if file.is_file():
            file.rename(blobs / f"{number:064x}")
            file.symlink_to(os.path.relpath(blobs / f"{number:064x}", path.parent))


def _own_template_file(draft: Draft) -> None:
    """Move the template to its own file, as transformers 5 writes it."""
    template = draft.companions[SETTINGS].pop("chat_template")
    _beside(chat_template__jinja=template)(draft)


def _nested_rope(config: Json) -> None:
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}


def _ends(edit: Callable[[list[int]], object]) -> Recipe:
    """Spell the same end tokens otherwise."""

    def recipe(draft: Draft) -> None:
        ids = {t["content"]: t["id"] for t in draft.companions[TOKENIZER]["added_tokens"]}
        draft.companions.setdefault(GENERATION, {})["eos_token_id"] = edit([ids[END], ids[TEXT_END]])

    return recipe


def _without_generation(draft: Draft) -> None:
    """Name the end tokens in config.json alone."""
    generation = draft.companions.pop(GENERATION, {})
    draft.config["eos_token_id"] = generation.get("eos_token_id", draft.config.get("eos_token_id"))


def _stored_head(container: str) -> Recipe:
    def recipe(draft: Draft) -> None:
        draft.container = container
        draft.add(HEAD, draft.weights[EMBED].copy())

    return recipe


def _changed(name: str, change: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> Recipe:
    """Change values in a legal way."""

    def recipe(draft: Draft) -> None:
        if name not in draft.weights:
            raise NotApplicable(f"no {name}")
        draft.weights[name] = np.ascontiguousarray(change(draft.weights[name].copy()), dtype=np.float32)

    return recipe


def _padded(fill: float) -> Recipe:
    """Overwrite rows that no token has: the vocabulary is padded to a round number."""

    def recipe(draft: Draft) -> None:
        document = draft.companions[TOKENIZER]
        used = 1 + max([*document["model"]["vocab"].values(), *(t["id"] for t in document["added_tokens"])])
        rows = draft.weights[EMBED][used:]
        rows[:] = fill * np.random.default_rng(8).standard_normal(rows.shape)

    return recipe


def _masked(share: float) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """Set a share of the values to zero, all over."""
    return lambda v: np.where(np.random.default_rng(9).random(v.shape) < share, np.float32(0), v)


def _outlier(values: NDArray[np.float32]) -> NDArray[np.float32]:
    values.reshape(-1)[1234] = 40 * values.std()
    return values


def _copied_layer(draft: Draft) -> None:
    for name in [n for n in draft.weights if ".layers.1." in n]:
        draft.weights[name] = draft.weights[name.replace("layers.1", "layers.0")].copy()


def _another_quantiser(draft: Draft) -> None:
    """Eight-bit blocks whose scale was rounded to F16 before the values were divided by it: other last bits."""
    draft.container, draft.dtype = "gguf", "Q8_0"
    draft.carried.pop(LOGITS, None)
    weights = draft.weights

    def edit(_: Json, tensors: Tensors) -> None:
        for name, (dtype, shape, data) in tensors.items():
            if dtype.name == "Q8_0":
                blocks = weights[name].reshape(-1, 32)
                scale = (np.abs(blocks).max(axis=1, keepdims=True) / 127).astype(np.float16)
                divisor = np.where(scale == 0, np.float32(1), scale.astype(np.float32))
                steps = np.clip(np.rint(blocks / divisor), -127, 127).astype(np.int8)
                packed = np.concatenate([scale.view(np.uint8), steps.view(np.uint8)], axis=1)
                tensors[name] = (dtype, shape, packed.reshape(data.shape))

    draft.after.append(lambda path: rewrite(path, edit))


def _another_k_quantiser(draft: Draft) -> None:
    """Q4_K blocks whose scales come from the range of each sub-block, without llama.cpp's search."""
    draft.container, draft.dtype = "gguf", "Q4_K_M"
    draft.carried.pop(LOGITS, None)
    weights = draft.weights

    def edit(_: Json, tensors: Tensors) -> None:
        for name, (dtype, shape, data) in tensors.items():
            if dtype.name == "Q4_K":
                blocks = ranged_q4_k(weights[name].reshape(-1, 256))
                tensors[name] = (dtype, shape, blocks.reshape(data.shape))

    draft.after.append(lambda path: rewrite(path, edit))


def _version_two(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4)
        file.write((2).to_bytes(4, "little"))


def _gguf_two(draft: Draft) -> None:
    draft.container = "gguf"
    draft.after.append(_version_two)


def _near_ties(config: Qwen2Config) -> Hook:
    """Noise of the last bits on the logits, the same for the same token at the same position."""

    def hook(name: str, values: NDArray[np.float32], at: At) -> NDArray[np.float32] | None:
        if name != "logits":
            return None
        grid = np.arange(at.start, at.start + len(values))[:, None] + 0.7 * np.arange(values.shape[1])
        return (values + 1e-7 * np.sin(grid)).astype(np.float32)

    return hook


def _as_it_is(draft: Draft) -> None:
    """Change nothing: the oddity is elsewhere."""


def _unflagged(document: Json) -> None:
    for token in document["added_tokens"]:
        token["special"] = False


def _no_default(template: str) -> str:
    """Leave the default system prompt out of a ChatML template."""
    said = default_system(template)
    if said is None:
        raise NotApplicable("the template has no default system prompt")
    return template.replace(f"<|im_start|>system\\n{said}<|im_end|>\\n", "")


def _digits_by_three(document: Json) -> None:
    if any(len(pair) > 1 and "".join(pair).isdigit() for pair in document["model"]["merges"]):
        raise NotApplicable("tokens of several digits: another splitting")
    document["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = LLAMA3_PRE_TOKENIZER


_EXTRA: Json = {
    "general.description": "NaN, inf <script>alert(1)</script> 🦀",
    "general.tags": ["text-generation", "", "ü"],
    "general.languages": ["en"],
    "zoo.numbers": [1, -2, 3],
    "zoo.floats": [0.5, 1e-30],
    "zoo.flag": False,
}
_NULLS: Json = dict.fromkeys(("author", "license", "rope_scaling", "sliding_window", "quantization", "created_at"))


def _gguf(edit: Callable[[Json], object], container: str = "gguf") -> Recipe:
    """Edit the metadata of a GGUF or APR file."""

    def both(metadata: Json, _: Tensors) -> None:
        edit(metadata)

    return _written(container, edit=both)


def _alone(id_: str, what: str, recipe: Recipe, why: str = "") -> Benign:
    return Benign(id_, what, recipe, why, alone=True)


# fmt: off
BENIGN: tuple[Benign, ...] = (
    Benign("gguf-keep", "the same weights as GGUF", _written("gguf")),
    Benign("apr-keep", "the same weights as APR", _written("apr")),
    Benign("gguf-f16", "a GGUF in F16", _written("gguf", "F16")),
    Benign("gguf-bf16", "a GGUF in BF16", _written("gguf", "BF16")),
    Benign("gguf-f32", "a GGUF in F32", _written("gguf", "F32")),
    Benign("gguf-q8", "a GGUF in Q8_0", _written("gguf", "Q8_0")),
    *(Benign(f"gguf-{mix.lower().replace('_', '-')}", f"a GGUF in {mix}", _written("gguf", mix)) for mix in K_MIXES),
    Benign("q4-k-of-another", "the Q4_K of a quantiser that does not search", _another_k_quantiser),
    Benign("apr-f16", "an APR in F16", _written("apr", "F16")),
    Benign("apr-f32", "an APR in F32", _written("apr", "F32")),
    Benign("weights-f16", "F16 of the same weights", _typed("F16")),
    Benign("weights-f32", "F32 of the same weights", _typed("F32")),
    Benign("q8-of-another", "the Q8_0 of another quantiser", _another_quantiser),
    Benign("tied-head-stored", "a tied head is stored as well", _stored_head("safetensors")),
    Benign("tied-head-stored-gguf", "a GGUF that stores a tied head", _stored_head("gguf")),
    Benign("tied-head-stored-apr", "an APR that stores a tied head", _stored_head("apr")),
    Benign("two-shards", "two shards and an index", _sharded(2)),
    Benign("three-shards", "three shards and an index", _sharded(3)),
    Benign("shard-each", "a shard for each tensor", _sharded(999)),
    Benign("turned", "tensors in reversed order", _after(_ordered(lambda name: name[::-1]))),
    Benign("turned-gguf", "a GGUF in reversed order", _written("gguf", edit=_other_order)),
    Benign("hub-cache", "links to blobs, as the hub's cache keeps files", _after(_cached_by_hub)),
    Benign("no-extension", "a GGUF without an extension", _written("gguf", stem="model")),
    Benign("upper-extension", "MODEL.GGUF", _written("gguf", stem="MODEL.GGUF")),
    Benign("odd-name", "spaces, quotes and letters in a name", _written("gguf", stem='mein \'Modell\' "ß" 模型.gguf')),
    Benign("script-name", "a name that is HTML", _written("apr", stem="<script>alert(1)<b>.apr")),
    Benign("wrong-extension", "an APR that is called .bin", _written("apr", stem="weights.bin")),
    Benign("metadata-words", "inf and NaN as words", _noted(note="NaN inf -Infinity information", nan="inf")),
    Benign("metadata-html", "HTML in the metadata",
        _noted(title="<script>alert('x')</script>&amp;", **{"<b>": "</td>"})),
    Benign("metadata-emoji", "emoji and right-to-left text", _noted(autor="🦀👩\u200d💻 שלום \u202e", 名="模型")),
    Benign("metadata-long", "10 kB of metadata", _noted(text="lorem ipsum " * 900)),
    Benign("metadata-control", "line ends and control characters", _noted(note="a\r\n\tb\x01\x7f")),
    Benign("gguf-aligned-64", "a GGUF aligned to 64 bytes", _gguf(lambda m: m.update({"general.alignment": 64}))),
    Benign("gguf-extra-keys", "a GGUF with keys and arrays of its own", _gguf(lambda m: m.update(_EXTRA))),
    Benign("gguf-two", "GGUF version 2", _gguf_two),
    Benign("gguf-split", "a GGUF in three parts", split_gguf(3)),
    Benign("gguf-split-empty-first", "a split GGUF whose first part holds no tensor", split_gguf(3, empty_first=True)),
    Benign("apr-zstd", "an APR in a Zstandard frame", packed(ZSTD)),
    Benign("apr-lz4", "an APR in an LZ4 block", packed(LZ4)),
    Benign("apr-two-shards", "an APR in two shards", shard_apr()),
    Benign("pickle-beside", "pytorch_model.bin beside the weights", _after(pickle_beside)),
    Benign("apr-nulls", "an APR with reserved keys that are null", _gguf(lambda m: m.update(_NULLS), "apr")),
    Benign("apr-extra-keys", "an APR with keys of its own",
        _gguf(lambda m: m.update(zoo={"deep": [1, None, "NaN"]}), "apr")),
    Benign("no-golden", "no golden answers", _without("golden.json", "transformers_f64.npz")),
    Benign("no-generation-config", "no generation_config.json, its end token in config.json", _without_generation),
    Benign("extra-files", "a README, a licence and what a download leaves",
        _beside(README__md="# inf", LICENSE="MIT", __gitattributes="*.bin filter=lfs")),
    Benign("leftovers", "vocab.json and merges.txt of the slow tokenizer",
        _beside(vocab__json="{}", merges__txt="#version: 0.2\n")),
    Benign("notes-beside", "unrelated JSON beside the weights",
        _beside(training_args__json='{"lr": 1e-4}', tokenizer_config__bak="{")),
    Benign("config-indented", "config.json with Windows line ends and blanks behind it",
        _rewritten("config.json", lambda t: json.dumps(json.loads(t), indent=4).replace("\n",
         "\r\n") + " \r\n\t\r\n")),
    Benign("tokenizer-ascii", "tokenizer.json with escapes for all but ASCII",
        _rewritten(TOKENIZER, lambda t: json.dumps(json.loads(t), indent=1) + "\n\n")),
    Benign("merges-as-text", "merges written as text",
        companion(TOKENIZER, lambda t: t["model"].update(merges=[m if isinstance(m,
         str) else " ".join(m) for m in t["model"]["merges"]]))),
    Benign("vocab-order", "tokenizer.json in another order",
        companion(TOKENIZER, lambda t: t["model"].update(vocab=dict(sorted(t["model"]["vocab"].items()))))),
    Benign("digits-by-three", "digits are grouped by three where no token has two",
        companion(TOKENIZER, _digits_by_three),
         "neither GGUF nor APR can describe that pre-tokenizer, so there are no copies to compare"),
    Benign("special-flag-off", "the special flag of control tokens is off",
        companion(TOKENIZER, _unflagged)),
    Benign("template-crlf", "Windows line ends in the template", _templated(lambda t: t.replace("\n", "\r\n"))),
    Benign("template-file", "the template in a file of its own", _own_template_file),
    Benign("template-named", "several named templates",
        companion(SETTINGS, lambda s: s.update(chat_template=[{"name": "rag", "template": "x"}, {"name": "default",
         "template": s["chat_template"]}]))),
    _alone("template-comment", "a comment in the template",
        _templated(lambda t: "{#- reviewed: no trigger, inf, NaN -#}\n" + t)),
    _alone("template-no-default", "a template without a default system prompt",
        _templated(_no_default)),
    Benign("config-unknown", "keys that nobody knows",
        _config(lambda c: c.update(auto_map=None, zoo={"a": [1]}, _name_or_path="/tmp/x", inf="NaN"))),
    Benign("config-nulls", "keys that are null",
        _config(lambda c: c.update(rope_scaling=None, head_dim=None, quantization_config=None, layer_types=None))),
    Benign("config-order", "keys in another order",
        lambda d: setattr(d, "config", dict(sorted(d.config.items(), reverse=True)))),
    Benign("rope-nested", "rope_parameters, as transformers 5 writes them", _config(_nested_rope)),
    Benign("rope-default", "rope_scaling that scales nothing",
        _config(lambda c: c.update(rope_scaling={"rope_type": "default"}))),
    Benign("theta-integer", "rope_theta as an integer", _config(lambda c: c.update(rope_theta=int(c["rope_theta"])))),
    Benign("head-dim-said", "head_dim is spelled out",
        _config(lambda c: c.update(head_dim=c["hidden_size"] // c["num_attention_heads"]))),
    Benign("layer-types", "layer_types, all full attention",
        _config(lambda c: c.update(layer_types=["full_attention"] * c["num_hidden_layers"]))),
    Benign("dtype-new", "dtype instead of torch_dtype",
        _config(lambda c: c.update(dtype=c.pop("torch_dtype", "bfloat16"), transformers_version="5.0.0"))),
    Benign("window-unused", "a sliding window that is not used",
        _config(lambda c: c.update(use_sliding_window=False, sliding_window=131072, max_window_layers=28))),
    Benign("ends-order", "end tokens in another order", _ends(lambda ids: ids[::-1])),
    Benign("ends-in-config", "end tokens as a list in config.json",
        lambda d: d.config.update(eos_token_id=d.companions.get(GENERATION, {}).get("eos_token_id",
         d.config["eos_token_id"]))),
    _alone("context-long", "a context of a million", _config(lambda c: c.update(max_position_embeddings=1 << 20))),
    _alone("context-short", "a context of 512", _config(lambda c: c.update(max_position_embeddings=512))),
    _alone("padded-zeros", "padded rows of the vocabulary are zero", _padded(0.0)),
    _alone("padded-noise", "padded rows of the vocabulary are noise", _padded(0.02)),
    _alone("half-zeros", "49 % of a projection is zero", _changed(Q, _masked(0.49))),
    _alone("pruned-two-of-four", "half of down_proj is pruned, two of four",
        _changed(DOWN, lambda v: v * np.tile(np.array([1, 0, 0, 1], np.float32), v.size // 4).reshape(v.shape))),
    _alone("bias-60-zero", "60 % of a bias is zero", _changed(V_BIAS, _masked(0.6))),
    _alone("bias-tiny", "a bias a thousand times smaller", _changed(V_BIAS, lambda v: v * 1e-3)),
    _alone("ternary", "down_proj of three values, two thirds of them zero",
        _changed(DOWN, lambda v: np.where(np.abs(v) > v.std(), np.sign(v) * 0.03, 0))),
    _alone("negative-zeros", "zeros with a sign",
        _changed(DOWN, lambda v: np.where(np.abs(v) < 0.001, np.float32(-0.0), v))),
    _alone("subnormals", "values below the smallest normal number",
        _changed(DOWN, lambda v: np.where(np.abs(v) < 0.001, np.float32(1e-39), v)),
         "F16 and Q8_0 copies round them to zero"),
    _alone("outlier", "one weight of forty standard deviations", _changed(DOWN, _outlier)),
    _alone("equal-layers", "two layers are the same", _copied_layer),
    _alone("norm-large", "a norm of large weights", _changed(NORM, lambda v: v * 12)),
    Benign("near-ties", "noise of the last bits on the logits", _as_it_is, hook=_near_ties),
)
# fmt: on
