"""
Parts of one model that lie side by side: the names that number them, and the sum of what they hold.

Source: llama.cpp ``llama_split_path`` (``NAME-00001-of-00003.gguf``); Hugging Face and APR number their shards alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from apr_core.errors import FormatError, ReadWriteError
from apr_core.formats.checkpoint import TensorInfo

MAX_PARTS = 99_999  # five digits
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})(?P<suffix>\.[^.]+)", re.DOTALL)


@dataclass(frozen=True)
class PartName:
    """What a name like ``model-00002-of-00003.gguf`` says; ``number`` counts from 1."""

    stem: str
    number: int
    count: int
    suffix: str

    def sibling(self, number: int) -> str:
        """Name of another part of the same model."""
        return f"{self.stem}-{number:05}-of-{self.count:05}{self.suffix}"


def part_name(path: Path) -> PartName | None:
    """Read the numbers in a file name; None when it has none, or impossible ones."""
    match = _NUMBERED.fullmatch(path.name)
    if match is None:
        return None
    number, count = int(match["number"]), int(match["count"])
    return PartName(match["stem"], number, count, match["suffix"]) if 1 <= number <= count else None


def first_of_parts(entries: Sequence[Path]) -> Path | None:
    """Return the first of several files when all are numbered parts of one model, complete or not."""
    named = [part_name(entry) for entry in entries]
    if not named or any(name is None for name in named):
        return None
    models = {(name.stem, name.count, name.suffix) for name in named if name is not None}
    return min(entries) if len(models) == 1 else None


def sibling_paths(path: Path, number: int, count: int, advice: str) -> list[Path]:
    """
    Return the paths of all parts of a model.

    Args:
        path: The part that was opened.
        number: Which part its content says it is, from 1.
        count: How many its content says there are.
        advice: What to do when the names do not tell.

    Raises:
        FormatError: The file's name does not say the same as its content, or parts are missing; it names them all.
    """
    name = part_name(path)
    if name is None or (name.number, name.count) != (number, count):
        said = "without a part number" if name is None else f"of part {name.number} of {name.count}"
        raise FormatError(
            expected=f"a name that ends in -{number:05}-of-{count:05}, as the content says",
            found=f"a name {said}",
            file=path,
            advice=advice,
        )
    try:
        present = {entry.name for entry in path.parent.iterdir()}  # asked once: a liar may count to 99,999
    except OSError as error:
        raise ReadWriteError(
            f"cannot look for the other parts of {path}: {error.strerror}",
            advice="ask for the right to list its folder",
        ) from error
    siblings = [name.sibling(n) for n in range(1, count + 1)]
    absent = [sibling for sibling in siblings if sibling not in present]
    if absent:
        raise FormatError(
            expected=f"{count} parts side by side",
            found=f"{len(absent)} missing: {', '.join(absent[:5])}{', ...' if len(absent) > 5 else ''}",
            file=path,
            advice="download the missing parts into the same folder",
        )
    return [path.with_name(sibling) for sibling in siblings]


def require_once(parts: Iterable[Sequence[TensorInfo]], advice: str) -> list[TensorInfo]:
    """
    Chain the tensors of all parts.

    Raises:
        FormatError: Two parts hold a tensor of the same name: a loader could take either.
    """
    seen: dict[str, TensorInfo] = {}
    for info in (info for part in parts for info in part):
        other = seen.setdefault(info.stored_name, info)
        if other is not info:
            raise FormatError(
                expected="each tensor in one part",
                found=f"it in {other.file.name} too",
                file=info.file,
                tensor=info.stored_name,
                at=info.offset,
                advice=advice,
            )
    return list(seen.values())


def safe_shard(shard: object, name: str, index: Path) -> str:
    """
    Accept a path inside the index's folder alone: an index must not make us open /etc/passwd.

    Raises:
        FormatError: It is absolute, climbs out of the folder, or is no path at all.
    """
    if isinstance(shard, str) and shard and "\0" not in shard and "\\" not in shard:
        parts = PurePosixPath(shard)
        if not parts.is_absolute() and ".." not in parts.parts and ":" not in shard:
            return shard
    raise FormatError(
        expected="a shard inside the folder of the index",
        found=f"{shard!r:.120}",
        file=index,
        tensor=name,
        advice="do not trust this download",
    )
