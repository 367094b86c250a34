"""
Put the gate in front of the loaders of others: a few lines each, for programs that are not `apr`.

    from apr_core import gated
    model = gated(AutoModelForCausalLM.from_pretrained)("folder", dtype="auto")
    llama = gated(llama_cpp.Llama)(model_path="model.gguf")

The file is judged by every gate before the loader sees its path; a refused one raises and nothing is loaded. A receipt
in the person's cache folder makes the second start cheap. Names of a hub are not paths, so they are refused: download
first, then give the folder. Between judging and loading the file could be exchanged; that is malice, not accident.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

from apr_core.errors import UsageError

P = ParamSpec("P")
R = TypeVar("R")
# How the loaders that are known call the parameter that is a path: transformers, llama-cpp-python.
NAMES = ("pretrained_model_name_or_path", "model_path")


def gated(load: Callable[P, R], *, skip: bool = False, recheck: bool = False) -> Callable[P, R]:
    """
    Return a loader that admits the model first.

    Args:
        load: Any function or class whose first argument, or ``pretrained_model_name_or_path`` or ``model_path``, is the
            path of a local model: ``AutoModel.from_pretrained``, ``llama_cpp.Llama``, ...
        skip: The explicit bypass.
        recheck: Read every weight, whatever the receipt says.

    Raises (the returned loader):
        UsageError: No path is among the arguments.
        NotFound, FormatError, LoadError, ReadWriteError: The model cannot be opened.
        ContractViolation: A gate refuses it.
    """

    @wraps(load)
    def loader(*args: P.args, **kwargs: P.kwargs) -> R:
        path = next((kwargs[name] for name in NAMES if name in kwargs), args[0] if args else None)
        if not isinstance(path, str | Path):
            raise UsageError(f"expected the path of a model, first or as {' or '.join(NAMES)}, found {path!r:.80}")
        require(path, skip=skip, recheck=recheck)
        return load(*args, **kwargs)

    return loader


def require(path: str | Path, *, skip: bool = False, recheck: bool = False) -> None:
    """
    Admit a local model or raise; for loaders that take their path inside of something else.

    xllamacpp takes it in its parameters: ``require(params.model.path)`` before ``xllamacpp.Server(params)``.

    Raises:
        AprError: As the loader of `gated`.
    """
    from apr_core.contract.receipt import admit_by_receipt

    admission = admit_by_receipt(path, skip=skip, recheck=recheck)
    try:
        admission.require()
    finally:
        admission.checkpoint.close()
