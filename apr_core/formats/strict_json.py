"""JSON without the freedoms that two readers use differently: no duplicate keys, no NaN, no numbers out of range."""

from __future__ import annotations

import json
from math import isfinite
from pathlib import Path

from apr_core.errors import FormatError

_SURROGATE = ("\\ud", "\\uD")


class _RefusedError(ValueError):
    """A legal JSON text that is refused here; says what was found."""


def parse_object(data: bytes, *, file: Path, what: str, at: int, floats: bool = True) -> dict[str, object]:
    """
    Parse a JSON object.

    Args:
        data: UTF-8 text.
        file: For the message.
        what: What the text is, e.g. ``SafeTensors header``.
        at: Byte offset of ``data`` in ``file``.
        floats: False where the format knows integers alone.

    Raises:
        FormatError: Not UTF-8, not JSON, not an object, nested too deep, duplicate keys, NaN or numbers out of range,
            or half a surrogate pair (it could not be printed).
    """
    try:
        text = data.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite if floats else _no_float,
        )
        if any(mark in text for mark in _SURROGATE):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except _RefusedError as refused:
        found = str(refused)
    except RecursionError:
        found = "nesting too deep to parse"
    except UnicodeError:
        found = "bytes that are not UTF-8"
    except json.JSONDecodeError as error:
        found = f"a JSON error ({error.msg} at character {error.pos})"
    except ValueError:  # an integer of thousands of digits
        found = "an integer that is too long"
    else:
        if isinstance(value, dict):
            return value
        found = f"a JSON {type(value).__name__}"
    raise FormatError(
        expected=f"a JSON object as {what}", found=found, file=file, at=at, advice="get a fresh copy of the file"
    )


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Build a dict, refusing what would be last-wins in one reader and first-wins in the next."""
    built = dict(pairs)
    if len(built) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _RefusedError(f"the key {key!r:.80} twice")
            seen.add(key)
    return built


def _finite(digits: str) -> float:
    value = float(digits)
    if not isfinite(value):
        raise _RefusedError(f"the number {digits:.40}, which is out of range")
    return value


def _no_float(digits: str) -> float:
    raise _RefusedError(f"the number {digits:.40} where only integers belong")


def _no_constant(name: str) -> float:
    raise _RefusedError(f"{name}, which is not JSON")
