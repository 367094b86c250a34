"""``apr convert``, ``import``, ``export``, ``diff``, ``rosetta``: the same model in another format, and the proof."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apr_core.cli.dispatch import admission_of
from apr_core.errors import Exit, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from apr_core.formats.checkpoint import Checkpoint
    from apr_core.rosetta.trip import Comparison, Trip

app = typer.Typer(help="Convert between SafeTensors, GGUF and APR, and prove what it kept.", rich_markup_mode=None)

Source = Annotated[str, typer.Argument(metavar="SRC", help="A model file or folder, or 'pygmy'.", show_default=False)]
Target = Annotated[
    str, typer.Argument(metavar="DST", help="A .gguf, .apr or .safetensors file, or a folder.", show_default=False)
]
Output = Annotated[str, typer.Option("-o", "--output", metavar="DST", help="Where to write; the name says the format.")]
First = Annotated[str, typer.Argument(metavar="A", help="The reference.", show_default=False)]
Second = Annotated[str, typer.Argument(metavar="B", help="What claims to say the same.", show_default=False)]
Quantize = Annotated[
    str, typer.Option(metavar="TYPE|keep", help="What the weights are to be: F16, Q8_0, Q4_K_M, ...; keep keeps all.")
]
Force = Annotated[bool, typer.Option("-f", "--force", help="Replace the target when it exists.")]
Bare = Annotated[bool, typer.Option("--no-tokenizer", help="Copy a model that has no tokenizer.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print strict JSON.")]
Pattern = Annotated[str, typer.Option("--filter", metavar="TEXT", help="Only tensors whose name holds this.")]
KEEP = "keep"


def register(root: typer.Typer) -> None:
    """Put the commands of this module into the application."""
    root.command("convert")(convert)
    root.command("import")(import_)
    root.command("export")(export)
    root.command("diff")(diff)
    root.add_typer(app, name="rosetta")


@app.command("convert")
def convert(
    context: typer.Context,
    source: Source,
    target: Target,
    quantize: Quantize = "",
    force: Force = False,
    bare: Bare = False,
    as_json: AsJson = False,
) -> None:
    """Write a model in the format that the target's name says; SafeTensors to GGUF is Q4_K_M unless told otherwise."""
    _write(context, target, quantize, force=force, bare=bare, as_json=as_json)


def _towards(doc: str, holds: Callable[[str], bool], wrong: str, advice: str) -> Callable[..., None]:
    """Make a command that writes to ``--output``, in the containers that ``holds`` allows."""

    def command(
        context: typer.Context,
        source: Source,
        output: Output,
        quantize: Quantize = "",
        force: Force = False,
        bare: Bare = False,
        as_json: AsJson = False,
    ) -> None:
        from apr_core.rosetta.convert import container_of

        if not holds(container_of(output)):
            raise UsageError(f"{wrong}, found {output}", advice=advice)
        _write(context, output, quantize, force=force, bare=bare, as_json=as_json)

    command.__doc__ = doc
    return command


import_ = _towards(
    "Write a local SafeTensors or GGUF model as APR.",
    lambda container: container == "apr",
    "import writes APR",
    "name it .apr, or use `apr convert`",
)
export = _towards(
    "Write a model as GGUF or SafeTensors, whichever the output's name says.",
    lambda container: container != "apr",
    "export writes GGUF and SafeTensors",
    "use `apr import` for APR",
)


def _write(context: typer.Context, target: str, quantize: str, *, force: bool, bare: bool, as_json: bool) -> None:
    """Convert the admitted source and say what was done."""
    from apr_core.cli.output import note, show, show_json
    from apr_core.cli.progress import progress
    from apr_core.report.text import nbytes
    from apr_core.rosetta import convert as room

    checkpoint = admission_of(context, "source").checkpoint
    asked = _asked(quantize)
    container = room.container_of(target)
    chosen = not quantize and container == "gguf" and checkpoint.format == "safetensors"
    if chosen:
        asked = room.GGUF_DEFAULT
        note(f"quantising to {asked}, the default from SafeTensors to GGUF; --quantize keep keeps every type")
    intent = room.plan(checkpoint, target, quantize=asked)
    if (
        asked
        and any(info.dtype.block_elements > 1 for info in checkpoint.tensors.values())
        and asked not in room.FLOATS
    ):
        note("the source is quantised already: the errors of both add up")
    with progress(f"writing {container}", intent.nbytes) as step:
        path = room.convert(checkpoint, target, quantize=asked, force=force, bare=bare, progress=step)
    body = {
        "source": str(checkpoint.path),
        "target": str(path),
        "format": container,
        "quantize": asked or KEEP,
        "default": chosen,
        "bypassed": bool(context.obj.get("skip_contract")),
        "tensors": len(intent.types),
        "passed_byte_for_byte": intent.passed,
        "types": intent.histogram,
        "weight_bytes": intent.nbytes,
    }
    if as_json:
        show_json(body)
        return
    types = ", ".join(f"{count} {pair}" for pair, count in intent.histogram.items())
    show(f"{path}: {container}, {nbytes(intent.nbytes)} of weights, {len(intent.types)} tensors ({types})")


def _asked(quantize: str) -> str | None:
    """Read a type as people write it: any case; ``keep`` and nothing mean that types stay."""
    from apr_core.rosetta.convert import CHOICES

    if quantize.lower() in ("", KEEP):
        return None
    known = {name.lower(): name for names in CHOICES.values() for name in names}
    found = known.get(quantize.lower())
    if found is None:
        raise UsageError(f"expected --quantize {KEEP} or one of {', '.join(known.values())}, found {quantize!r:.40}")
    return found


def diff(
    first: First,
    second: Second,
    pattern: Pattern = "",
    limit: Annotated[int, typer.Option(min=1, help="Rows to show at most.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Compare two models as wholes: tensors, configuration, tokenizer, template; exit 5 when something differs."""
    with _opened(first) as reference, _opened(second) as subject:
        found = _compared(subject, reference, pattern=pattern, identity=True)
    raise typer.Exit(_show_comparison(found, first, second, limit, as_json=as_json))


@app.command("diff-tensors")
def diff_tensors(
    first: First,
    second: Second,
    pattern: Pattern = "",
    limit: Annotated[int, typer.Option(min=1, help="Rows to show at most.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Hold every tensor of B against A's within what B's types can say; exit 5 when one differs or is missing."""
    with _opened(first) as reference, _opened(second) as subject:
        found = _compared(subject, reference, pattern=pattern, identity=False)
    raise typer.Exit(_show_comparison(found, first, second, limit, as_json=as_json))


@app.command()
def verify(
    context: typer.Context,
    source: Source,
    against: Annotated[
        str | None, typer.Option(metavar="REF", help="A model that it should equal.", show_default=False)
    ] = None,
    intermediate: Annotated[str, typer.Option(metavar="FORMAT", help="Through which format to go and come back.")] = "",
    bare: Bare = False,
    as_json: AsJson = False,
) -> None:
    """Send a model to another format and back, or hold it against a reference; exit 0 or 5 by the verdict."""
    from apr_core.rosetta.trip import round_trip

    checkpoint = admission_of(context, "source").checkpoint
    if against is not None and intermediate:
        raise UsageError("--against and --intermediate are two different questions", advice="ask one at a time")
    if against is not None:
        found = _compared(checkpoint, admission_of(context, "against").checkpoint, pattern="", identity=True)
        raise typer.Exit(_show_comparison(found, against, source, 10, as_json=as_json))
    trip = round_trip(checkpoint, intermediate or None, bare=bare, progress=_teller())
    raise typer.Exit(_show_trip(trip, as_json=as_json))


@app.command()
def chain(
    context: typer.Context,
    source: Source,
    formats: Annotated[list[str], typer.Argument(metavar="FORMAT...", help="gguf, apr, safetensors, in order.")],
    quantize: Quantize = "",
    work_dir: Annotated[str, typer.Option(metavar="DIR", help="Keep the copies here.")] = "",
    bare: Bare = False,
    as_json: AsJson = False,
) -> None:
    """Convert from format to format and hold the end against the start; exit 0 or 5 by the verdict."""
    from apr_core.rosetta.trip import chain as travel

    trip = travel(
        admission_of(context, "source").checkpoint,
        formats,
        quantize=_asked(quantize),
        folder=Path(work_dir) if work_dir else None,
        bare=bare,
        progress=_teller(),
    )
    raise typer.Exit(_show_trip(trip, as_json=as_json))


@app.command("inspect")
def inspect(
    source: Source,
    reference: Annotated[str, typer.Option(metavar="REF", help="Measure each tensor's distance to it.")] = "",
    as_json: AsJson = False,
) -> None:
    """Say what the format is and what the tensors are stored in, against what the label says: the quant passport."""
    from apr_core.cli.output import show, show_json, show_table
    from apr_core.rosetta.passport import passport

    with _opened(source) as checkpoint:
        if reference:
            with _opened(reference) as other:
                found = passport(checkpoint, other)
        else:
            found = passport(checkpoint)
        body = {"path": str(checkpoint.path), "format": checkpoint.format, **found.as_json()}
    if as_json:
        show_json(body)
        return
    show(f"{body['path']}: {body['format']}")
    for sentence in found.sentences():
        show(sentence)
    show_passport(body)
    worst = sorted(found.distances.items(), key=lambda item: item[1].sqnr_db)[:10]
    rows = [(n, f"{d.sqnr_db:.2f}", f"{d.cosine:.6f}", f"{100 * d.blocks:.1f} %") for n, d in worst]
    if rows:
        show_table(("tensor", "SQNR dB", "cosine", "equal runs of 32"), rows)


def show_passport(body: Mapping[str, Any]) -> None:
    """Print the histogram of types of a passport."""
    from apr_core.cli.output import show_table

    rows = [
        (name, row["tensors"], f"{row['parameters']:,}", f"{100 * row['share']:.1f} %", row["decoder"])
        for name, row in body["types"].items()
    ]
    show_table(("type", "tensors", "parameters", "share", "decoder"), rows)


@app.command("fingerprint")
def fingerprint_(
    source: Source,
    other: Annotated[
        str | None, typer.Argument(metavar="[OTHER]", help="A second model to hold against it.", show_default=False)
    ] = None,
    output: Annotated[str, typer.Option("-o", "--output", metavar="FILE", help="Write the document here.")] = "",
    as_json: AsJson = False,
) -> None:
    """Print the fingerprint of the values, whatever they are stored in; with OTHER, exit 5 when they differ."""
    from apr_core.cli.output import show, show_json, show_table

    found = _prints(source)
    body = found.as_json()
    if output:
        _save(output, body)
    rows = [(row.digest, row.dtype, str(list(row.shape)), row.name) for row in found.tensors.values()]
    if other is None:
        if as_json:
            show_json(body)
        else:
            show_table(("fingerprint", "type", "shape", "tensor"), rows)
            show(f"{found.digest}  {source}")
        return
    second = _prints(other)
    names = dict.fromkeys([*found.tensors, *second.tensors])
    unlike = [
        name
        for name in names
        if getattr(found.tensors.get(name), "digest", "") != getattr(second.tensors.get(name), "digest", "")
    ]
    same = found.digest == second.digest
    if as_json:
        show_json({"first": found.digest, "second": second.digest, "same": same, "differing": [] if same else unlike})
    else:
        show(f"{found.digest}  {source}\n{second.digest}  {other}")
        for name in [] if same else unlike[:10]:
            show(f"differs: {name}")
    raise typer.Exit(Exit.OK if same else Exit.REFUTED)


@app.command("validate-stats")
def validate_stats(
    source: Source,
    reference: Annotated[str, typer.Option(metavar="REF", help="A model to compare with.")] = "",
    fingerprints: Annotated[str, typer.Option(metavar="FILE", help="A document of `rosetta fingerprint -o`.")] = "",
    threshold: Annotated[float, typer.Option(min=0.0, help="Reference deviations that a mean may move.")] = 3.0,
    as_json: AsJson = False,
) -> None:
    """Compare statistics with a reference's, tensor by tensor: plausibility, never identity; exit 5 for an anomaly."""
    from dataclasses import asdict

    from apr_core.cli.output import show, show_json
    from apr_core.rosetta.fingerprint import judge_statistics

    if bool(reference) == bool(fingerprints):
        raise UsageError("expected either --reference or --fingerprints", advice="give one of them")
    other = _prints(reference) if reference else _read_prints(fingerprints)
    mine = _prints(source)
    found = judge_statistics(mine, other, threshold=threshold)
    if as_json:
        rows = [asdict(anomaly) for anomaly in found]
        show_json({"tensors": len(mine.tensors), "anomalies": rows, "same_fingerprint": mine.digest == other.digest})
    else:
        for anomaly in found:
            sigma = f" ({anomaly.deviation:.2f} deviations)" if anomaly.deviation is not None else ""
            show(f"{anomaly.tensor}: {anomaly.what}{sigma}")
        same = "the fingerprints are equal" if mine.digest == other.digest else "plausible is not identical"
        show(f"{len(found)} anomalies in {len(mine.tensors)} tensors; {same}")
    raise typer.Exit(Exit.REFUTED if found else Exit.OK)


def _opened(model: str) -> Checkpoint:
    """Open without judging: diagnostics work on corrupt files."""
    from apr_core.engines.subject import resolve_model
    from apr_core.formats.checkpoint import open_checkpoint

    return open_checkpoint(resolve_model(model))


def _prints(model: str) -> Any:
    from apr_core.cli.progress import progress
    from apr_core.rosetta.fingerprint import fingerprint

    with _opened(model) as checkpoint:
        total = sum(info.nbytes for info in checkpoint.tensors.values())
        with progress("reading", total) as step:
            return fingerprint(checkpoint, progress=step)


def _read_prints(path: str) -> Any:
    import json

    from apr_core.errors import FormatError, NotFound
    from apr_core.rosetta.fingerprint import read_prints

    file = Path(path)
    if not file.is_file():
        raise NotFound(f"no such file: {path}", advice="make it with `apr rosetta fingerprint MODEL -o FILE`")
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(expected="JSON", found=f"{error!s:.80}", file=path, advice="make it again") from error
    return read_prints(document, path)


def _save(path: str, body: Mapping[str, Any]) -> None:
    """Write a document whole or not at all; an older one of the same name is replaced."""
    import json

    from apr_core.cli.output import plain
    from apr_core.formats.sink import replacing

    with replacing(Path(path)) as sink:
        sink.write(json.dumps(plain(body), indent=1, allow_nan=False).encode("utf-8"))


def _compared(subject: Checkpoint, reference: Checkpoint, *, pattern: str, identity: bool) -> Comparison:
    """Compare; the finer of the two is the reference, since nothing finer can be held against a quantised file."""
    from apr_core.cli.output import note
    from apr_core.rosetta.trip import compare

    if _bits(reference) < _bits(subject):
        note(f"{reference.path} is the coarser of the two, so it is held against {subject.path}")
        subject, reference = reference, subject
    return compare(subject, reference, identity=identity, pattern=pattern)


def _bits(checkpoint: Checkpoint) -> float:
    from math import prod

    count = sum(prod(info.shape) for info in checkpoint.tensors.values())
    return sum(info.nbytes for info in checkpoint.tensors.values()) / count if count else 0.0


def _show_comparison(found: Comparison, first: str, second: str, limit: int, *, as_json: bool) -> int:
    from apr_core.cli.output import show, show_json, show_table

    if as_json:
        show_json({"reference": first, "subject": second, **found.as_json()})
        return _code(found)
    unlike = [row for row in found.tensors.rows if row.mismatched]
    for row in unlike[:limit]:
        show(row.sentence())
    if len(unlike) > limit:
        show(f"... and {len(unlike) - limit} more")
    if found.identity is not None:
        for field in found.identity.differences:
            show(
                f"{field.name}: {field.subject}, expected {field.reference}" + (f"; {field.note}" if field.note else "")
            )
    far = [(row.name, row.distance) for row in found.tensors.rows if row.distance is not None]
    worst = sorted(far, key=lambda item: item[1].sqnr_db)[:limit]
    if worst:
        rows = [(n, f"{d.sqnr_db:.2f}", f"{d.cosine:.6f}", f"{100 * d.blocks:.1f} %") for n, d in worst]
        show_table(("tensor", "SQNR dB", "cosine", "blocks that hold"), rows)
    show(f"{found.verdict.value}: {_summary(found)}")
    return _code(found)


def _summary(found: Comparison) -> str:
    tensors = found.tensors
    return found.reason or (
        f"{len(tensors.rows)} tensors, {tensors.compared:,} values compared"
        + (f", {len(found.identity.fields)} fields" if found.identity else "")
    )


def _show_trip(trip: Trip, *, as_json: bool) -> int:
    from apr_core.cli.output import show, show_json, show_table

    if as_json:
        show_json(trip.as_json())
    else:
        rows = [(s.format, s.fingerprint, f"{s.nbytes:,}") for s in trip.steps]
        show_table(("format", "fingerprint", "bytes"), rows)
        show(f"{trip.verdict.value}: {trip.reason or _summary(trip.comparison)}")
    return _code(trip)


def _code(found: Comparison | Trip) -> int:
    from apr_core.falsify.verdict import Verdict

    if found.verdict is Verdict.CORROBORATED:
        return Exit.OK
    return Exit.REFUTED if found.verdict is Verdict.FALSIFIED else Exit.INCONCLUSIVE


def _teller() -> Any:
    """Show each conversion of a trip as its own bar, or its own lines."""
    from contextlib import ExitStack

    from apr_core.cli.progress import progress

    stack = ExitStack()
    now: dict[str, Any] = {"label": "", "step": None}

    def tell(label: str, done: int, total: int) -> None:
        if label != now["label"]:
            stack.close()
            now["label"], now["step"] = label, stack.enter_context(progress(label, total))
        step: Any = now["step"]
        step(done, total)
        if done >= total:
            stack.close()
            now["label"] = ""

    return tell
