"""A candidate beside its peers and its ceiling: their rounds take turns, so that each meets the same machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apr_core.bench.roofline import StreamBandwidth
from apr_core.bench.throughput import Plan, Throughput, measure
from apr_core.bench.timing import Samples
from apr_core.contract.admit import Admission
from apr_core.dtypes import FORMATS
from apr_core.model.trace import TracedForward
from apr_core.peers.rates import RatedPeer, Rates, median_ratio

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
    """

    timed: Throughput
    threads: int
    read_bytes: int
    bandwidth: NDArray[np.float64]
    peers: Sequence[tuple[RatedPeer, list[Rates]]]

    @property
    def read_gb_s(self) -> float:
        """The best sample: a ceiling is what the machine can do."""
        return float(self.bandwidth.max())

    @property
    def share_of_ceiling(self) -> float:
        """Bandwidth that the median step implies, over the ceiling."""
        return self.timed.decode_tok_s * self.read_bytes / 1e9 / self.read_gb_s

    @property
    def meter(self) -> str:
        """What refutes the meter: a median above the ceiling by more than the ceiling's own spread; else empty."""
        low, high = np.quantile(self.bandwidth, [0.25, 0.75])
        spread = float((high - low) / self.read_gb_s)
        if not self.share_of_ceiling <= 1 + spread:
            return (
                f"the meter: {self.timed.decode_tok_s:.4g} tok/s are {self.share_of_ceiling:.2f} of the ceiling of "
                f"{self.read_gb_s:.3g} GB/s (spread {spread:.2f})"
            )
        return ""

    def body(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        return {
            "threads": self.threads,
            "candidate": self.timed.figures(),
            "read_bytes_per_token": self.read_bytes,
            "read_gb_s": self.read_gb_s,
            "bandwidth_gb_s": self.bandwidth.tolist(),
            "share_of_ceiling": self.share_of_ceiling,
            "meter": self.meter,
            "peers": [self._peer(peer, rounds) for peer, rounds in self.peers],
        }

    def _peer(self, peer: RatedPeer, rounds: list[Rates]) -> dict[str, Any]:
        ours = self.timed
        steps = ours.steps.seconds.reshape(ours.plan.repeats, -1)
        decode = [1 / float(np.median(row)) for row in steps]
        prefill = [ours.plan.prefill / seconds for seconds in ours.prefill.seconds.tolist()]
        made, read = [r.decode_tok_s for r in rounds], [r.prefill_tok_s for r in rounds]
        return {
            "name": peer.name,
            "build": peer.build,
            "features": peer.features,
            "fair": peer.fair,
            "prompt": rounds[0].prompt,
            "decode_tok_s": Samples.of(made).median,
            "prefill_tok_s": Samples.of(read).median,
            "decode_ratio": median_ratio(decode, made) if peer.fair else None,
            "prefill_ratio": median_ratio(prefill, read) if peer.fair else None,
            "samples": {"decode_tok_s": made, "prefill_tok_s": read},
        }


def interleave(
    model: TracedForward,
    prompt: NDArray[np.int64],
    plan: Plan,
    *,
    threads: int,
    peers: Sequence[RatedPeer],
    elements: int,
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
    """
    read_bytes = int(getattr(model, "bytes_per_token", 4 * elements))
    ceiling = StreamBandwidth(read_bytes, threads)
    rounds: list[list[Rates]] = [[] for _ in peers]

    def turn() -> None:
        ceiling.sample()
        for peer, kept in zip(peers, rounds, strict=True):
            kept.append(peer.round(threads, prompt.tolist(), plan.decode))

    timed = measure(model, prompt, plan, threads=threads, between=turn)
    ceiling.sample()
    return Comparison(timed, threads, read_bytes, np.array(ceiling.samples), list(zip(peers, rounds, strict=True)))


def rounds_activations(model: TracedForward) -> bool:
    """Say whether an engine multiplies 8-bit activations: in ``speed``, with a weight that is stored in blocks."""
    weights, mode = getattr(model, "weights", None), getattr(model, "precision", "")
    return mode == "speed" and any(not FORMATS[kind].plain for kind in weights.types.values())  # type: ignore[union-attr]


def cost_of_rounding(admission: Admission, reference: TracedForward) -> float:
    """
    Measure how far the reference's own logits move when its activations are rounded to 8 bits; nat, the largest.

    On a few prompts of drawn tokens: what an engine of that arithmetic may do, and no more.
    """
    from apr_core.model.linear import Weights
    from apr_core.model.qwen2 import Qwen2
    from apr_core.parity.floor import EightBit

    validated = admission.require()
    rounded = Qwen2(validated, weights=Weights(validated, EightBit()))
    most = 0.0
    for seed in range(_PROMPTS):
        ids = np.random.default_rng(seed).integers(0, reference.config.vocab_size, 16)
        most = max(most, float(np.abs(reference.forward(ids) - rounded.forward(ids)).max()))
    return most
