"""The pre-dispatch gate: every action on a model starts here, and diagnostics may stop here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from apr_core.contract.gates import (
    Violation,
    judge_cover,
    judge_keys,
    judge_layout,
    judge_tensor,
    load_gates,
    needs_spot_rows,
    undecodable,
)
from apr_core.contract.layout import EMBEDDING, HEAD, Geometry, expected_tensors, read_geometry, role_of
from apr_core.contract.stats import TensorStats, measure_all
from apr_core.contract.types import ADMIT, Admission
from apr_core.errors import LoadError
from apr_core.formats.checkpoint import Checkpoint, open_checkpoint

__all__ = ["Admission", "Progress", "admit"]

# bytes done, bytes in all, name of the tensor that was measured last
Progress = Callable[[int, int, str], None]


def admit(source: str | Path | Checkpoint, *, skip: bool = False, progress: Progress | None = None) -> Admission:
    """
    Judge a model file by every gate; all violations at once, none of them raised.

    Args:
        source: A path that `open_checkpoint` takes, or an opened checkpoint.
        skip: The explicit bypass. The gates still run and their violations are still listed, but a model can be built
            in spite of those that can be waived, and everything that comes out of it is marked.
        progress: Called after each tensor.

    Raises:
        NotFound, FormatError, UsageError, ReadWriteError: As `open_checkpoint`.
        LoadError: There is no config, so nothing says what the model should be.

    Cost: reads every weight once, on all cores; `make bench-gate` measures it.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    if checkpoint.config is None:
        raise LoadError(
            f"expected a config.json beside {checkpoint.path}, found none", advice="copy it from the model's own folder"
        )
    geometry, problems = geometry_of(checkpoint, checkpoint.config)
    # what the container says of itself can be judged whatever the config lacks
    found = judge_layout(checkpoint, geometry) if geometry else judge_cover(checkpoint) + judge_keys(problems)
    names = _judged(checkpoint, geometry)
    broken = {v.tensor for v in found if v.rule == "byte_difference"}
    stats, data = _measure(checkpoint, [name for name in names if name not in broken], progress)
    return Admission(
        checkpoint=checkpoint,
        geometry=geometry,
        stats=MappingProxyType(stats),
        violations=(*found, *data),
        gate_version=load_gates().version,
        extras=tuple(name for name in checkpoint.tensors if name not in names and not _beyond(name, geometry)),
        bypassed=skip,
        token=ADMIT,
    )


def geometry_of(checkpoint: Checkpoint, config: Mapping[str, object]) -> tuple[Geometry | None, tuple[str, ...]]:
    """Return the sizes, or None and what is wrong with them."""
    geometry, problems = read_geometry(config)
    if problems:
        return None, problems
    info = checkpoint.tensors.get(EMBEDDING)
    stated = any(key.endswith(".vocab_size") for key in checkpoint.metadata)
    if checkpoint.format != "gguf" or stated or info is None or info.shape[1:] != (geometry.hidden_size,):
        return geometry, ()
    # A GGUF without the key has its vocab_size from its list of tokens, which a padded embedding exceeds: legal.
    # More tokens than rows is not, and F-CONFIG-PLAUSIBLE-001 says so.
    return replace(geometry, vocab_size=info.shape[0]), ()


def _judged(checkpoint: Checkpoint, geometry: Geometry | None) -> list[str]:
    """List the tensors of the contract that are there, in the order of the model and not of the file."""
    if geometry is None:
        return sorted(name for name in checkpoint.tensors if role_of(name) is not None)
    wanted = [*expected_tensors(geometry), *([HEAD] if geometry.tied else [])]
    return [name for name in wanted if name in checkpoint.tensors]


def _beyond(name: str, geometry: Geometry | None) -> bool:
    """Return whether a tensor is of a layer past the last, or switched off: a violation, not an extra."""
    return geometry is not None and role_of(name) in geometry.architecture.roles


def _measure(
    checkpoint: Checkpoint, names: list[str], progress: Progress | None
) -> tuple[dict[str, TensorStats], list[Violation]]:
    """Measure and judge the values of the named tensors, one pass over each, on all cores."""
    stats: dict[str, TensorStats] = {}
    found: list[Violation] = []
    roles = {name: role for name in names if (role := role_of(name)) is not None}
    assert len(roles) == len(names)
    tensors = [(checkpoint.raw(name), needs_spot_rows(role)) for name, role in roles.items()]
    done, total = 0, sum(raw.info.nbytes for raw, _ in tensors)
    # closed at once when the caller's progress raises: no thread goes on with a file that nobody waits for
    with closing(measure_all(tensors)) as measured:
        for (raw, _), (name, role), now in zip(tensors, roles.items(), measured, strict=True):
            if isinstance(now, TensorStats):
                stats[name] = now
                found += judge_tensor(now, role)
            else:
                found += undecodable(name, role, str(now))
            done += raw.info.nbytes
            if progress is not None:
                progress(done, total, name)
    return stats, found
