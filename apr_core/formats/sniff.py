"""Tell from the first bytes what a file is; name what it is instead when it is no model."""

from __future__ import annotations

import re

from apr_core.errors import FormatError
from apr_core.formats.checkpoint import MappedFile
from apr_core.formats.executables import executable_kind

MAX_SAFETENSORS_HEADER = 100_000_000
_LFS = b"version https://git-lfs.github.com/spec/"
_CONVERT = "convert it to SafeTensors in a sandbox, or download the SafeTensors file"
_AGAIN = "download the model file again"
_SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "a gzip archive", "unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive", "unpack it"),
    (b"BZh", "a bzip2 archive", "unpack it"),
    (b"\xfd7zXZ", "an xz archive", "unpack it"),
    (b"\x89HDF", "an HDF5 file", _CONVERT),
    (b"FUGG", "a byte-swapped GGUF magic", "convert it to little-endian"),
    (b"lmgg", "a GGML file of the time before GGUF", "convert it with llama.cpp's convert script"),
    (b"tjgg", "a GGJT file of the time before GGUF", "convert it with llama.cpp's convert script"),
    (b"\x7fELF", "a program (ELF)", "give a model file"),
    (b"%PDF", "a PDF document", "give a model file"),
)


def sniff(file: MappedFile) -> str:
    """
    Return ``gguf``, ``apr``, ``safetensors`` or ``index``.

    Raises:
        FormatError: It is none of them; the message names what it looks like.
    """
    head = bytes(file.view[:4096])
    if head[:4] == b"GGUF":
        return "gguf"
    if head[:3] == b"APR":
        return "apr"
    # The upper half of a plausible header length is zero, which no text starts with.
    if head[4:9] == b"\0\0\0\0{":
        return "safetensors"
    if head[:1] == b"{" and b"\0" not in head:
        if b'"weight_map"' in bytes(file.view[:MAX_SAFETENSORS_HEADER]):
            return "index"
        raise _refuse(file, "a JSON file that is no shard index", "give the weights, or model.safetensors.index.json")
    raise _diagnose(file, head)


def _diagnose(file: MappedFile, head: bytes) -> FormatError:
    """Name the impostor: what people really have in place of weights."""
    for signature, what, advice in _SIGNATURES:
        if head.startswith(signature):
            return _refuse(file, what, advice)
    executable = executable_kind(file.view)
    if executable:
        return _refuse(file, f"executable content: {executable}, which can run code when it is loaded", _CONVERT)
    if head.startswith(b"PK\x03\x04"):
        return _refuse(file, "a zip archive", "unpack it")
    if head.startswith(_LFS):
        size = re.search(rb"\nsize (\d{1,20})", head)
        amount = f" to {size.group(1).decode()} bytes" if size else ""
        return _refuse(file, f"a Git-LFS pointer{amount}, not the file itself", "run `git lfs pull`")
    if head.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html", b"<?xml")):
        return _refuse(file, "an HTML or XML page (an error page saved as a model?)", _AGAIN)
    if not head.strip(b"\0"):
        return _refuse(file, f"zeros (the first {len(head)} bytes of {file.size}): never written", _AGAIN)
    if head[8:9] == b"{":
        length = int.from_bytes(head[:8], "little")
        return _refuse(file, f"a SafeTensors header of {length} bytes in a file of {file.size}", _AGAIN)
    if len(head) < 9:
        return _refuse(file, f"a stump of {len(head)} bytes ({head.hex(' ')})", _AGAIN)
    if not head[:8].strip(b"\0"):
        return _refuse(file, "a SafeTensors header of 0 bytes", _AGAIN)
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head[:64]):
        return _refuse(file, f"text that begins {head[:40].decode('ascii')!r}", _AGAIN)
    return _refuse(file, f"an unknown format (first bytes {head[:8].hex(' ')})", "give a model file of these formats")


def _refuse(file: MappedFile, found: str, advice: str) -> FormatError:
    return FormatError(expected="a SafeTensors, GGUF or APR v2 file", found=found, file=file.path, at=0, advice=advice)
