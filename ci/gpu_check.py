"""
Compile every phase ahead of time for compute capability 9.0 and hold its machine code against what the design needs.

    python ci/gpu_check.py          exit 0 all hold, 1 something does not, 9 NOT_RUN: Triton is not installed

No device is needed: Triton brings the assembler and the disassembler. The launches are those of `launch`, made with
tensors without memory and recorded. Asserted: no spill, codes of weights in loads of 16 bytes, such a load before the
wait for the kernel before (so that weights arrive while it still runs), that wait in every kernel that is launched
dependently, and instructions per weight of the inner loop within the budget: what 132 multiprocessors issue at 1.98 GHz
while one weight arrives at 4.3 TB/s.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from apr_core.dtypes import FORMATS
from apr_core.kernels.gpu import has_triton
from apr_core.kernels.gpu.planes import PLANES

INSTRUCTIONS_PER_BYTE = 132 * 128 * 1.98e9 / 4.3e12
"""Lane instructions that an H200 issues while it reads a byte."""
REGISTERS = 168
"""Per thread at most, where weights are read: three programs of 128 threads then fit on a multiprocessor."""
OPTIONS = ("num_warps", "launch_pdl", "enable_fp_fusion")


@dataclass(frozen=True)
class Launch:
    """One recorded launch: the kernel's name, its arguments (of a tensor the type), its constants and options."""

    name: str
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]
    case: str = ""
    weights: int = 0
    stored: str = ""

    @property
    def wide_loads(self) -> int:
        """Loads of 16 bytes per thread that the codes of the first tiles take; of q, k and v the narrowest."""
        if not self.stored:
            return 0
        k = self.constants
        tiles = 2 if self.name == "gate_up" else 1
        per_thread = 16 * 32 * self.options["num_warps"]
        return int(tiles * k["BN"] * k["C"] * PLANES[self.stored].codes / per_thread)


class Recorder:
    """Stands in for `phases`: records what would be launched."""

    def __init__(self) -> None:
        self.seen: list[Launch] = []

    def __getattr__(self, name: str) -> Any:
        recorder = self

        class Kernel:
            def __getitem__(self, grid: tuple[int, ...]) -> Any:
                return lambda *arguments, **constants: recorder.add(name, arguments, constants)

        return Kernel()

    def add(self, name: str, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        """Keep a launch without its memory."""
        types = tuple(a if isinstance(a, int | float) else str(a.dtype).removeprefix("torch.") for a in arguments)
        options = {key: constants.pop(key) for key in OPTIONS if key in constants}
        self.seen.append(Launch(name, types, constants, options))


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Record what is launched meanwhile, in the place of launching it."""
    from apr_core.kernels.gpu import launch

    recorder = Recorder()
    with patch.object(launch, "phases", recorder):
        yield recorder.seen


class Absent:
    """A driver whose device is not there: kernels are compiled for it as for one that is."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> Any:
        """What is compiled for."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        """The first."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0


def built(launch: Launch, capability: int = 90) -> Any:
    """Compile a launch on the very path that launching takes: a process with the device finds it in Triton's cache."""
    import torch
    from triton.runtime.driver import driver

    from apr_core.kernels.gpu import phases

    driver.set_active(Absent(capability))
    arguments = (torch.empty(16, dtype=getattr(torch, a)) if isinstance(a, str) else a for a in launch.arguments)
    return getattr(phases, launch.name).warmup(*arguments, grid=(1,), **launch.constants, **launch.options)


def launches() -> Iterator[Launch]:
    """Record the launches of a 1.5B in every type (and of a 0.5B, whose recipe differs), as `launch` makes them."""
    import torch

    from apr_core.kernels.gpu import launch
    from apr_core.kernels.gpu.launch import Matrix, Mode, Norm, Pieces

    def f32(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, device="meta")

    def i32(count: int) -> torch.Tensor:
        return torch.empty(count, device="meta", dtype=torch.int32)

    def matrix(kind: str, rows: int, columns: int) -> Matrix:
        return Matrix(kind, rows, columns, torch.empty(1, device="meta", dtype=torch.uint8))

    norm, state = Norm(f32(99), 1e-6), i32(3)

    def record(case: str, weights: int, kind: str, call: Any) -> Launch:
        with recording() as seen:
            call()
        return replace(seen[0], case=case, weights=weights, stored=kind)

    exact, speed, three = Mode(3, True), Mode(1, True), (f32(9),) * 3
    for mode, said, kinds in ((exact, "exact", tuple(PLANES)), (speed, "speed", ("Q4_K", "Q6_K", "Q5_0"))):
        for kind in kinds:
            w = matrix(kind, 1536, 8960)
            yield record(
                f"down {kind} {said}", 32 * 32 * launch.tile_blocks(w, launch.shares(1536, 8960)), kind,
                lambda w=w, mode=mode: launch.residual(mode, w, *three, norm, *three, state),
            )  # fmt: skip
    for kind in ("Q4_K", "Q8_0", "BF16"):
        w = matrix(kind, 8960, 1536)
        yield record(f"gate_up {kind} exact", 0, kind, lambda w=w: launch.gate_up(exact, w, w, f32(9), norm, f32(9)))
    for case, heads, hidden, d, kinds, cache in (
        ("1.5B", 12, 1536, 128, ("Q4_K", "Q4_K", "Q6_K"), torch.float32),
        ("0.5B", 14, 896, 64, ("Q5_0", "Q5_0", "Q8_0"), torch.float16),
    ):
        weights = tuple(matrix(kind, rows * d, hidden) for kind, rows in zip(kinds, (heads, 2, 2), strict=True))
        keys = torch.empty(2, 1024, d, device="meta", dtype=cache)
        mode = exact if cache == torch.float32 else speed
        yield record(
            f"qkv {case} {'+'.join(kinds)}", 0, kinds[0],
            lambda w=weights, k=keys, m=mode, h=heads, d=d: launch.qkv(
                m, w, (f32(9),) * 3, f32(9), norm, (f32(9), f32(9)), state, f32(h, d), k, k
            ),
        )  # fmt: skip
        yield record(
            f"attention {case} {cache}", 0, "",
            lambda k=keys, m=mode, h=heads, d=d: launch.attention(
                m, f32(h, d), k, k, f32(9), Pieces.of(h, 2, 1024, d, torch.device("meta")), state, state
            ),
        )  # fmt: skip
    for kind in ("Q6_K", "Q8_0"):
        w = matrix(kind, 151936, 1536)
        yield record(f"head {kind}", 0, kind, lambda w=w: launch.head(exact, w, f32(9), norm, f32(9), f32(9), state))
        yield record(f"embed {kind}", 0, "", lambda w=w: launch.embed(exact, w, state, f32(9), norm, f32(9), f32(9)))
    yield record("pick", 0, "", lambda: launch.pick(exact, 151936, f32(9), state, state, state))
    for dtype in (torch.float32, torch.bfloat16):
        w = matrix("Q5_K", 8960, 1536)
        yield record(f"decode Q5_K {dtype}", 0, "", lambda w=w, t=dtype: launch.decode(w, t, 7, 64))


@dataclass(frozen=True)
class Code:
    """What the machine code of one launch shows."""

    case: str
    registers: int
    local_bytes: int
    wide_loads_before_wait: int
    dependent: bool
    per_weight: float | None
    budget: float | None

    def faults(self, launch: Launch) -> list[str]:
        """Say what does not hold."""
        found = []
        if self.local_bytes:
            found.append(f"{self.local_bytes} bytes of local memory, expected none")
        if launch.options.get("launch_pdl", False) != self.dependent:
            found.append("launched dependently without waiting, or the other way round")
        if launch.stored and self.registers > REGISTERS:
            found.append(f"{self.registers} registers, expected at most {REGISTERS}")
        if not self.wide_loads_before_wait >= launch.wide_loads:
            found.append(
                f"{self.wide_loads_before_wait} loads of 16 bytes before the wait, expected {launch.wide_loads}"
            )
        if self.per_weight is not None and self.budget is not None and not self.per_weight <= self.budget:
            found.append(f"{self.per_weight:.2f} instructions per weight, expected at most {self.budget:.2f}")
        return [f"{self.case}: {fault}" for fault in found]


def build_ahead(launch: Launch, capability: int) -> None:
    """As `built`, for a worker: what is compiled stays in Triton's cache."""
    built(launch, capability)


def compiled(launch: Launch) -> Code:
    """Compile one launch and read its machine code."""
    made = built(launch)
    usage, text = _disassembled(made.asm["cubin"])
    code = [_opcode(line) for line in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", text)]
    wait = next((at for at, name in enumerate(code) if name.startswith("ACQBULK")), None)
    budget = FORMATS[launch.stored].bits_per_weight / 8 * INSTRUCTIONS_PER_BYTE if launch.stored else None
    loop = _loop(text)
    per_weight = len(loop) * 32 * launch.options["num_warps"] / launch.weights if launch.weights and loop else None
    return Code(
        launch.case,
        int(re.search(r"REG:(\d+)", usage).group(1)),  # type: ignore[union-attr]
        int(re.search(r"LOCAL:(\d+)", usage).group(1)) + 4 * sum(name.startswith(("LDL", "STL")) for name in code),  # type: ignore[union-attr]
        sum(".128" in name for name in code[:wait] if name.startswith("LDG")),
        made.metadata.launch_pdl and wait is not None,
        per_weight,
        budget,
    )


def _disassembled(cubin: bytes) -> tuple[str, str]:
    import triton

    tool = str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, text = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    return usage, text


def _opcode(line: str) -> str:
    return re.sub(r"^@!?U?P[0-9T]+\s+", "", line.strip()).split()[0]


def _loop(text: str) -> list[str]:
    """Return the opcodes of the longest loop: from the target of a backward branch to the branch."""
    lines = [(int(at, 16), body) for at, body in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", text)]
    spans = [
        (int(target.group(1), 16), at)
        for at, body in lines
        if "BRA" in body and (target := re.search(r"BRA.*?(0x[0-9a-f]+)", body)) and int(target.group(1), 16) < at
    ]
    if not spans:
        return []
    first, last = max(spans, key=lambda span: span[1] - span[0])
    return [_opcode(body) for at, body in lines if first <= at <= last]


def main() -> int:
    """Print a line per launch, and every fault."""
    if not has_triton():
        print('NOT_RUN: triton is not installed; pip install --no-deps "$(grep ^triton constraints-gpu.txt)"')
        return 9
    cases = list(launches())
    if len(sys.argv) > 1:
        cases = [case for case in cases if sys.argv[1] in case.case]
    with ProcessPoolExecutor(2) as pool:
        found = list(pool.map(compiled, cases))
    faults = [fault for case, code in zip(cases, found, strict=True) for fault in code.faults(case)]
    for code in found:
        per = "" if code.per_weight is None else f"{code.per_weight:5.2f} of {code.budget:5.2f} instructions per weight"
        print(f"{code.case:32} {code.registers:3} registers  {code.wide_loads_before_wait:2} wide loads early  {per}")
    for fault in faults:
        print(f"FAULT {fault}")
    print(json.dumps({"compiled": len(found), "faults": len(faults)}))
    return 1 if faults or not found else 0


if __name__ == "__main__":
    sys.exit(main())
