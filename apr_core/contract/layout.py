"""
The layout contract of Qwen2: which tensors there are, what each is for, and its shape.

Source: the tensor-layout contract v1 (2.0.0) of APR, and the Hugging Face implementation of Qwen2 for the three biases,
which that table leaves out. Shapes are row-major, [out, in]; names are those of Hugging Face.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from apr_core.errors import LoadError

Kind = Literal["embedding", "head", "weight", "norm", "bias"]
KINDS: tuple[Kind, ...] = ("embedding", "head", "weight", "norm", "bias")

# A config that asks for more is not a model: without the limit `num_hidden_layers: 10**9` would list names for hours.
MOST_LAYERS = 1000
MOST_UNITS = 2**31


@dataclass(frozen=True)
class Role:
    """
    What a tensor is for.

    Attributes:
        name: The short name, e.g. ``q_proj``.
        pattern: The Hugging Face name, ``{n}`` standing for the layer.
        dims: The shape in letters: H hidden, V vocabulary, I intermediate, A heads * head_dim, K key-value heads *
            head_dim.
        kind: Which gates apply; ``norm`` and ``bias`` are the vectors, ``head`` is the output matrix.
        required: False for the one tensor that a tied model need not store.
    """

    name: str
    pattern: str
    dims: tuple[str, ...]
    kind: Kind
    required: bool = True

    @property
    def per_layer(self) -> bool:
        """True when every layer has one."""
        return "{n}" in self.pattern

    def shape(self, geometry: Geometry) -> tuple[int, ...]:
        """The shape that a geometry demands."""
        return tuple(geometry.letters[letter] for letter in self.dims)


_LAYER = "model.layers.{n}."
ROLES: tuple[Role, ...] = (
    Role("embedding", "model.embed_tokens.weight", ("V", "H"), "embedding"),
    Role("input_layernorm", _LAYER + "input_layernorm.weight", ("H",), "norm"),
    Role("q_proj", _LAYER + "self_attn.q_proj.weight", ("A", "H"), "weight"),
    Role("q_bias", _LAYER + "self_attn.q_proj.bias", ("A",), "bias"),
    Role("k_proj", _LAYER + "self_attn.k_proj.weight", ("K", "H"), "weight"),
    Role("k_bias", _LAYER + "self_attn.k_proj.bias", ("K",), "bias"),
    Role("v_proj", _LAYER + "self_attn.v_proj.weight", ("K", "H"), "weight"),
    Role("v_bias", _LAYER + "self_attn.v_proj.bias", ("K",), "bias"),
    Role("o_proj", _LAYER + "self_attn.o_proj.weight", ("H", "A"), "weight"),
    Role("post_attention_layernorm", _LAYER + "post_attention_layernorm.weight", ("H",), "norm"),
    Role("gate_proj", _LAYER + "mlp.gate_proj.weight", ("I", "H"), "weight"),
    Role("up_proj", _LAYER + "mlp.up_proj.weight", ("I", "H"), "weight"),
    Role("down_proj", _LAYER + "mlp.down_proj.weight", ("H", "I"), "weight"),
    Role("final_norm", "model.norm.weight", ("H",), "norm"),
    Role("lm_head", "lm_head.weight", ("V", "H"), "head", required=False),
)
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

_BY_PATTERN = {role.pattern: role for role in ROLES}
# no leading zeros: `layers.01` is another name than `layers.1`, and a tensor must not have two
_NUMBER = re.compile(r"(?<=^model\.layers\.)(0|[1-9][0-9]{0,8})(?=\.)")


def role_of(name: str) -> Role | None:
    """Return the role of a canonical tensor name, or None for a name outside the contract."""
    return None if "{" in name else _BY_PATTERN.get(_NUMBER.sub("{n}", name))


def layer_of(name: str) -> int | None:
    """Return the layer number in a canonical tensor name, or None."""
    found = _NUMBER.search(name)
    return int(found.group()) if found else None


@dataclass(frozen=True)
class Geometry:
    """The sizes that a config states; whether they fit each other is judged by F-CONFIG-PLAUSIBLE-001."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tied: bool

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
        """The dimensions by the letters that `Role.dims` uses."""
        return {
            "H": self.hidden_size,
            "V": self.vocab_size,
            "I": self.intermediate_size,
            "A": self.num_attention_heads * self.head_dim,
            "K": self.num_key_value_heads * self.head_dim,
        }

    @property
    def tensor_count(self) -> int:
        """12 L + 2 for a tied model, 12 L + 3 otherwise: 290 for Qwen2.5-0.5B, 339 for the 7B."""
        return 12 * self.num_hidden_layers + (2 if self.tied else 3)


def read_geometry(config: Mapping[str, object]) -> tuple[Geometry, tuple[str, ...]]:
    """Read the sizes that `Geometry.from_config` describes, and every problem; with problems the sizes mean nothing."""
    problems: list[str] = []
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
    layer = [role for role in ROLES if role.per_layer]
    first, last = ROLES[0], ROLES[-2:]
    expected[first.pattern] = (first, first.shape(geometry))
    for n in range(geometry.num_hidden_layers):
        for role in layer:
            expected[role.pattern.format(n=n)] = (role, role.shape(geometry))
    for role in last:
        if role.required or not geometry.tied:
            expected[role.pattern] = (role, role.shape(geometry))
    return expected
