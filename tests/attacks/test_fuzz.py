"""Random damage to valid files: the reader returns or raises its own error, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.attacks.build import VALID
from tests.attacks.mutants import read_whole, with_checksums

FUZZ = settings(
    max_examples=400, deadline=2000, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def survives(path: Path, data: bytes) -> bool:
    """Open, read everything that opening offers, and decode; True when nothing was refused."""
    path.write_bytes(data)
    return read_whole(path) == "opened"


@pytest.mark.parametrize("kind", VALID)
@given(data=st.data())
@FUZZ
def test_byte_flips(kind: str, data: st.DataObject, tmp_path: Path) -> None:
    """Up to four bytes of a valid file become others."""
    bent = bytearray(VALID[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        bent[data.draw(st.integers(0, len(bent) - 1))] = data.draw(st.sampled_from([0, 1, 0x22, 0x7F, 0x80, 0xFF]))
    survives(tmp_path / "model", with_checksums(bytes(bent)) if kind == "apr" else bytes(bent))


@pytest.mark.parametrize("kind", VALID)
def test_every_truncation(kind: str, tmp_path: Path) -> None:
    """No proper prefix of a valid file is accepted, checksums repaired or not."""
    whole = VALID[kind]
    last = len(whole.rstrip(b"\0")) if kind == "gguf" else len(whole)  # a GGUF may end without its padding
    assert [size for size in range(last) if survives(tmp_path / "model", whole[:size])] == []
    assert survives(tmp_path / "model", whole)


@pytest.mark.parametrize("head", [b"", b"GGUF\x03\0\0\0", b"APR\0\x02\0\0\x04", b"\x20\0\0\0\0\0\0\0{"])
@given(tail=st.binary(max_size=300))
@FUZZ
def test_noise(head: bytes, tail: bytes, tmp_path: Path) -> None:
    """Noise behind each magic is refused or read, never a traceback."""
    survives(tmp_path / "model", head + tail)


def test_the_probe_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception of another type would be seen by these tests."""
    from apr_core.formats import gguf

    def broken(_: object) -> None:
        raise IndexError

    monkeypatch.setattr(gguf, "read_gguf", broken)
    with pytest.raises(IndexError):
        survives(tmp_path / "model", VALID["gguf"])
