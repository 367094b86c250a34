"""How values become text: every string that a model file supplied passes here before it reaches a page."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

LONG = 4000

# Controls (an escape sequence recolours a terminal), bidirectional overrides (a name that reads backwards), lone
# surrogates (they cannot be written as UTF-8), and the two code points that XML forbids.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def clean(value: object, limit: int = LONG) -> str:
    """
    Turn any value into text that can be shown: unsafe characters become visible escapes, long text loses its middle.

    Args:
        value: Anything; an object whose ``str`` fails is named by its type.
        limit: Longest text kept whole, in characters; what is cut is counted in the text.
    """
    try:
        text = str(value)
    except Exception:  # a repr must be total, and __str__ of a foreign object may do anything
        text = f"({type(value).__name__} without text)"
    length = len(text)
    if length > limit:
        head = limit * 3 // 4
        text = f"{text[:head]} … [{length:,} characters] … {text[length - (limit - head) :]}"
    return _UNSAFE.sub(lambda m: f"\\u{ord(m[0]):04x}" if ord(m[0]) > 0xFF else f"\\x{ord(m[0]):02x}", text)


def esc(value: object, limit: int = LONG) -> Markup:
    """
    Escape a value for HTML text and attributes.

    An address in a model's metadata keeps its looks and loses its bytes (``:&#47;&#47;``), so that a search of a page
    for remote references finds remote references only.
    """
    if isinstance(value, Markup):
        return value
    return Markup(str(escape(clean(value, limit))).replace("://", ":&#47;&#47;"))


def number(value: object) -> str:
    """Write a cell of a table: integers in full, floats with three digits, nothing as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) or type(value).__module__ == "numpy":
        return _float(value)
    return clean(value, 400)


def _float(value: Any) -> str:
    try:
        x = float(value)
    except (TypeError, ValueError):
        return clean(value, 400)
    if not math.isfinite(x):
        return "not finite"
    return str(int(x)) if x == int(x) and abs(x) < 1e6 else f"{x:.3g}"


def quantity(value: object, unit: str) -> str:
    """Write a measured value with its unit; ``count`` and ``1`` are no units that a reader needs."""
    text = number(value)
    return text if unit in ("count", "1", "") or value is None else f"{text} {unit}"


def limit_of(claim: Mapping[str, Any]) -> str:
    """Write the threshold of a declared claim as the claims table has it, e.g. ``≤ 1e-05``."""
    sign = "≤" if claim["direction"] == "at_most" else "≥"
    return f"{sign} {quantity(float(claim['threshold']), str(claim['unit']))}"


def machine_facts(provenance: Mapping[str, Any]) -> dict[str, object]:
    """What ran, on what, by heading; what is not known is empty."""
    p = provenance
    return {
        "Machine": ", ".join(str(p[k]) for k in ("platform", "cpu") if p.get(k)),
        "Cores": p.get("cores"),
        "Python": p.get("python"),
        "Packages": ", ".join(f"{k} {v}" for k, v in dict(p.get("packages") or {}).items()),
        "Commit": f"{p['commit']}{' (edited since)' if p.get('dirty') else ''}" if p.get("commit") else "",
        "Command": p.get("command"),
    }


def percent(share: object) -> str:
    """Write a share of one; never rounded up to a hundred, nor down to nothing."""
    if isinstance(share, bool) or not isinstance(share, int | float) or not math.isfinite(share):
        return "–"
    shown = 100.0 * share
    return f"{shown:.0f} %" if shown in (0, 100) else f"{min(max(shown, 0.1), 99.9):.1f} %"


def seconds(value: float) -> str:
    """Write a duration: ``0.42 s``, ``12.3 s``, ``3 min 07 s``."""
    if not math.isfinite(value):
        return "unknown"
    if value < 60:
        return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"
    return f"{int(value // 60)} min {int(value % 60):02d} s"


def nbytes(value: int) -> str:
    """Write a size in decimal units, as file managers do."""
    size = float(value)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{value:,} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError("unreachable: the last unit returns")


def columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys of all rows in the order of their first appearance."""
    return list(dict.fromkeys(str(k) for row in rows for k in row))


def aligned(heads: Sequence[str], rows: Sequence[Sequence[object]], limit: int) -> str:
    """Write columns as wide as their widest cell, for a terminal; ``limit`` is the longest text kept whole."""
    cells = [[clean(cell, limit).replace("\n", " ") for cell in row] for row in (heads, *rows)]
    wide = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, wide, strict=True)).rstrip() for row in cells)


def table(rows: Sequence[Mapping[str, Any]], caption: str = "") -> Markup:
    """Build an escaped HTML table of rows, column heads with scope; empty for no rows."""
    if not rows:
        return Markup("")
    names = columns(rows)
    head = Markup("").join(Markup('<th scope="col">{}</th>').format(esc(n, 80)) for n in names)
    body = Markup("").join(
        Markup("<tr>{}</tr>").format(Markup("").join(_cell(number(row.get(n))) for n in names)) for row in rows
    )
    title = Markup("<caption>{}</caption>").format(esc(caption, 200)) if caption else Markup("")
    return Markup('<table class="apr-rows">{}<thead><tr>{}</tr></thead><tbody>{}</tbody></table>').format(
        title, head, body
    )


def _cell(text: str) -> Markup:
    """A short cell never breaks: ``1e-05`` has a hyphen that a browser takes for a place to break."""
    short = Markup(' class="apr-n"') if len(text) <= 14 else Markup("")
    return Markup("<td{}>{}</td>").format(short, esc(text, 400))
