"""The package's own objects in a notebook: visible, escaped, completed on tab, errors of one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import apr_core as apr
from apr_core.diagnose.cause import Diagnosis
from apr_core.errors import NotFound
from apr_core.model.trace import Trace
from apr_core.report import display


@pytest.fixture(scope="module")
def shell() -> Iterator[Any]:
    """An IPython shell with the displays installed."""
    from IPython.core.interactiveshell import InteractiveShell

    made = InteractiveShell.instance()
    assert display.install()
    yield made
    InteractiveShell.clear_instance()


@pytest.fixture
def shown(shell: Any) -> Callable[[object], tuple[str, str]]:
    """Text and HTML of an object, as a cell shows it."""

    def format_(thing: object) -> tuple[str, str]:
        data, _ = shell.display_formatter.format(thing)
        return data["text/plain"], data["text/html"]

    return format_


def test_a_checkpoint_and_its_admission(shown: Any, pygmy: Path) -> None:
    """Format, size, tensors with their places; admitted or every violation."""
    with apr.open_checkpoint(pygmy) as checkpoint:
        text, html = shown(checkpoint)
        assert f"safetensors, {len(checkpoint.tensors)} tensors" in text
        assert html.count("<tr>") == len(checkpoint.tensors) + 1
        assert "model.embed_tokens.weight" in html
    admission = apr.admit(pygmy)
    text, html = shown(admission)
    assert "admitted" in text
    assert f"{admission.measured} of {admission.expected} tensors measured" in html


def test_a_refused_subject(shown: Any, tmp_path: Path) -> None:
    """Every violation with gate, tensor and limit, and what the subject is held against."""
    from apr_core.zoo.acts import twin
    from apr_core.zoo.draft import put_together
    from apr_core.zoo.plants import DOWN

    draft = twin().copy()
    draft.weights[DOWN][...] = 0
    put_together(draft, tmp_path / "bad")
    subject = apr.obtain(str(tmp_path / "bad"))
    text, html = shown(subject)
    subject.close()
    assert f"refused, {len(subject.admission.violations)} violations" in text
    assert DOWN in html
    assert "no reference" in text


def test_a_trace_a_parity_report_and_a_diagnosis(shown: Any) -> None:
    """Names in order; the largest difference per name; the chain of causes."""
    trace = Trace()
    trace.record("layers.0.q", np.ones((2, 3), np.float32))
    trace.record("logits", np.ones((2, 5), np.float32))
    text, _ = shown(trace)
    assert text.index("layers.0.q") < text.index("logits")
    assert "2 x 5" in text
    text, html = shown(apr.compare(trace, {"logits": np.full((2, 5), 2, np.float32)}))
    assert "1 names compared" in text
    assert "least tolerance that holds 1 " in text
    assert "layers.0.q" in html
    text, html = shown(Diagnosis("unexplained", steps=(("Where <b>?", "in layer 3"),), needed="a reference"))
    assert "1. Where <b>? in layer 3" in text
    assert "Where &lt;b&gt;?" in html


def test_hostile_names(shown: Any, parse: Callable[[str], Any], strings: tuple[str, ...]) -> None:
    """A tensor's name is text."""
    trace = Trace()
    for name in strings:
        trace.record(name, np.zeros((1, 1), np.float32))
    text, html = shown(trace)
    assert parse(html).faults() == []
    assert "<script" not in html
    assert "\x1b" not in text


def test_keys_complete_on_tab(shell: Any, pygmy: Path) -> None:
    """As for dictionaries, names with dots included; a property is not evaluated, an odd name breaks nothing."""
    from IPython.core.completer import provisionalcompleter

    class Lazy:
        @property
        def names(self) -> dict[str, int]:
            raise AssertionError("a press of the tab key ran this")

    trace = Trace()
    trace.record("layers.0.q", np.ones((2, 3), np.float32))
    with apr.open_checkpoint(pygmy) as checkpoint, provisionalcompleter():
        shell.user_ns |= {"checkpoint": checkpoint, "trace": trace, "lazy": Lazy(), "apr": apr}

        def complete(text: str) -> list[str]:
            return [text[: c.start] + c.text for c in shell.Completer.completions(text, len(text))]

        assert complete('trace["lay') == ['trace["layers.0.q']
        assert complete("checkpoint.tensors['model.norm") == ["checkpoint.tensors['model.norm.weight"]
        assert complete("apr.open_ch") == ["apr.open_checkpoint"]
        complete('lazy.names["')
        complete('nothing["')


def test_errors_are_one_line(shell: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """What was expected and what to do; the cell still fails; any other error keeps its traceback."""
    shell.user_ns["apr"] = apr
    result = shell.run_cell("apr.open_checkpoint('/nowhere\\x1b[31m')")
    said = capsys.readouterr()
    assert isinstance(result.error_in_exec, NotFound)
    assert said.out.count("\n") <= 2
    assert "NotFound: no such file or folder: /nowhere" in said.out
    assert "\x1b[31m" not in said.out
    shell.run_cell("1 / 0")
    assert "Traceback" in capsys.readouterr().out
