"""A record's JSON Schema, and the record back from its JSON: both read the types of the dataclass, so they agree."""

from __future__ import annotations

import inspect
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_PLAIN = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}


def schema_of(kind: Any) -> dict[str, Any]:
    """
    Return the JSON Schema of a record.

    Args:
        kind: A dataclass, or what its fields may be: plain values, enums of text, literals, unions, tuples of one type,
            mappings from text, Any.
    """
    origin, args = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return {
            "type": "object",
            "description": (inspect.getdoc(kind) or "").split("\n\n")[0],
            "properties": {f.name: schema_of(hints[f.name]) for f in fields(kind)},
            "required": [f.name for f in fields(kind)],
            "additionalProperties": False,
        }
    if origin is Literal:
        return {"enum": list(args)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [schema_of(a) for a in args]}
    if origin is tuple:
        return {"type": "array", "items": schema_of(args[0])}
    if origin is Mapping:
        return {"type": "object", "additionalProperties": schema_of(args[1])}
    if isinstance(kind, type) and issubclass(kind, Enum):
        return {"enum": [str(member) for member in kind]}
    return {} if kind is Any else {"type": _PLAIN[kind]}


def parse(kind: Any, value: Any, at: str = "$") -> Any:
    """
    Build a record from the JSON that ``schema_of(kind)`` describes.

    Raises:
        ValueError: The JSON is not of this type; the message names the place.
    """
    origin, args = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        names = {f.name for f in fields(kind)}
        if not isinstance(value, dict) or set(value) != names:
            found = sorted(set(value) ^ names) if isinstance(value, dict) else type(value).__name__
            raise ValueError(f"{at}: missing or unknown {found}")
        hints = get_type_hints(kind)
        return kind(**{name: parse(hints[name], value[name], f"{at}.{name}") for name in names})  # type: ignore[operator]
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return parse(next(a for a in args if a is not type(None)), value, at)
    if origin is tuple and isinstance(value, list):
        return tuple(parse(args[0], item, f"{at}[{i}]") for i, item in enumerate(value))
    if origin is Mapping and isinstance(value, dict):
        return {key: parse(args[1], item, f"{at}.{key}") for key, item in value.items()}
    if origin is Literal and value in args:
        return value
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(value)
    if kind is float and type(value) is int:
        return float(value)
    if kind is Any or type(value) is kind:
        return value
    raise ValueError(f"{at}: expected {getattr(kind, '__name__', kind)}, found {value!r:.60}")


def main() -> None:
    """Write the published schema again."""
    import json
    from pathlib import Path

    from apr_core.report.summary import Summary

    path = Path(__file__).with_name("summary.schema.json")
    path.write_text(json.dumps(schema_of(Summary), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
