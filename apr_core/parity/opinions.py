"""
Foreign opinions: other implementations of the same file on the same tokens, each with its own noise.

Every pair of opinions is held to four times the noise of both. Where one differs from all others, and those agree with
each other, it is the odd one out; where no majority is left, nobody is accused. Distances are between
log-probabilities, which is all that llama.cpp gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from apr_core.engines.subject import Subject
from apr_core.errors import UsageError
from apr_core.falsify.verdict import Verdict
from apr_core.parity.compare import LOGITS, compare_rows
from apr_core.parity.distribution import log_softmax
from apr_core.parity.floor import FACTOR, LEAST, EightBit, honest_floor, noise_floor, path
from apr_core.peers.llama_cpp import LlamaCpp
from apr_core.peers.transformers import Transformers

PEERS = ("transformers", "llama.cpp")
POSITIONS = 96
OURS = "torch"

Ids = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Opinion:
    """
    One implementation's distributions.

    Attributes:
        name: Who says so.
        log_p: [positions, vocabulary] log-probabilities.
        noise: rel_l2 that its own arithmetic may cost, beyond float64.
        source: Where that number comes from.
    """

    name: str
    log_p: NDArray[np.float64]
    noise: float
    source: str


@dataclass(frozen=True)
class Hearing:
    """
    Several opinions held against each other.

    Attributes:
        verdict: FALSIFIED when ours is the odd one out; INCONCLUSIVE when another is, or nobody can be.
        reason: Why not CORROBORATED, or empty.
        odd: The odd one out, or empty.
        noises: One row per opinion.
        pairs: One row per pair.
    """

    verdict: Verdict
    reason: str
    odd: str
    noises: Sequence[dict[str, object]]
    pairs: Sequence[dict[str, object]]


def gather(subject: Subject, peers: Sequence[str], positions: int = POSITIONS) -> list[Opinion]:
    """
    Ask for opinions on an admitted model: both forwards here, saved answers beside it, and the peers asked for.

    Args:
        subject: The model.
        peers: Of ``PEERS``.
        positions: Tokens of the stimulus.

    Raises:
        UsageError: An unknown peer.
        Unavailable: A peer that is not installed.
        LoadError: A peer does not read this file.
    """
    unknown = [peer for peer in peers if peer not in PEERS]
    if unknown:
        raise UsageError(f"expected a peer of {', '.join(PEERS)}, found {unknown[0]!r}")
    saved = subject.golden_logits
    room = min(positions, subject.model.config.max_position_embeddings)
    ids = subject.stimulus(room).ids if saved is None else saved["ids"][:room].astype(np.int64)
    validated, run = subject.admission.require(), path(ids, ids.size)
    float32 = honest_floor(validated, run).of(LOGITS)
    found = [
        Opinion(OURS, log_softmax(subject.model.forward(ids)), float32, "honest float32 (decision 0018)"),
        Opinion("numpy", log_softmax(subject.plain.forward(ids)), LEAST, "float64, given out as float32"),
    ]
    if saved is not None:
        found.append(Opinion("saved", log_softmax(saved[LOGITS][: ids.size]), LEAST, "float64, transformers_f64.npz"))
    if "transformers" in peers:
        exact, single = (log_softmax(Transformers(subject.path, kind).logits(ids)) for kind in ("float64", "float32"))
        own = max(float32, _distance(exact, single))
        found.append(Opinion("transformers float64", exact, LEAST, "float64"))
        found.append(Opinion("transformers float32", single, own, "float32, or its distance from its own float64"))
    if "llama.cpp" in peers:
        price = noise_floor(validated, run, EightBit()).of(LOGITS)
        with LlamaCpp(subject.path, context=max(256, 2 * ids.size)) as peer:
            told = peer.log_probabilities(ids).astype(np.float64)
        found.append(Opinion("llama.cpp", told, price, "8-bit activations, as they cost the reference (0012)"))
    return found


def hear(opinions: Sequence[Opinion]) -> Hearing:
    """Hold every pair of opinions against each other and say who is the odd one out."""
    pairs: list[dict[str, object]] = []
    against: dict[str, set[str]] = {o.name: set() for o in opinions}
    for one, other in combinations(opinions, 2):
        distance, limit = _distance(one.log_p, other.log_p), FACTOR * (one.noise + other.noise)
        if not distance <= limit:
            against[one.name].add(other.name)
            against[other.name].add(one.name)
        row = {"one": one.name, "other": other.name, "rel_l2": distance, "limit": limit, "agree": distance <= limit}
        pairs.append(row)
    noises = [{"opinion": o.name, "noise": o.noise, "source": o.source} for o in opinions]
    if len(opinions) < 3:
        return Hearing(Verdict.INCONCLUSIVE, "it takes three opinions to tell who is wrong", "", noises, pairs)
    if not any(against.values()):
        return Hearing(Verdict.CORROBORATED, "", "", noises, pairs)
    odd = [
        name
        for name, others in against.items()
        if len(others) == len(opinions) - 1 and not any(against[o] - {name} for o in others)
    ]
    if not odd:
        said = "; ".join(f"{row['one']} and {row['other']}" for row in pairs if not row["agree"])
        return Hearing(Verdict.INCONCLUSIVE, f"no majority agrees: {said} differ", "", noises, pairs)
    verdict = Verdict.FALSIFIED if odd[0] == OURS else Verdict.INCONCLUSIVE
    return Hearing(verdict, f"the odd one out is {odd[0]}: the others agree", odd[0], noises, pairs)


def _distance(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Largest rel_l2 over positions; infinite for another shape or a value that is not finite."""
    return compare_rows(LOGITS, one, other).required_tolerance if one.shape == other.shape else float("inf")
