"""The promises of the package itself: pins that agree, names that are stable, imports that are cheap."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

import pytest
import yaml

import apr_core


def pins(root) -> dict[str, str]:
    """Name -> version of constraints.txt."""
    lines = (root / "constraints.txt").read_text().splitlines()
    return {a.lower().replace("_", "-"): b for a, b in (x.split("==") for x in lines if x and not x.startswith("#"))}


def requirements(root) -> dict[str, list[str]]:
    """Group -> requirement strings of pyproject.toml."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    return {"core": project["dependencies"], **project["optional-dependencies"]}


def name_of(requirement: str) -> str:
    """The distribution name in a requirement."""
    return re.split(r"[<>=!\[; ]", requirement)[0].lower().replace("_", "-")


def test_every_requirement_that_ci_installs_is_pinned(root):
    """An unpinned one would change under us."""
    groups = requirements(root)
    wanted = {name_of(r) for g in ("core", "dev", "peers") for r in groups[g]}

    assert sorted(wanted - set(pins(root))) == []


def test_every_pin_satisfies_the_lower_bound_of_pyproject(root):
    """constraints.txt and pyproject.toml agree."""

    def version(text):
        return tuple(int(x) for x in re.findall(r"\d+", text)[:3])

    for group in ("core", "dev", "peers"):
        for requirement in requirements(root)[group]:
            low = re.search(r">=([\d.]+)", requirement)
            assert low, requirement
            assert version(pins(root)[name_of(requirement)]) >= version(low.group(1)), requirement


def test_the_conda_environment_uses_the_same_pins(root):
    """environment.yml takes python and pip from conda-forge, the rest by pip under constraints.txt."""
    conda = yaml.safe_load((root / "environment.yml").read_text())
    pip = next(d["pip"] for d in conda["dependencies"] if isinstance(d, dict))
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]

    assert conda["channels"] == ["conda-forge"]
    assert [d for d in conda["dependencies"] if isinstance(d, str)] == [f"python{project['requires-python']}", "pip"]
    assert pip == ["-c constraints.txt", f"torch=={pins(root)['torch']}", "-e .[dev,peers]"]


def test_triton_is_never_a_constraint_of_everybody(root):
    """The CUDA build of torch pins its own triton; a pin here would fight it."""
    assert "triton" not in pins(root)
    assert requirements(root)["gpu"] == ["triton"]
    assert "torch==2.11.0" in (root / "constraints-gpu.txt").read_text()
    assert "triton==3.6.0" in (root / "constraints-gpu.txt").read_text()


def test_public_names_resolve_and_none_hides_a_room(root):
    """An exported name equal to a room's would be replaced when the room is imported."""
    rooms = {p.name for p in (root / "apr_core").iterdir() if p.is_dir()} | {
        p.stem for p in (root / "apr_core").glob("*.py")
    }

    assert sorted(set(apr_core.__all__) & rooms) == []
    assert all(getattr(apr_core, name) is not None for name in apr_core.__all__)
    assert set(apr_core.__all__) <= set(dir(apr_core))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        apr_core.nonsense  # noqa: B018


def test_importing_the_package_imports_nothing_heavy():
    """`apr --help` and the preflight depend on it."""
    heavy = ("torch", "matplotlib", "tokenizers", "nbconvert", "papermill")
    code = f"import sys, apr_core, apr_core.falsify.rounds; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


def test_no_tracked_text_names_a_machine(root):
    """Paths of the machine it was written on do not belong in the repository."""
    texts = [p for p in root.rglob("*") if p.suffix in (".py", ".md", ".toml", ".sh", ".ipynb", ".yml") and p.is_file()]
    texts = [p for p in texts if not {".venv", "reports", ".git"} & set(p.relative_to(root).parts)]
    found = [str(p.relative_to(root)) for p in texts if f"{root}/" in p.read_text(encoding="utf-8")]

    assert len(texts) > 50
    assert found == []
