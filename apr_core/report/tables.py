"""Evidence as data frames, for people who go on working with it in a notebook."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from apr_core.falsify.evidence import Evidence
from apr_core.falsify.finding import Finding
from apr_core.falsify.rounds import Round
from apr_core.report.text import limit_of

if TYPE_CHECKING:
    import pandas


def frame(source: Finding | Evidence | Iterable[Finding | Evidence]) -> pandas.DataFrame:
    """Put the rows of one or more findings or records into one frame; several get a ``claim`` column."""
    import pandas

    if isinstance(source, Finding | Evidence):
        return pandas.DataFrame([dict(row) for row in source.rows])
    return pandas.DataFrame(
        [
            {"claim": _claim_id(one), **{k: v for k, v in row.items() if k != "claim"}}
            for one in source
            for row in one.rows
        ]
    )


def claims_frame(round_: Round) -> pandas.DataFrame:
    """Put the claims of a round into a frame in their order; those without a record yet say so."""
    import pandas

    by_id = {e.id: e for e in round_.records}
    rows = []
    for claim in round_.claims:
        evidence = by_id.get(claim.id)
        rows.append(
            {
                "id": claim.id,
                "title": claim.title,
                "verdict": str(evidence.verdict) if evidence else "not recorded yet",
                "measured": evidence.measured["value"] if evidence else None,
                "limit": limit_of(claim.as_json()),
                "compared": evidence.coverage["compared"] if evidence else 0,
            }
        )
    return pandas.DataFrame(rows, columns=["id", "title", "verdict", "measured", "limit", "compared"])


def _claim_id(source: Finding | Evidence) -> str:
    return source.claim if isinstance(source, Finding) else source.id
