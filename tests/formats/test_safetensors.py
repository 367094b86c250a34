"""SafeTensors, with the safetensors package as the witness in both directions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apr_core.dtypes import BY_SAFETENSORS, FORMATS
from apr_core.errors import FormatError, UsageError
from apr_core.formats.checkpoint import TensorSource, map_file, open_checkpoint
from apr_core.formats.codecs import decode
from apr_core.formats.safetensors import read_safetensors, write_safetensors

NUMPY = {
    "F64": "f8",
    "F32": "f4",
    "F16": "f2",
    "I64": "i8",
    "I32": "i4",
    "I16": "i2",
    "I8": "i1",
    "U64": "u8",
    "U32": "u4",
    "U16": "u2",
    "U8": "u1",
    "BOOL": "?",
}
ARRAYS = st.dictionaries(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8).filter(
        lambda name: name != "__metadata__"
    ),
    st.tuples(st.sampled_from(sorted(NUMPY)), st.lists(st.integers(0, 3), max_size=3)),
    max_size=6,
)
QUICK = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def fill(spec: dict[str, tuple[str, list[int]]]) -> dict[str, np.ndarray]:
    """Make arrays of the drawn types and shapes, different bytes in each."""
    rng = np.random.default_rng(0)
    return {name: rng.integers(0, 2, shape).astype(NUMPY[kind]) for name, (kind, shape) in spec.items()}


def sources(arrays: dict[str, np.ndarray]) -> list[TensorSource]:
    """Offer arrays to a writer."""
    kinds = {np.dtype(code): FORMATS[kind] for kind, code in NUMPY.items()}
    return [
        TensorSource(name, kinds[array.dtype], array.shape, lambda array=array: [array])
        for name, array in arrays.items()
    ]


@given(spec=ARRAYS, notes=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=1))
@QUICK
def test_written_bytes_equal_the_reference(
    spec: dict[str, tuple[str, list[int]]], notes: dict[str, str], tmp_path: Path
) -> None:
    """Our writer's file is byte for byte that of the safetensors package (one note: its order is a hash map's)."""
    arrays = fill(spec)
    write_safetensors(tmp_path / "ours", sources(arrays), notes)
    reference = safetensors.numpy.save(arrays, notes or None)
    assert (tmp_path / "ours").read_bytes() == reference


@given(spec=ARRAYS)
@QUICK
def test_reads_what_the_reference_writes(spec: dict[str, tuple[str, list[int]]], tmp_path: Path) -> None:
    """Every tensor of a file by the safetensors package comes out with its type, shape and bytes."""
    arrays = fill(spec)
    safetensors.numpy.save_file(arrays, tmp_path / "theirs", {"format": "np"})
    with open_checkpoint(tmp_path / "theirs") as checkpoint:
        assert checkpoint.metadata == {"format": "np"}
        assert set(checkpoint.tensors) == set(arrays)
        for name, array in arrays.items():
            info = checkpoint.tensors[name]
            assert (info.shape, info.nbytes, info.stored_name) == (array.shape, array.nbytes, name)
            assert checkpoint.raw(name).data.tobytes() == array.tobytes()
            assert decode(checkpoint.raw(name)).tobytes() == array.astype(np.float32).tobytes()


@pytest.mark.parametrize("dtype", BY_SAFETENSORS.values(), ids=str)
def test_every_dtype_round_trips(dtype: object, tmp_path: Path) -> None:
    """Each SafeTensors type that we know is accepted by the safetensors package as we write it, and by us."""
    count = dtype.nbytes((3, 5))
    write_safetensors(tmp_path / "f", [TensorSource("t", dtype, (3, 5), lambda: [bytes(count)])])
    listed = safetensors.deserialize((tmp_path / "f").read_bytes())
    assert [(name, view["dtype"], view["shape"]) for name, view in listed] == [("t", dtype.safetensors, [3, 5])]
    with open_checkpoint(tmp_path / "f") as checkpoint:
        assert checkpoint.tensors["t"].dtype == dtype


def test_oracle_file(oracle: Path) -> None:
    """A file of transformers opens with its config, tensors in file order, each as the safetensors package reads it."""
    torch = pytest.importorskip("torch")
    with (
        open_checkpoint(oracle / "mini") as checkpoint,
        safetensors.safe_open(oracle / "mini" / "model.safetensors", "pt") as reference,
    ):
        assert checkpoint.config["num_key_value_heads"] == 2
        offsets = [info.offset for info in checkpoint.tensors.values()]
        assert offsets == sorted(offsets)
        assert set(checkpoint.tensors) == set(reference.keys())
        for name in reference.keys():  # noqa: SIM118 (no mapping)
            expected = reference.get_tensor(name).to(torch.float32).numpy()
            assert decode(checkpoint.raw(name)).tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", ["Q4_K", "Q8_0", "AprQ8"])
def test_refuses_quantised_types(dtype: str, tmp_path: Path) -> None:
    """A type that SafeTensors cannot hold is refused by name; no file appears."""
    source = TensorSource("w", FORMATS[dtype], (1, 256), list)
    with pytest.raises(UsageError, match=f"SafeTensors cannot hold {dtype} .tensor w"):
        write_safetensors(tmp_path / "f", [source])
    assert list(tmp_path.iterdir()) == []


def test_refuses_what_would_not_open(tmp_path: Path) -> None:
    """Names twice, the reserved name and metadata that is not text are refused before a byte is written."""
    source = TensorSource("w", FORMATS["U8"], (1,), lambda: [b"x"])
    reserved = TensorSource("__metadata__", FORMATS["U8"], (1,), lambda: [b"x"])
    with pytest.raises(UsageError, match="two tensors would be stored as w"):
        write_safetensors(tmp_path / "f", [source, source])
    with pytest.raises(UsageError, match="__metadata__"):
        write_safetensors(tmp_path / "f", [reserved])
    with pytest.raises(UsageError, match="must be strings"):
        write_safetensors(tmp_path / "f", [source], {"a": 1})  # type: ignore[dict-item]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "says"), [(b"short", "a header length of 8 bytes"), (bytes([2] + [0] * 7) + b" {}", "{")]
)
def test_reader_on_its_own(data: bytes, says: str, tmp_path: Path) -> None:
    """The reader does not rely on the sniffing that comes before it."""
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(FormatError, match=says):
        read_safetensors(map_file(tmp_path / "f"))
