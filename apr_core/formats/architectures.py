"""
The roles of every known architecture, from architectures.toml: the one home of tensor names, shapes and legal types.

It lies in the lowest room that needs it: readers translate names with it, the contract judges by it.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any, Literal

Kind = Literal["embedding", "head", "weight", "norm", "bias"]
KINDS: tuple[Kind, ...] = ("embedding", "head", "weight", "norm", "bias")

# ASCII digits without leading zeros: "layers.01" and Arabic-Indic digits are other names, not other spellings; a tensor
# must not have two.
LAYER = re.compile(r"(?<=^model\.layers\.)(0|[1-9][0-9]{0,8})(?=\.)")


@dataclass(frozen=True)
class Role:
    """
    What a tensor is for.

    Attributes:
        name: The short name, e.g. ``q_proj``.
        kind: Which gates apply; ``norm`` and ``bias`` are the vectors, ``head`` is the output matrix.
        shape: The shape in the letters of the table, e.g. ``AH``.
        hf: The Hugging Face name, which is the canonical one; ``{n}`` stands for the layer.
        gguf: The name in a GGUF file.
        apr: The name in an APR file.
        types: Names of the element types that it may have.
    """

    name: str
    kind: Kind
    shape: str
    hf: str
    gguf: str
    apr: str
    types: frozenset[str]

    @property
    def per_layer(self) -> bool:
        """True when every layer has one."""
        return "{n}" in self.hf


@dataclass(frozen=True)
class Architecture:
    """
    What a family of models is made of.

    Attributes:
        name: As ``model_type`` and ``general.architecture`` have it.
        says: In a phrase.
        roles: In the order of the model; those of a layer stand together.
        when: Role name -> the config key that must be true for the role to exist.
        gguf_permutes: Names of roles whose rows GGUF stores in another order.
    """

    name: str
    says: str
    roles: tuple[Role, ...]
    when: Mapping[str, str]
    gguf_permutes: tuple[str, ...] = ()


@cache
def load_roles() -> Mapping[str, Role]:
    """Read every role of the table, by its Hugging Face name; from the installed package, cached."""
    table = _table()
    made = {}
    for name, row in table["roles"].items():
        types = frozenset(table["types"][table["kinds"][row["kind"]]])
        made[row["hf"]] = Role(name, types=types, **row)
    return MappingProxyType(made)


@cache
def load_architectures() -> Mapping[str, Architecture]:
    """Read every architecture of the table, by its name; cached."""
    roles = {role.name: role for role in load_roles().values()}
    return MappingProxyType(
        {
            name: Architecture(
                name,
                row["says"],
                tuple(roles[r] for r in row["roles"]),
                row.get("when", {}),
                tuple(row.get("gguf_permutes", ())),
            )
            for name, row in _table()["architectures"].items()
        }
    )


def find_role(name: str) -> Role | None:
    """Return the role of a canonical tensor name in any architecture, or None for a name outside the table."""
    return None if "{" in name else load_roles().get(LAYER.sub("{n}", name))


@cache
def _table() -> dict[str, Any]:
    text = resources.files("apr_core.formats").joinpath("architectures.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)
