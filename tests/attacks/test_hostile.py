"""Every hostile file is refused by a typed error that names what is wrong, quickly and without allocating for it."""

from __future__ import annotations

import re
import time
import tracemalloc
from pathlib import Path

import pytest

from apr_core.errors import FormatError
from apr_core.formats.checkpoint import open_checkpoint
from tests.attacks.build import VALID, Attack
from tests.attacks.hostile import ATTACKS

CASES = [pytest.param(attack, id=f"{kind}-{attack.id}") for kind, attacks in ATTACKS.items() for attack in attacks]


@pytest.mark.parametrize("attack", CASES)
def test_refused(attack: Attack, tmp_path: Path) -> None:
    """The refusal is a FormatError (exit 4) that names the reason and the file and ends in advice."""
    path = tmp_path / "model.bin"
    path.write_bytes(attack.data)
    with pytest.raises(FormatError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert re.search(attack.says, message), message
    assert message.startswith("expected ")
    assert str(path) in message
    assert caught.value.advice


def test_quick_and_small(tmp_path: Path) -> None:
    """No refusal takes 50 ms of the processor or 50 MB of Python's memory: counts are checked before use."""
    path = tmp_path / "model.bin"
    slow, large = {}, {}
    for attack in (attack for attacks in ATTACKS.values() for attack in attacks):
        path.write_bytes(attack.data)
        taken = []
        for _ in range(3):
            start = time.process_time()
            with pytest.raises(FormatError):
                open_checkpoint(path)
            taken.append(time.process_time() - start)
        if not min(taken) < 0.05:
            slow[attack.id] = min(taken)
        tracemalloc.start()
        with pytest.raises(FormatError):
            open_checkpoint(path)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        if not peak < 50 << 20:
            large[attack.id] = peak
    assert (slow, large) == ({}, {})


def test_files_are_small() -> None:
    """Each attack fits in a few kB: none of them works by being large."""
    assert [attack.id for attacks in ATTACKS.values() for attack in attacks if len(attack.data) > 5000] == []


@pytest.mark.parametrize("kind", VALID)
def test_unbent_file_opens(kind: str, tmp_path: Path) -> None:
    """The files that the attacks are bent from are accepted: the refusals are not refusals of everything."""
    path = tmp_path / "model.bin"
    path.write_bytes(VALID[kind])
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.format == kind
        assert len(checkpoint.tensors) == 2
        assert checkpoint.gaps == ()
