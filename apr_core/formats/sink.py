"""
Write a file so that a reader sees all of it or none: a temporary file beside it, fsync, then rename.

In-place rewriting is how a mapped checkpoint turns to zeros under a running program.
"""

from __future__ import annotations

import os
import secrets
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from apr_core.dtypes import QuantFormat
from apr_core.errors import ReadWriteError, UsageError
from apr_core.formats.checkpoint import TensorSource

# Linux keeps a file in memory in pieces as large as the writes that made it: written 64 kB at a time, a gigabyte costs
# a reader that maps it 15,000 page faults (38 ms); written by the megabyte, a thousand.
_WRITE = 1 << 22


class Sink:
    """Append-only view of the temporary file; counts bytes, keeps the CRC-32 of all of them, and reports progress."""

    def __init__(self, stream: BinaryIO, progress: Callable[[int], None] | None, *, checksum: bool) -> None:
        self.position = 0
        self.crc = 0
        self._stream, self._progress, self._checksum = stream, progress, checksum

    def write(self, piece: bytes | memoryview | NDArray[np.generic]) -> None:
        """Append bytes; an array is written as it lies in memory, row-major."""
        data = memoryview(
            np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data if isinstance(piece, np.ndarray) else piece
        )
        self._stream.write(data)
        self.position += data.nbytes
        if self._checksum:
            self.crc = zlib.crc32(data, self.crc)
        if self._progress is not None:
            self._progress(self.position)

    def pad_to(self, alignment: int) -> None:
        """Append zeros up to a multiple of ``alignment``."""
        self.write(bytes(-self.position % alignment))

    def write_tensor(self, source: TensorSource) -> None:
        """
        Append all chunks of a tensor.

        Raises:
            UsageError: They are not as many bytes as the type and the shape say; the offsets behind it would be wrong.
        """
        start, expected = self.position, source.dtype.nbytes(source.shape)
        for chunk in source.chunks():
            self.write(chunk)
        if self.position - start != expected:
            raise UsageError(
                f"tensor {source.name} gave {self.position - start} bytes, "
                f"expected {expected} for {source.dtype} {list(source.shape)}",
                advice="nothing was written; fix the source of this tensor",
            )


@contextmanager
def replacing(path: Path, progress: Callable[[int], None] | None = None, *, checksum: bool = False) -> Iterator[Sink]:
    """
    Open a `Sink`; on leaving without an error the file appears under ``path``, otherwise nothing of it stays.

    Raises:
        ReadWriteError: The operating system refuses (no such folder, disk full, permission).
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("xb", buffering=_WRITE) as stream:
            yield Sink(stream, progress, checksum=checksum)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException as error:  # KeyboardInterrupt too: a stump of gigabytes must not stay behind
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise ReadWriteError(
                f"cannot write {path}: {error.strerror or error}", advice="check the folder, permissions and free space"
            ) from error
        raise


def sync_folder(folder: Path) -> None:
    """Make a rename in a folder durable; some file systems do not offer that, which is no reason to fail."""
    sync_file(folder)


def sync_file(path: Path) -> None:
    """Bring what was written to a file or a folder to the disk, where the file system offers that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        return
    finally:
        os.close(descriptor)


def require_unique(sources: list[tuple[str, TensorSource]], path: Path) -> None:
    """Refuse two tensors of one stored name before the first byte is written."""
    seen: set[str] = set()
    for name, _ in sources:
        if name in seen:
            raise UsageError(f"two tensors would be stored as {name} in {path}", advice="leave one out")
        seen.add(name)


def refuse_type(source: TensorSource, container: str, path: Path, instead: str) -> UsageError:
    """Build the error for a type that a container cannot hold; never a silent cast."""
    dtype: QuantFormat = source.dtype
    return UsageError(f"{container} cannot hold {dtype} (tensor {source.name}, for {path})", advice=instead)
