"""Codecs against the gguf package bit for bit, and against blocks computed by hand."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apr_core.dtypes import FORMATS
from apr_core.errors import Unavailable, UsageError
from apr_core.formats import blocks, codecs, foreign
from apr_core.formats.checkpoint import RawTensor, TensorInfo

QUICK = settings(max_examples=60, deadline=None, derandomize=True)
GGML = [q for q in FORMATS.values() if q.gguf is not None and not q.name.startswith(("I8", "I16", "I32", "I64", "F64"))]
OWN_BLOCKS = sorted(set(blocks.DECODERS) - {"AprQ4"})
NO_DECODER = {"Q8_1", "Q8_K", "Q1_0"}
WITHOUT_SCALES = {"Q8_1", "MXFP4", "NVFP4", "IQ1_M", "Q1_0"}
CODES = {"F64": "d", "F32": "f", "F16": "e", "BOOL": "?", "I8": "b", "I16": "h", "I32": "i", "I64": "q"}
CODES |= {"U8": "B", "U16": "H", "U32": "I", "U64": "Q"}
FLOATS = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=32, max_size=32)


def tensor(dtype: str, data: np.ndarray, shape: tuple[int, ...]) -> RawTensor:
    """Wrap bytes as an opened tensor."""
    q = FORMATS[dtype]
    return RawTensor(TensorInfo("w", q, shape, Path("f"), 0, q.nbytes(shape), "w"), data)


def noise(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random bytes of a tensor: NaN and infinite scales included."""
    return np.random.default_rng(seed).integers(0, 256, FORMATS[dtype].nbytes(shape), dtype=np.uint8)


@pytest.mark.parametrize("dtype", OWN_BLOCKS)
@given(seed=st.integers(0, 2**32))
@QUICK
def test_own_decoders_equal_the_gguf_package(dtype: str, seed: int) -> None:
    """Random blocks decode to the same bits (NaN where it says NaN: its sign is not part of the format)."""
    shape = (3, 512)
    data = noise(dtype, shape, seed)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(data.reshape(3, -1), gguf.GGMLQuantizationType[dtype])
    values = codecs.decode_bytes(FORMATS[dtype], data, shape)
    usual = ~np.isnan(expected)
    assert np.array_equal(np.isnan(values), ~usual)
    assert values[usual].tobytes() == expected[usual].tobytes()
    assert codecs.decoder_name(FORMATS[dtype]) == "apr_core"


@pytest.mark.parametrize("q", GGML, ids=str)
def test_every_ggml_type_decodes_or_says_why_not(q: object) -> None:
    """Each GGML type decodes to what the gguf package gives, or is Unavailable by name; none defaults to F32."""
    shape = (2, 2 * q.block_elements)
    data = noise(q.name, shape)
    if q.name in NO_DECODER:
        with pytest.raises(Unavailable, match=f"no decoder for {q.name}.*pip install"):
            codecs.decode_bytes(q, data, shape)
        return
    with np.errstate(all="ignore"):
        stored = data.reshape(2, -1)
        stored = stored.view(q.name.lower().replace("f", "float")) if q.name in ("F32", "F16") else stored
        expected = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType(q.gguf)).astype(np.float32)
    assert np.array_equal(codecs.decode_bytes(q, data, shape), expected, equal_nan=True)


@pytest.mark.parametrize(
    ("dtype", "code"),
    CODES.items(),
)
def test_casts(dtype: str, code: str) -> None:
    """Plain types are read little-endian and cast; the struct module is the witness."""
    values = [0, 1] if dtype == "BOOL" else [3, 100]
    data = np.frombuffer(struct.pack(f"<2{code}", *values), np.uint8)
    found = codecs.decode(tensor(dtype, data, (2,)))
    assert found.dtype == np.float32
    assert found.tolist() == values
    assert codecs.decoder_name(FORMATS[dtype]) == "apr_core"


@pytest.mark.parametrize(
    ("dtype", "torch_name"),
    [
        ("F8_E4M3", "float8_e4m3fn"),
        ("F8_E5M2", "float8_e5m2"),
        ("F8_E4M3FNUZ", "float8_e4m3fnuz"),
        ("F8_E5M2FNUZ", "float8_e5m2fnuz"),
        ("F8_E8M0", "float8_e8m0fnu"),
    ],
)
def test_float8_equals_torch(dtype: str, torch_name: str) -> None:
    """All 256 bytes of each 8-bit float decode as torch decodes them."""
    torch = pytest.importorskip("torch")
    codes = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(codes.copy()).view(getattr(torch, torch_name)).to(torch.float32).numpy()
    assert np.array_equal(codecs.decode_bytes(FORMATS[dtype], codes, (256,)), expected, equal_nan=True)


def test_q8_0_block_by_hand() -> None:
    """A Q8_0 block: scale 0.5 and bytes -16..15."""
    data = np.frombuffer(struct.pack("<e32b", 0.5, *range(-16, 16)), np.uint8)
    assert codecs.decode_bytes(FORMATS["Q8_0"], data, (32,)).tolist() == [0.5 * code for code in range(-16, 16)]


def test_q4_k_block_by_hand() -> None:
    """A Q4_K block with eight different scales and minima, unpacked by a scalar loop from the public layout."""
    rng = np.random.default_rng(3)
    packed, nibbles = rng.integers(0, 256, 12), rng.integers(0, 256, 128)
    data = np.frombuffer(struct.pack("<ee12B128B", 2, 0.25, *packed, *nibbles), np.uint8)
    expected = []
    for part in range(8):
        if part < 4:
            scale, minimum = packed[part] & 63, packed[part + 4] & 63
        else:
            scale = (packed[part + 4] & 15) | ((packed[part - 4] >> 6) << 4)
            minimum = (packed[part + 4] >> 4) | ((packed[part] >> 6) << 4)
        run = nibbles[32 * (part // 2) : 32 * (part // 2) + 32]
        codes = run & 15 if part % 2 == 0 else run >> 4
        expected += [2 * scale * code - 0.25 * minimum for code in codes]
    assert codecs.decode_bytes(FORMATS["Q4_K"], data, (256,)).tolist() == expected


def test_apr_q4_by_hand() -> None:
    """AprQ4: even elements low, odd high; scales that are NaN, infinite or subnormal decode as zero; flat stream."""
    codes = [(i * 7) % 16 for i in range(32)]
    nibbles = bytes(codes[2 * i] | codes[2 * i + 1] << 4 for i in range(16))
    good = struct.pack("<e", 0.5) + nibbles
    data = np.frombuffer(good + b"".join(scale + nibbles for scale in (b"\0\x7e", b"\0\x7c", b"\xff\x03")), np.uint8)
    values = codecs.decode_bytes(FORMATS["AprQ4"], data, (5, 20))
    expected = [0.5 * (code - 8) for code in codes] + [0.0] * 68
    assert values.reshape(-1).tolist() == expected


def test_apr_q8_by_hand() -> None:
    """AprQ8: one float32 scale, then signed bytes."""
    data = np.frombuffer(struct.pack("<f6b", 0.25, -127, -1, 0, 1, 2, 127), np.uint8)
    raw = tensor("AprQ8", data, (2, 3))
    assert codecs.decode(raw).tolist() == [[-31.75, -0.25, 0.0], [0.25, 0.5, 31.75]]
    assert codecs.scales(raw).tolist() == [0.25]


@pytest.mark.parametrize("dtype", [q.name for q in FORMATS.values() if q.layout == "row" and q.name not in NO_DECODER])
def test_rows_are_a_slice_of_the_whole(dtype: str) -> None:
    """Any run of rows equals that slice of the decoded tensor, padded rows of odd length included."""
    q = FORMATS[dtype]
    shape = (2, 3, 63 if dtype in ("Q4_K", "Q6_K", "Q8_0") else q.block_elements)
    raw = tensor(dtype, noise(dtype, shape), shape)
    whole = codecs.decode(raw).reshape(6, -1)
    for start, stop in ((0, 6), (2, 5), (5, 6), (3, 3)):
        assert np.array_equal(codecs.decode_rows(raw, start, stop), whole[start:stop], equal_nan=True)


def test_rows_that_do_not_exist() -> None:
    """Rows beyond the tensor, and rows of a type without rows, are refused."""
    raw = tensor("F32", np.zeros(24, np.uint8), (2, 3))
    for start, stop in ((0, 3), (-1, 1), (2, 1)):
        with pytest.raises(UsageError, match=r"rows within 0\.\.2"):
            codecs.decode_rows(raw, start, stop)
    with pytest.raises(UsageError, match="decode the whole tensor"):
        codecs.decode_rows(tensor("AprQ8", np.zeros(10, np.uint8), (2, 3)), 0, 1)
    assert codecs.decode_rows(tensor("F32", np.zeros(4, np.uint8), ()), 0, 1).shape == (1, 1)


def test_wrong_number_of_bytes() -> None:
    """Bytes that do not fit the shape are refused rather than reshaped."""
    with pytest.raises(UsageError, match=r"expected 8 bytes for F32 \[2\], found 7"):
        codecs.decode_bytes(FORMATS["F32"], np.zeros(7, np.uint8), (2,))


@pytest.mark.parametrize("dtype", ["Q4_0", "Q8_0", "AprQ4", "Q4_K"])
def test_scalar_of_a_block_type(dtype: str) -> None:
    """A scalar takes one block and comes back without axes."""
    q = FORMATS[dtype]
    assert codecs.decode_bytes(q, np.zeros(q.nbytes(()), np.uint8), ()).shape == ()


def test_decoding_across_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chunked loop does not depend on the chunk: one block at a time gives the same values."""
    shape = (7, 512)
    data = noise("Q6_K", shape)
    whole = codecs.decode_bytes(FORMATS["Q6_K"], data, shape)
    monkeypatch.setattr(codecs, "_CHUNK_BYTES", 1)
    assert np.array_equal(codecs.decode_bytes(FORMATS["Q6_K"], data, shape), whole, equal_nan=True)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
@given(values=FLOATS, scale=st.sampled_from([0.0, 1e-40, 1e-8, 1e-3, 1.0]))
@QUICK
def test_encoders_equal_the_gguf_package(dtype: str, values: list[float], scale: float) -> None:
    """Encoded bytes equal gguf.quants.quantize, subnormals and what is too large for a float16 included."""
    array = np.array(values, np.float32) * np.float32(scale)
    if dtype not in ("F16", "BF16") and np.abs(array).max() >= 65504:
        with pytest.raises(UsageError, match=f"{dtype} cannot hold"):
            codecs.encode(array, FORMATS[dtype])
        return
    with np.errstate(all="ignore"):
        expected = gguf.quants.quantize(array.reshape(1, 32), gguf.GGMLQuantizationType[dtype])
    assert codecs.encode(array, FORMATS[dtype]).tobytes() == expected.tobytes()


@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40))
@QUICK
def test_bf16_of_every_bit_pattern(bits: list[int]) -> None:
    """BF16 of arbitrary bits equals the gguf package's; a NaN stays a NaN, which plain rounding would make infinite."""
    values = np.array([*bits, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)
    encoded = codecs.encode(values, FORMATS["BF16"])
    expected = gguf.quants.quantize(values.reshape(1, -1), gguf.GGMLQuantizationType.BF16)
    assert encoded.tobytes() == expected.tobytes()
    assert np.array_equal(np.isnan(codecs.round_to(values, FORMATS["BF16"])), np.isnan(values))


def test_ties_go_to_even() -> None:
    """Values half-way between two BF16 or F16 numbers go to the even one."""
    assert codecs.round_to(np.float32([1 + 2**-8, 1 + 3 * 2**-8]), FORMATS["BF16"]).tolist() == [1, 1 + 2**-6]
    assert codecs.round_to(np.float32([1 + 2**-11, 1 + 3 * 2**-11]), FORMATS["F16"]).tolist() == [1, 1 + 2**-9]


def test_f16_overflow_is_returned() -> None:
    """What F16 cannot hold comes back infinite, without a warning: the caller counts it."""
    assert codecs.round_to(np.float32([65504, 65520, -1e30]), FORMATS["F16"]).tolist() == [65504, np.inf, -np.inf]


def test_f32_is_exact_and_a_copy() -> None:
    """F32 keeps every bit, and the bytes do not alias the input."""
    values = np.array([0x7F800001, 1, 0x80000000], np.uint32).view(np.float32)
    encoded = codecs.encode(values, FORMATS["F32"])
    assert encoded.tobytes() == values.tobytes()
    assert not np.shares_memory(encoded, values)
    assert codecs.encode(np.arange(6, dtype=np.float32).reshape(2, 3).T, FORMATS["F32"]).view("f4").tolist() == [
        0, 3, 1, 4, 2, 5,
    ]  # fmt: skip


def test_what_cannot_be_encoded() -> None:
    """Other types and broken rows are refused."""
    with pytest.raises(UsageError, match="IQ4_XS cannot be written; use one of F32, F16"):
        codecs.encode(np.zeros(256, np.float32), FORMATS["IQ4_XS"])
    for poison in (np.nan, np.inf, 7e4):
        with pytest.raises(UsageError, match="Q4_K cannot hold"):
            codecs.encode(np.full(256, poison, np.float32), FORMATS["Q4_K"])
    for shape in ((2, 48), ()):
        with pytest.raises(UsageError, match="rows of a multiple of 32"):
            codecs.encode(np.zeros(shape, np.float32), FORMATS["Q8_0"])


@pytest.mark.parametrize("q", GGML, ids=str)
def test_scales_find_the_poison(q: object) -> None:
    """A NaN scale makes NaN values; where we read the scales, we find it at the right place."""
    shape = (1, q.block_elements * 2)
    found = codecs.scales(tensor(q.name, np.zeros(q.nbytes(shape), np.uint8), shape))
    if q.plain or q.name in WITHOUT_SCALES:
        assert found is None
        return
    assert found.tolist() == [0.0] * found.size
    places = codecs._HALF_SCALES.get(q.name, ())
    assert found.size == 2 * max(1, len(places))
    for at in places:
        data = np.zeros(q.nbytes(shape), np.uint8)
        data[q.block_bytes + at : q.block_bytes + at + 2] = [0, 0x7E]
        raw = tensor(q.name, data, shape)
        assert np.isnan(codecs.scales(raw)).sum() == 1
        if q.name not in NO_DECODER:
            values = codecs.decode(raw)[0]
            assert np.isnan(values[q.block_elements :]).all()
            assert np.isfinite(values[: q.block_elements]).all()


def test_foreign_is_only_for_what_we_lack() -> None:
    """The gguf package decodes nothing that our own code decodes."""
    assert codecs.decoder_name(FORMATS["IQ4_XS"]) == "gguf"
    assert {q.name for q in GGML if codecs.decoder_name(q) == "apr_core"} == {*OWN_BLOCKS, "F32", "F16", "BF16"}
    with pytest.raises(Unavailable, match="AprQ8"):
        foreign.decode_foreign(FORMATS["AprQ8"], np.zeros((1, 4), np.uint8))


def test_q8_0_ties_go_away_from_zero() -> None:
    """With a scale of exactly 1, halves round away from zero as ggml's roundf does, not to even."""
    values = np.array([127, 0.5, -0.5, 1.5, -1.5, 2.5, -2.5, 4.5] * 4, np.float32)
    expected = gguf.quants.quantize(values.reshape(1, 32), gguf.GGMLQuantizationType.Q8_0)
    encoded = codecs.encode(values, FORMATS["Q8_0"])
    assert encoded.tobytes() == expected.tobytes()
    assert encoded[2:10].view(np.int8).tolist() == [127, 1, -1, 2, -2, 3, -3, 5]
