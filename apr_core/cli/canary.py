"""``apr canary``: what a model answers today, kept in a small file, and compared with what it answers later."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apr_core.errors import Exit, FormatError, UsageError

if TYPE_CHECKING:
    from apr_core.contract.admit import Admission

app = typer.Typer(help="Record what a model answers, and see later whether it still does.", rich_markup_mode=None)

SCHEMA = 1
PROMPT = "What is 2+2?"
# Distance of activations: a hundred times what two right forwards of the same weights differ by (F-PAR-001), so that
# another machine or engine passes.
LIMIT = 1e-3
_STATS = ("minimum", "maximum", "mean", "std", "l2", "zeros", "nans", "infs")

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model file or folder, or 'pygmy'.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print strict JSON.")]


@app.command()
def create(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="A new file.", show_default=False)],
    prompt: Annotated[str, typer.Option("-p", "--prompt", metavar="TEXT", help="What to ask.")] = PROMPT,
    max_tokens: Annotated[int, typer.Option("-n", "--max-tokens", min=1, help="Tokens of the answer at most.")] = 32,
) -> None:
    """Record answer, activations and tensors of a model; a refused one is recorded nowhere (exit 5)."""
    from apr_core.cli.output import plain, show
    from apr_core.formats.sink import replacing

    if out.exists():
        raise UsageError(f"{out} exists", advice="name a new file: nothing is overwritten")
    body = record(model, prompt, max_tokens)
    with replacing(out) as sink:
        sink.write(json.dumps(plain(body), allow_nan=False).encode())
    show(f"{out}: {len(body['tensors'])} tensors, {len(body['activations'])} activations, answer {body['answer']!r}")


@app.command()
def check(
    model: Model,
    canary: Annotated[Path, typer.Option("--canary", "-c", metavar="FILE", help="What `create` wrote.")],
    as_json: AsJson = False,
) -> None:
    """Ask again and compare: other tokens, moved activations or changed tensors are exit 5, in a refused model too."""
    from apr_core.cli.output import show, show_json, show_table

    body = compare(model, canary)
    if as_json:
        show_json(body)
    else:
        if body["changes"]:
            rows = [(c["part"], c["name"], c["was"], c["is"]) for c in body["changes"][:20]]
            show_table(("part", "", "was", "is"), rows)
        more = len(body["changes"]) - 20
        show(f"{body['model']}: {len(body['changes'])} changes" + (f" ({more} not shown)" if more > 0 else ""))
        show(body["summary"])
    raise typer.Exit(Exit.REFUTED if body["changes"] else Exit.OK)


def record(model: str, prompt: str, max_tokens: int) -> dict[str, Any]:
    """
    Run a model on a prompt and describe what it did.

    Returns:
        schema, model, sha256, prompt, max_tokens, mode (chat, text or ids), prompt_ids, template_sha256, ids, answer,
        activations (name -> rms, digest and sketch at the last position of the prompt), tensors (name -> shape, type,
        digest and statistics).

    Raises:
        ContractViolation: A gate refuses it.
        AprError: It cannot be opened or run.
    """
    from apr_core.contract.admit import admit
    from apr_core.engines.subject import resolve_model

    admission = admit(resolve_model(model))
    admission.require()
    with admission.checkpoint as checkpoint:
        ran = _run(admission, prompt, max_tokens, None)
        tensors = {name: _tensor(admission, name) for name in admission.stats}
        return {
            "schema": SCHEMA,
            "model": checkpoint.path.name,
            "sha256": checkpoint.content_hash,
            "prompt": prompt,
            "max_tokens": max_tokens,
            **ran,
            "tensors": tensors,
        }


def _tensor(admission: Admission, name: str) -> dict[str, Any]:
    info, stats = admission.checkpoint.tensors[name], admission.stats[name]
    numbers = {key: getattr(stats, key) for key in _STATS}
    return {"shape": list(info.shape), "dtype": str(info.dtype), "digest": stats.digest, **numbers}


def _run(admission: Admission, prompt: str, max_tokens: int, ids: list[int] | None) -> dict[str, Any]:
    """Answer the prompt greedily and fingerprint the forward at its last position."""
    from apr_core.engines.load import build
    from apr_core.model.generate import generate, trace
    from apr_core.model.tokens import prepare_tokens
    from apr_core.model.trace import Fingerprints

    model = build(admission)
    tokenizer = model.tokenizer
    if tokenizer is None:
        made = ids if ids is not None else [k * 31 % model.config.vocab_size for k in range(1, 17)]
        mode, prepared = "ids", prepare_tokens(model, ids=made)
    elif tokenizer.chat_template is None:
        mode, prepared = "text", prepare_tokens(model, text=prompt)
    else:
        mode, prepared = "chat", prepare_tokens(model, messages=[{"role": "user", "content": prompt}])
    traced = trace(model, prepared, positions=[prepared.ids.size - 1])
    assert isinstance(traced, Fingerprints)
    generation = generate(model, prepared, max_new_tokens=max_tokens)
    answer = list(generation)
    return {
        "mode": mode,
        "prompt_ids": prepared.ids.tolist(),
        "template_sha256": tokenizer.template_hash if tokenizer else None,
        "ids": answer,
        "answer": generation.text if tokenizer else None,
        "activations": {
            name: {
                "rms": rows[0].rms,
                "nonfinite": rows[0].nonfinite,
                "digest": rows[0].digest,
                "sketch": traced[name][0].tolist(),
            }
            for name, rows in traced.rows.items()
        },
    }


def compare(model: str, canary: Path) -> dict[str, Any]:
    """
    Hold a model against a canary file.

    Returns:
        model, changes (part, name, was, is), compared (tensors, activations, tokens), same_bits, summary.

    Raises:
        AprError: The model or the canary cannot be opened.
    """
    from apr_core.contract.admit import admit
    from apr_core.engines.subject import resolve_model

    was = read(canary)
    admission = admit(resolve_model(model))
    with admission.checkpoint as checkpoint:
        changes = list(_tensor_changes(admission, was["tensors"]))
        compared = {"tensors": len(was["tensors"]), "activations": 0, "tokens": 0}
        same = checkpoint.content_hash == was["sha256"]
        if admission.ok:
            now = _run(admission, was["prompt"], was["max_tokens"], was["prompt_ids"])
            changes += _answer_changes(was, now)
            compared |= {"activations": len(was["activations"]), "tokens": len(was["ids"])}
            digests = {name: row["digest"] for name, row in now["activations"].items()}
            equal = sum(digests.get(name) == row["digest"] for name, row in was["activations"].items())
            said = f"{equal} of {len(was['activations'])} activations have the same bits"
        else:
            changes.append(_change("contract", "refused", "admitted", admission.refusal))
            said = "not asked: refused by the contract"
        return {
            "model": str(checkpoint.path),
            "changes": changes,
            "compared": compared,
            "same_bits": same,
            "summary": f"{'the same file' if same else 'another file'}; {compared['tensors']} tensors compared; {said}",
        }


def _change(part: str, name: str, was: object, now: object) -> dict[str, Any]:
    return {"part": part, "name": name, "was": was, "is": now}


def _tensor_changes(admission: Admission, was: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Name tensors that came, went, or changed; statistics are told because they say how."""
    for name in sorted(was.keys() | admission.stats.keys()):
        if name not in was or name not in admission.stats:
            there = ["absent" if name not in side else "present" for side in (was, admission.stats)]
            yield _change("tensor", name, *there)
            continue
        old, new = was[name], _tensor(admission, name)
        for key in ("shape", "dtype"):
            if old[key] != new[key]:
                yield _change("tensor", f"{name} {key}", old[key], new[key])
        if old["digest"] != new["digest"]:
            words = [f"mean {s['mean']}, deviation {s['std']}, {s['nans']} NaN" for s in (old, new)]
            yield _change("tensor", f"{name} values", *words)


def _answer_changes(was: dict[str, Any], now: dict[str, Any]) -> Iterator[dict[str, Any]]:
    import numpy as np

    for key in ("mode", "template_sha256", "prompt_ids", "ids"):
        if was[key] != now[key]:
            shown = "answer" if key == "ids" and was["answer"] is not None else key
            yield _change("answer", "tokens" if key == "ids" else key, was[shown], now[shown])
    for name in sorted(was["activations"].keys() | now["activations"].keys()):
        old, new = was["activations"].get(name), now["activations"].get(name)
        if old is None or new is None or len(old["sketch"]) != len(new["sketch"]):
            yield _change("activation", name, "present" if old else "absent", "present" if new else "absent")
            continue
        a, b = (np.array(side["sketch"], np.float64) for side in (old, new))
        distance = float(np.linalg.norm(a - b) / max(float(np.linalg.norm(a)), 1e-30))
        if not (distance <= LIMIT and new["nonfinite"] == old["nonfinite"]):
            yield _change("activation", name, f"rms {old['rms']:.6g}", f"rms {new['rms']:.6g}, rel_l2 {distance:.2g}")


def read(path: Path) -> dict[str, Any]:
    """
    Read a canary file.

    Raises:
        AprError: It is not there, or not what `create` writes.
    """
    from apr_core.formats.checkpoint import map_file
    from apr_core.formats.strict_json import parse_object

    body = parse_object(bytes(map_file(path).view), file=path, what="canary", at=0)
    needed = {"sha256", "prompt", "max_tokens", "mode", "template_sha256", "prompt_ids", "ids", "answer", "activations"}
    missing = sorted((needed | {"tensors"}) - body.keys())
    if body.get("schema") != SCHEMA or missing or not body["tensors"] or not body["activations"]:
        raise FormatError(
            expected=f"a canary of schema {SCHEMA}",
            found=f"schema {body.get('schema')!r}, without {', '.join(missing) or 'content'}",
            file=path,
            advice="make it again with `apr canary create`",
        )
    return body
