"""``apr check``: a self-test in eleven stages; each stage is computed twice, by two forwards that share no code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apr_core.cli.dispatch import admission_of
from apr_core.errors import AprError, Exit

if TYPE_CHECKING:
    from apr_core.contract.admit import Admission
    from apr_core.model.trace import TracedForward

TOKENS, STEPS = 12, 8
# Ten times the limit of F-PAR-001: this says whether a stage works at all; how near it is, the parity suite says.
LIMIT = 1e-4


def check(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model file or folder, or 'pygmy'.")],
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="Where to compute.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print strict JSON.")] = False,
) -> None:
    """Test a model stage by stage. From tokenizer to sampler, every layer; exit 5 when a stage fails."""
    from apr_core.cli.output import show, show_json, show_table
    from apr_core.cli.run import device_for
    from apr_core.engines.load import build, load_plain

    admission = admission_of(context)
    with admission.checkpoint as checkpoint:
        tested = build(admission, device=device_for(device))
        body = examine(admission, tested, load_plain(admission))
        body = {"model": str(checkpoint.path), "backend": tested.backend, "device": tested.device, **body}
    if as_json:
        show_json(body)
    else:
        rows = [(s["name"], s["status"], s["details"]) for s in body["stages"]]
        show_table(("stage", "status", ""), rows)
        skipped = body["skipped"]
        rest = f", {skipped} skipped" if skipped else ""
        show(f"{body['model']}: {body['passed']} of {body['total']} stages passed{rest} ({tested.backend})")
    # under the bypass nothing can be corroborated
    passed = Exit.INCONCLUSIVE if admission.bypassed else Exit.OK
    raise typer.Exit(passed if body["all_passed"] else Exit.REFUTED)


def examine(admission: Admission, model: TracedForward, plain: TracedForward) -> dict[str, Any]:
    """
    Test an admitted model.

    Args:
        admission: The admitted file.
        model: The forward that is tested.
        plain: The forward that it is held against.

    Returns:
        stages (name, status PASS, FAIL or SKIP, details, measured, limit), passed, skipped, total, all_passed,
        bypassed.
    """
    stages = list(_stages(admission, model, plain))
    count = {status: sum(s["status"] == status for s in stages) for status in ("PASS", "FAIL", "SKIP")}
    return {
        "stages": stages,
        "passed": count["PASS"],
        "skipped": count["SKIP"],
        "total": len(stages),
        "all_passed": count["FAIL"] == 0 and count["PASS"] > 0,
        "bypassed": admission.bypassed,
    }


def _stages(admission: Admission, model: TracedForward, plain: TracedForward) -> Iterator[dict[str, Any]]:
    found, of = len(admission.violations), admission.expected
    yield _stage("Contract", found, 0, f"{admission.measured} of {of} tensors measured, {found} violations")
    yield _tokenizer(model)
    ids = _ids(model)
    names: dict[str, Callable[[], tuple[float, str]]] = {
        "Embedding": lambda: _embedding(admission, model, ids),
        "Positional Encoding": lambda: _positions(model, int(ids[0])),
        **{stage: _compared(ops, model, plain, ids) for stage, ops in _TRACED.items()},
        "Logits -> Probs": lambda: _probabilities(model, plain, ids),
        "Sampler/Decode": lambda: _decode(model, ids),
    }
    for name, measure in names.items():
        try:
            value, details = measure()
        except AprError as error:
            yield {"name": name, "status": "FAIL", "details": str(error), "measured": None, "limit": LIMIT}
        else:
            yield _stage(name, value, LIMIT, details)


def _stage(name: str, value: float, limit: float, details: str) -> dict[str, Any]:
    """Judge one stage; a value that is not a number fails."""
    status = "PASS" if value <= limit else "FAIL"
    return {"name": name, "status": status, "details": details, "measured": value, "limit": limit}


def _tokenizer(model: TracedForward) -> dict[str, Any]:
    from apr_core.engines.subject import STIMULUS

    if model.tokenizer is None:
        return {"name": "Tokenizer", "status": "SKIP", "details": "no tokenizer", "measured": None, "limit": 0}
    ids = model.tokenizer.encode(STIMULUS)
    same = model.tokenizer.decode(ids) == STIMULUS
    beyond = sum(i >= model.config.vocab_size for i in ids)
    said = f"{len(ids)} tokens of {len(STIMULUS)} characters come back {'unchanged' if same else 'changed'}"
    return _stage("Tokenizer", beyond + (not same), 0, said)


def _ids(model: TracedForward) -> Any:
    import numpy as np

    return np.random.default_rng(0).integers(0, model.config.vocab_size, TOKENS)


def _trace(model: TracedForward, ids: Any) -> Mapping[str, Any]:
    from apr_core.model.trace import Trace

    recorded = Trace()
    model.forward(ids, trace=recorded)
    return recorded


def _distance(reference: Any, candidate: Any) -> float:
    """Return the largest rel_l2 over the rows; NaN stays NaN."""
    import numpy as np

    r, c = np.asarray(reference, np.float64), np.asarray(candidate, np.float64)
    with np.errstate(all="ignore"):
        return float(np.max(np.linalg.norm(c - r, axis=1) / np.linalg.norm(r, axis=1)))


def _embedding(admission: Admission, model: TracedForward, ids: Any) -> tuple[float, str]:
    """What enters the first layer (the residual behind attention less its output) are the decoded rows."""
    import numpy as np

    from apr_core.contract.layout import EMBEDDING
    from apr_core.formats.codecs import decode_rows

    raw = admission.checkpoint.raw(EMBEDDING)
    rows = np.concatenate([decode_rows(raw, int(i), int(i) + 1) for i in ids])
    seen = _trace(model, ids)
    value = _distance(rows, seen["layers.0.resid_attn"] - seen["layers.0.attn_output"])
    return value, f"{len(ids)} rows as stored, rel_l2 {value:.1e}"


def _positions(model: TracedForward, token: int) -> tuple[float, str]:
    """One token at five positions: the first query turned by the angles of the configuration gives the others."""
    import numpy as np

    count, heads = 5, model.config.num_attention_heads
    queries = _trace(model, np.full(count, token, np.int64))["layers.0.q"].astype(np.float64).reshape(count, heads, -1)
    half = queries.shape[2] // 2
    speed = model.config.rope_theta ** (-np.arange(half) / half)
    angle = np.arange(count)[:, None, None] * speed
    left, right = queries[0, :, :half], queries[0, :, half:]
    turned = np.concatenate(
        (left * np.cos(angle) - right * np.sin(angle), right * np.cos(angle) + left * np.sin(angle)), axis=2
    )
    value = _distance(turned.reshape(count, -1), queries.reshape(count, -1))
    return value, f"positions 0 to {count - 1} turn by theta {model.config.rope_theta:g}, rel_l2 {value:.1e}"


_TRACED = {
    "Q/K/V Projection": ("q", "k", "v"),
    "Attention Scores": ("attn_output", "resid_attn"),
    "Feed-Forward (MLP)": ("resid_ffn",),
    "Layer Norm": ("final_hidden",),
    "LM Head": ("logits",),
}


def _compared(
    ops: tuple[str, ...], model: TracedForward, plain: TracedForward, ids: Any
) -> Callable[[], tuple[float, str]]:
    """Hold the named operations of every layer against those of the other forward."""

    def measure() -> tuple[float, str]:
        from apr_core.model.trace import mandatory_names

        wanted = [n for n in mandatory_names(model.config.num_hidden_layers) if n.rsplit(".", 1)[-1] in ops]
        reference, candidate = _trace(plain, ids), _trace(model, ids)
        found = {name: _distance(reference[name], candidate[name]) for name in wanted}
        # the largest, and one that is not a number before any
        worst = max(found, key=lambda name: (found[name] != found[name], found[name]))
        return found[worst], f"{len(wanted)} activations, worst {worst}, rel_l2 {found[worst]:.1e}"

    return measure


def _probabilities(model: TracedForward, plain: TracedForward, ids: Any) -> tuple[float, str]:
    import numpy as np

    sides = []
    for forward in (plain, model):
        scores = forward.forward(ids).astype(np.float64)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        sides.append(weights / weights.sum(axis=1, keepdims=True))
    value = float(np.max(np.abs(sides[0] - sides[1])))
    return value, f"{sides[0].shape[1]} probabilities at {len(ids)} positions, largest difference {value:.1e}"


def _decode(model: TracedForward, ids: Any) -> tuple[float, str]:
    """Decode greedily through the cache, twice; the logits must be those of one forward over all tokens."""
    import numpy as np

    runs = []
    for _ in range(2):
        cache, tokens = model.new_cache(), list(map(int, ids))
        rows = [model.forward(ids, cache)[-1]]
        for _ in range(STEPS):
            tokens.append(int(rows[-1].argmax()))
            rows.append(model.forward(np.array([tokens[-1]], np.int64), cache)[-1])
        runs.append((tokens, np.stack(rows)))
    whole = model.forward(np.array(runs[0][0], np.int64))[len(ids) - 1 :]
    value = _distance(whole, runs[0][1])
    if runs[0][0] != runs[1][0]:
        return float("nan"), "two greedy runs gave different tokens"
    return value, f"{STEPS} cached steps, twice the same tokens, rel_l2 to one forward {value:.1e}"
