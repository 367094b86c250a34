"""The published schema: generated from the records, current, and agreed on by a foreign validator."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any, Literal

import jsonschema
import pytest

from apr_core.falsify.verdict import Verdict
from apr_core.report.schema import parse, schema_of
from apr_core.report.summary import Summary, summarise

PUBLISHED = files("apr_core.report").joinpath("summary.schema.json")


@dataclass(frozen=True)
class Inner:
    """One thing."""

    x: float | None
    kind: Literal["a", "b"]


@dataclass(frozen=True)
class Outer:
    """Many things."""

    verdict: Verdict
    inner: Mapping[str, Inner]
    names: tuple[str, ...]
    other: Mapping[str, Any]


GOOD = {"verdict": "FALSIFIED", "inner": {"k": {"x": 1, "kind": "a"}}, "names": ["n"], "other": {"deep": [1]}}


def test_the_committed_schema_is_current() -> None:
    """Changed records change the schema: write it again with `python -m apr_core.report.schema`."""
    assert json.loads(PUBLISHED.read_text("utf-8")) == schema_of(Summary)


def test_a_summary_is_valid_by_a_foreign_validator(good: Any, hostile: Any) -> None:
    """A clean run and a hostile one; one key more, or one verdict of another word, is invalid."""
    jsonschema.Draft202012Validator.check_schema(schema_of(Summary))
    check = jsonschema.Draft202012Validator(schema_of(Summary))
    for run in (good, hostile):
        body = json.loads(json.dumps(asdict(summarise(run.folder, run.conclusion, run.notebooks))))
        check.validate(body)
        assert parse(Summary, body) == parse(Summary, json.loads(json.dumps(body)))
        assert not check.is_valid({**body, "more": 1})
        assert not check.is_valid({**body, "verdict": "PASSED"})


def test_there_and_back() -> None:
    """The record that the JSON stands for, with its own types."""
    record = parse(Outer, GOOD)
    assert record == Outer(Verdict.FALSIFIED, {"k": Inner(1.0, "a")}, ("n",), {"deep": [1]})
    assert isinstance(record.inner["k"].x, float)
    jsonschema.validate(GOOD, schema_of(Outer))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ({"verdict": "PASSED"}, "PASSED"),
        ({"names": "n"}, r"\$\.names"),
        ({"names": [3]}, r"\$\.names\[0\]: expected str, found 3"),
        ({"inner": {"k": {"x": True, "kind": "a"}}}, r"\$\.inner\.k\.x: expected float, found True"),
        ({"inner": {"k": {"x": None, "kind": "c"}}}, r"\$\.inner\.k\.kind"),
        ({"inner": {"k": {"x": None}}}, r"missing or unknown \['kind'\]"),
        ({"inner": {"k": 3}}, "missing or unknown int"),
        ({"extra": 1}, "extra"),
    ],
)
def test_what_the_schema_refuses_the_parser_refuses(edit: dict[str, Any], words: str) -> None:
    """Both read the same types; the parser names the place."""
    body = {**GOOD, **edit}
    assert not jsonschema.Draft202012Validator(schema_of(Outer)).is_valid(body)
    with pytest.raises(ValueError, match=words):
        parse(Outer, body)
