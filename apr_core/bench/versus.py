"""A candidate beside its peers and its ceiling: their rounds take turns, so that each meets the same machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from apr_core.bench.roofline import ceiling_of
from apr_core.bench.throughput import Plan, Throughput, measure
from apr_core.bench.timing import Samples
from apr_core.contract.admit import Admission
from apr_core.errors import Unavailable
from apr_core.model.trace import TracedForward
from apr_core.peers.rates import RatedPeer, Rates, median_ratio, open_peer

if TYPE_CHECKING:
    from apr_core.parity.floor import Rounding

_PROMPTS = 3


@dataclass(frozen=True, eq=False)
class Comparison:
    """
    One candidate with one number of threads, what the machine allows, and what its peers did in the same minutes.

    Attributes:
        timed: The candidate.
        threads: Threads asked for.
        read_bytes: Bytes that one of its tokens reads.
        bandwidth: Samples of the ceiling, 1e9 bytes per second.
        peers: Each peer's rounds.
        absent: Peers that were asked for and are not here, each with the reason.
    """

    timed: Throughput
    threads: int
    read_bytes: int
    bandwidth: NDArray[np.float64]
    peers: Sequence[tuple[RatedPeer, list[Rates]]]
    absent: Mapping[str, str] = field(default_factory=dict)

    @property
    def read_gb_s(self) -> float:
        """The best sample: a ceiling is what the machine can do."""
        return float(self.bandwidth.max())

    @property
    def ceiling_tok_s(self) -> float:
        """Tokens per second at that bandwidth."""
        return self.read_gb_s * 1e9 / self.read_bytes

    @property
    def share_of_ceiling(self) -> float:
        """Bandwidth that the median step implies, over the ceiling."""
        return self.timed.decode_tok_s / self.ceiling_tok_s

    @property
    def spread(self) -> float:
        """Distance of the ceiling's quartiles, as a share of its best sample."""
        low, high = np.quantile(self.bandwidth, [0.25, 0.75])
        return float((high - low) / self.read_gb_s)

    def ratios(self) -> dict[str, tuple[float, float]]:
        """Return candidate over peer, median over rounds, in decode and in prefill; of the fair peers alone."""
        ours = self.timed
        if not any(peer.fair for peer, _ in self.peers):
            return {}
        decode = [1 / float(np.median(row)) for row in ours.steps.seconds.reshape(ours.plan.repeats, -1)]
        prefill = [ours.plan.prefill / seconds for seconds in ours.prefill.seconds.tolist()]
        return {
            peer.name: (
                median_ratio(decode, [r.decode_tok_s for r in rounds]),
                median_ratio(prefill, [r.prefill_tok_s for r in rounds]),
            )
            for peer, rounds in self.peers
            if peer.fair
        }

    def body(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        return {
            "threads": self.threads,
            "candidate": self.timed.figures(),
            "read_bytes_per_token": self.read_bytes,
            "read_gb_s": self.read_gb_s,
            "bandwidth_gb_s": self.bandwidth.tolist(),
            "share_of_ceiling": self.share_of_ceiling,
            "ceiling_spread": self.spread,
            "peers": self.peer_rows(),
            "absent_peers": dict(self.absent),
        }

    def peer_rows(self) -> list[dict[str, Any]]:
        """Return one row per peer: who it is by its own log, medians, samples, and the ratios if it is fair."""
        ratios, rows = self.ratios(), []
        for peer, rounds in self.peers:
            made, read = [r.decode_tok_s for r in rounds], [r.prefill_tok_s for r in rounds]
            decode, prefill = ratios[peer.name] if peer.fair else (None, None)
            rows.append(
                {
                    "name": peer.name,
                    "build": peer.build,
                    "features": peer.features,
                    "fair": peer.fair,
                    "prompt": rounds[0].prompt,
                    "decode_tok_s": Samples.of(made).median,
                    "prefill_tok_s": Samples.of(read).median,
                    "decode_ratio": decode,
                    "prefill_ratio": prefill,
                    "samples": {"decode_tok_s": made, "prefill_tok_s": read},
                }
            )
        return rows


def open_peers(names: Sequence[str], model: Path, elements: int) -> tuple[list[RatedPeer], dict[str, str]]:
    """
    Open the peers that are here, and say of the others why not.

    Raises:
        UsageError: There is no peer of that name, or it holds another size of the model.
    """
    opened, absent = list[RatedPeer](), dict[str, str]()
    for name in names:
        try:
            opened.append(open_peer(name, model, elements))
        except Unavailable as error:
            absent[name] = error.message
    return opened, absent


def interleave(
    model: TracedForward,
    prompt: NDArray[np.int64],
    plan: Plan,
    *,
    threads: int,
    peers: Sequence[RatedPeer],
    elements: int,
    absent: Mapping[str, str] | None = None,
) -> Comparison:
    """
    Time a candidate; before each of its repeats the ceiling is read and each peer has a round.

    Args:
        model: The candidate.
        prompt: int64 [plan.prefill].
        plan: What is timed.
        threads: Of the candidate, the ceiling and the peers.
        peers: Opened ones.
        elements: Parameters, for a backend that does not say what a token reads: it holds float32.
        absent: Peers that are not here, with the reason.
    """
    read_bytes = int(getattr(model, "bytes_per_token", 4 * elements))
    ceiling = ceiling_of(read_bytes, threads)
    rounds: list[list[Rates]] = [[] for _ in peers]

    def turn() -> None:
        ceiling.sample()
        for peer, kept in zip(peers, rounds, strict=True):
            kept.append(peer.round(threads, prompt.tolist(), plan.decode))

    timed = measure(model, prompt, plan, threads=threads, between=turn)
    ceiling.sample()
    met = list(zip(peers, rounds, strict=True))
    return Comparison(timed, threads, read_bytes, np.array(ceiling.samples), met, absent or {})


def cost_of_rounding(admission: Admission, reference: TracedForward, place: Rounding) -> float:
    """
    Measure how far the reference's own logits move when its activations are rounded as a place does; nat, the largest.

    On a few prompts of drawn tokens: what an engine of that arithmetic may do, and no more.
    """
    from apr_core.model.linear import Weights
    from apr_core.model.qwen2 import Qwen2

    validated = admission.require()
    rounded = Qwen2(validated, weights=Weights(validated, place))
    most = 0.0
    for seed in range(_PROMPTS):
        ids = np.random.default_rng(seed).integers(0, reference.config.vocab_size, 16)
        most = max(most, float(np.abs(reference.forward(ids) - rounded.forward(ids)).max()))
    return most
