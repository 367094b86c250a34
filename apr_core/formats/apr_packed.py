"""
Compressed APR files: the bytes behind the header are one LZ4 block or one Zstandard frame.

No size that a file states is trusted: what comes out may be at most ``MAX_RATIO`` times what goes in (beyond a floor
that every file may use), and is produced piece by piece. The unpacked image lies in memory, as large as the model.
Source: ``shared/spec/apr.md`` section 1.8 (LZ4: 4 bytes of size, then a block; Zstandard: a plain frame); LZ4 block
format (its ratio cannot exceed 255); RFC 8878.
"""

from __future__ import annotations

from apr_core.errors import AprError, FormatError, Unavailable
from apr_core.formats.checkpoint import MappedFile
from apr_core.formats.strict_json import parse_object

LZ4, ZSTD = 0x0001, 0x0002
MAX_RATIO = 255
FLOOR_BYTES = 8 << 20
MAX_WINDOW_BYTES = 1 << 26  # a Zstandard frame may ask for memory of its own; level 21 asks for this much
_PIECES = (64, 4096)  # least and most bytes fed at a time
_AGAIN = "write it again without compression, or get a fresh copy of the file"


def unpack(file: MappedFile, flags: int, header_bytes: int, metadata_bytes: int) -> MappedFile:
    """
    Return the file as it was before compression, or itself when it is not compressed.

    Args:
        file: The file as it lies on the disk.
        flags: The header's flags.
        header_bytes: Length of the header, which is not compressed.
        metadata_bytes: Length of the metadata according to the header.

    Raises:
        FormatError: The data is damaged, expands beyond all measure, or is followed by something else.
        Unavailable: The package that unpacks it is not installed.
    """
    packed = file.view[header_bytes:]
    if not flags & (LZ4 | ZSTD):
        return file
    if flags & LZ4 and flags & ZSTD:
        raise _wrong(file, "one compression", "the flags of LZ4 and of Zstandard", 6)
    if flags & LZ4 and _is_plain(file, header_bytes, metadata_bytes):
        return file
    image = _unpack_lz4(file, packed, header_bytes) if flags & LZ4 else _unpack_zstd(file, packed, header_bytes)
    image[:0] = file.view[:header_bytes]
    return MappedFile(file.path, memoryview(image), stored=file.view)


def _wrong(file: MappedFile, expected: str, found: str, at: int) -> FormatError:
    return FormatError(expected=expected, found=found, file=file.path, at=at, advice=_AGAIN)


def _is_plain(file: MappedFile, start: int, nbytes: int) -> bool:
    """Tell the files of a writer that sets the LZ4 flag and compresses nothing: their metadata is there to be read."""
    text = bytes(file.view[start : start + nbytes])
    if text[:1] != b"{" or len(text) != nbytes:
        return False
    try:
        parse_object(text, file=file.path, what="APR metadata", at=start)
    except AprError:
        return False
    return True


def _limit(packed: memoryview) -> int:
    return max(FLOOR_BYTES, MAX_RATIO * packed.nbytes)


def _unpack_lz4(file: MappedFile, packed: memoryview, start: int) -> bytearray:
    try:
        from lz4 import block
    except ImportError as error:
        raise Unavailable(f"{file.path} is compressed with LZ4", advice="pip install lz4") from error
    size = int.from_bytes(packed[:4], "little")
    if packed.nbytes < 5 or size > MAX_RATIO * (packed.nbytes - 4):
        raise _wrong(
            file, f"an LZ4 block that expands at most {MAX_RATIO}-fold", f"{size} bytes of {packed.nbytes - 4}", start
        )
    try:
        image: bytearray = block.decompress(packed[4:], uncompressed_size=size, return_bytearray=True)
    except (block.LZ4BlockError, ValueError, OverflowError) as error:
        raise _wrong(file, f"an LZ4 block of {size} bytes", f"damaged data ({error})", start) from error
    if len(image) != size:
        raise _wrong(file, f"an LZ4 block of {size} bytes", f"{len(image)}", start)
    return image


def _unpack_zstd(file: MappedFile, packed: memoryview, start: int) -> bytearray:
    try:
        import zstandard
    except ImportError as error:
        raise Unavailable(f"{file.path} is compressed with Zstandard", advice="pip install zstandard") from error
    stream = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompressobj()
    image, most, at = bytearray(), _limit(packed), 0
    while at < packed.nbytes:
        # Four bytes make up to 128 KiB: what is fed grows with what may still come out.
        piece = packed[at : at + min(_PIECES[1], max(_PIECES[0], (most - len(image)) >> 15))]
        try:
            image += stream.decompress(piece)
        except zstandard.ZstdError as error:
            raise _wrong(file, "a Zstandard frame", f"damaged data ({error})", start + at) from error
        at += piece.nbytes
        if len(image) > most:
            raise _wrong(file, f"at most {most} bytes of {packed.nbytes}", "more: it expands beyond all measure", start)
        if stream.eof:
            behind = packed.nbytes - at + len(stream.unused_data)
            if behind:
                raise _wrong(file, "one Zstandard frame", f"{behind} bytes behind it", file.size - behind)
            return image
    raise _wrong(file, "a whole Zstandard frame", "the end of the file: it is truncated", file.size)
