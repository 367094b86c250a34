"""What commands print: strict JSON, aligned tables, and text of foreign origin made harmless."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from apr_core.report.text import aligned, clean

WHOLE = sys.maxsize


def note(text: str) -> None:
    """Say something to the person, beside the output: on stderr, unsafe characters escaped."""
    print(clean(text, WHOLE), file=sys.stderr, flush=True)


def show(text: str) -> None:
    """Print a line of output, unsafe characters escaped: names in a model file may hold terminal commands."""
    print(clean(text, WHOLE))


def show_json(body: Mapping[str, Any]) -> None:
    """Print strict JSON: no NaN and no Infinity (null instead), ASCII, so that any terminal and parser takes it."""
    print(json.dumps(plain(body), indent=1, allow_nan=False))


def plain(value: Any) -> Any:
    """Return JSON values alone: tuples as lists, numpy numbers as Python's, what is not finite as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "item") and not isinstance(value, str):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def show_table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print columns as wide as their widest cell, the last one as long as it is."""
    print(aligned(heads, rows, 400))
