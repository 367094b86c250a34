"""The commands and their options. Each imports what it needs when it runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from apr_core.cli import (
    bench,
    canary,
    chat,
    check,
    diagnose,
    explain,
    lint,
    parity,
    report,
    rosetta,
    tensors,
    tools,
    validate,
    zoo,
)
from apr_core.cli.dispatch import SkipContract, admission_of
from apr_core.errors import UsageError

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model file or folder, or 'pygmy'.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print strict JSON.")]
Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="Where to compute.")]
Reference = Annotated[str, typer.Option(metavar="PATH", help="The model that this one claims to be made from.")]


def register(app: typer.Typer) -> None:
    """Put every command of this module into the application."""
    commands: tuple[Callable[..., None], ...] = (
        *(run, chat.chat, check.check, qa, validate.validate, inspect, tensors.tensors, lint.lint, explain.explain),
        *(diagnose.diagnose, tools.tools, synth),
    )
    for command in commands:
        app.command()(command)
    app.command(cls=Suite)(suite)
    app.command()(lab)
    parity.register(app)
    bench.register(app)
    rosetta.register(app)
    app.add_typer(canary.app, name="canary")
    app.add_typer(zoo.app, name="zoo")
    app.add_typer(report.app, name="report")


def run(
    context: typer.Context,
    model: Model,
    text: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="What to say to it.", show_default=False)
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("-p", "--prompt", metavar="TEXT", help="The same, as an option.")
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system message.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Do not apply the chat template.")] = False,
    max_tokens: Annotated[int, typer.Option("-n", "--max-tokens", min=1, help="Tokens to generate at most.")] = 32,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample from the K likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest of this joint probability.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of sampling.")] = None,
    device: Device = "auto",
    precision: Annotated[
        str, typer.Option(metavar="auto|reference|exact|speed", help="Which engine; the answer says which ran.")
    ] = "auto",
    stream: Annotated[bool, typer.Option(help="Print tokens as they come.")] = True,
    budget_mb: Annotated[
        int | None, typer.Option("--budget-mb", min=1, help="Memory for the model; less streams its layers.")
    ] = None,
) -> None:
    """Answer one prompt. The generated text goes to stdout, everything else to stderr."""
    from apr_core.cli.run import answer

    if text is not None and prompt is not None:
        raise UsageError("two prompts were given", advice="give it either behind the model or with --prompt")
    said = prompt if prompt is not None else text
    if said is None:
        raise UsageError("no prompt was given", advice="put it in quotes behind the model")
    answer(
        admission_of(context),
        said,
        system=system,
        raw=raw,
        sampling={
            "max_new_tokens": max_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "seed": seed,
        },
        device=device,
        stream=stream,
        precision=precision,
        budget_mb=budget_mb,
    )


def inspect(
    model: Model,
    as_json: AsJson = False,
    digest: Annotated[
        bool, typer.Option("--hash", help="Compute the sha256 of the weights: reads every byte.")
    ] = False,
) -> None:
    """Describe a file without judging it. Works on files that the contract refuses."""
    from apr_core.cli.inspect import describe, show_description
    from apr_core.cli.output import show_json

    body = describe(model, digest=digest)
    show_json(body) if as_json else show_description(body)


def qa(
    context: typer.Context,
    model: Model,
    reference: Reference = "",
    device: Device = "auto",
    claims: Annotated[
        bool, typer.Option("--claims", help="Try to refute every claim of the notebooks instead of the gates.")
    ] = False,
    skip: Annotated[str, typer.Option(metavar="GATE,GATE", help="Gates to leave out; they count as skipped.")] = "",
    min_executed: Annotated[
        int | None, typer.Option("--min-executed", min=0, metavar="N", help="Fewer are inconclusive.  [default: 4]")
    ] = None,
    assert_tps: Annotated[
        float | None, typer.Option("--assert-tps", min=0, metavar="N", help="Least tokens per second, taken literally.")
    ] = None,
    assert_speedup: Annotated[
        float | None, typer.Option("--assert-speedup", min=0, metavar="N", help="Least ratio to Ollama.")
    ] = None,
    assert_gpu_speedup: Annotated[
        float | None, typer.Option("--assert-gpu-speedup", min=0, metavar="N", help="Least ratio of CUDA to the CPU.")
    ] = None,
    ollama: Annotated[str, typer.Option(metavar="NAME", help="The same model in Ollama.")] = "",
    previous: Annotated[str, typer.Option(metavar="FILE", help="An earlier report (--json) to compare with.")] = "",
    iterations: Annotated[int | None, typer.Option(min=1, metavar="N", help="Timed generations.  [default: 3]")] = None,
    max_tokens: Annotated[
        int | None, typer.Option("-n", "--max-tokens", min=2, metavar="N", help="Tokens of each.  [default: 32]")
    ] = None,
    as_json: AsJson = False,
    skip_contract: SkipContract = False,
) -> None:
    """Put a model through eleven gates. From its capabilities to its speed; 5 when one fails, 11 when too few ran."""
    bypass = context.obj["skip_contract"]  # before the command or behind it: the dispatch has joined the two
    limits = {"throughput": assert_tps, "ollama_parity": assert_speedup, "gpu_speedup": assert_gpu_speedup}
    given = {name: value for name, value in limits.items() if value is not None}
    numbers = {"min_executed": min_executed, "iterations": iterations, "max_tokens": max_tokens}
    set_ = {name: value for name, value in numbers.items() if value is not None}
    if claims:
        if skip or given or ollama or previous or set_:
            raise UsageError("options of the gates have no effect on the claims", advice="leave them or --claims out")
        from apr_core.cli.claims import examine as attempt
        from apr_core.cli.claims import show_examination

        body = attempt(model, reference=reference, device=device, skip_contract=bypass)
        raise typer.Exit(show_examination(body, as_json=as_json))
    from apr_core.cli.qa import Order, examine, show_report

    names = tuple(name for name in skip.split(",") if name)
    order = Order(
        model,
        reference,
        device,
        names,
        limits=given,
        ollama=ollama,
        previous=previous,
        skip_contract=bypass,
        **set_,
    )
    raise typer.Exit(show_report(examine(order), as_json=as_json))


def synth(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder (safetensors) or file (gguf).")],
    shape: Annotated[str, typer.Option(metavar="qwen2.5-coder-0.5b|1.5b|7b|pygmy", help="Exact shape.")],
    container: Annotated[str, typer.Option("--format", metavar="safetensors|gguf", help="Format.")] = "safetensors",
    dtype: Annotated[str, typer.Option(metavar="f32|f16|bf16|q8_0|q4_k_m", help="Type; blocks need gguf.")] = "bf16",
    tokenizer: Annotated[
        str, typer.Option(metavar="DIR|none", help="A tokenizer to take, or none.", show_default="one is made")
    ] = "",
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
) -> None:
    """Write an untrained model. Of exact shape, with plausible random weights."""
    from apr_core.cli.synth import write_synthetic

    write_synthetic(out, shape=shape, format=container, dtype=dtype, tokenizer=tokenizer, seed=seed)


class Suite(TyperCommand):
    """``-p NAME VALUE`` takes two arguments and may be repeated, as papermill's does; typer knows no such option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Join each pair to the one argument that the declared option takes."""
        joined: list[str] = []
        left = iter(args)
        for argument in left:
            joined.append(argument)
            if argument == "-p":
                name, value = next(left, None), next(left, None)
                if name is None or value is None:
                    raise UsageError("expected a name and a value behind -p", advice="write -p NAME VALUE")
                joined.append(f"{name}={value}")
        return super().parse_args(ctx, joined)


def suite(
    context: typer.Context,
    model: Annotated[str, typer.Option(metavar="PATH", help="A model file or folder, or 'pygmy'.")] = "pygmy",
    reference: Reference = "",
    device: Device = "auto",
    only: Annotated[str, typer.Option(metavar="00,20", help="Notebooks to run; all when left out.")] = "",
    out: Annotated[str, typer.Option(metavar="DIR", help="A new folder for everything that is written.")] = "",
    timeout_s: Annotated[int, typer.Option("--timeout-s", min=1, metavar="N", help="Seconds per cell.")] = 600,
    parameter: Annotated[
        list[str] | None, typer.Option("-p", metavar="NAME VALUE", help="A notebook parameter; may be repeated.")
    ] = None,
    peer: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Hold the rates against it, as apr bench; may be repeated.")
    ] = None,
    claim: Annotated[
        list[str] | None, typer.Option(metavar="METRIC=NUMBER", help="A rate to refute; may be repeated.")
    ] = None,
    reuse: Annotated[
        bool, typer.Option("--reuse", help="Take over claims that a run beside this one decided on the same bytes.")
    ] = False,
    skip_contract: SkipContract = False,
) -> None:
    """Run the notebooks on a model. Conclude from the evidence that they leave."""
    from apr_core.cli.runner import run_suite

    parameters: dict[str, str] = {}
    for pair in parameter or []:
        name, _, value = pair.partition("=")
        if name in parameters:
            raise UsageError(f"parameter {name} was given twice", advice="give it once")
        parameters[name] = value
    code = run_suite(
        model=model,
        reference=reference,
        device=device,
        only=only,
        out=out,
        timeout_s=timeout_s,
        parameters=parameters,
        reuse=reuse,
        skip_contract=context.obj["skip_contract"],  # before the command or behind it
        peers=peer or [],
        claims=claim or [],
    )
    raise typer.Exit(code)


def lab(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="A model file or folder, or 'pygmy'.")] = "pygmy",
    reference: Reference = "",
    out: Annotated[
        str, typer.Option(metavar="DIR", help="Where the copies go; a new folder.  [default: apr-lab]")
    ] = "",
    browser: Annotated[bool, typer.Option(help="Open a browser.")] = True,
) -> None:
    """Open the notebooks in JupyterLab. On a copy, with the model set; the originals stay as they are."""
    from apr_core.cli.lab import open_lab

    raise typer.Exit(open_lab(model, reference=reference, out=out or "apr-lab", browser=browser))
