"""What notebook 00 shows beside its claims, and its figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from apr_core.engines.subject import Subject
from apr_core.falsify.finding import Finding
from apr_core.falsify.verdict import NotRun
from apr_core.report import conversion
from apr_core.report.display import show_finding
from apr_core.report.style import alt_text
from apr_core.rosetta import copies, show
from apr_core.rosetta.convert import convert

Edit = Callable[..., Path]


def test_round_trips_have_one_fingerprint(tiny: Path, open_subject: Callable[..., Subject]) -> None:
    """Five files, one fingerprint; the figure says so in words."""
    found = show.round_trips(open_subject(tiny))
    assert [row["step"] for row in found.rows] == [
        "safetensors (subject)",
        "gguf",
        "back from gguf",
        "apr",
        "back from apr",
    ]
    assert len({row["fingerprint"] for row in found.rows}) == 1
    figure = conversion.plot_round_trip(found)
    assert figure is not None
    assert "5 of 5 steps have the fingerprint of the start" in alt_text(figure)
    assert "5 of 5 files" in show_finding(found).text


def test_a_broken_converter_breaks_the_line(tiny: Path, open_subject: Callable[..., Subject]) -> None:
    """One other value in the APR copy: its step and the way back have another fingerprint."""

    def spoil(path: Path) -> None:
        from apr_core.zoo.words import rewrite

        if path.suffix == ".apr":
            rewrite(
                path, lambda _, held: held["model.norm.weight"][2].__setitem__(0, held["model.norm.weight"][2][0] ^ 1)
            )

    with copies.tampered(spoil):
        found = show.round_trips(open_subject(tiny))
    assert [row["same"] for row in found.rows] == [True, True, True, False, False]
    figure = conversion.plot_round_trip(found)
    assert figure is not None
    assert "3 of 5 steps" in alt_text(figure)


def test_the_passport_of_a_plain_model_is_that_of_its_quantised_copy(
    pygmy: Path, open_subject: Callable[..., Subject]
) -> None:
    """Pygmy in Q4_K_M: K-quants alone, 20 to 40 dB from the source; vectors are exact."""
    found = show.quant_passport(open_subject(pygmy))
    by_type = {str(row["type"]) for row in found.rows}
    assert by_type == {"Q4_K", "Q6_K", "F32"}
    measured = [float(str(row["sqnr_db"])) for row in found.rows if row["sqnr_db"] is not None]
    assert len(measured) == 15
    assert 20 < min(measured) < max(measured) < 45
    assert "every matrix has the type that the label's rules give it" in found.detail
    figure = conversion.plot_passport(found)
    assert figure is not None
    assert "Q4_K: 73.1 % of the parameters" in alt_text(figure)


def test_the_passport_of_a_quantised_subject_is_its_own(
    tiny: Path, tmp_path: Path, open_subject: Callable[..., Subject]
) -> None:
    """With a reference its distances are measured, without one there are none."""
    path = convert(tiny, tmp_path / "q.gguf", quantize="Q8_0")
    near = show.quant_passport(open_subject(path, tiny))
    alone = show.quant_passport(open_subject(path))
    assert any(row["sqnr_db"] is not None for row in near.rows)
    assert all(row["sqnr_db"] is None for row in alone.rows)
    assert conversion.plot_passport(alone) is not None


def test_a_refused_subject_and_one_without_copies_still_give_a_page(
    edited: Edit, open_subject: Callable[..., Subject]
) -> None:
    """A finding that says why, and no figure."""
    refused = open_subject(edited(lambda held: held["model.norm.weight"].fill_(np.nan)))
    for measure in (show.round_trips, show.quant_passport):
        found = measure(refused)
        assert found.not_run is NotRun.REFUSED
        assert "not shown: refused by the contract" in show_finding(found).text
    four = {"eos_token_id": [317, 1, 2, 3]}
    stuck = show.round_trips(open_subject(edited(**{"config.json": four, "generation_config.json": four})))
    assert "can name 3 end tokens" in stuck.inconclusive


@pytest.mark.parametrize("plot", [conversion.plot_round_trip, conversion.plot_passport])
def test_nothing_to_draw_is_no_figure(plot: Callable[[Finding], object]) -> None:
    """An empty finding is not a picture of nothing."""
    assert plot(Finding(None, 0, 0)) is None
