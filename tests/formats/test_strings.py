"""The fast walk over GGUF strings, against a plain loop."""

from __future__ import annotations

import struct
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apr_core.formats.strings import BrokenStringError, walk_strings

TEXTS = st.lists(
    st.one_of(
        st.binary(max_size=12),  # zeros, and no bytes at all
        st.binary(min_size=1, max_size=12).map(lambda text: text.replace(b"\0", b"x")),
        st.sampled_from([b"x" * 255, b"x" * 256, b"x" * 300, b"x" * 65536, b"\0" * 40]),
    ),
    max_size=60,
).map(lambda texts: texts * 7)


def pack(texts: list[bytes]) -> bytes:
    """Lay strings out behind their lengths."""
    return b"".join(struct.pack("<Q", len(text)) + text for text in texts)


def walked(data: bytes, at: int, count: int) -> tuple[list[bytes], int]:
    """Collect the strings that a walk finds, and where it ends."""
    view, texts, end = memoryview(data), [], at
    for places, end in walk_strings(view, at, count):
        bounds = [*places.tolist(), end]
        texts += [data[start + 8 : stop] for start, stop in pairwise(bounds)]
    return texts, end


@given(texts=TEXTS, lead=st.binary(max_size=9), tail=st.binary(max_size=9))
@settings(deadline=None, max_examples=150, derandomize=True)
def test_finds_every_string(texts: list[bytes], lead: bytes, tail: bytes) -> None:
    """Whatever is before, behind and inside: the strings come back as they were packed."""
    packed = pack(texts)
    assert walked(lead + packed + tail, len(lead), len(texts)) == (texts, len(lead) + len(packed))


@pytest.mark.parametrize("text", [b"token", b"", b"\0\0\0\0", b"x" * 300])
def test_many_windows(text: bytes) -> None:
    """More strings than a window holds, of a kind that windows can read and of kinds that they cannot."""
    texts = [text, b"a"] * 20_000
    assert walked(b"pad" + pack(texts), 3, 40_000)[0] == texts


@given(texts=TEXTS.filter(len), cut=st.integers(1, 12))
@settings(deadline=None, max_examples=100, derandomize=True)
def test_cut_off(texts: list[bytes], cut: int) -> None:
    """Cut off behind the beginning of the last string, the walk says which one is broken, and where it begins."""
    packed = pack(texts)
    last = len(packed) - 8 - len(texts[-1])
    with pytest.raises(BrokenStringError) as caught:
        walked(packed[: max(last, len(packed) - cut)], 0, len(texts))
    assert (caught.value.number, caught.value.at) == (len(texts) - 1, last)


def test_length_that_only_looks_short() -> None:
    """A length whose lowest byte fits but whose upper bytes do not is not taken for a short one."""
    packed = bytearray(pack([b"abc"] * 100))
    packed[11 * 50 + 7] = 1
    with pytest.raises(BrokenStringError) as caught:
        walked(bytes(packed), 0, 100)
    assert caught.value.number == 50
