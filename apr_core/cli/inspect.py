"""``apr inspect``: what a file says about itself, without judging it; a corrupt file that parses is described too."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from apr_core.cli.output import show, show_table
from apr_core.engines.subject import resolve_model
from apr_core.errors import AprError, FormatError
from apr_core.formats.apr_unrunnable import describe_unrunnable
from apr_core.formats.checkpoint import Checkpoint, open_checkpoint
from apr_core.formats.codecs import decoder_name
from apr_core.formats.executables import find_executables
from apr_core.report.text import nbytes

LONGEST = 200  # characters of a metadata value that are shown
MOST_ITEMS = 8  # items of a metadata list that are shown


def describe(model: str, *, digest: bool = False) -> dict[str, Any]:
    """
    Describe a model file.

    Args:
        model: Path, or ``pygmy``.
        digest: Hash the weight files.

    Returns:
        path, format, container (what it says about itself), files, tensors, parameters, weight_bytes, bits_per_weight,
        types, passport (label against content), config, metadata, tokenizer, gaps, executables when pickles lie beside
        the weights, and sha256 when asked
        for. For an APR file that cannot be run (version 1, JSON-APR): what its header says, and why.

    Raises:
        AprError: There is no such file, or it does not parse.
    """
    path = resolve_model(model)
    try:
        checkpoint = open_checkpoint(path)
    except FormatError as error:
        try:
            first = describe_unrunnable(path)
        except AprError:
            raise error from None  # not version 1 either: the diagnosis of the reader stands
        return {"path": str(path), **first, "cannot_run": error.message}
    with checkpoint:
        tensors = list(checkpoint.tensors.values())
        weights = sum(t.nbytes for t in tensors)
        parameters = sum(prod(t.shape) for t in tensors)
        body = {
            "path": str(checkpoint.path),
            "format": checkpoint.format,
            "container": dict(checkpoint.facts),
            "files": [{"name": f.name, "bytes": f.stat().st_size} for f in checkpoint.files],
            "tensors": len(tensors),
            "parameters": parameters,
            "weight_bytes": weights,
            "bits_per_weight": round(8 * weights / parameters, 4) if parameters else None,
            "types": _types(checkpoint),
            "passport": _passport(checkpoint),
            "config": checkpoint.config,
            "metadata": {key: _cut(_value(checkpoint.metadata, key)) for key in checkpoint.metadata},
            "tokenizer": _tokenizer(checkpoint),
            "gaps": [{"file": g.file.name, "offset": g.offset, "bytes": g.nbytes} for g in checkpoint.gaps],
        }
        executables = [{"name": name, "what": kind} for name, kind in find_executables(checkpoint.folder)]
        body |= {"executables": executables} if executables else {}
        return {**body, "sha256": checkpoint.content_hash} if digest else body


def _types(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Tensors, parameters and bytes by element type, and whose code decodes it."""
    types: dict[str, dict[str, Any]] = {}
    for info in checkpoint.tensors.values():
        new = {"tensors": 0, "parameters": 0, "bytes": 0, "decoder": decoder_name(info.dtype)}
        row = types.setdefault(str(info.dtype), new)
        row["tensors"] += 1
        row["parameters"] += prod(info.shape)
        row["bytes"] += info.nbytes
    return types


def _passport(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the label says against what is stored; the histogram is the body's own ``types``."""
    from apr_core.rosetta.passport import passport

    found = passport(checkpoint)
    said = {k: v for k, v in found.as_json().items() if k in ("label", "label_from", "fallback_share", "label_agrees")}
    return {**said, "says": found.sentences()}


def _value(metadata: Mapping[str, object], key: str) -> object:
    """Read one value; of a broken one say what is wrong with it, so that the rest is still shown."""
    try:
        return metadata[key]
    except AprError as error:
        return f"(unreadable: {error.message})"


def _cut(value: object) -> object:
    """Shorten what would fill the screen, and say how long it was."""
    if isinstance(value, list) and len(value) > MOST_ITEMS:
        return f"[{len(value)} values] {', '.join(str(_cut(item)) for item in value[:3])}, ..."
    if isinstance(value, Mapping) and len(str(value)) > LONGEST:
        return f"{{{len(value)} keys}} {', '.join(str(key)[:LONGEST] for key in list(value)[:MOST_ITEMS])}, ..."
    if isinstance(value, str) and len(value) > LONGEST:
        return f"{value[:LONGEST]}... ({len(value)} characters)"
    return value


def _tokenizer(checkpoint: Checkpoint) -> dict[str, Any]:
    """Whether text can be given to the model: loads the tokenizer as inference would, and reports why it cannot."""
    from apr_core.model.tokens import load_tokenizer

    try:
        tokenizer = load_tokenizer(checkpoint)
    except AprError as error:
        return {"usable": False, "reason": error.message}
    return {
        "usable": True,
        "source": str(tokenizer.source),
        "vocab_size": tokenizer.vocab_size,
        "end_tokens": sorted(tokenizer.eos_ids),
        "chat_template": tokenizer.chat_template is not None,
        "template_sha256": tokenizer.template_hash,
    }


def show_description(body: Mapping[str, Any]) -> None:
    """Print a description for a person."""
    if "types" not in body:
        show_table(("header", ""), [(key, _cut(value)) for key, value in body.items()])
        return
    show(f"path             {body['path']}")
    show(f"format           {body['format']}")
    if body["container"]:
        show(f"container        {', '.join(f'{key} {value}' for key, value in body['container'].items())}")
    for file in body["files"]:
        show(f"file             {file['name']}, {file['bytes']:,} bytes")
    if "sha256" in body:
        show(f"sha256           {body['sha256']}")
    bits = body["bits_per_weight"]
    show(f"tensors          {body['tensors']}")
    show(f"parameters       {body['parameters']:,}")
    show(f"weights          {nbytes(body['weight_bytes'])}" + (f", {bits:.3f} bits per weight" if bits else ""))
    for sentence in body["passport"]["says"][1:]:
        show(f"passport         {sentence}")
    tokenizer = body["tokenizer"]
    if tokenizer["usable"]:
        template = "with a chat template" if tokenizer["chat_template"] else "no chat template (a base model)"
        show(f"tokenizer        {tokenizer['vocab_size']} tokens, {template}, ends on {tokenizer['end_tokens']}")
    else:
        show(f"tokenizer        none: {tokenizer['reason']}")
    for entry in body.get("executables", ()):
        show(f"executable       {entry['name']}: {entry['what']}; it is not loaded, and can run code where it is")
    for gap in body["gaps"]:
        show(f"unexplained      {gap['bytes']} bytes at {gap['offset']} in {gap['file']}")
    print()
    rows = [
        (name, row["tensors"], f"{row['parameters']:,}", f"{row['bytes']:,}", row["decoder"])
        for name, row in body["types"].items()
    ]
    show_table(("type", "tensors", "parameters", "bytes", "decoder"), rows)
    for title in ("config", "metadata"):
        print()
        values = body[title]
        show_table((title, ""), [(key, _cut(value)) for key, value in values.items()] if values else [("none", "")])
