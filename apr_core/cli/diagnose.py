"""``apr diagnose``: from a failing model to the cause, by experiment."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apr_core.errors import Exit, UsageError

if TYPE_CHECKING:
    from apr_core.diagnose.cause import Diagnosis


def diagnose(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model file or folder; it need not open.")],
    reference: Annotated[
        str, typer.Option(metavar="PATH", help="The model that this one claims to be made from.")
    ] = "",
    evidence: Annotated[str, typer.Option(metavar="FILE", help="The record of the claim that failed.")] = "",
    reproduce: Annotated[
        str, typer.Option(metavar="DIR", help="A new folder for the damaged rows alone and a command that shows them.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print strict JSON.")] = False,
) -> None:
    """Find out why a model fails, by experiment. Exit 0: nothing to explain, 5: explained, 11: not explained."""
    from apr_core.cli.output import show, show_json, show_table
    from apr_core.diagnose.cause import EXPLAINED, NOTHING
    from apr_core.diagnose.explain import explain_failure

    found = explain_failure(model, reference=reference or None, evidence=evidence or None)
    if reproduce:
        _reproduce(found, model, reference, reproduce)
    if as_json:
        show_json(found.as_json())
    else:
        show(found.outcome)
        if found.provenance:
            show(f"provenance: {found.provenance}")
        for cause in found.causes:
            show(f"{cause.klass}: {cause.place} ({'proved by repair' if cause.proved else 'measured'})")
            show_table(("why", "question", "answer"), [(n, *why) for n, why in enumerate(cause.whys, 1)])
        if not found.causes:
            show_table(("why", "question", "answer"), [(n, *why) for n, why in enumerate(found.whys, 1)])
    code = {NOTHING: Exit.OK, EXPLAINED: Exit.REFUTED}.get(found.outcome, Exit.INCONCLUSIVE)
    raise typer.Exit(code)


def _reproduce(found: Diagnosis, model: str, reference: str, folder: str) -> None:
    """Write the smallest reproduction of the first cause that lies in a tensor."""
    from apr_core.cli.output import note
    from apr_core.diagnose.smallest import reproduce
    from apr_core.engines.subject import resolve_model
    from apr_core.formats.checkpoint import open_checkpoint

    causes = [cause for cause in found.causes if cause.tensors]
    if not causes or not reference:
        raise UsageError("there is no damaged tensor to cut out", advice="give a reference, or leave --reproduce out")
    with open_checkpoint(resolve_model(model)) as subject, open_checkpoint(resolve_model(reference)) as given:
        note(f"reproduction: {reproduce(causes[0], subject, given, Path(folder))}")
