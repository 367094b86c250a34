"""
Validated tensors: a value of these types has passed the gates, or belongs to an explicit bypass that says so.

Parse, don't validate: there are two ways to such a value. From raw bytes, which are copied, measured and judged; or
from an `Admission` that covers exactly this span of this open mapping. `dataclasses.replace`, `copy` and `pickle` go
through the same two. The guarantee is against accident, not malice: Python has no private fields.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NoReturn, TypeVar, final

import numpy as np
from numpy.typing import NDArray

from apr_core.contract.gates import Violation, judge_span, judge_tensor, load_gates, needs_spot_rows, undecodable
from apr_core.contract.layout import EMBEDDING, HEAD, Geometry, Kind, Role
from apr_core.contract.stats import TensorStats, measure
from apr_core.errors import AprError, ContractViolation, UsageError
from apr_core.formats import codecs
from apr_core.formats.checkpoint import Checkpoint, RawTensor


def _closed(cls: type) -> NoReturn:
    """Refuse a subclass: it could leave the gate out, and would pass for the type that has it."""
    raise TypeError(f"{cls.__name__}: {', '.join(base.__name__ for base in cls.__bases__)} cannot be subclassed")


# What `admit` shows to build an Admission. `dataclasses.replace(admission, violations=())` does not have it.
ADMIT = object()


@final
@dataclass(frozen=True, eq=False)
class Admission:
    """
    The outcome of the pre-dispatch gate for one opened file. Only `admit` and a receipt that holds build it.

    Attributes:
        checkpoint: The opened file that was judged.
        geometry: Its sizes; None when the config does not state them, which is a violation.
        stats: What was measured, by tensor, in the order of the model.
        violations: All of them: layout first, then tensor by tensor.
        gate_version: Version of the gate table that judged.
        extras: Tensors outside the contract, which nothing uses (information, not a violation).
        bypassed: True for the explicit bypass; whatever is computed from it carries the mark.
        receipt: The file that proves it (`receipt.admit_by_receipt`); None when every weight was read just now.
    """

    checkpoint: Checkpoint
    geometry: Geometry | None
    stats: Mapping[str, TensorStats]
    violations: tuple[Violation, ...]
    gate_version: int
    extras: tuple[str, ...] = ()
    bypassed: bool = False
    receipt: Path | None = None
    token: InitVar[object] = None

    def __init_subclass__(cls) -> None:
        _closed(cls)

    def __post_init__(self, token: object) -> None:
        if token is not ADMIT:
            raise TypeError("an Admission comes from admit(); it cannot be built or edited")

    @property
    def ok(self) -> bool:
        """True when there is no violation; a bypass does not change that."""
        return not self.violations

    @property
    def expected(self) -> int:
        """Tensors that the architecture demands: 12 L + 2 or 12 L + 3; 0 when the config does not say."""
        return self.geometry.tensor_count if self.geometry else 0

    @property
    def measured(self) -> int:
        """Tensors that were measured, a stored tied head included."""
        return len(self.stats)

    @property
    def refusal(self) -> str | None:
        """One line: the first violation and how many there are; None when there are none."""
        if self.ok:
            return None
        tensors = len({violation.tensor for violation in self.violations})
        more = f" ({len(self.violations)} violations in {tensors} tensors)" if len(self.violations) > 1 else ""
        return f"{self.violations[0]}{more}"

    @property
    def blocking(self) -> tuple[Violation, ...]:
        """What keeps a model from being built: every violation, or under a bypass those that leave nothing to run."""
        return tuple(v for v in self.violations if not (self.bypassed and v.waivable))

    def require(self) -> ValidatedModel:
        """
        Return the validated model.

        Raises:
            ContractViolation: With every violation.
        """
        return ValidatedModel(self)

    def stats_of(self, raw: RawTensor) -> TensorStats:
        """
        Return what was measured for exactly these bytes: same span, same open mapping, same gates.

        Raises:
            ContractViolation: The file was refused.
            UsageError: These are not the bytes that were judged, or the gates have changed since.
        """
        if self.blocking:
            raise ContractViolation(self.checkpoint.path, self.blocking)
        name = raw.info.name
        if self.gate_version != load_gates().version:
            raise UsageError(f"the admission is of gate version {self.gate_version}", advice="admit the file again")
        if name not in self.stats or self.checkpoint.tensors.get(name) != raw.info or not self._is_mine(raw):
            raise UsageError(
                f"the admission of {self.checkpoint.path} does not cover these bytes of tensor {name}",
                advice="take the tensor from the checkpoint that was admitted",
            )
        return self.stats[name]

    def _is_mine(self, raw: RawTensor) -> bool:
        """Compare addresses: equal bytes elsewhere can be changed by somebody else."""
        own = self.checkpoint.raw(raw.info.name).data
        return own.ctypes.data == raw.data.ctypes.data and own.nbytes == raw.data.nbytes

    def __reduce__(self) -> tuple[Callable[..., Admission], tuple[str]]:
        # A pickled verdict could be edited, or its file could: what arrives is judged where it arrives.
        from apr_core.contract.admit import admit

        return partial(admit, skip=self.bypassed), (str(self.checkpoint.path),)


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class _Validated:
    """The common door of the four tensor types; see the module docstring."""

    kinds: ClassVar[tuple[Kind, ...]] = ()

    raw: RawTensor
    geometry: Geometry
    admission: InitVar[Admission | None] = None
    role: Role = field(init=False)
    stats: TensorStats = field(init=False)
    bypassed: bool = field(init=False)

    def __init_subclass__(cls) -> None:
        if cls.__bases__ != (_Validated,):
            _closed(cls)

    def __post_init__(self, admission: Admission | None) -> None:
        role = self.geometry.role_of(self.raw.info.name)
        if role is None or role.kind not in self.kinds:
            raise TypeError(f"{self.raw.info.name} is not for a {type(self).__name__}, which holds {self.kinds}")
        if admission is None:
            raw = owned(self.raw)
            stats, found = inspect(raw, role, self.geometry.shape_of(role))
            if stats is None or found:
                raise ContractViolation(raw.info.file, found)
            object.__setattr__(self, "raw", raw)
        else:
            if not isinstance(admission, Admission):
                raise TypeError(f"expected an Admission, found {type(admission).__name__}")
            stats = admission.stats_of(self.raw)
            if admission.geometry != self.geometry:
                raise UsageError("the admission judged another geometry", advice="use admission.geometry")
        object.__setattr__(self, "role", role)
        object.__setattr__(self, "stats", stats)
        object.__setattr__(self, "bypassed", admission is not None and admission.bypassed)

    @property
    def name(self) -> str:
        """Canonical name."""
        return self.raw.info.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Row-major shape."""
        return self.raw.info.shape

    def values(self) -> NDArray[np.float32]:
        """Decode to a fresh float32 array of the tensor's shape; writing to it changes nothing here."""
        return codecs.decode(self.raw)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name}, {self.raw.info.dtype} {list(self.shape)})"

    def __reduce__(self) -> tuple[type[_Validated], tuple[RawTensor, Geometry]]:
        # Bytes and sizes travel, the verdict does not: the other side measures and judges.
        return type(self), (self.raw, self.geometry)


@final
@dataclass(frozen=True, eq=False, repr=False, slots=True)
class ValidatedEmbedding(_Validated):
    """The token embedding, [vocabulary, hidden]."""

    kinds = ("embedding",)


@final
@dataclass(frozen=True, eq=False, repr=False, slots=True)
class ValidatedWeight(_Validated):
    """A projection, [out, in]."""

    kinds = ("weight",)


@final
@dataclass(frozen=True, eq=False, repr=False, slots=True)
class ValidatedVector(_Validated):
    """A norm's gain or a bias, [length]."""

    kinds = ("norm", "bias")


@final
@dataclass(frozen=True, eq=False, repr=False, slots=True)
class ValidatedHead(_Validated):
    """The output matrix as it is stored, [vocabulary, hidden]; of a tied model the embedding once more."""

    kinds = ("head", "embedding")

    def __post_init__(self, admission: Admission | None) -> None:
        _Validated.__post_init__(self, admission)
        if self.role.kind == "embedding" and not self.geometry.tied:
            raise TypeError(f"{self.name} is not the head of this model, which has one of its own")


Pack = Callable[[ValidatedHead], NDArray[Any]]


def transposed(head: ValidatedHead) -> NDArray[np.float32]:
    """Decode a head to [hidden, vocabulary]."""
    return np.ascontiguousarray(head.values().T)


@final
@dataclass(frozen=True, eq=False, repr=False, slots=True)
class RepackedHead:
    """
    The output matrix in an engine's own layout, made from a `ValidatedHead` and from nothing else.

    It is no `ValidatedHead`, and none becomes one: a head multiplied in the other layout gives fluent noise and, in a
    square or padded buffer, no error. `replace`, `copy` and `pickle` pack again.

    Attributes:
        head: The judged matrix.
        pack: Lays it out anew; the array that it returns must be its own.
        data: What `pack` made, read-only, uncopied.
    """

    head: ValidatedHead
    pack: Pack = transposed
    data: NDArray[Any] = field(init=False)

    def __init_subclass__(cls) -> None:
        _closed(cls)

    def __post_init__(self) -> None:
        if not isinstance(self.head, ValidatedHead):
            raise TypeError(f"expected a ValidatedHead to pack, found {type(self.head).__name__}")
        made = np.ascontiguousarray(self.pack(self.head))
        # over a read-only view of the memory: its flag cannot be set back, as that of an array of its own could
        data = np.frombuffer(made.data.toreadonly(), dtype=made.dtype).reshape(made.shape)
        object.__setattr__(self, "data", data)

    def __repr__(self) -> str:
        return f"RepackedHead({self.head.name}, {self.data.dtype} {list(self.data.shape)})"

    def __reduce__(self) -> tuple[type[RepackedHead], tuple[ValidatedHead, Pack]]:
        return RepackedHead, (self.head, self.pack)


Validated = ValidatedEmbedding | ValidatedWeight | ValidatedVector | ValidatedHead
_T = TypeVar("_T", ValidatedEmbedding, ValidatedWeight, ValidatedVector, ValidatedHead)
_TYPES: dict[Kind, Callable[[RawTensor, Geometry, Admission], Validated]] = {
    "embedding": ValidatedEmbedding,
    "head": ValidatedHead,
    "weight": ValidatedWeight,
    "norm": ValidatedVector,
    "bias": ValidatedVector,
}


@final
@dataclass(frozen=True, eq=False, repr=False, slots=True)
class ValidatedModel:
    """
    A whole admitted model; built from its `Admission` alone, which `admit` makes from the file.

    Attributes:
        admission: The proof.
        tensors: Every tensor of the contract by name, in the order of the model; a tied model that stores its head
            has that too, judged equal to the embedding: `tied` says which one is meant.
    """

    admission: Admission
    tensors: Mapping[str, Validated] = field(init=False)

    def __init_subclass__(cls) -> None:
        _closed(cls)

    def __post_init__(self) -> None:
        admission = self.admission
        if not isinstance(admission, Admission):
            raise TypeError(f"expected an Admission, found {type(admission).__name__}")
        if admission.blocking or admission.geometry is None:
            raise ContractViolation(admission.checkpoint.path, admission.blocking)
        made: dict[str, Validated] = {}
        for name in admission.stats:
            raw = admission.checkpoint.raw(name)
            role = admission.geometry.role_of(name)
            assert role is not None
            made[name] = _TYPES[role.kind](raw, admission.geometry, admission)
        object.__setattr__(self, "tensors", MappingProxyType(made))

    def take(self, name: str, kind: type[_T]) -> _T:
        """
        Return a tensor as the type that it must have.

        Raises:
            KeyError: The model has no such tensor.
            TypeError: It is for something else.
        """
        tensor = self.tensors[name]
        if not isinstance(tensor, kind):
            raise TypeError(f"{name} is a {type(tensor).__name__}, not a {kind.__name__}")
        return tensor

    @property
    def head(self) -> ValidatedHead:
        """The output matrix: the stored one, or of a tied model the embedding."""
        if not self.tied:
            return self.take(HEAD, ValidatedHead)
        return ValidatedHead(self.checkpoint.raw(EMBEDDING), self.geometry, self.admission)

    @property
    def checkpoint(self) -> Checkpoint:
        """The opened file."""
        return self.admission.checkpoint

    @property
    def geometry(self) -> Geometry:
        """Its sizes."""
        assert self.admission.geometry is not None
        return self.admission.geometry

    @property
    def config(self) -> Mapping[str, object]:
        """The config with Hugging Face names."""
        return self.checkpoint.config or {}

    @property
    def tied(self) -> bool:
        """True when the embedding is the head."""
        return self.geometry.tied

    @property
    def bypassed(self) -> bool:
        """True for the explicit bypass: mark whatever comes out of this model."""
        return self.admission.bypassed

    def __repr__(self) -> str:
        return f"ValidatedModel({self.checkpoint.path}, {len(self.tensors)} tensors)"

    def __reduce__(self) -> tuple[type[ValidatedModel], tuple[Admission]]:
        return ValidatedModel, (self.admission,)


def owned(raw: RawTensor) -> RawTensor:
    """Return the tensor on bytes that nobody else can change: as it is when immutable, else copied."""
    base: object = raw.data
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, bytes) and raw.data.dtype == np.uint8 and raw.data.ndim == 1:
        return raw
    return RawTensor(raw.info, np.frombuffer(raw.data.tobytes(), dtype=np.uint8))


def inspect(raw: RawTensor, role: Role, shape: tuple[int, ...]) -> tuple[TensorStats | None, list[Violation]]:
    """Measure and judge one tensor by every gate of its role; statistics are None when it cannot be decoded."""
    # the bytes that are really there, not those that the header speaks of
    found = judge_span(replace(raw.info, nbytes=raw.data.nbytes), role, shape)
    if any(violation.rule == "byte_difference" for violation in found):
        return None, found
    stats, data = inspect_values(raw, role)
    return stats, found + data


def inspect_values(raw: RawTensor, role: Role) -> tuple[TensorStats | None, list[Violation]]:
    """Measure one tensor and judge its values; a type that nothing decodes is refused, not skipped."""
    try:
        stats = measure(raw, spot_rows=needs_spot_rows(role))
    except AprError as error:
        return None, undecodable(raw.info.name, role, str(error))
    return stats, judge_tensor(stats, role)
