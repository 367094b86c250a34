"""nbval made honest: unix sockets instead of raced ports, a reference to contradict, a count of what was compared."""

from __future__ import annotations

import copy
import os
import re
import shutil
import tempfile
from collections import defaultdict
from pathlib import Path

import nbval.kernel
import pytest
from jupyter_client.manager import KernelManager
from nbval.plugin import IPyNbCell
from traitlets import default

from apr_core.falsify.claims import NOTEBOOKS, claims_of, load_claims

os.environ["SOURCE_DATE_EPOCH"] = "0"


class IpcKernelManager(KernelManager):
    """A kernel over unix sockets in a private folder: nothing to race for."""

    @default("transport")
    def _transport(self):
        return "ipc"

    @default("connection_file")
    def _connection_file(self):
        self._folder = tempfile.mkdtemp(prefix="apr-", dir=tempfile.gettempdir())  # a socket path holds 107 bytes
        return str(Path(self._folder) / "k.json")

    def shutdown_kernel(self, *args, **kwargs):
        super().shutdown_kernel(*args, **kwargs)
        shutil.rmtree(self._folder, ignore_errors=True)


nbval.kernel.KernelManager = IpcKernelManager  # nbval has no option for it
_compare = IPyNbCell.compare_outputs  # kept before it is replaced below
_doubted: set[str] = set()  # node ids of claim lines of which every mutation was seen
_claims = pytest.StashKey[set]()
_passed = pytest.StashKey[set]()
_config: list[pytest.Config] = []


def pytest_configure(config):
    """Remember the configuration: the report hook below is not given it."""
    _config[:] = [config]


def mutations(outputs):
    """Yield the reference outputs with another verdict, and with another digit in the last number of the line."""
    verdict = {"CORROBORATED": "FALSIFIED", "NOT_RUN": "CORROBORATED"}
    for change in (
        lambda text: re.sub("|".join(verdict), lambda m: verdict[m[0]], text, count=1),
        lambda text: re.sub(r"(\d)(\D*)$", lambda m: f"{(int(m[1]) + 1) % 10}{m[2]}", text),
    ):
        changed = copy.deepcopy(outputs)
        for output in changed:
            output.text = change(output.text)
        yield changed


def compare_and_doubt(self, test, ref, skip_compare=None):
    """Compare; then show that each mutation of the reference would have failed: on every claim line, in every run."""
    if not _compare(self, test, ref, skip_compare):
        return False
    if "claim" in self.cell.metadata.get("tags", []):
        for changed in mutations(ref):
            if _compare(self, test, changed, skip_compare):
                pytest.fail(f"{self.nodeid}: a mutated reference compared equal: {changed}")
        _doubted.add(self.nodeid)
        self.comparison_traceback = []
    return True


IPyNbCell.compare_outputs = compare_and_doubt


def why_not_comparable(item: IPyNbCell) -> str | None:
    """Say why nothing could contradict a claim cell; nbval itself would pass it."""
    tags = set(item.cell.metadata.get("tags", []))
    if not item.options["check"] or item.options["skip"]:
        return f"is not compared (tags {sorted(tags)})"
    text = "".join(o.get("text", "") for o in item.cell.outputs)
    if [(o.output_type, o.get("name")) for o in item.cell.outputs] != [("stream", "stdout")]:
        return "must have exactly one stdout output in the reference"
    if text.count("\n") != 1 or not text.endswith("\n") or "\r" in text or "\b" in text:
        return f"must print exactly one line, found {text!r}"
    if text.split(" ")[0] not in load_claims():
        return f"does not begin with a claim id: {text!r}"
    return None


def pytest_collection_modifyitems(config, items):
    """Refuse to start over a stripped reference, an uncompared claim cell, or a claim that is missing."""
    cells = [i for i in items if isinstance(i, IPyNbCell)]
    if not cells:
        return
    claims = [i for i in cells if "claim" in i.cell.metadata.get("tags", [])]
    bad = [f"{i.nodeid}: was not executed in the reference" for i in cells if i.cell.execution_count is None]
    bad += [f"{i.nodeid}: {why}" for i in claims if (why := why_not_comparable(i))]
    bad += [
        f"{i.nodeid}: holds injected parameters"
        for i in cells
        if "injected-parameters" in i.cell.metadata.get("tags", [])
    ]
    seen = defaultdict(list)
    for i in claims:
        seen[i.path.stem].append("".join(o.get("text", "") for o in i.cell.outputs).split(" ")[0])
    for notebook in {i.path.stem for i in cells} & set(NOTEBOOKS):
        if sorted(seen[notebook]) != sorted(c.id for c in claims_of(notebook)):
            bad.append(f"{notebook}: expected each claim of claims.toml once, found {seen[notebook]}")
    if bad:
        raise pytest.UsageError("\n".join(sorted(set(bad))))
    config.stash[_claims] = {i.nodeid for i in claims}
    config.stash[_passed] = set()


def pytest_runtest_logreport(report):
    """Count the claim lines that were compared and equal."""
    config = _config[0]
    if report.when == "call" and report.outcome == "passed" and report.nodeid in config.stash.get(_claims, ()):
        config.stash[_passed].add(report.nodeid)


def pytest_terminal_summary(terminalreporter, config):
    """Print the count: a green run that compared nothing would look the same otherwise."""
    if _claims in config.stash:
        n, of = len(config.stash[_passed]), len(config.stash[_claims])
        terminalreporter.write_line(f"nbval: {n} of {of} claim lines compared equal; mutations of {len(_doubted)} seen")


def pytest_sessionfinish(session, exitstatus):
    """Fail when a claim line was not compared or not doubted, or when there are fewer of them than claims."""
    stash = session.config.stash
    if exitstatus == 0 and _claims in stash and len(stash[_passed] & _doubted) < len(load_claims()):
        session.exitstatus = 1
