"""
Classes of defects that cannot be planted, each with the issue that would bring what it needs.

Two of `peers.md` C4 are no items of the zoo at all. K5, noise of 0.02 on the logits, is benign for the top token alone:
from a second forward of the same weights it is beyond float32, and F-PAR-001 is right to refute it; that none of its
flips is called decisive is tested on `parity.distribution`. And a dropped extension of the context (K7) in a file: no
side of such a pair opens, since YaRN is refused (`yarn`); a lost rope base is planted in files (`theta-*`).
"""

from __future__ import annotations

from apr_core.zoo.registry import Later

LATER = (
    Later("triton-kernel", "a fused kernel that is wrong for one type, shape or partial tile", "peers K2", 8),
    Later("flash-tile", "a head wider than the attention tile of a GPU kernel", "GH-5", 8),
    Later("qk-norm", "the norm of queries and keys is skipped: Qwen3 has one, Qwen2 has none", "peers K3", 6),
    Later("other-revision", "a reference of another revision, reported as corruption", "peers N11", 9),
)
