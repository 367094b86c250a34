"""
Put what was written where it belongs: a target is there whole, or not at all.

Everything is written into a hidden folder beside the target and renamed at the end, the weights last. Whatever happens
before (an error, Ctrl-C, SIGTERM that became SystemExit) removes that folder and leaves the target as it was.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from apr_core.errors import NotFound, ReadWriteError, UsageError
from apr_core.formats.sink import sync_file, sync_folder
from apr_core.rosetta.carry import COMPANIONS

_WEIGHTS = "model.safetensors"


@contextmanager
def placing(target: Path, container: str, *, force: bool, keep: Sequence[Path]) -> Iterator[Path]:
    """
    Hand out the file to write the weights into, companions beside it; on leaving without an error all of it appears.

    Args:
        target: A file, or a folder for SafeTensors.
        container: Of the target.
        force: Replace what is there.
        keep: Files that are being read: never a target.

    Raises:
        UsageError: Something is there and ``force`` is not given, or it is no model, or it is the source.
        NotFound: There is no folder to write into.
        ReadWriteError: The operating system refuses.
    """
    folder = container == "safetensors" and target.suffix.lower() != ".safetensors"
    _require_room(target, folder=folder, force=force, keep=keep)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        temporary.mkdir()
        file = temporary / (_WEIGHTS if folder else target.name)
        yield file
        for path in temporary.iterdir():
            if path != file:
                sync_file(path)
        sync_folder(temporary)
        if folder:
            _swap(temporary, target)
        else:
            _move(file, target, force=force)
        sync_folder(target.parent)
    except BaseException as error:  # KeyboardInterrupt and SystemExit too: gigabytes must not stay behind
        if isinstance(error, OSError):
            raise ReadWriteError(
                f"cannot write {target}: {error.strerror or error}", advice="check the folder and free space"
            ) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _require_room(target: Path, *, folder: bool, force: bool, keep: Sequence[Path]) -> None:
    if not target.parent.is_dir():
        raise NotFound(f"no folder {target.parent} to write into", advice="make it first")
    if not (target.exists() or target.is_symlink()):
        return
    if not force:
        raise UsageError(f"{target} exists", advice="name another, or give --force to replace it")
    held = {path.resolve() for path in keep}
    if target.resolve() in held or any(path.parent == target.resolve() for path in held):
        raise UsageError(f"{target} is what is being read", advice="name another target")
    if folder != target.is_dir() or target.is_symlink():
        raise UsageError(f"{target} is not of the kind that would replace it", advice="name another target")
    strange = sorted(p.name for p in target.iterdir() if p.name not in (_WEIGHTS, *COMPANIONS)) if folder else []
    if strange:
        raise UsageError(
            f"{target} holds more than a model ({', '.join(strange[:3])}), so it is not replaced",
            advice="name another folder",
        )


def _swap(temporary: Path, target: Path) -> None:
    """Rename a folder into place; one that was there steps aside first and comes back when that fails."""
    if not target.exists():
        temporary.rename(target)
        return
    aside = target.with_name(f".{target.name}.{secrets.token_hex(6)}.old")
    target.rename(aside)
    try:
        temporary.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _move(file: Path, target: Path, *, force: bool) -> None:
    """Rename a file into place, its companions before it; those that are there already must say the same."""
    companions = [path for path in file.parent.iterdir() if path != file]
    for path in companions:
        there = target.parent / path.name
        if there.exists() and not force and there.read_bytes() != path.read_bytes():
            raise UsageError(f"{there} exists and says something else", advice="write into a folder of its own")
    placed: list[Path] = []
    try:
        for path in companions:
            there = target.parent / path.name
            if not there.exists():
                placed.append(there)
            path.replace(there)
        file.replace(target)
    except BaseException:
        for path in placed:
            path.unlink(missing_ok=True)
        raise
