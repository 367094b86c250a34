"""``apr lab``: the notebooks as a place to think: a copy of them in JupyterLab, with the model set."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from apr_core.cli.output import note
from apr_core.cli.runner import notebook_path
from apr_core.engines.subject import BUNDLED, resolve_model
from apr_core.errors import NotFound, Unavailable, UsageError
from apr_core.falsify.claims import NOTEBOOKS

_QUIET = '{"fetchNews": "false", "checkForUpdates": false}'


def open_lab(model: str, *, reference: str, out: str, browser: bool) -> int:
    """
    Start JupyterLab on a copy of the notebooks and wait for its end.

    Args:
        model: Path, or the name of the bundled model.
        reference: What it claims to be made from; empty for none.
        out: A new folder for the copies.
        browser: Whether JupyterLab opens one.

    Returns:
        JupyterLab's exit code.

    Raises:
        Unavailable: JupyterLab is not installed.
        NotFound: There is no such model.
        UsageError: The folder exists.
    """
    if importlib.util.find_spec("jupyterlab") is None:
        raise Unavailable(
            "JupyterLab is not installed", advice="pip install 'apr_core[dev]', or pip install jupyterlab"
        )
    folder = Path(out).expanduser().absolute()
    copy_notebooks(folder, {"model": _resolved(model), "reference": _resolved(reference) if reference else ""})
    note(f"notebooks in {folder}; what you change there stays there")
    home = Path(tempfile.mkdtemp(prefix="apr-lab-"))  # short: a kernel's socket path holds 107 bytes
    settings = home / "s" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(_QUIET, encoding="utf-8")
    options = [f"--ServerApp.root_dir={folder}", "--KernelManager.transport=ipc"]
    options += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    options += [] if browser else ["--no-browser", "--expose-app-in-browser"]
    options += ["--allow-root"] * (os.getuid() == 0)
    env = {**os.environ, "JUPYTERLAB_SETTINGS_DIR": str(home / "s")}
    env.setdefault("JUPYTER_RUNTIME_DIR", str(home / "r"))
    try:
        return subprocess.run([sys.executable, "-m", "jupyterlab", *options], env=env, check=False).returncode
    finally:
        shutil.rmtree(home, ignore_errors=True)


def copy_notebooks(folder: Path, parameters: Mapping[str, str]) -> None:
    """
    Copy the notebooks into a new folder with parameters set and without outputs: those were another model's.

    Raises:
        UsageError: The folder exists.
    """
    try:
        folder.mkdir(parents=True)
    except FileExistsError as error:
        raise UsageError(f"{folder} exists", advice="give --out a new folder") from error
    for name in NOTEBOOKS:
        book = json.loads(notebook_path(name).read_text(encoding="utf-8"))
        for cell in book["cells"]:
            if cell["cell_type"] == "code":
                cell["outputs"], cell["execution_count"] = [], None
            if "parameters" in cell["metadata"].get("tags", []):
                cell["source"] = _set("".join(cell["source"]), parameters)
        (folder / f"{name}.ipynb").write_text(json.dumps(book, indent=1) + "\n", encoding="utf-8")


def _set(source: str, parameters: Mapping[str, str]) -> str:
    for name, value in parameters.items():
        quoted = json.dumps(value).replace("\\", "\\\\")  # a backslash stands for itself in what is put in
        source, count = re.subn(rf'^({name}: str = )"[^"]*"', rf"\g<1>{quoted}", source, flags=re.MULTILINE)
        assert count == 1, f"the parameters cell has no {name}"
    return source


def _resolved(model: str) -> str:
    """The bundled model by its name, any other by its absolute path: the notebooks run in another folder."""
    if model in BUNDLED:
        return model
    path = resolve_model(model).absolute()
    if not path.exists():
        raise NotFound(f"no such file or folder: {path}", advice="check the path")
    return str(path)
