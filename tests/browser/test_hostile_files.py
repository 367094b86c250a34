"""Markup in the metadata of a real file of each format is text: in the index and in a notebook's page."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from apr_core.cli.kernels import IpcKernelManager
from apr_core.cli.runner import _look
from apr_core.formats.apr import write_apr
from apr_core.formats.checkpoint import Checkpoint, TensorSource, open_checkpoint
from apr_core.formats.gguf import write_gguf
from apr_core.formats.safetensors import write_safetensors
from apr_core.report.export import export_html
from apr_core.report.page import write_index
from apr_core.rosetta.convert import convert
from tests.report.conftest import build

pytestmark = pytest.mark.browser

SCRIPT = "<script>window.PWN=1</script>"
IMAGE = '"><img src=x onerror="window.PWN=2">'
WRITERS: dict[str, Callable[..., None]] = {"gguf": write_gguf, "apr": write_apr, "safetensors": write_safetensors}

SHOW = """import apr_core as apr
from IPython.display import display as put
from apr_core.report import display, figures
from apr_core.rosetta import acts
display.install()
for path in {paths!r}:
    subject = apr.obtain(path)
    this_round = apr.open_round("00_ground_truth", subject, "", {{"model": path, "note": {attack!r}}})
    put(display.show_provenance(this_round), subject.checkpoint, subject.admission, subject, this_round)
    print(dict(list(subject.checkpoint.metadata.items())[-3:]))
    put(dict(subject.checkpoint.metadata))"""


def sources(checkpoint: Checkpoint) -> list[TensorSource]:
    """Every tensor as it is stored."""
    return [
        TensorSource(info.name, info.dtype, info.shape, lambda name=info.name: [checkpoint.raw(name).data])
        for info in checkpoint.tensors.values()
    ]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundled model in each format, with markup for a name, in a key and in a value."""
    folder, pygmy = tmp_path_factory.mktemp("hostile"), Path(__file__).parents[2] / "models" / "pygmy"
    found = {}
    for name, write in WRITERS.items():
        home = folder / f"{name} <b>"
        shutil.copytree(pygmy, home, ignore=shutil.ignore_patterns("*.safetensors", "*.npz", "*.py"))
        clean = convert(pygmy, folder / f"clean.{name}")
        with open_checkpoint(clean if clean.suffix != ".safetensors" else pygmy) as checkpoint:
            more = {"general.name" if name == "gguf" else "name": SCRIPT, IMAGE: IMAGE, "a.b": SCRIPT}
            found[name] = home / f"<img src=x onerror=window.PWN=3>.{name}"
            write(found[name], sources(checkpoint), {**checkpoint.metadata, **more})
    return found


@pytest.mark.parametrize("name", WRITERS)
def test_the_index(name: str, files: dict[str, Path], visit: Any, tmp_path: Path) -> None:
    """Key, value, file name and path are there to be read."""
    record = _look(files[name])
    assert SCRIPT in record.metadata.values()
    run = build(tmp_path, who=record)
    tab = visit(write_index(run.folder, run.conclusion, notebooks=run.notebooks))
    tab.click(".meta > summary")
    assert SCRIPT in tab.inner_text(".meta")
    assert IMAGE in tab.inner_text(".meta")
    assert files[name].name in tab.inner_text("h1")


def test_a_notebook(files: dict[str, Path], visit: Any, tmp_path: Path) -> None:
    """Every display of all three, executed by a kernel and exported as the runner does it."""
    source = SHOW.format(paths=[str(p) for p in files.values()], attack=SCRIPT)
    kernel = {"name": "python3", "display_name": "p", "language": "python"}
    book = new_notebook(cells=[new_code_cell(source)], metadata={"kernelspec": kernel})
    NotebookClient(book, kernel_name="python3", kernel_manager_class=IpcKernelManager, timeout=120).execute()
    nbformat.write(book, tmp_path / "n.ipynb")
    export_html(tmp_path / "n.ipynb", tmp_path / "n.html")
    tab = visit(tmp_path / "n.html")
    assert tab.evaluate("document.querySelectorAll('img').length") == 0
    assert SCRIPT in tab.inner_text("main")
    for path in files.values():
        assert path.name in tab.inner_text("main")
