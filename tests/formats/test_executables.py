"""Executable content is recognised by its bytes; torch and pickle are the witnesses."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from apr_core.errors import FormatError
from apr_core.formats.checkpoint import open_checkpoint
from apr_core.formats.executables import executable_kind, find_executables
from tests.attacks.build import VALID, VALID_SAFETENSORS


class Bomb:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (os.mkdir, (str(self.trace),))


@pytest.mark.parametrize("old", [False, True])
def test_torch_checkpoint(old: bool, tmp_path: Path) -> None:
    """Both containers of torch.save are refused as executable, by name, alone or in a folder."""
    torch = pytest.importorskip("torch")
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=not old)
    with pytest.raises(FormatError, match=r"executable content: a P.*which can run code when it is loaded"):
        open_checkpoint(path)
    with pytest.raises(FormatError, match=r"executable content alone: pytorch_model\.bin"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol(protocol: int, tmp_path: Path) -> None:
    """Pickles of every protocol are recognised, whatever they are called, and never loaded."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps(["weights", Bomb(tmp_path / "trace")], protocol))
    with pytest.raises(FormatError, match="a Python pickle"):
        open_checkpoint(path)
    assert not (tmp_path / "trace").exists()
    pickle.loads(path.read_bytes())  # the trap works: only this left a trace
    assert (tmp_path / "trace").exists()


def test_beside_weights_it_is_legal_and_listed(tmp_path: Path) -> None:
    """SafeTensors with pickles beside opens; the inventory names them, and the innocent files of such names not."""
    (tmp_path / "model.safetensors").write_bytes(VALID_SAFETENSORS)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "training_args.PT").write_bytes(pickle.dumps([1], 0))
    (tmp_path / "numbers.bin").write_bytes(np.arange(300, dtype="<f4").tobytes())
    (tmp_path / "empty.bin").write_bytes(b"")
    (tmp_path / "loop.bin").symlink_to("loop.bin")
    with open_checkpoint(tmp_path) as checkpoint:
        assert len(checkpoint.tensors) == 2
    assert find_executables(tmp_path) == [
        ("pytorch_model.bin", "a Python pickle (protocol 4)"),
        ("training_args.PT", "a Python pickle (protocol 0 or 1)"),
    ]


@pytest.mark.parametrize("data", [*VALID.values(), b"(see above)", b"c", b"}" * 3, b"", b"(\x80", b"]not a pickle"])
def test_what_is_none(data: bytes) -> None:
    """Models and text are not taken for pickles."""
    assert executable_kind(memoryview(data)) is None
