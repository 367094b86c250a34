"""Classes of defects that cannot be planted yet, each with the issue that brings what it needs."""

from __future__ import annotations

from apr_core.zoo.registry import Later

LATER = (
    Later("triton-kernel", "a fused kernel that is wrong for one type, shape or partial tile", "peers K2", 8),
    Later("flash-tile", "a head wider than the attention tile of a GPU kernel", "GH-5", 8),
    Later("other-revision", "a reference of another revision, reported as corruption", "peers N11", 9),
)
