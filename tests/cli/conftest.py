"""Models for the commands: a healthy one of pygmy's shape, and what becomes of it when it is broken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from apr_core.formats.checkpoint import open_checkpoint
from apr_core.model.synth import synthesise


@pytest.fixture(scope="session")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model that every gate admits."""
    return synthesise("pygmy", format="safetensors", dtype="bf16", out=tmp_path_factory.mktemp("cli") / "healthy")


@pytest.fixture(scope="session")
def refused(healthy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with three NaN in one tensor and one norm of zeros: readable, and refused."""
    folder = tmp_path_factory.mktemp("cli") / "refused"
    shutil.copytree(healthy, folder)
    with open_checkpoint(folder) as checkpoint:
        down, norm = (checkpoint.tensors[f"model.{n}"] for n in ("layers.1.mlp.down_proj.weight", "norm.weight"))
    data = np.fromfile(folder / "model.safetensors", dtype=np.uint8)
    data[down.offset : down.offset + 6] = 0xFF
    data[norm.offset : norm.offset + norm.nbytes] = 0
    data.tofile(folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def base(healthy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without a chat template."""
    folder = tmp_path_factory.mktemp("cli") / "base"
    shutil.copytree(healthy, folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    del settings["chat_template"]
    path.write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def mute(healthy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without a tokenizer."""
    folder = tmp_path_factory.mktemp("cli") / "mute"
    shutil.copytree(healthy, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    return folder


@pytest.fixture(scope="session")
def lost_config(healthy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without config.json."""
    folder = tmp_path_factory.mktemp("cli") / "lost"
    shutil.copytree(healthy, folder, ignore=shutil.ignore_patterns("config.json"))
    return folder


@pytest.fixture(scope="session")
def truncated(healthy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, its weights cut in the middle."""
    folder = tmp_path_factory.mktemp("cli") / "cut"
    shutil.copytree(healthy, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1_000_000])
    return folder
