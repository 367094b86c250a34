"""Print the size of the house against its budget: lines of code, without blank lines, comments and docstrings."""

from __future__ import annotations

import ast
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 12_000
OUTSIDE = ("kernels", "engines")


def code_lines(path: Path) -> int:
    """Lines that hold a token other than a comment or a docstring."""
    with path.open("rb") as stream:
        kinds = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.ENCODING, tokenize.INDENT, tokenize.DEDENT)
        tokens = [t for t in tokenize.tokenize(stream.readline) if t.type not in kinds]
    lines = {n for t in tokens for n in range(t.start[0], t.end[0] + 1) if t.string}
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, holders) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(lines)


def total(paths: list[Path]) -> tuple[int, int]:
    """Code lines and all lines of some files."""
    return sum(map(code_lines, paths)), sum(len(p.read_text(encoding="utf-8").splitlines()) for p in paths)


def main() -> None:
    """Print one line per room, then the sums."""
    inside: list[Path] = []
    for room in sorted((ROOT / "apr_core").iterdir()):
        paths = sorted(room.rglob("*.py")) if room.is_dir() else [room] if room.suffix == ".py" else []
        if paths:
            print(f"{room.stem:12}{'{:7,} code {:7,} lines'.format(*total(paths))}")
            inside += [] if room.name in OUTSIDE else paths
    code, lines = total(inside)
    tests = total(sorted((ROOT / "tests").rglob("*.py")))
    print(f"{'apr_core':12}{code:7,} code {lines:7,} lines, budget {BUDGET:,} code; without {', '.join(OUTSIDE)}")
    print(f"{'tests':12}{tests[0]:7,} code {tests[1]:7,} lines, at most 1.5 times that")


if __name__ == "__main__":
    main()
