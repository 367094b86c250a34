"""
The zoo's vocabulary: a planted defect, a legal oddity, and the registry that collects both from the other files.

A defect is a recipe on a draft (a damaged file), a hook in a backend (``engines.wrap``), or a tamper of the copies that
the three-format claims make (a broken converter). Recipes are seeded and general: they look tensors up in the draft and
raise ``NotApplicable`` when the model has none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from apr_core.diagnose.cause import CAUSES
from apr_core.engines.wrap import Hook
from apr_core.model.config import Qwen2Config
from apr_core.zoo.draft import Draft

Recipe = Callable[[Draft], None]
MakeHook = Callable[[Qwen2Config], Hook]
Tamper = Callable[[Path], None]


class NotApplicable(Exception):
    """The model has nothing that the recipe could damage (no bias to drop, no tokenizer to edit)."""


@dataclass(frozen=True)
class Defect:
    """
    One planted fault.

    Attributes:
        id: Stable name.
        klass: The class that it belongs to; at most four of a class count.
        what: What was done, in a phrase.
        source: The round of the specification or the public thread that it reproduces.
        cause: Root cause, one of ``CAUSES``: what a diagnosis must name.
        kills: The claims that must kill it; ``preflight`` for a file that must not even open.
        role: Role of the damaged tensor (``q_proj``, ``embedding``, ...), or empty.
        tensor: Canonical name of the damaged tensor, or empty.
        recipe: Damages a draft in place.
        hook: Makes a hook for ``engines.wrap``.
        tamper: Damages each copy that the three-format claims write.
        invisible_alone: Why nothing in the file itself can show it; empty when it is visible alone.
        twin: True for the counter-examples of the gates, which notebook 10 plants on a synthetic twin too.
    """

    id: str
    klass: str
    what: str
    source: str
    cause: str
    kills: tuple[str, ...]
    role: str = ""
    tensor: str = ""
    recipe: Recipe | None = None
    hook: MakeHook | None = None
    tamper: Tamper | None = None
    invisible_alone: str = ""
    twin: bool = False

    @property
    def gate(self) -> str:
        """The first claim that must kill it."""
        return self.kills[0]


@dataclass(frozen=True)
class Benign:
    """
    A legal oddity that must raise no alarm: a recipe on the healthy model, with the healthy model as reference.

    ``alone``: it changes values on purpose (noise in padded rows, other zeros), so nothing may hold them against the
    healthy model or its golden answers.
    """

    id: str
    what: str
    recipe: Recipe
    why: str = ""
    hook: MakeHook | None = None
    twin: bool = False
    alone: bool = False


@dataclass(frozen=True)
class Later:
    """A class of defects that cannot be planted yet, and the issue that brings what it needs."""

    klass: str
    what: str
    source: str
    issue: int


@dataclass
class Zoo:
    """Everything that is planted."""

    defects: dict[str, Defect] = field(default_factory=dict)
    benign: dict[str, Benign] = field(default_factory=dict)
    later: dict[str, Later] = field(default_factory=dict)

    def add(self, *items: Defect | Benign | Later) -> None:
        """
        Register items.

        Raises:
            ValueError: An id is taken, a cause is not on the closed list, or a defect has not exactly one way in.
        """
        for item in items:
            if isinstance(item, Later):
                self.later[item.klass] = item
                continue
            if item.id in self.defects or item.id in self.benign:
                raise ValueError(f"the zoo holds {item.id} twice")
            if isinstance(item, Benign):
                self.benign[item.id] = item
                continue
            ways = [w for w in (item.recipe, item.hook, item.tamper) if w is not None]
            if item.cause not in CAUSES or len(ways) != 1 or not item.kills:
                raise ValueError(f"{item.id}: cause {item.cause!r}, {len(ways)} ways in, kills {item.kills}")
            self.defects[item.id] = item


@cache
def load_zoo() -> Zoo:
    """Collect every defect and benign twin, in the order of the rooms that they damage."""
    from apr_core.zoo import backend, benign, files, later, plants, words

    zoo = Zoo()
    for module in (plants, files, words, backend):
        zoo.add(*module.DEFECTS)
    zoo.add(*plants.BENIGN, *benign.BENIGN, *later.LATER)
    return zoo
