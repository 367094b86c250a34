"""``apr chat``: a conversation through the model's own template; Ctrl-C stops an answer, Ctrl-D ends it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apr_core.cli.dispatch import admission_of
from apr_core.errors import InferenceError, LoadError

if TYPE_CHECKING:
    from apr_core.model.trace import TracedForward

HELP = "/new begins again, /help says this, /quit (or Ctrl-D) ends; Ctrl-C stops an answer"


def chat(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model file or folder, or 'pygmy'.")],
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system message.")] = None,
    max_tokens: Annotated[int, typer.Option("-n", "--max-tokens", min=1, help="Tokens of an answer at most.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample from the K likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Sample from this joint probability.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of sampling.")] = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="Where to compute.")] = "auto",
) -> None:
    """Talk with a model. From a pipe each line is one message, and stdout holds the answers alone."""
    from apr_core.cli.output import note
    from apr_core.cli.run import device_for
    from apr_core.engines.load import build

    admission = admission_of(context)
    with admission.checkpoint as checkpoint:
        loaded = build(admission, device=device_for(device))
        if loaded.tokenizer is None or loaded.tokenizer.chat_template is None:
            raise LoadError(
                f"{checkpoint.path} has no chat template", advice="talk to a base model with `apr run --raw`"
            )
        note(f"{checkpoint.path.name}: {loaded.backend} on {loaded.device}; {HELP}")
        sampling = {"max_new_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        converse(loaded, _said(), system=system, sampling=sampling | {"seed": seed})


def _said() -> Iterator[str]:
    """Yield what the person says; the prompt goes to stderr, so that stdout holds answers alone."""
    while True:
        if sys.stdin.isatty():
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            return
        yield line.rstrip("\n")


def converse(
    model: TracedForward, said: Iterator[str], *, system: str | None, sampling: dict[str, Any]
) -> list[dict[str, str]]:
    """
    Answer messages until there are no more.

    Args:
        model: Any backend with a tokenizer that has a template.
        said: What the person says; may raise KeyboardInterrupt, which ends the conversation.
        system: A system message.
        sampling: As `generate` takes it.

    Returns:
        The conversation, an interrupted answer as far as it came.
    """
    from apr_core.cli.output import note

    start = [{"role": "system", "content": system}] if system is not None else []
    messages = list(start)
    try:
        for text in said:
            if text.strip() in ("/quit", "/exit"):
                break
            if text.strip() == "/new":
                messages = list(start)
                note("a new conversation")
            elif text.strip() == "/help":
                note(HELP)
            elif text.strip():
                messages.append({"role": "user", "content": text})
                try:
                    messages.append({"role": "assistant", "content": _answer(model, messages, sampling)})
                except InferenceError as error:  # the context is full: what was said last is taken back
                    messages.pop()
                    note(f"not answered: {error}; /new begins again")
    except KeyboardInterrupt:
        note("ended")
    return messages


def _answer(model: TracedForward, messages: list[dict[str, str]], sampling: dict[str, Any]) -> str:
    """Generate one answer and print it as it comes; Ctrl-C stops it and keeps what there is."""
    from apr_core.cli.output import note
    from apr_core.cli.run import print_answer
    from apr_core.model.generate import generate
    from apr_core.model.tokens import prepare_tokens

    generation = generate(model, prepare_tokens(model, messages=messages), **sampling)
    try:
        print_answer(generation, stream=True)
    except KeyboardInterrupt:
        print()
        note("stopped")
    return generation.text
