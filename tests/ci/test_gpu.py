"""The script for a machine with a device: rehearsed on the CPU, from a bare checkout, without the heavy packages."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

# What the device machine lacks. A finder that raises is stricter than an environment without them: asking counts.
DENIED = """
import sys
from importlib import metadata

GONE = {"gguf", "numba", "llvmlite", "papermill", "typer", "rich", "matplotlib", "lz4", "zstandard"}

class Denied:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in GONE:
            raise ModuleNotFoundError(f"{name} is not on the device machine", name=name)

sys.meta_path.insert(0, Denied())
installed = metadata.version

def version(name):
    if name == "apr_core":
        raise metadata.PackageNotFoundError(name)
    return installed(name)

metadata.version = version
"""


@pytest.fixture(scope="module")
def gpu(root: Path) -> Any:
    """The script as a module, beside its parts."""
    sys.path.insert(0, str(root / "ci"))
    try:
        import gpu

        yield gpu
    finally:
        sys.path.remove(str(root / "ci"))


@pytest.fixture
def setup(gpu: Any, tmp_path: Path) -> Any:
    """A rehearsal."""
    return gpu.Setup("cpu", tmp_path, ("pygmy",), ("gguf:Q4_K_M",))


def read(path: Path) -> dict[str, Any]:
    """Every record of an archive by file name."""
    with tarfile.open(path) as archive:
        return {name: json.load(archive.extractfile(name)) for name in archive.getnames()}  # type: ignore[arg-type]


def test_a_bare_checkout_rehearses_without_the_heavy_packages(root: Path, tmp_path: Path) -> None:
    """Every part, under an import hook that raises, with PYTHONPATH alone; nothing is corroborated on a CPU."""
    checkout, hook, out = tmp_path / "checkout", tmp_path / "hook", tmp_path / "out"
    for folder in ("apr_core", "ci", "models/pygmy"):
        shutil.copytree(root / folder, checkout / folder, ignore=shutil.ignore_patterns("__pycache__"))
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(DENIED, encoding="utf-8")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(hook),
        "OUT": str(out),
    }
    arguments = ["--device", "cpu", "--shapes", "pygmy", "--formats", "apr:AprQ4", "--commit", "c0ffee"]
    command = ["bash", str(checkout / "ci" / "run_gpu.sh"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 11, done.stderr + done.stdout
    found = read(out / "gpu-parity.tar.gz")
    assert [name[3:] for name in found] == [
        "products-tf32.json",
        "bundled-pygmy-apr-AprQ4.json",
        "large-pygmy.json",
        "random_weights-random-apr-AprQ4.json",
    ]
    for name, record in found.items():
        assert (record["verdict"], record["reason"]) in (
            ("INCONCLUSIVE", "the CUDA side ran on cpu"),
            ("INCONCLUSIVE", "a rehearsal on the cpu"),
        ), name
        assert record["provenance"]["commit"] == "c0ffee"
        assert record["provenance"]["packages"]["apr_core"] == "absent"
        for finding in ("parity", "repeatability", "streaming") if "products" not in name else ():
            assert record["measured"][finding]["reason"] == ""
    model = found["02-large-pygmy.json"]
    assert model["measured"]["types"] == ["F32", "Q4_K", "Q6_K"]
    assert model["measured"]["parity"]["within_aim"]
    assert model["measured"]["streaming"]["compared"] > 72 * 1024
    assert [row["comparison"] for row in model["rows"]][:2] == ["prefill", "decode"]


def test_each_record_is_kept_before_the_next_part_begins(gpu: Any, setup: Any, tmp_path: Path) -> None:
    """A part that breaks is recorded with its trail, the next one runs, and exit 1 tells."""
    path = tmp_path / "a.tar.gz"
    archive, seen = gpu.Archive(path, {"commit": "c0ffee"}), []

    def first(setup: Any) -> Any:
        yield gpu.Record("one", gpu.Verdict.CORROBORATED, measured={"number": float("nan")})
        seen.append(list(read(path)))
        raise RuntimeError("it broke")

    def second(setup: Any) -> Any:
        seen.append(list(read(path)))
        yield gpu.Record("two", gpu.Verdict.NOT_RUN, "no reason")

    assert gpu.run_parts(archive, setup, [gpu.Part("first", 1, first), gpu.Part("second", 1, second)], 3600) == 1
    assert seen == [["00-first-one.json"], ["00-first-one.json", "01-first-error.json"]]
    found = read(path)
    assert found["00-first-one.json"]["measured"] == {"number": None}
    assert found["00-first-one.json"]["verdict"] == "INCONCLUSIVE"
    assert found["01-first-error.json"]["reason"] == "RuntimeError: it broke"
    assert "in first" in found["01-first-error.json"]["measured"]["traceback"]
    assert found["02-second-two.json"]["verdict"] == "NOT_RUN"


def test_each_part_has_its_share_of_the_time(gpu: Any, setup: Any, tmp_path: Path) -> None:
    """One that does not end is ended, whatever it handles; what a quick one leaves is for those behind it."""
    archive = gpu.Archive(tmp_path / "a.tar.gz", {})

    def quick(setup: Any) -> Any:
        yield gpu.Record("one", gpu.Verdict.NOT_RUN, "no reason")

    def slow(setup: Any) -> Any:
        for at in range(100):
            with suppress(Exception):
                gpu.time.sleep(0.1)
            yield gpu.Record(f"step{at}", gpu.Verdict.NOT_RUN, "no reason")

    def ended(setup: Any) -> Any:
        gpu.time.sleep(0.4)
        yield gpu.Record("two", gpu.Verdict.NOT_RUN, "no reason")

    parts = [gpu.Part("quick", 3, quick), gpu.Part("slow", 1, slow), gpu.Part("ended", 4, ended)]
    assert gpu.run_parts(archive, setup, parts, 2) == 11
    found = [(body["part"], body["name"]) for body in read(archive.path).values()]
    assert found[0] == ("quick", "one")
    assert found[-2:] == [("slow", "rest"), ("ended", "two")]
    assert 5 <= sum(part == "slow" for part, _ in found) <= 11, "its quarter of a second, and what quick left"
    assert read(archive.path)[f"{len(found) - 2:02d}-slow-rest.json"]["reason"] == "out of time, its share was 1 s"


def test_what_a_machine_lacks_is_not_run(gpu: Any, setup: Any, tmp_path: Path) -> None:
    """Triton missing, a device too old: said, and no part that broke."""
    archive = gpu.Archive(tmp_path / "a.tar.gz", {})

    def lacking(setup: Any) -> Any:
        raise gpu.Unavailable("no triton here", advice="install it")
        yield

    assert gpu.run_parts(archive, setup, [gpu.Part("lacking", 1, lacking)], 60) == 11
    (record,) = read(archive.path).values()
    assert (record["verdict"], record["reason"]) == ("NOT_RUN", "no triton here; install it")


def test_where_the_device_is_lost_another_process_goes_on(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the part that lost it, with the time that is left and the records that are there."""
    import gpu_parity

    def breaking(setup: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
        yield

    def sound(setup: Any) -> Any:
        yield gpu.Record("two", gpu.Verdict.CORROBORATED)

    def fails() -> None:
        raise RuntimeError("CUDA error")

    class Gone(BaseException):
        pass

    def leave(program: str, arguments: list[str]) -> None:
        said.extend(arguments)
        raise Gone

    said: list[str] = []
    parts = [gpu.Part("one", 1, breaking), gpu.Part("two", 1, sound)]
    monkeypatch.setattr(gpu_parity, "parts", lambda setup: parts)
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.torch.cuda, "synchronize", fails)
    monkeypatch.setattr(gpu, "about", lambda *_: {})
    monkeypatch.setattr(gpu.os, "execv", leave)
    with pytest.raises(Gone):
        gpu.main(["--out", str(tmp_path), "--budget-s", "100"])
    assert said[:2] == [sys.executable, gpu.__file__]
    assert gpu.main(said[2:]) == 1
    assert said[-4:-1] == ["--done", "1", "--budget-s"]
    assert 90 < float(said[-1]) <= 100
    assert list(read(tmp_path / "gpu-parity.tar.gz")) == ["00-one-error.json", "01-two-two.json"]


def test_without_a_device_nothing_runs(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Exit 9 and the way out; no archive that could be taken for evidence."""
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path)]) == 9
    assert "--device cpu" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("CudaQwen2", "parity: prefill: first divergence: layers.0.attn_output at position 1"),
        ("StreamedCudaQwen2", "streaming: "),
    ],
)
def test_a_wrong_forward_is_refuted(
    gpu: Any, setup: Any, name: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong scale of attention, in the whole forward and in the streamed one: exit 5, and where it began."""
    import gpu_parity

    honest = getattr(gpu_parity, name)

    class Wrong(honest):  # type: ignore[misc]
        def make_layers(self, weights: Any, attend: Any) -> Any:
            return super().make_layers(weights, lambda q, k, v: attend(q * 1.01, k, v))

    monkeypatch.setattr(gpu_parity, name, Wrong)
    archive = gpu.Archive(setup.scratch / "a.tar.gz", {})
    assert gpu.run_parts(archive, setup, gpu_parity.parts(setup)[2:3], 3600) == 5
    (record,) = read(archive.path).values()
    assert record["reason"].startswith(reason)


def test_products_that_round_are_refuted(gpu: Any, setup: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device whose float32 product is TF32's: operands rounded to 10 bits."""
    import gpu_parity

    (healthy,) = gpu_parity.products(setup)
    assert (str(healthy.verdict), healthy.reason) == ("CORROBORATED", "")
    randn = gpu.torch.randn

    def drawn(*shape: int, **given: Any) -> Any:
        return Rounding(randn(*shape, **given))

    monkeypatch.setattr(gpu_parity.torch, "randn", drawn)
    (record,) = gpu_parity.products(setup)
    assert str(record.verdict) == "FALSIFIED"
    assert "TF32 is not off" in record.reason


class Rounding:
    """A tensor that loses 13 bits of its mantissa on the way to the device."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    def double(self) -> Any:
        """The exact values."""
        return self.tensor.double()

    def to(self, device: str) -> Any:
        """The rounded ones."""
        import torch

        return (self.tensor.view(torch.int32) & ~0x1FFF).view(torch.float32)
