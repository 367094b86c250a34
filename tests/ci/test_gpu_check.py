"""The ahead-of-time check: what it looks at, what it calls a fault, and that it compares every phase."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from apr_core.kernels.gpu import has_triton

needs_triton = pytest.mark.skipif(not has_triton(), reason="NOT_RUN: triton is not installed")


@pytest.fixture(scope="module")
def check(root: Path) -> ModuleType:
    """The script."""
    spec = importlib.util.spec_from_file_location("gpu_check", root / "ci" / "gpu_check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module
    spec.loader.exec_module(module)
    return module


@needs_triton
def test_every_phase_and_type_is_compiled(check: ModuleType) -> None:
    """A kernel that nobody launches there would be held against nothing; the launches are those of the engine."""
    from apr_core.kernels.gpu import launch, phases
    from apr_core.kernels.gpu.planes import PLANES

    real = launch.phases
    seen = list(check.launches())
    kernels = {
        name
        for name, value in vars(phases).items()
        if getattr(getattr(value, "fn", None), "__module__", "") == phases.__name__
    }
    assert {one.name for one in seen} == {name for name in kernels if not name.startswith("_")}
    assert {one.stored for one in seen if one.weights} == set(PLANES)
    assert launch.phases is real
    assert {one.wide_loads for one in seen if one.case in ("down Q4_K exact", "gate_up Q8_0 exact")} == {4, 8}


def test_each_limit_can_be_broken(check: ModuleType) -> None:
    """Spills, registers, narrow or late loads, instructions: each alone is a fault."""
    launch = check.Launch(
        "residual", (), {"BN": 32, "C": 16}, {"num_warps": 4, "launch_pdl": True}, "case", 16384, "Q4_K"
    )
    good = check.Code("case", 120, 0, 4, True, 3.2, 4.4)
    assert good.faults(launch) == []
    for change, said in (
        ({"local_bytes": 8}, "8 bytes of local memory"),
        ({"registers": 200}, "200 registers"),
        ({"wide_loads_before_wait": 3}, "3 loads of 16 bytes before the wait, expected 4"),
        ({"dependent": False}, "launched dependently without waiting"),
        ({"per_weight": 4.5}, "4.50 instructions per weight, expected at most 4.40"),
        ({"per_weight": float("nan")}, "nan instructions per weight"),
    ):
        (fault,) = replace(good, **change).faults(launch)
        assert said in fault


def test_the_longest_loop_is_counted(check: ModuleType) -> None:
    """From the target of the backward branch to the branch; a branch to itself at the end is none."""
    text = "\n".join(
        f"        /*{16 * at:04x}*/                   {body} ;"
        for at, body in enumerate(("LDG.E.128 R1", "@P0 FADD R2", "IDP.4A R3", "@!P1 BRA 0x10", "EXIT", "BRA 0x50"))
    )
    assert check._loop(text) == ["FADD", "IDP.4A", "BRA"]
    assert check._loop("") == []


def test_without_triton_it_says_so(root: Path) -> None:
    """NOT_RUN and its own exit code: neither green nor red."""
    code = (
        "import sys, runpy\n"
        "class Denied:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] == 'triton': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Denied()); sys.argv = ['gpu_check.py']\n"
        "runpy.run_path('ci/gpu_check.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=root, capture_output=True, text=True)
    assert done.stdout.startswith("NOT_RUN: triton is not installed")
    assert done.returncode == 9
