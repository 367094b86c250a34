"""``apr synth``: write an untrained model, with progress."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

from apr_core.cli.output import note
from apr_core.cli.progress import progress
from apr_core.model.synth import SHAPES, plan, synthesise
from apr_core.report.text import nbytes, seconds

_FAMILY = "qwen2.5-coder-"


def write_synthetic(out: Path, *, shape: str, format: str, dtype: str, tokenizer: str, seed: int) -> None:
    """
    Write the model and say on stderr what it is.

    Args:
        out: Where; must not exist.
        shape: A key of `SHAPES`, or its size alone: ``1.5b``.
        format: ``safetensors`` or ``gguf``.
        dtype: One of the types of `synthesise`.
        tokenizer: A folder, ``none``, or empty for a generated one.
        seed: Of the weights.
    """
    shape = _FAMILY + shape if _FAMILY + shape in SHAPES else shape
    planned = plan(shape, format=format, dtype=dtype)
    total = sum(tensor.nbytes for tensor in planned)
    vocabulary: Path | Literal["generated"] | None = Path(tokenizer).expanduser() if tokenizer else "generated"
    if tokenizer == "none":
        vocabulary = None
    started = time.monotonic()
    with progress("writing", total) as step:
        synthesise(shape, format=format, dtype=dtype, tokenizer=vocabulary, seed=seed, out=out, progress=step)
    elapsed = seconds(time.monotonic() - started)
    note(
        f"{out}: {shape}, untrained, {len(planned)} tensors, {nbytes(total)} of {dtype} weights, seed {seed}, {elapsed}"
    )
