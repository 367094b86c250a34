"""
What a tensor says, whatever it is stored in: one fingerprint of the decoded values, and the same for a whole model.

The same weights in three containers have one fingerprint, since names are canonical, shapes row-major and the values
decoded: BF16 and its widening to F32 are the same numbers. Statistics stand beside it and never for it: a permutation
of rows keeps every one of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apr_core.errors import FormatError
from apr_core.formats.checkpoint import Checkpoint
from apr_core.rosetta.convert import decoded_chunks

SCHEMA = 1
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_BYTES = 16
_CHUNK_VALUES = 1 << 20
_Pair = tuple[NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True)
class TensorPrint:
    """
    One tensor's fingerprint, and its statistics for a person who looks for what is odd.

    Attributes:
        name: Canonical name.
        shape: Row-major.
        dtype: Stored type; not part of the fingerprint.
        digest: BLAKE2b-128 of shape and decoded float32 values, little-endian, row-major; hex.
        mean: Over the finite values; std, min and max likewise.
        nonfinite: Values that are NaN or infinite.
        zeros: Share of values that are zero.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    digest: str
    mean: float
    std: float
    min: float
    max: float
    nonfinite: int
    zeros: float


@dataclass(frozen=True)
class ModelPrint:
    """
    The fingerprint of a model.

    Attributes:
        digest: BLAKE2b-128 over names and digests of the tensors, sorted by name; a stored head that says what the
            embedding says counts as tied.
        tensors: By canonical name.
    """

    digest: str
    tensors: Mapping[str, TensorPrint]

    def as_json(self) -> dict[str, Any]:
        """The document that `read_prints` reads again."""
        rows = [asdict(row) | {"shape": list(row.shape)} for row in self.tensors.values()]
        return {"schema": SCHEMA, "digest": self.digest, "tensors": rows}


def fingerprint(checkpoint: Checkpoint, *, progress: Callable[[int], None] | None = None) -> ModelPrint:
    """
    Read every tensor once.

    Args:
        checkpoint: An opened model.
        progress: Called with the stored bytes read so far.

    Raises:
        Unavailable: A type has no decoder here.

    Cost: one pass, a few megabytes decoded at a time; about 0.5 GB/s of decoded values on one core.
    """
    tensors: dict[str, TensorPrint] = {}
    done = 0
    for name, info in checkpoint.tensors.items():
        tensors[name] = _print(checkpoint, name)
        done += info.nbytes
        if progress is not None:
            progress(done)
    return ModelPrint(_model_digest(tensors), tensors)


def _print(checkpoint: Checkpoint, name: str) -> TensorPrint:
    info = checkpoint.tensors[name]
    digest = hashlib.blake2b(repr(info.shape).encode(), digest_size=_BYTES)
    # 0.0 and -0.0 are two values here: what passes byte for byte keeps the sign.
    count = finite_count = zeros = 0
    total = squares = 0.0
    low, high = np.inf, -np.inf
    for chunk in decoded_chunks(checkpoint, name):
        values = np.ascontiguousarray(chunk, dtype="<f4").reshape(-1)
        digest.update(values.data)
        finite = values if np.isfinite(values).all() else values[np.isfinite(values)]
        count, finite_count = count + values.size, finite_count + finite.size
        zeros += values.size - int(np.count_nonzero(values))
        total += float(finite.sum(dtype=np.float64))
        squares += float(np.square(finite, dtype=np.float64).sum())
        low, high = min(low, float(finite.min(initial=np.inf))), max(high, float(finite.max(initial=-np.inf)))
    mean = total / finite_count if finite_count else 0.0
    std = sqrt(max(0.0, squares / finite_count - mean**2)) if finite_count else 0.0
    extent = (low, high) if finite_count else (0.0, 0.0)
    share = zeros / count if count else 0.0
    return TensorPrint(
        name, info.shape, str(info.dtype), digest.hexdigest(), mean, std, *extent, count - finite_count, share
    )


def _model_digest(tensors: Mapping[str, TensorPrint]) -> str:
    """Digest of digests; a head that is the embedding again is what tying means, in whichever way it is stored."""
    head, embedding = tensors.get(HEAD), tensors.get(EMBEDDING)
    tied = head is not None and embedding is not None and head.digest == embedding.digest
    whole = hashlib.blake2b(digest_size=_BYTES)
    for name in sorted(tensors):
        if not (tied and name == HEAD):
            whole.update(f"{name} {tensors[name].digest}\n".encode())
    return whole.hexdigest()


def read_prints(document: object, source: str) -> ModelPrint:
    """
    Read a fingerprint document.

    Raises:
        FormatError: It is none, or its own digest does not fit its tensors: somebody edited it.
    """
    try:
        if not isinstance(document, dict) or document["schema"] != SCHEMA:
            raise TypeError("no schema 1")
        rows = [TensorPrint(**{**row, "shape": tuple(row["shape"])}) for row in document["tensors"]]
        made = ModelPrint(str(document["digest"]), {row.name: row for row in rows})
    except (TypeError, KeyError) as error:
        raise FormatError(
            expected="a fingerprint as `apr rosetta fingerprint` writes it",
            found=f"{type(error).__name__}: {error!s:.80}",
            file=source,
            advice="make it again",
        ) from error
    if _model_digest(made.tensors) != made.digest:
        raise FormatError(
            expected=f"digest {_model_digest(made.tensors)}", found=made.digest, file=source, advice="make it again"
        )
    return made


@dataclass(frozen=True)
class Anomaly:
    """A tensor whose statistics are not those of the reference; ``deviation`` is in reference standard deviations."""

    tensor: str
    what: str
    deviation: float | None = None


def judge_statistics(
    subject: ModelPrint, reference: ModelPrint, *, threshold: float = 3.0, width: float = 2.0
) -> Sequence[Anomaly]:
    """
    Compare statistics tensor by tensor: plausibility, never identity.

    A tensor that one side lacks, another shape, new non-finite values, a mean that moved by more than ``threshold``
    reference deviations, or a spread that changed by more than a factor of ``width`` is an anomaly. Where the reference
    does not vary at all, its mean's magnitude takes the place of its deviation.

    Args:
        subject: What is judged.
        reference: What it should be like.
        threshold: In reference standard deviations.
        width: Largest ratio of the two standard deviations.
    """
    found: list[Anomaly] = []
    for name in dict.fromkeys([*reference.tensors, *subject.tensors]):
        mine, other = subject.tensors.get(name), reference.tensors.get(name)
        if mine is None or other is None:
            found.append(Anomaly(name, "missing in the subject" if mine is None else "missing in the reference"))
            continue
        if mine.shape != other.shape:
            found.append(Anomaly(name, f"shape {list(mine.shape)}, expected {list(other.shape)}"))
        if mine.nonfinite > other.nonfinite:
            found.append(Anomaly(name, f"{mine.nonfinite} non-finite values, expected {other.nonfinite}"))
        scale = other.std or abs(other.mean) or 1e-6
        moved = abs(mine.mean - other.mean) / scale
        if not moved <= threshold:
            found.append(Anomaly(name, f"mean {mine.mean:.4g}, expected {other.mean:.4g}", moved))
        if not other.std / width <= mine.std <= other.std * width + 1e-12:
            found.append(Anomaly(name, f"standard deviation {mine.std:.4g}, expected {other.std:.4g}"))
    return tuple(found)


@dataclass(frozen=True)
class Distance:
    """
    How far decoded values are from a reference's.

    Attributes:
        values: How many were compared.
        sqnr_db: Signal to quantisation noise, 10 log10 of the power ratio; infinite where nothing differs.
        cosine: Of the two tensors as vectors.
        blocks: Share of runs of 32 consecutive values that hold what they should: the very same values, or each within
            the bound of its type where a comparison judged them so.
    """

    values: int
    sqnr_db: float
    cosine: float
    blocks: float


class Gauge:
    """Sums over chunks that make a `Distance`."""

    def __init__(self) -> None:
        self.values = self.runs = self.same = 0
        self._signal = self._noise = self._other = self._product = 0.0

    def add(
        self, given: NDArray[np.float32], found: NDArray[np.float32], wrong: NDArray[np.bool_] | None = None
    ) -> None:
        """Take a chunk of whole rows of both sides, and which values are judged wrong; by default what differs."""
        given, found = given.reshape(-1), found.reshape(-1)
        if wrong is None:
            wrong = given.view(np.uint32) != found.view(np.uint32)
        wide, other = given.astype(np.float64), found.astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            self._signal += float(wide @ wide)
            self._other += float(other @ other)
            self._product += float(wide @ other)
            self._noise += float(np.square(wide - other).sum())
        differ = np.flatnonzero(wrong) // 32
        self.values += given.size
        self.runs += -(-given.size // 32)
        self.same += -(-given.size // 32) - np.unique(differ).size

    def read(self) -> Distance:
        """Close the sums; NaN where a side is not finite, so that no limit holds."""
        with np.errstate(all="ignore"):
            ratio = np.float64(self._signal) / np.float64(self._noise)
            sqnr = float(10 * np.log10(ratio)) if self._noise else (np.inf if self._noise == 0 else np.nan)
            norm = np.sqrt(np.float64(self._signal) * np.float64(self._other))
            cosine = float(np.float64(self._product) / norm) if norm else (1.0 if norm == 0 == self._noise else np.nan)
        return Distance(self.values, sqnr, min(1.0, cosine), self.same / self.runs if self.runs else 1.0)


def distances(
    subject: Checkpoint, reference: Checkpoint, *, progress: Callable[[int], None] | None = None
) -> dict[str, Distance]:
    """
    Measure how far each tensor of the subject is from the reference's, of those that both have in one shape.

    Raises:
        Unavailable: A type has no decoder here.

    Cost: one pass over both files.
    """
    out: dict[str, Distance] = {}
    done = 0
    for name, info in subject.tensors.items():
        other = reference.tensors.get(name)
        if other is not None and other.shape == info.shape:
            gauge = Gauge()
            for found, given in paired_chunks(subject, name, reference, name):
                gauge.add(given, found)
            out[name] = gauge.read()
        done += info.nbytes
        if progress is not None:
            progress(done)
    return out


def paired_chunks(subject: Checkpoint, name: str, reference: Checkpoint, other: str) -> Iterator[_Pair]:
    """Yield both sides' decoded values in step; in one piece when one of them cannot be cut by rows."""
    layouts = {subject.tensors[name].dtype.layout, reference.tensors[other].dtype.layout}
    size = _CHUNK_VALUES if layouts == {"row"} else max(1, prod(subject.tensors[name].shape))
    yield from zip(decoded_chunks(subject, name, size), decoded_chunks(reference, other, size), strict=True)
