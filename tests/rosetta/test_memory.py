"""What a conversion keeps in memory: not the source that it has read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from apr_core.dtypes import FORMATS
from apr_core.formats.checkpoint import TensorSource
from apr_core.formats.safetensors import write_safetensors

MATRICES, SHAPE = 24, (6144, 512)  # 6.3 MB each in BF16, 151 MB in all
ALLOWED = 64 << 20
PROGRAM = """
import sys
from pathlib import Path
from apr_core.rosetta.convert import convert

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) << 10

folder, quantize = Path(sys.argv[1]), sys.argv[2] or None
convert(folder / "small", folder / "warm.gguf", quantize=quantize, bare=True)
before = peak()
convert(folder / "large", folder / "out.gguf", quantize=quantize, bare=True)
print(peak() - before)
"""


def write(folder: Path, count: int) -> int:
    """Write some matrices of a model that nobody loads; return the bytes of the file."""
    folder.mkdir()
    values = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    data = (values.view(np.uint32) >> 16).astype(np.uint16)
    names = [f"model.layers.{n // 2}.mlp.{('gate', 'up')[n % 2]}_proj.weight" for n in range(count)]
    sources = [TensorSource(name, FORMATS["BF16"], SHAPE, lambda: [data]) for name in names]
    write_safetensors(folder / "model.safetensors", sources, {})
    config = {"model_type": "qwen2", "num_hidden_layers": count // 2, "hidden_size": SHAPE[1]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return (folder / "model.safetensors").stat().st_size


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("quantize", ["", "Q8_0"])
def test_a_conversion_does_not_keep_its_source(tmp_path: Path, quantize: str) -> None:
    """The peak grows by less than half of the file, whether bytes pass through or are encoded."""
    write(tmp_path / "small", 4)
    size = write(tmp_path / "large", MATRICES)
    words = [sys.executable, "-c", PROGRAM, str(tmp_path), quantize]
    run = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
    assert size > 2 * ALLOWED
    assert int(run.stdout) < ALLOWED
