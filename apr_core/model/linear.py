"""
Weights as torch sees them: the only place where an admitted tensor becomes a torch tensor.

An engine that computes a projection differently replaces `Weights` and nothing else. Every part takes the validated
type that it is for, and neither an array nor a tensor of another role. The torch views stay in this file, and no object
of the model takes another value once it is built: the contract judged these bytes, not later ones.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional

from apr_core.contract.types import (
    Validated,
    ValidatedEmbedding,
    ValidatedHead,
    ValidatedModel,
    ValidatedVector,
    ValidatedWeight,
)

_ADVICE = "weights are admitted once, with their file; build another model with load_model(path)"


class _Sealing(type):
    """Closes an object against assignment as soon as its ``__init__`` has returned."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        built = super().__call__(*args, **kwargs)
        object.__setattr__(built, "_sealed", True)
        return built


class Sealed(metaclass=_Sealing):
    """A part of a model; assigning to it or loading other weights into it raises."""

    def __setattr__(self, name: str, value: object) -> None:
        if getattr(self, "_sealed", False):
            raise AttributeError(f"{type(self).__name__}.{name} cannot be assigned; {_ADVICE}")
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__}.{name} cannot be deleted; {_ADVICE}")

    def load_state_dict(self, *args: object, **kwargs: object) -> NoReturn:
        """Refuse: it would put weights into the model that no gate has seen."""
        raise TypeError(f"{type(self).__name__} takes no state dict; {_ADVICE}")


class Place:
    """
    Where weights live and how their products are summed.

    Args:
        device: A torch device.
        dtype: Precision of the weights, and so of the forward.
        parts: Sum each product in so many pieces, one behind the other: another order of summation on the same
            numbers, which is how the noise floor of a forward is measured.
    """

    def __init__(self, device: str = "cpu", dtype: torch.dtype = torch.float32, parts: int = 1) -> None:
        self.device, self.dtype, self.parts = torch.device(device), dtype, parts

    def take(self, tensor: Validated) -> Tensor:
        """Decode a tensor and bring it here."""
        return torch.from_numpy(tensor.values()).to(self.device, self.dtype)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``x @ weight.T + bias``."""
        if self.parts == 1:
            return functional.linear(x, weight, bias)
        pieces = zip(x.tensor_split(self.parts, -1), weight.tensor_split(self.parts, -1), strict=True)
        total = sum((functional.linear(a, b) for a, b in pieces), torch.zeros((), device=x.device, dtype=x.dtype))
        return total if bias is None else total + bias


CPU = Place()


class Linear(Sealed):
    """``x @ weight.T + bias``; the weight is [out, in]."""

    def __init__(self, weight: ValidatedWeight, bias: ValidatedVector | None = None, place: Place = CPU) -> None:
        self._place, self._weight = place, _torch(weight, ValidatedWeight, place)
        self._bias = None if bias is None else _torch(bias, ValidatedVector, place)

    def __call__(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        return self._place.product(x, self._weight, self._bias)


class Embedding(Sealed):
    """A table of rows, [vocab_size, hidden_size]."""

    def __init__(self, weight: ValidatedEmbedding, place: Place = CPU) -> None:
        self._weight, self._source = _torch(weight, ValidatedEmbedding, place), weight

    def __call__(self, ids: Tensor) -> Tensor:
        """Map [tokens] to [tokens, hidden_size]."""
        return self._weight[ids]


class Head(Sealed):
    """
    ``x @ weight.T``: the logits, from the output matrix in its natural layout, [vocab_size, hidden_size].

    A `RepackedHead` belongs to the engine that packed it and is refused here.

    Args:
        weight: The output matrix.
        place: Where it lives.
        table: The embedding of a tied model, whose memory is then used and not a copy.
    """

    def __init__(self, weight: ValidatedHead, place: Place = CPU, table: Embedding | None = None) -> None:
        self._place = place
        shared = table is not None and isinstance(weight, ValidatedHead) and table._source.raw.info == weight.raw.info
        self._weight = table._weight if table is not None and shared else _torch(weight, ValidatedHead, place)

    def __call__(self, x: Tensor) -> Tensor:
        """Map [..., hidden_size] to [..., vocab_size]."""
        return self._place.product(x, self._weight)


class RMSNorm(Sealed):
    """Scale each row to a root mean square of one, then by a learned gain."""

    def __init__(self, weight: ValidatedVector, eps: float, place: Place = CPU) -> None:
        self._weight, self._eps = _torch(weight, ValidatedVector, place), eps

    def __call__(self, x: Tensor) -> Tensor:
        """Map [..., hidden_size] to the same shape."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self._eps) * self._weight


def _torch(tensor: Validated, kind: type[Validated], place: Place) -> Tensor:
    """Decode a validated tensor of one kind to its place."""
    if not isinstance(tensor, kind):
        raise TypeError(f"expected a {kind.__name__}, found {type(tensor).__name__}; {_ADVICE}")
    return place.take(tensor)


class Weights:
    """
    Hands out the parts of an admitted model by their Hugging Face names, in one place.

    Cost: decodes each tensor when its part is asked for, 4 bytes per element; a tied head adds nothing.
    """

    def __init__(self, validated: ValidatedModel, place: Place = CPU) -> None:
        self._validated, self.place = validated, place

    def linear(self, name: str) -> Linear:
        """Return the projection ``name``, with its bias when the model has one."""
        model, bias = self._validated, f"{name}.bias"
        offset = model.take(bias, ValidatedVector) if bias in model.tensors else None
        return Linear(model.take(f"{name}.weight", ValidatedWeight), offset, self.place)

    def embedding(self, name: str) -> Embedding:
        """Return the table ``name``."""
        return Embedding(self._validated.take(f"{name}.weight", ValidatedEmbedding), self.place)

    def norm(self, name: str, eps: float) -> RMSNorm:
        """Return the norm ``name``."""
        return RMSNorm(self._validated.take(f"{name}.weight", ValidatedVector), eps, self.place)

    def head(self, table: Embedding) -> Head:
        """Return the head; of a tied model it shares the memory of ``table``."""
        return Head(self._validated.head, self.place, table)
