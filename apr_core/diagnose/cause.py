"""What a diagnosis says: causes from the closed list, each with its chain of measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from apr_core.contract.layout import layer_of, role_of

# The closed list of root causes that a diagnosis may name; docs/glossary.md says what each means.
CAUSES = (
    "container",
    "missing-data",
    "tensor-values",
    "layout",
    "naming",
    "configuration",
    "codec",
    "numerics",
    "tokenizer",
    "template",
    "stop",
    "backend-attention",
    "backend-position",
    "backend-cache",
    "backend-kernel",
    "backend-sampling",
    "converter",
    "meter",
    "suite",
)
NOTHING = "nothing to explain"
EXPLAINED = "explained"
UNEXPLAINED = "unexplained"
Why = tuple[str, str]


@dataclass(frozen=True)
class Cause:
    """
    One cause, and how it was found.

    Attributes:
        klass: One of ``CAUSES``.
        experiment: What was tried that tells it from other causes.
        found: The answer of that experiment, with its numbers.
        repair: What restores agreement; empty where nothing that was tried does.
        proved: Whether the repair was carried out and did.
        tensors: Canonical names concerned, in the order of the model; the first is where to look.
        op: Activation of a backend, or the part of the words (``merges``, ``rope_theta``).
        position: Index into the tensor, or token positions of a backend.
        whys: The chain, from symptom to cause.
    """

    klass: str
    experiment: str
    found: str
    repair: str = ""
    proved: bool = False
    tensors: tuple[str, ...] = ()
    op: str = ""
    position: str = ""
    whys: tuple[Why, ...] = ()

    def __post_init__(self) -> None:
        if self.klass not in CAUSES:
            raise ValueError(f"{self.klass!r} is not on the closed list of causes")

    @property
    def tensor(self) -> str:
        """Where to look first."""
        return self.tensors[0] if self.tensors else ""

    @property
    def layer(self) -> int | None:
        """Layer of the tensor or of the activation."""
        parts = self.op.split(".")
        return int(parts[1]) if parts[0] == "layers" else layer_of(self.tensor)

    @property
    def place(self) -> str:
        """Tensor, activation or part, whichever there is."""
        return self.tensor or self.op

    def as_json(self) -> dict[str, Any]:
        """The cause as plain values."""
        role = role_of(self.tensor)
        return {
            "class": self.klass,
            "role": role.name if role else "",
            "tensor": self.tensor,
            "tensors": list(self.tensors),
            "layer": self.layer,
            "op": self.op,
            "position": self.position,
            "confidence": "proved by repair" if self.proved else "measured",
            "experiment": f"{self.experiment}: {self.found}",
            "repair": self.repair,
            "whys": [list(why) for why in self.whys],
        }


@dataclass(frozen=True)
class Diagnosis:
    """
    The outcome of an explanation.

    Attributes:
        outcome: ``nothing to explain``, ``explained`` or ``unexplained``.
        causes: Ranked, the most likely first; several when several were found.
        provenance: What kind of relation model and reference have, in a sentence; empty without a reference.
        steps: What was asked on the way, with the answers: also when nothing was found.
        needed: What would be needed to go further; empty when nothing would.
        behind: Whether the file itself has nothing to explain: the cause lies in what read, ran or timed it.
    """

    outcome: str
    causes: tuple[Cause, ...] = ()
    provenance: str = ""
    steps: tuple[Why, ...] = ()
    needed: str = ""
    behind: bool = False

    @property
    def whys(self) -> tuple[Why, ...]:
        """The chain to the first cause, or how far it got."""
        last = [("What would be needed?", self.needed)] if self.needed else []
        return (*(self.causes[0].whys if self.causes else self.steps), *last)

    def as_json(self) -> dict[str, Any]:
        """The first cause's fields, with outcome, provenance and every other cause beside them."""
        empty = dict.fromkeys(("class", "role", "tensor", "op", "position", "confidence", "experiment", "repair"), "")
        first = self.causes[0].as_json() if self.causes else {**empty, "tensors": [], "layer": None}
        return {
            "outcome": self.outcome,
            **first,
            "whys": [list(why) for why in self.whys],
            "provenance": self.provenance,
            "needed": self.needed,
            "others": [cause.as_json() for cause in self.causes[1:]],
        }


@dataclass
class Chain:
    """The questions so far, with their answers; a cause takes them over and adds its own."""

    steps: list[Why] = field(default_factory=list)

    def ask(self, question: str, answer: str) -> None:
        """Note a question and what was measured."""
        self.steps.append((question, answer))

    def close(self, cause: Cause) -> Cause:
        """Give a cause its chain: the common questions, its own, its experiment and the repair."""
        own = [*self.steps, *cause.whys, (cause.experiment, cause.found)]
        if cause.repair:
            own.append(("What restores agreement?", cause.repair))
        return replace(cause, whys=tuple(own))


def listed(names: Sequence[str], most: int = 3) -> str:
    """Name the first few of many."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
