"""``apr run``: one answer. The generated text goes to stdout, what was done to get it to stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from apr_core.cli.output import WHOLE, note
from apr_core.errors import UsageError
from apr_core.report.text import clean, seconds

if TYPE_CHECKING:
    from apr_core.contract.admit import Admission
    from apr_core.model.generate import Generation
    from apr_core.model.tokens import PreparedTokens, Tokenizer
    from apr_core.model.trace import TracedForward

_UNFINISHED = "\ufffd"  # what the bytes of half a character decode to


def answer(
    admission: Admission,
    prompt: str,
    *,
    system: str | None,
    raw: bool,
    sampling: Mapping[str, Any],
    device: str,
    stream: bool,
    precision: str = "auto",
    budget_mb: int | None = None,
) -> None:
    """
    Answer one prompt.

    Args:
        admission: The model, as the gate admitted it.
        prompt: What the user says.
        system: A system message; None for the template's own.
        raw: Give the text as it is.
        sampling: As `generate` takes it.
        device: ``auto``, ``cpu`` or ``cuda``.
        stream: Print tokens as they come.
        precision: ``auto`` for the fastest engine there is, or one of `PRECISIONS`.
        budget_mb: Memory for the model; None for what is free. Decides whether layers are streamed.

    Raises:
        AprError: As the steps raise it: usage 2, no tokenizer 6, inference 8, no such device 9.
    """
    from apr_core.model.generate import generate
    from apr_core.model.tokens import load_tokenizer

    with admission.checkpoint as checkpoint:
        # Before the weights are decoded: a missing tokenizer or a refused prompt shows at once.
        prepared = _prepare(load_tokenizer(checkpoint), prompt, system, raw=raw)
        if str(checkpoint.metadata.get("apr.untrained", "")).lower() == "true":
            note("an untrained model of `apr synth`: its text has no meaning")
        where = device_for(device)
        chosen = "reference" if budget_mb and precision == "auto" else precision_for(precision, where)
        loaded, why = _load(admission, where, chosen, budget_mb)
        note(f"{checkpoint.path.name}: {checkpoint.format}, {loaded.backend} on {loaded.device}{why}")
        started = time.monotonic()
        generation = generate(loaded, prepared, **sampling)
        first = print_answer(generation, stream=stream)
        _account(generation, prepared, started, first)
        if sampling["temperature"]:
            note(f"sampled with --seed {generation.seed}")


def _load(admission: Admission, device: str, precision: str, budget_mb: int | None) -> tuple[TracedForward, str]:
    """Build the engine; the reference in the mode that there is memory for, with the reason of the choice."""
    from apr_core.engines.load import build, engine_for, tokenizer_of
    from apr_core.engines.streaming import MB, fit

    if precision != "reference":
        if budget_mb:
            raise UsageError("--budget-mb streams the layers of the reference", advice="add --precision reference")
        return build(admission, device=device, precision=precision), ""
    engine_for(precision, device)
    validated = admission.require()
    loaded, plan = fit(validated, device, tokenizer_of(validated), budget_mb * MB if budget_mb else None)
    return loaded, f"; {plan.reason}"


def _prepare(tokenizer: Tokenizer, prompt: str, system: str | None, *, raw: bool) -> PreparedTokens:
    """Make the tokens, and say in which way: a wrapped prompt and an unwrapped one give different answers."""
    from apr_core.model.tokens import prepare_tokens

    if raw or tokenizer.chat_template is None:
        if system is not None:
            raise UsageError("a system message needs the chat template", advice="leave out --system")
        why = "--raw" if raw else "a base model without a chat template"
        note(f"raw: the prompt is not wrapped ({why})")
        return prepare_tokens(tokenizer, text=prompt)
    messages = [{"role": "system", "content": system}] if system is not None else []
    note(f"chat: the model's own template (sha256 {str(tokenizer.template_hash)[:12]})")
    return prepare_tokens(tokenizer, messages=[*messages, {"role": "user", "content": prompt}])


def precision_for(asked: str, device: str) -> str:
    """
    Resolve ``auto``: ``speed`` where an engine of that precision is registered and its compiler is here.

    Raises:
        UsageError, Unavailable: As `engine_for`.
    """
    from apr_core.cli.output import note
    from apr_core.engines.load import engine_for, fastest_precision
    from apr_core.kernels.cpu import features

    if note not in features.listeners:
        features.listeners.append(note)  # the first compilation takes a while
    if asked == "auto":
        return fastest_precision(device)
    engine_for(asked, device)
    return asked


def device_for(asked: str) -> str:
    """Resolve ``auto``; a device that was asked for and is not there is an error, before minutes of judging."""
    from apr_core.engines.load import engine_for

    if asked == "auto":
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"
    engine_for("reference", asked)
    return asked


def print_answer(generation: Generation, *, stream: bool) -> float:
    """Generate and print; return when the first token was there (monotonic seconds)."""
    first, printed = 0.0, 0
    for _ in generation:
        first = first or time.monotonic()
        if stream:
            text = generation.text
            if not text.endswith(_UNFINISHED):  # the next token may complete the character
                _write(text[printed:])
                printed = len(text)
    _write(generation.text[printed:] + "\n")
    return first


def _write(text: str) -> None:
    # A terminal obeys control characters, and a model can be made to say them; a pipe gets the exact text.
    sys.stdout.write(clean(text, WHOLE) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def _account(generation: Generation, prepared: PreparedTokens, started: float, first: float) -> None:
    count, end = len(generation.ids), time.monotonic()
    first = first or end
    rest = f", then {(count - 1) / (end - first):.1f} tokens/s" if count > 1 and end > first else ""
    note(
        f"{prepared.ids.size} prompt tokens, {count} generated, stopped by {generation.stopped}; "
        f"first after {seconds(first - started)}{rest}"
    )
