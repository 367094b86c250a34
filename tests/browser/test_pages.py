"""
What a person sees, in a real browser: `make test-browser` (needs chromium; not part of CI's default run).

The pages are those of `reports/latest`, so run the suite first.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser

PAGES = ("index", "00_ground_truth", "10_contract_gates", "20_parity", "30_throughput")
NOTEBOOKS = PAGES[1:]

# Drives the application rather than its menus: a committed notebook has counts already, so the DOM proves nothing.
RUN_ALL = """async ([name, limit]) => {
  const app = window.jupyterapp; await app.restored;
  const w = await app.commands.execute('docmanager:open', {path: name, factory: 'Notebook'});
  await w.context.ready; await w.sessionContext.ready; app.shell.activateById(w.id); await w.revealed;
  await w.sessionContext.session.kernel.info;
  await app.commands.execute('notebook:clear-all-cell-outputs');
  const late = new Promise((_, no) => setTimeout(() => no(new Error('not done in ' + limit + ' s')), limit * 1000));
  const ok = await Promise.race([app.commands.execute('notebook:run-all-cells'), late]);
  const code = [...w.content.model.cells].filter(c => c.type === 'code' && c.sharedModel.source.trim());
  return {ok, unexecuted: code.filter(c => c.executionCount === null).length,
    errors: code.flatMap(c => c.outputs.toJSON()).filter(o => o.output_type === 'error').map(o => o.ename + o.evalue),
    claims: code.filter(c => (c.getMetadata('tags') || []).includes('claim'))
      .map(c => c.outputs.toJSON().map(o => o.text || '').join(''))};
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1200])
@pytest.mark.parametrize("page", PAGES)
def test_a_page_asks_for_nothing_and_fits(browser, root, page, width, scheme):
    """No request, no console error, no horizontal scrolling, on a telephone and on a desk."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab = context.new_page()
    requests, errors = [], []
    tab.on("request", lambda r: requests.append(r.url))
    tab.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    tab.on("pageerror", lambda e: errors.append(str(e)))
    address = (root / "reports" / "latest" / f"{page}.html").resolve().as_uri()
    tab.goto(address)

    assert [r for r in requests if not r.startswith("data:")] == [address]
    assert errors == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    context.close()


@pytest.fixture(scope="module")
def lab():
    """`apr lab` as a person starts it; yields the address with the token."""
    home = Path(tempfile.mkdtemp(prefix="lab-"))
    folders = {
        "JUPYTER_RUNTIME_DIR": "r",
        "JUPYTER_CONFIG_DIR": "c",
        "JUPYTERLAB_WORKSPACES_DIR": "w",
        "IPYTHONDIR": "i",
    }
    env = {**os.environ, **{k: str(home / v) for k, v in folders.items()}}
    command = [sys.executable, "-m", "apr_core", "lab", "pygmy", "--no-browser", "--out", str(home / "copy")]
    with (home / "log").open("w") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        start = time.monotonic()
        while not (found := list((home / "r").glob("jpserver-*.json"))):  # written when the port is bound
            assert server.poll() is None, (home / "log").read_text()
            assert time.monotonic() - start < 60, (home / "log").read_text()
            time.sleep(0.1)
        time.sleep(0.3)
        body = json.loads(found[0].read_text())
        yield f"{body['url']}lab?reset&token={body['token']}"
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(20)
    shutil.rmtree(home, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_a_notebook_runs_in_jupyterlab(browser, lab, notebook):
    """Run to its end by the application itself: no error, no unexecuted cell, a verdict in each claim cell."""
    tab = browser.new_page(viewport={"width": 1400, "height": 1000})
    tab.on("dialog", lambda d: d.accept())
    tab.goto(lab)
    tab.wait_for_function("window.jupyterapp", timeout=60_000)
    got = tab.evaluate(RUN_ALL, [f"{notebook}.ipynb", 240])

    assert (got["ok"], got["errors"], got["unexecuted"]) == (True, [], 0)
    assert len(got["claims"]) >= 7
    assert all(" CORROBORATED" in line or " NOT_RUN" in line for line in got["claims"])
    tab.close()
