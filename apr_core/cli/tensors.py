"""``apr tensors``: what is in a file, tensor by tensor, with numbers when they are asked for; judges nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apr_core.errors import AprError, UsageError

if TYPE_CHECKING:
    from apr_core.formats.checkpoint import Checkpoint, TensorInfo

_NUMBERS = ("count", "zeros", "nans", "infs", "minimum", "maximum", "mean", "std", "l2", "nonfinite_scales", "digest")


def tensors(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model file or folder, or 'pygmy'.")],
    matching: Annotated[
        str, typer.Option("--filter", metavar="TEXT", help="Names that hold this text, or match it (*, ?, [...]).")
    ] = "",
    stats: Annotated[
        bool, typer.Option("--stats", help="Measure each: zeros, not finite, range, mean, deviation, norm.")
    ] = False,
    limit: Annotated[int, typer.Option("--limit", min=0, metavar="N", help="Show N at most; 0 for all.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print strict JSON.")] = False,
) -> None:
    """List the tensors of a file. Role, type, shape, where the bytes lie; works on files that the contract refuses."""
    from apr_core.cli.output import show_json

    body = listing(model, matching=matching, stats=stats, limit=limit)
    show_json(body) if as_json else _show(body)


def listing(model: str, *, matching: str = "", stats: bool = False, limit: int = 0) -> dict[str, Any]:
    """
    List the tensors of a model file.

    Args:
        model: Path, or ``pygmy``.
        matching: Text that a name holds, or a pattern for the whole name.
        stats: Measure the values.
        limit: At most so many; 0 for all.

    Returns:
        model, format, tensors in all, matching (their number), rows (name, role, dtype, shape, file, begin, end, bytes,
        stored_name, and what was measured, or why it could not be).

    Raises:
        AprError: The file cannot be opened.
        UsageError: No name matches.
    """
    from apr_core.engines.subject import resolve_model
    from apr_core.formats.checkpoint import open_checkpoint

    with open_checkpoint(resolve_model(model)) as checkpoint:
        found = [info for info in checkpoint.tensors.values() if _matches(info, matching)]
        if matching and not found:
            raise UsageError(
                f"none of {len(checkpoint.tensors)} tensors matches {matching!r}", advice="list all without --filter"
            )
        rows = [_row(checkpoint, info, stats) for info in found[: limit or None]]
        return {
            "model": str(checkpoint.path),
            "format": checkpoint.format,
            "tensors": len(checkpoint.tensors),
            "matching": len(found),
            "rows": rows,
        }


def _matches(info: TensorInfo, text: str) -> bool:
    from fnmatch import fnmatchcase

    names = (info.name, info.stored_name)
    if any(mark in text for mark in "*?["):
        return any(fnmatchcase(name, text) for name in names)
    return any(text in name for name in names)


def _row(checkpoint: Checkpoint, info: TensorInfo, stats: bool) -> dict[str, Any]:
    from apr_core.contract.layout import role_of

    role = role_of(info.name)
    row: dict[str, Any] = {
        "name": info.name,
        "role": role.name if role else None,
        "dtype": str(info.dtype),
        "shape": list(info.shape),
        "file": info.file.name,
        "begin": info.offset,
        "end": info.offset + info.nbytes,
        "bytes": info.nbytes,
        "stored_name": info.stored_name,
    }
    return row | _measured(checkpoint, info) if stats else row


def _measured(checkpoint: Checkpoint, info: TensorInfo) -> dict[str, Any]:
    """Measure one tensor; what cannot be decoded says why and does not end the list."""
    from apr_core.contract.stats import measure

    try:
        found = measure(checkpoint.raw(info.name))
    except AprError as error:
        return {"unreadable": error.message}
    return {name: getattr(found, name) for name in _NUMBERS} | {"zero_percent": found.zero_percent}


def _show(body: Mapping[str, Any]) -> None:
    from apr_core.cli.output import show, show_table

    rows = body["rows"]
    measured = any("l2" in row or "unreadable" in row for row in rows)
    heads = ["tensor", "role", "type", "shape", "bytes", "at"]
    heads += ["zeros", "not finite", "minimum", "maximum", "mean", "deviation", "norm"] if measured else []
    show_table(heads, [_cells(row, measured) for row in rows])
    shown = "" if len(rows) == body["matching"] else f", {len(rows)} shown"
    of = "" if body["matching"] == body["tensors"] else f" of {body['tensors']}"
    show(f"{body['model']}: {body['format']}, {body['matching']}{of} tensors{shown}")


def _cells(row: Mapping[str, Any], measured: bool) -> list[object]:
    files = f"{row['begin']}" + (f" in {row['file']}" if "-of-" in row["file"] else "")
    cells: list[object] = [row["name"], row["role"] or "none", row["dtype"], row["shape"], f"{row['bytes']:,}", files]
    if not measured:
        return cells
    if "unreadable" in row:
        return [*cells, row["unreadable"], *[""] * 6]
    numbers = [f"{row[key]:.4g}" for key in ("minimum", "maximum", "mean", "std", "l2")]
    return [*cells, f"{row['zero_percent']:.1f} %", row["nans"] + row["infs"], *numbers]
