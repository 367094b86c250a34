"""
Weights as torch sees them: the only place where an admitted tensor becomes a torch tensor.

An engine that computes a projection differently replaces `Weights` and nothing else. The torch views stay in this file,
and no object of the model takes another value once it is built: the contract judged these bytes, not later ones.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional

from apr_core.contract.types import ValidatedModel

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


class Linear(Sealed):
    """``x @ weight.T + bias``; the weight is [out, in]."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        return functional.linear(x, self._weight, self._bias)


class Embedding(Sealed):
    """A table of rows, [vocab_size, hidden_size]."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def __call__(self, ids: Tensor) -> Tensor:
        """Map [tokens] to [tokens, hidden_size]."""
        return self._weight[ids]

    def as_head(self) -> Linear:
        """Return the head of a tied model: the same memory, not a copy."""
        return Linear(self._weight, None)


class RMSNorm(Sealed):
    """Scale each row to a root mean square of one, then by a learned gain."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self._weight, self._eps = weight, eps

    def __call__(self, x: Tensor) -> Tensor:
        """Map [..., hidden_size] to the same shape."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self._eps) * self._weight


class Weights:
    """
    Hands out the parts of an admitted model by their Hugging Face names, in float32 on one device.

    Cost: decodes each tensor when its part is asked for, 4 bytes per element; a tied head adds nothing.
    """

    def __init__(self, validated: ValidatedModel, device: torch.device) -> None:
        self._validated, self._device = validated, device

    def linear(self, name: str) -> Linear:
        """Return the projection ``name``, with its bias when the model has one."""
        bias = f"{name}.bias"
        return Linear(self._tensor(f"{name}.weight"), self._tensor(bias) if bias in self._validated.tensors else None)

    def embedding(self, name: str) -> Embedding:
        """Return the table ``name``."""
        return Embedding(self._tensor(f"{name}.weight"))

    def norm(self, name: str, eps: float) -> RMSNorm:
        """Return the norm ``name``."""
        return RMSNorm(self._tensor(f"{name}.weight"), eps)

    def _tensor(self, name: str) -> Tensor:
        return torch.from_numpy(self._validated.tensors[name].values()).to(self._device)
