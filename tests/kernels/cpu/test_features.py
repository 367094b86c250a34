"""Which path is taken, and what is said when it cannot be."""

from __future__ import annotations

import pytest

from apr_core.errors import Unavailable, UsageError
from apr_core.kernels.cpu import features


def test_the_fastest_available_path_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a wish, the first of those that run here."""
    monkeypatch.delenv(features.VARIABLE, raising=False)
    assert features.choose_path() == features.available_paths()[0]


def test_a_parameter_beats_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Either forces the portable path; the parameter is asked first."""
    monkeypatch.setenv(features.VARIABLE, "nonsense")
    assert features.choose_path("portable") == "portable"
    monkeypatch.setenv(features.VARIABLE, "portable")
    assert features.choose_path() == "portable"


def test_an_unknown_path_is_refused() -> None:
    """A misspelt wish must not silently become the default."""
    with pytest.raises(UsageError, match="avx512vnni, portable, found 'avx'"):
        features.choose_path("avx")


def test_a_processor_without_avx512_gets_the_portable_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """And asking for the other names what is missing."""
    monkeypatch.setattr(features, "instructions", lambda: frozenset({"avx2", "fma", "f16c"}))
    assert features.available_paths() == ("portable",)
    with pytest.raises(Unavailable, match="avx512vnni, which this processor lacks"):
        features.choose_path("avx512vnni")


def test_without_numba_there_is_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what still works."""
    monkeypatch.setattr(features, "has_numba", lambda: False)
    assert features.available_paths() == ()
    with pytest.raises(Unavailable, match="use --precision reference"):
        features.choose_path()


@pytest.mark.parametrize(("name", "ahead"), [("znver5", 4096), ("znver4", 0), ("generic", 0)])
def test_memory_is_asked_for_ahead_where_that_was_measured(
    name: str, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the processor that needs it, not on the one that it hurts, and on no other."""
    from llvmlite import binding

    monkeypatch.setattr(binding, "get_host_cpu_name", lambda: name)
    assert features.bytes_ahead.__wrapped__() == ahead


def test_nothing_is_asked_for_ahead_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nobody to say which processor this is."""
    monkeypatch.setattr(features.importlib.util, "find_spec", lambda name: None)
    assert features.bytes_ahead.__wrapped__() == 0


def test_instructions_that_numba_is_told_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels for another processor must not hold what it lacks."""
    monkeypatch.setenv("NUMBA_CPU_FEATURES", "+avx2, +fma,-avx512f")
    assert features.instructions.__wrapped__() == {"avx2", "fma"}
    monkeypatch.delenv("NUMBA_CPU_FEATURES")
    monkeypatch.setenv("NUMBA_CPU_NAME", "generic")
    assert features.instructions.__wrapped__() == frozenset()


def test_instructions_are_empty_where_nobody_can_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """No llvmlite, or a processor that it does not know: no instruction is assumed."""
    features.instructions.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(features.importlib.util, "find_spec", lambda name: None)
        assert features.instructions() == frozenset()
    features.instructions.cache_clear()
    from llvmlite import binding

    def unknown() -> dict[str, bool]:
        raise RuntimeError("unknown processor")

    with monkeypatch.context() as patch:
        patch.setattr(binding, "get_host_cpu_features", unknown)
        assert features.instructions() == frozenset()
    features.instructions.cache_clear()


def test_cores_are_those_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Affinity where there is one, else the machine's count."""
    assert features.available_cores() >= 1
    monkeypatch.delattr(features.os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(features.os, "cpu_count", lambda: None)
    assert features.available_cores() == 1


def test_a_compiler_that_an_import_hook_refuses_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for it raises there, and the reference runs all the same."""

    def refuse(name: str) -> None:
        raise ModuleNotFoundError(f"{name} is denied", name=name)

    monkeypatch.setattr("importlib.util.find_spec", refuse)
    assert not features.has_numba.__wrapped__()
