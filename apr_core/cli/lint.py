"""``apr lint``: conventions that a healthy file may break: what the next person, or the next program, will miss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apr_core.errors import AprError, Exit

if TYPE_CHECKING:
    from apr_core.formats.checkpoint import Checkpoint

_ALIGNED = {"gguf": 32, "apr": 64, "safetensors": 8}
_MOST = 5


def lint(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model file or folder, or 'pygmy'.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print strict JSON.")] = False,
) -> None:
    """Look for broken conventions. Exit 5 when a rule warns; judges no weights (`apr validate` does)."""
    from apr_core.cli.output import show, show_json, show_table

    body = findings(model)
    if as_json:
        show_json(body)
    else:
        if body["findings"]:
            rows = [(f["rule"], f["level"], f["says"], f["do"]) for f in body["findings"]]
            show_table(("rule", "level", "", "do"), rows)
        warnings, notes = body["warnings"], len(body["findings"]) - body["warnings"]
        show(f"{body['model']}: {warnings} warnings, {notes} notes, of {len(body['rules'])} rules")
    raise typer.Exit(Exit.REFUTED if body["warnings"] else Exit.OK)


def findings(model: str) -> dict[str, Any]:
    """
    Look at a model file by every rule.

    Returns:
        model, format, rules (id -> what it looks for), findings (rule, level, says, do), warnings (their number).

    Raises:
        AprError: The file cannot be opened.
    """
    from apr_core.engines.subject import resolve_model
    from apr_core.formats.checkpoint import open_checkpoint

    with open_checkpoint(resolve_model(model)) as checkpoint:
        found = [
            {"rule": name, "level": level, "says": says, "do": do}
            for name, (level, do, rule) in RULES.items()
            for says in rule(checkpoint)
        ]
        return {
            "model": str(checkpoint.path),
            "format": checkpoint.format,
            "rules": {name: (rule.__doc__ or "").strip().split("\n")[0] for name, (_, _, rule) in RULES.items()},
            "findings": found,
            "warnings": sum(f["level"] == "warning" for f in found),
        }


def _names(checkpoint: Checkpoint) -> Iterator[str]:
    """Tensor names are those of Hugging Face or of GGUF."""
    from apr_core.contract.layout import role_of

    odd = [info.stored_name for info in checkpoint.tensors.values() if role_of(info.name) is None]
    if odd:
        yield f"{len(odd)} tensors have names of no known role: {_some(odd)}"


def _alignment(checkpoint: Checkpoint) -> Iterator[str]:
    """Tensors begin at multiples of the format's alignment."""
    step = _ALIGNED[checkpoint.format]
    stated = checkpoint.metadata.get("general.alignment") if checkpoint.format == "gguf" else None
    step = stated if isinstance(stated, int) and stated > 0 else step
    if checkpoint.format == "safetensors":  # the format aligns the data section, and packs what is in it
        starts: dict[Path, int] = {}
        for info in checkpoint.tensors.values():
            starts[info.file] = min(starts.get(info.file, info.offset), info.offset)
        odd = [file.name for file, start in starts.items() if start % step]
    else:
        odd = [info.name for info in checkpoint.tensors.values() if info.offset % step]
    if odd:
        yield f"{len(odd)} do not begin at a multiple of {step} bytes: {_some(odd)}"


def _gaps(checkpoint: Checkpoint) -> Iterator[str]:
    """Every byte of the data section belongs to a tensor."""
    for gap in checkpoint.gaps:
        yield f"{gap.nbytes} unexplained bytes at {gap.offset} in {gap.file.name}"


def _licence(checkpoint: Checkpoint) -> Iterator[str]:
    """The file says under which licence it may be used."""
    if checkpoint.format == "safetensors":
        folder = checkpoint.folder
        cards = [path for path in folder.glob("*") if path.name.lower().startswith(("license", "licence", "readme"))]
        stated = bool(cards) or bool(checkpoint.metadata.get("license"))
    else:
        stated = any(checkpoint.metadata.get(key) for key in ("general.license", "license"))
    if not stated:
        yield "no licence is stated"


def _tokenizer(checkpoint: Checkpoint) -> Iterator[str]:
    """A usable tokenizer came with the weights."""
    from apr_core.model.tokens import load_tokenizer

    try:
        load_tokenizer(checkpoint)
    except AprError as error:
        yield f"no usable tokenizer: {error.message}"


def _template(checkpoint: Checkpoint) -> Iterator[str]:
    """A chat model brings its template."""
    from apr_core.model.tokens import load_tokenizer

    try:
        if load_tokenizer(checkpoint).chat_template is None:
            yield "no chat template: this is a base model, or its template was lost"
    except AprError:
        return  # the rule on tokenizers says it


def _config(checkpoint: Checkpoint) -> Iterator[str]:
    """The configuration names its architecture and how far its context reaches."""
    config = checkpoint.config
    if config is None:
        yield "no config.json, so nothing says what the model is"
        return
    for key in ("model_type", "max_position_embeddings"):
        if config.get(key) is None:
            yield f"the configuration does not state {key}"


def _executable(checkpoint: Checkpoint) -> Iterator[str]:
    """Nothing beside the weights can run code when a program loads it."""
    from apr_core.formats.executables import find_executables

    config = checkpoint.config or {}
    if config.get("auto_map"):
        yield "the configuration names Python code to run (auto_map)"
    beside = [f"{name} ({kind})" for name, kind in find_executables(checkpoint.folder)]
    if beside:
        yield f"{len(beside)} files that can run code when loaded: {_some(beside)}"


def _shards(checkpoint: Checkpoint) -> Iterator[str]:
    """Shards are named ...-00001-of-0000N."""
    odd = [path.name for path in checkpoint.files if len(checkpoint.files) > 1 and "-of-" not in path.name]
    if odd:
        yield f"shards that are not named -00001-of-0000{len(checkpoint.files)}: {_some(odd)}"


def _some(names: list[str]) -> str:
    rest = len(names) - _MOST
    return ", ".join(names[:_MOST]) + (f" and {rest} more" if rest > 0 else "")


RULES: dict[str, tuple[str, str, Callable[[Checkpoint], Iterator[str]]]] = {
    "LINT-NAMES": ("warning", "rename them, or leave them out", _names),
    "LINT-ALIGNMENT": ("warning", "write the file again with `apr convert`", _alignment),
    "LINT-COVER": ("warning", "write the file again; a hole is a tensor that lost its entry", _gaps),
    "LINT-CONFIG": ("warning", "put the model's own config.json beside it", _config),
    "LINT-EXECUTABLE": ("warning", "remove them, or load them in a sandbox only", _executable),
    "LINT-TOKENIZER": ("warning", "copy tokenizer.json and tokenizer_config.json beside it", _tokenizer),
    "LINT-SHARDS": ("note", "rename them and the index", _shards),
    "LINT-TEMPLATE": ("note", "add chat_template to tokenizer_config.json if it is a chat model", _template),
    "LINT-LICENCE": ("note", "state one in the metadata, or in a card beside the weights", _licence),
}
