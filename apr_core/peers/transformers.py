"""
transformers, Hugging Face's implementation of Qwen2: logits of a file in float64 or float32.

It reads SafeTensors itself, so neither our reader nor our codecs have a part in it. For a GGUF it needs another package
(accelerate), which is not asked for here: llama.cpp speaks about those.

Source: transformers ``AutoModelForCausalLM.from_pretrained`` (eager attention).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from apr_core.errors import LoadError, Unavailable
from apr_core.formats.checkpoint import open_checkpoint

DTYPES = {"float64": torch.float64, "float32": torch.float32}


def is_installed() -> bool:
    """Probe for the package without loading it, which takes seconds."""
    return importlib.util.find_spec("transformers") is not None


class Transformers:
    """
    A file opened by transformers on the CPU.

    Args:
        path: A SafeTensors folder or file.
        dtype: ``float64`` or ``float32``.

    Raises:
        Unavailable: transformers is not installed.
        LoadError: It does not read this file.
    """

    def __init__(self, path: str | Path, dtype: str = "float64") -> None:
        if not is_installed():
            raise Unavailable("transformers is not installed", advice="pip install 'apr_core[peers]'")
        with open_checkpoint(path) as file:
            if file.format != "safetensors":
                raise LoadError(f"transformers reads SafeTensors, {path} is {file.format}", advice="ask another peer")
            folder = file.folder
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        try:
            self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                str(folder), dtype=DTYPES[dtype], attn_implementation="eager", local_files_only=True
            ).eval()
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            raise LoadError(f"transformers refuses {path}: {error}", advice="look at it with `apr inspect`") from error

    def logits(self, ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the logits [tokens, vocabulary] of one forward over ``ids`` [tokens], widened to float64."""
        with torch.no_grad():
            found: NDArray[np.float64] = self._model(torch.from_numpy(ids)[None]).logits[0].double().numpy()
        return found
