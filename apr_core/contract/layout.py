"""
The layout contract: which tensors a model has by its architecture and its sizes, and their shapes.

The roles and their names stand in formats/architectures.toml. Shapes are row-major, [out, in]; names are those of
Hugging Face.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from apr_core.errors import LoadError
from apr_core.formats.architectures import KINDS, LAYER, Architecture, Kind, Role, load_architectures
from apr_core.formats.architectures import find_role as role_of

__all__ = [
    "EMBEDDING",
    "HEAD",
    "KINDS",
    "UNKNOWN",
    "Geometry",
    "Kind",
    "Role",
    "expected_tensors",
    "layer_of",
    "read_geometry",
    "role_of",
]

# A config that asks for more is not a model: without the limit `num_hidden_layers: 10**9` would list names for hours.
MOST_LAYERS = 1000
MOST_UNITS = 2**31
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
UNKNOWN = "has the architecture"  # how the problem of an unknown architecture begins


def layer_of(name: str) -> int | None:
    """Return the layer number in a canonical tensor name, or None."""
    found = LAYER.search(name)
    return int(found.group()) if found else None


@dataclass(frozen=True)
class Geometry:
    """
    The sizes that a config states; whether they fit each other is judged by F-CONFIG-PLAUSIBLE-001.

    Attributes:
        family: Name of the architecture.
        switches: Config keys that are true, of those that bring tensors with them (``attention_bias``).
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    family: str = "qwen2"
    switches: frozenset[str] = frozenset()

    @property
    def architecture(self) -> Architecture:
        """The family's roles."""
        return load_architectures()[self.family]

    def has(self, role: Role) -> bool:
        """Return whether a model of this config must have a role of its architecture."""
        if role.kind == "head":
            return not self.tied
        key = self.architecture.when.get(role.name)
        return key is None or key in self.switches

    def role_of(self, name: str) -> Role | None:
        """Return the role of a tensor name in this model: the head's even when tied; None for what has no role."""
        role = role_of(name)
        known = role is not None and role in self.architecture.roles
        return role if role is not None and known and (role.kind == "head" or self.has(role)) else None

    def shape_of(self, role: Role) -> tuple[int, ...]:
        """Return the shape that a role demands here."""
        return tuple(self.letters[letter] for letter in role.shape)

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> Geometry:
        """
        Read the sizes from a config with Hugging Face names.

        `num_key_value_heads` defaults to `num_attention_heads`, `head_dim` to their share of the hidden size, and
        `tie_word_embeddings` to false, as in transformers for Qwen2.

        Raises:
            LoadError: Naming every key that is missing or holds no usable number.
        """
        geometry, problems = read_geometry(config)
        if problems:
            raise LoadError("the config " + ", ".join(problems), advice="put the model's own config.json beside it")
        return geometry

    @property
    def letters(self) -> dict[str, int]:
        """The dimensions by the letters of the table."""
        return {
            "H": self.hidden_size,
            "V": self.vocab_size,
            "I": self.intermediate_size,
            "A": self.num_attention_heads * self.head_dim,
            "K": self.num_key_value_heads * self.head_dim,
            "D": self.head_dim,
        }

    @property
    def tensor_count(self) -> int:
        """How many tensors there must be: of a Qwen2 12 L + 2 when tied, 12 L + 3 otherwise (290 for the 0.5B)."""
        return len(expected_tensors(self))


def read_geometry(config: Mapping[str, object]) -> tuple[Geometry, tuple[str, ...]]:
    """Read the sizes that `Geometry.from_config` describes, and every problem; with problems the sizes mean nothing."""
    problems: list[str] = []
    stated = config.get("model_type")
    family = load_architectures().get(stated) if isinstance(stated, str) else None
    if stated is None:
        problems.append("lacks model_type")
    elif family is None:
        known = "; ".join(f"{name} ({one.says})" for name, one in load_architectures().items())
        problems.append(f"{UNKNOWN} {str(stated)[:40]!r}, of which nothing is known here; known are {known}")
    hidden = _size(config, "hidden_size", problems)
    heads = _size(config, "num_attention_heads", problems)
    tied = config.get("tie_word_embeddings")
    if tied is not None and not isinstance(tied, bool):
        problems.append(f"has tie_word_embeddings {str(tied)[:40]!r}, not true or false")
    geometry = Geometry(
        hidden_size=hidden,
        intermediate_size=_size(config, "intermediate_size", problems),
        num_hidden_layers=_size(config, "num_hidden_layers", problems, most=MOST_LAYERS),
        num_attention_heads=heads,
        num_key_value_heads=_size(config, "num_key_value_heads", problems, default=heads),
        head_dim=_size(config, "head_dim", problems, default=max(1, hidden // heads)),
        vocab_size=_size(config, "vocab_size", problems),
        tied=tied is True,
        family=family.name if family else "qwen2",
        switches=frozenset(key for key in (family.when.values() if family else ()) if config.get(key) is True),
    )
    return geometry, tuple(problems)


def _size(
    config: Mapping[str, object], key: str, problems: list[str], *, default: int | None = None, most: int = MOST_UNITS
) -> int:
    """Read one positive integer; on trouble note it and return 1, so that all problems are found at once."""
    value = config.get(key)
    if value is None:
        if default is None:
            problems.append(f"lacks {key}")
        return default or 1
    # bool is an int in Python: `hidden_size: true` would be 1
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        problems.append(f"has {key} {str(value)[:40]!r}, not an integer from 1 to {most}")
        return 1
    return value


def expected_tensors(geometry: Geometry) -> dict[str, tuple[Role, tuple[int, ...]]]:
    """List every tensor that must be there, in the order of the model, with its role and shape."""
    expected: dict[str, tuple[Role, tuple[int, ...]]] = {}
    roles = [role for role in geometry.architecture.roles if geometry.has(role)]
    layer = [role for role in roles if role.per_layer]
    for role in roles:
        if role is layer[0]:  # the roles of a layer stand together
            for n in range(geometry.num_hidden_layers):
                expected |= {one.hf.replace("{n}", str(n)): (one, geometry.shape_of(one)) for one in layer}
        elif not role.per_layer:
            expected[role.hf] = (role, geometry.shape_of(role))
    return expected
