"""
An opened model file: named tensors that point into a private mapping, unchecked.

The file is recognised by its first bytes, never by its extension. Nothing is read at opening but the header: a tensor's
bytes are touched when somebody looks at them. Whether the numbers make sense is the contract's business.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from apr_core.dtypes import QuantFormat
from apr_core.errors import AprError, FormatError, NotFound, ReadWriteError, UsageError

MAX_COMPANION_BYTES = 256 << 20
MAX_INDEX_BYTES = 100_000_000
SPARSE_FROM = 1 << 30  # bytes; below, zeros are read faster than they are explained
_MAX_EXTENTS = 4096
_HASH_CHUNK = 1 << 24
_NAMED = ("model.safetensors", "model.safetensors.index.json")
_SANDBOX = "convert it to SafeTensors in a sandbox, or download the SafeTensors file"


@dataclass(frozen=True)
class TensorInfo:
    """
    Where a tensor lies and what it claims to be.

    Attributes:
        name: The canonical (Hugging Face) name.
        dtype: Element type.
        shape: Row-major, outermost first, as Hugging Face writes it.
        file: The file that holds the bytes.
        offset: Absolute byte offset in ``file``.
        nbytes: Stored bytes, alignment padding excluded.
        stored_name: The name as it stands in the file.
    """

    name: str
    dtype: QuantFormat
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    stored_name: str


@dataclass(frozen=True, eq=False)
class RawTensor:
    """Unchecked bytes of one tensor: ``data`` is uint8, one-dimensional, read-only, a view of the mapping."""

    info: TensorInfo
    data: NDArray[np.uint8]


@dataclass(frozen=True)
class TensorSource:
    """
    A tensor to be written.

    Attributes:
        name: Canonical name; each writer translates it.
        dtype: Element type of the bytes that ``chunks`` yields.
        shape: Row-major shape.
        chunks: Starts a fresh pass over the encoded bytes; the sum of the pieces is ``dtype.nbytes(shape)``.
    """

    name: str
    dtype: QuantFormat
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[bytes | memoryview | NDArray[np.generic]]]


@dataclass(frozen=True)
class Gap:
    """Bytes of the data section that no tensor explains: a hole between tensors, or a tail behind the last one."""

    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True, eq=False)
class MappedFile:
    """
    A regular file of at least one byte, mapped copy-on-write: no write through it can reach the disk.

    ``stored`` is set where ``view`` is not what lies on the disk but was unpacked from it; offsets are in ``view``.
    """

    path: Path
    view: memoryview
    stored: memoryview | None = None

    @property
    def size(self) -> int:
        """Length in bytes at the time of mapping."""
        return self.view.nbytes


@dataclass(frozen=True, eq=False)
class Contents:
    """What a reader found: the parts of a `Checkpoint` that depend on the container."""

    files: tuple[MappedFile, ...]
    tensors: Sequence[TensorInfo]
    metadata: Mapping[str, object]
    config: Mapping[str, object] | None
    gaps: tuple[Gap, ...] = field(default=())
    facts: Mapping[str, object] = field(default_factory=dict)


class Checkpoint:
    """
    An opened model file. Build it with `open_checkpoint`.

    Attributes:
        path: The weight file or the shard index that was opened, symbolic links unresolved.
        format: ``safetensors``, ``gguf`` or ``apr``.
        files: Weight files in shard order.
        tensors: Canonical name to `TensorInfo`, in file order.
        metadata: The container's own metadata; the large arrays of a GGUF are parsed when they are asked for.
        config: Hugging Face configuration values, or None when the file has none.
        folder: Where companions (tokenizer.json and so on) are looked for: beside the link, not beside the blob.
        gaps: Bytes that no tensor explains.
        facts: What the container says about itself, for a report: version, flags, compression, parts.
    """

    def __init__(self, path: Path, container: str, contents: Contents) -> None:
        self.path = path
        self.format = container
        self.folder = path.parent
        self.files = tuple(file.path for file in contents.files)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(_by_name(contents.tensors))
        self.metadata = contents.metadata
        self.config = contents.config
        self.gaps = contents.gaps
        self.facts = contents.facts
        self._maps = {file.path: file.view for file in contents.files}
        self._stored = [file.view if file.stored is None else file.stored for file in contents.files]
        self._closed = False

    def raw(self, name: str) -> RawTensor:
        """
        Return the bytes of a tensor, uncopied.

        Raises:
            UsageError: There is no tensor of that canonical name, or the checkpoint is closed.
        """
        info = self.tensors.get(name)
        if info is None:
            raise UsageError(f"{self.path} has no tensor {name!r}", advice="list the names with `apr tensors`")
        self._require_open()
        data = np.frombuffer(self._maps[info.file], dtype=np.uint8)[info.offset : info.offset + info.nbytes]
        # The mapping itself is writable (that is what keeps torch from warning); without this flag a stray in-place
        # operation would change the weights under everybody who holds a view of them.
        data.flags.writeable = False
        return RawTensor(info, data)

    def release(self, name: str) -> None:
        """
        Let the pages of a tensor go; whoever looks at it again reads the file again.

        The mapping is private and nothing of ours writes through it, so there is nothing to lose. Does nothing where
        the system has no such call, or the bytes were unpacked and lie in no file.
        """
        info = self.tensors[name]
        held = self._maps[info.file].obj if not self._closed else None
        if isinstance(held, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            start = info.offset // mmap.PAGESIZE * mmap.PAGESIZE
            held.madvise(mmap.MADV_DONTNEED, start, info.offset + info.nbytes - start)

    @cached_property
    def content_hash(self) -> str:
        """The sha256 of the weight files in order, as hex. Cost: one pass over all bytes, then cached."""
        self._require_open()
        digest = hashlib.sha256()
        for view in self._stored:
            for start in range(0, view.nbytes, _HASH_CHUNK):
                digest.update(view[start : start + _HASH_CHUNK])
        return digest.hexdigest()

    def close(self) -> None:
        """Let go of the mappings; they vanish when the last array that was handed out does."""
        self._maps, self._stored = {}, []
        self._closed = True

    def _require_open(self) -> None:
        if self._closed:
            raise UsageError(f"{self.path} is closed", advice="open it again")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {self.format}, {len(self.tensors)} tensors)"


def _by_name(tensors: Sequence[TensorInfo]) -> dict[str, TensorInfo]:
    """Index tensors by canonical name; two stored names that mean the same tensor are an error, never last-wins."""
    named: dict[str, TensorInfo] = {}
    for info in tensors:
        other = named.setdefault(info.name, info)
        if other is not info:
            raise FormatError(
                expected=f"one tensor for the name {info.name}",
                found=f"two, stored as {other.stored_name} and {info.stored_name}",
                file=info.file,
                tensor=info.stored_name,
                at=info.offset,
                advice="export the model again; a loader could take either",
            )
    return named


def map_file(path: Path) -> MappedFile:
    """
    Map a file privately.

    Raises:
        NotFound: There is no such file.
        FormatError: It is empty, not a regular file, or a hole for the most part.
        ReadWriteError: The operating system refuses, or symbolic links lead in a circle.
    """
    with _opened(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size == 0:
            raise FormatError(
                expected="a model file", found="an empty file (0 bytes)", file=path, advice="download it again"
            )
        _require_written(stream, size, path)
        mapping = _map(stream.fileno(), size)
    return MappedFile(path, memoryview(mapping))


def read_companion(path: Path, most: int = MAX_COMPANION_BYTES) -> bytes:
    """
    Read a small file that lies beside the weights; a pipe is not waited for, and a terabyte not read.

    Raises:
        NotFound, ReadWriteError: As `map_file`.
        FormatError: It is not a regular file, or larger than ``most`` bytes.
    """
    with _opened(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > most:
            raise FormatError(
                expected=f"at most {most} bytes", found=f"{size}", file=path, advice="get a fresh copy of the file"
            )
        return stream.read(size)  # not of the limit: the buffer is allocated before the first byte


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file for reading; whatever the operating system objects to becomes our own error."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a device may already do something
            raise _irregular(path)
        # Without O_NONBLOCK, a pipe that took the file's place would be waited for.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(descriptor, "rb") as stream:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise _irregular(path)
            yield stream
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(f"no such file: {path}", advice="check the path") from error
    except (OSError, ValueError) as error:
        raise _refused(path, error) from error


def _irregular(path: Path) -> FormatError:
    return FormatError(
        expected="a regular file", found="a directory, pipe, socket or device", file=path, advice="give a model file"
    )


def _refused(path: Path, error: OSError | ValueError) -> AprError:
    """Say what the operating system objects to; ValueError is Python's for a name with a zero byte."""
    code = getattr(error, "errno", None)
    if code == errno.ELOOP:
        return ReadWriteError(
            f"cannot read {path}: its symbolic links lead in a circle", advice="remove the link, or name the file"
        )
    if code == errno.EISDIR or code == errno.ENXIO:  # a socket, or a device without a driver
        return _irregular(path)
    if code in (errno.EACCES, errno.EPERM):
        return ReadWriteError(
            f"cannot read {path}: {os.strerror(code)}", advice="ask its owner for the right to read it"
        )
    said = error.strerror if isinstance(error, OSError) else str(error)
    return ReadWriteError(f"cannot read {path!s:.200}: {said}", advice="check the path and the disk")


def _map(descriptor: int, size: int) -> mmap.mmap:
    """Map copy-on-write; without a claim on memory where the system offers that: a model may exceed the memory."""
    if sys.platform == "linux":
        no_reserve = 0x4000  # MAP_NORESERVE, which Python names from 3.13 on
        return mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE | no_reserve, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY)


def _require_written(stream: BinaryIO, size: int, path: Path) -> None:
    """
    Refuse a large file that is mostly hole: a download that was cut off behind its preallocation, or a trap.

    Reading it would yield zeros for hours. Smaller holes are legal: ``cp --sparse`` makes them of runs of zeros.
    """
    if size < SPARSE_FROM or not hasattr(os, "SEEK_DATA"):
        return
    written = at = 0
    for _ in range(_MAX_EXTENTS):  # more pieces than that are no interrupted download
        try:
            data = os.lseek(stream.fileno(), at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # this file system knows no holes
                return
            raise FormatError(
                expected=f"{size} bytes of data",
                found=f"{written} that were ever written; the rest of the file is a hole (an interrupted download?)",
                file=path,
                at=at,
                advice="download it again",
            ) from None
        at = os.lseek(stream.fileno(), data, os.SEEK_HOLE)  # the end of the file where there are no holes
        written += at - data
        if 2 * written >= size:
            return


def open_checkpoint(path: str | Path, *, verify_footer: bool = True) -> Checkpoint:
    """
    Open a model file, any part of a split GGUF or APR, a shard index, or a folder that holds exactly one model.

    Args:
        path: A file of any of the three formats, a ``model.safetensors.index.json``, or a folder.
        verify_footer: False skips the checksum over all bytes of an APR file, for speed.

    Raises:
        NotFound: The path does not exist, or the folder holds no model.
        UsageError: The folder holds several models.
        FormatError: The file is not a model, or is malformed; the message names what it is instead.
        ReadWriteError: The operating system refuses.
        Unavailable: An APR file is compressed, and the package that unpacks it is not installed.

    Cost: reads the header alone; an APR file is read once from end to end because its checksum covers every byte, and
    a compressed one is unpacked into memory.
    """
    from apr_core.formats import apr, gguf, safetensors
    from apr_core.formats.sniff import sniff
    from apr_core.formats.strict_json import parse_object

    target = _only_model(Path(path))
    file = map_file(target)
    container = sniff(file)
    if container == "gguf":
        contents = gguf.read_gguf(file)
        return Checkpoint(contents.files[0].path, container, contents)
    if container == "apr":
        contents = apr.read_apr(file, verify_footer=verify_footer)
        return Checkpoint(contents.files[0].path, container, contents)
    if container == "index":
        index = parse_object(bytes(file.view[:MAX_INDEX_BYTES]), file=file.path, what="shard index", at=0)
        if "shards" in index:
            return Checkpoint(target, "apr", apr.read_manifest(file, index, verify_footer=verify_footer))
        return Checkpoint(target, "safetensors", safetensors.read_index(file, index))
    return Checkpoint(target, container, safetensors.read_safetensors(file))


def _only_model(path: Path) -> Path:
    """Resolve a folder to the one model in it; a file stays itself."""
    from apr_core.formats.executables import find_executables
    from apr_core.formats.shards import first_of_parts

    try:
        if not stat.S_ISDIR(path.stat().st_mode):
            return path
        entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(f"no such file or folder: {path}", advice="check the path") from error
    except (OSError, ValueError) as error:
        raise _refused(path, error) from error
    found = [entry for entry in entries if entry.name in _NAMED or entry.suffix.lower() in (".gguf", ".apr")]
    found = found or [entry for entry in entries if entry.suffix == ".safetensors"]
    if not found:
        pickles = find_executables(path)
        if pickles:
            raise FormatError(
                expected="model.safetensors, a .gguf or an .apr",
                found=f"executable content alone: {', '.join(f'{name} ({kind})' for name, kind in pickles[:3])}",
                file=path,
                advice=_SANDBOX,
            )
        raise NotFound(f"no model.safetensors, .gguf or .apr in {path}", advice="give the model file, or convert it")
    if len(found) == 1:
        return found[0]
    first = first_of_parts(found)
    if first is not None and first.suffix.lower() in (".gguf", ".apr"):
        return first
    if first is not None:
        raise FormatError(
            expected=f"model.safetensors.index.json beside {len(found)} shards",
            found="no index",
            file=path,
            advice="download the index too: it says which tensors there must be",
        )
    raise UsageError(
        f"{path} holds {len(found)} models: {', '.join(entry.name for entry in found[:20])}", advice="name one of them"
    )
