"""Figures as data: what is drawn, where, under which words; a canvas is used only where bytes are the subject."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from apr_core.falsify.claims import load_claims
from apr_core.falsify.finding import Finding
from apr_core.report.figures import (
    FIGURES,
    decimate,
    label,
    plot,
    plot_layer_trace,
    plot_margins,
    plot_positions,
    plot_tensor_statistics,
    plot_throughput,
    scale_y,
)
from apr_core.report.material import by_position, least_time, limits_of, material, timings, traced, violations
from apr_core.report.style import adaptive, alt_text, caption_of, new_figure, style, svg


def made(claim: str, **given: Any) -> Finding:
    """A finding of a claim that holds only what a figure reads."""
    return Finding(0.0, 1, 1, claim=claim, **given)


def words(figure: Any) -> list[str]:
    """The legend, then what is written on the lines and points themselves."""
    axes = figure.axes[0]
    legend = axes.get_legend().get_texts() if axes.get_legend() else []
    return [t.get_text() for t in [*legend, *axes.texts]]


def lines(figure: Any, marker: str) -> list[Any]:
    """Lines with this marker."""
    return [line for line in figure.axes[0].lines if line.get_marker() == marker]


def test_the_registry_names_claims() -> None:
    """A figure of a claim that does not exist would never be drawn."""
    assert set(FIGURES) <= set(load_claims())


@pytest.mark.parametrize("claim", FIGURES)
def test_every_figure_speaks(claim: str, finding: Callable[[str], Finding]) -> None:
    """Axes with units, alternative text with numbers, a caption that says what would have looked different."""
    figure = plot(finding(claim))
    axes = figure.axes[0]
    assert "(" in axes.get_xlabel() or axes.get_xlabel() in (
        "layer",
        "tensor, in file order",
        "spot row, in file order",
    )
    assert "(" in axes.get_ylabel() or axes.get_xlabel().startswith("time (")
    assert any(c.isdigit() for c in alt_text(figure))
    assert caption_of(figure).startswith("Were the claim false, ")
    assert axes.lines


def test_findings_and_records_draw_the_same(finding: Callable[[str], Finding], good: Any) -> None:
    """What a notebook shows is what the page shows."""
    record = good.conclusion.by_claim["F-PAR-002"][2]
    assert alt_text(plot(record)) == alt_text(plot(finding("F-PAR-002")))


@pytest.mark.parametrize("drawer", dict.fromkeys(FIGURES.values()))
@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {k: np.array([]) for k in ("measured", "rel_l2", "kl", "margin", "decode_s")},
        {k: np.full(5, np.nan) for k in ("measured", "rel_l2", "kl", "margin", "decode_s")},
        {k: np.array(["a", "b"]) for k in ("measured", "rel_l2", "kl", "margin", "decode_s")},
    ],
)
def test_nothing_to_draw(drawer: Any, arrays: dict[str, Any]) -> None:
    """No arrays, empty ones, NaN alone, text: no figure and no error."""
    assert drawer(made("F-PAR-001", arrays=arrays, rows=[{"x": 1}])) is None


def test_claims_without_figure(finding: Callable[[str], Finding]) -> None:
    """Golden answers and counts are tables; an unknown claim has nothing."""
    assert plot(finding("F-GT-006")) is None
    assert plot(made("", arrays={"rel_l2": np.ones(3)})) is None


def test_refused_tensors_are_crossed_and_named() -> None:
    """The rows say which tensors the gate refused; both limits of the density gate stand."""
    rows = [
        {"on": "subject", "what": "lm_head.weight", "measured": 94.2, "limit": 50.0},
        {"on": "subject", "what": "config", "measured": None, "limit": 1.0},
        {"on": "counter-example", "what": "planted", "measured": 3.0, "limit": 1},
    ]
    values = np.array([1.0, 2.0, 94.2, 3.0])
    found = made("F-DATA-QUALITY-001", rows=rows, arrays={"measured": values, "limit": np.array([50.0, 80.0])})
    figure = plot_tensor_statistics(found)
    assert words(figure) == ["tensor", "refused", "gate's limit 50", "gate's limit 80", "lm_head.weight"]
    (cross,) = lines(figure, "X")
    assert (list(cross.get_xdata()), list(cross.get_ydata())) == ([2], [94.2])
    assert "limit 50 and 80; 1 refused." in alt_text(figure)
    assert violations(material(found)) == [("lm_head.weight", 94.2)]


def test_one_tensor_has_one_place() -> None:
    """Neither a fraction of a tensor nor of a count stands on an axis."""
    figure = plot_tensor_statistics(made("F-DATA-QUALITY-002", arrays={"measured": np.zeros(1)}))
    axes = figure.axes[0]
    figure.draw_without_rendering()
    assert not any("." in t.get_text() for t in [*axes.get_xticklabels(), *axes.get_yticklabels()])


def test_many_refused_tensors_stay_readable() -> None:
    """All are crossed, four are named."""
    rows = [{"on": "subject", "what": f"t{i}", "measured": float(i)} for i in range(30)]
    figure = plot_tensor_statistics(made("F-DATA-QUALITY-003", rows=rows, arrays={"measured": np.arange(30.0)}))
    assert len(lines(figure, "X")[0].get_xdata()) == 30
    assert len([word for word in words(figure) if re.fullmatch(r"t\d+", word)]) == 4


def test_trace_is_ordered_by_layer() -> None:
    """One line per operation over the layers, over the limit of each name; what has no layer stands at the end."""
    names = np.array(["layers.0.q", "layers.0.v", "layers.1.q", "layers.1.v", "logits"])
    values = np.array([[1e-7, 2e-7], [3e-7, 1e-7], [2e-7, 1e-7], [4e-2, 1e-7], [1e-7, 5e-3]])
    arrays = {"name": names, "rel_l2": values, "position": np.arange(2), "limit": np.array([1, 1, 1, 1, 2]) * 1e-6}
    figure = plot_layer_trace(made("F-PAR-002", arrays=arrays))
    axes = figure.axes[0]
    assert axes.get_yscale() == "log"
    assert words(figure) == ["q", "v", "logits", "limit 1"]
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert drawn["q"][1] == pytest.approx([0.2, 0.2])
    assert drawn["v"][1] == pytest.approx([0.3, 4e4])
    assert drawn["logits"] == ([2.0], pytest.approx([2.5e3]))
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0", "1", "end"]
    assert "largest difference is 4e+04 at layers.1.v, limit 1" in alt_text(figure)
    low, high = axes.get_ylim()
    assert low < 0.1
    assert high > 4e4


def test_trace_from_rows_and_beside_them() -> None:
    """Rows serve where arrays are absent or cut; arrays hold all names of a deep model."""
    rows = [{"name": "layers.0.q", "rel_l2": 1e-7}, {"name": "logits", "rel_l2": "broken"}]
    assert traced(material(made("F-PAR-002", rows=rows))) == (["layers.0.q"], np.array([1e-7]), None)
    names = np.array([f"layers.{i}.{o}" for i in range(28) for o in "qkv"])
    arrays = {"name": names, "rel_l2": np.full((84, 5), 1e-7)}
    figure = plot_layer_trace(made("F-PAR-002", rows=rows, arrays=arrays))
    assert len(figure.axes[0].get_xticklabels()) == 11
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()][:3] == ["0", "3", "6"]


def test_not_a_number_cannot_hide() -> None:
    """One NaN among good positions takes its name out of the drawing, and the caption says so."""
    arrays = {"name": np.array(["layers.0.q", "logits"]), "rel_l2": np.array([[1e-7, 1e-7], [np.nan, 1e-7]])}
    figure = plot_layer_trace(made("F-PAR-002", arrays=arrays))
    assert "1 of 2 values are not finite and not drawn." in caption_of(figure)
    by_place = by_position(material(made("F-PAR-003", arrays=arrays)))["rel_l2"]
    assert np.isnan(by_place).tolist() == [True, False]


def test_positions_take_the_worst_name() -> None:
    """An array [names, positions] is one series; the axis is the stored position."""
    values = np.array([[1e-7, 2e-3, 3e-7], [4e-7, 1e-7, 1e-7]])
    arrays = {"position": np.array([5, 6, 7]), "rel_l2": values, "limit": np.array([1e-5])}
    figure = plot_positions(made("F-PAR-003", arrays=arrays))
    points = figure.axes[0].lines[0]
    assert (list(points.get_xdata()), list(points.get_ydata())) == ([5, 6, 7], [4e-7, 2e-3, 3e-7])
    assert figure.axes[0].get_ylabel() == "rel_l2 (ratio)"
    assert words(figure) == ["limit 1e-05"]


def test_copies_are_series_of_their_own(finding: Callable[[str], Finding]) -> None:
    """Two copies, two colours; equal logits are hollow points on the floor, below the limit."""
    figure = plot_positions(finding("F-GT-002"))
    assert words(figure) == ["rel_l2_gguf", "rel_l2_apr", "limit 1e-06"]
    hollow = [line for line in figure.axes[0].lines if line.get_markerfacecolor() == "none"]
    assert {float(y) for line in hollow for y in line.get_ydata()} == {1e-9}
    assert len({line.get_markersize() for line in hollow}) == 2  # one around the other: both are seen
    assert "Hollow points on the floor are exactly equal." in caption_of(figure)
    assert figure.axes[0].get_ylim()[1] > 1e-6


def test_a_budget_of_the_mean_is_no_limit_of_a_point(finding: Callable[[str], Finding]) -> None:
    """KL per position against a reference: subject and copy, no line that single points need not keep."""
    figure = plot_positions(finding("F-PAR-008"))
    assert words(figure) == ["kl", "kl_copy"]
    assert figure.axes[0].get_ylabel() == "kl (nat)"


def test_flips_are_crossed(finding: Callable[[str], Finding]) -> None:
    """A decisive flip is a cross over the near-tie band, a tie that flipped a ring; without flips there is neither."""
    found = finding("F-PAR-005")
    figure = plot_margins(found)
    assert words(figure) == ["margin of the top token", "near-tie below", "decisive flip"]
    assert list(lines(figure, "X")[0].get_xdata()) == [5]
    margin, flipped = np.array([3.0, 0.01, 2.0, 1.0]), np.array([True, True, False, True])
    both = plot_margins(Finding(None, 4, 4, arrays={"margin": margin, "tau": np.full(4, 0.05), "flipped": flipped}))
    assert words(both) == ["margin of the top token", "near-tie below", "near-tie flip", "decisive flip"]
    assert list(lines(both, "X")[0].get_xdata()) == [0, 3]
    assert [list(line.get_xdata()) for line in both.axes[0].lines if line.get_label() == "near-tie flip"] == [[1]]
    assert alt_text(both).endswith("2 decisive flips, 1 near-tie flips.")
    assert caption_of(both).startswith("A cross is a token that was decided")
    bare = plot_margins(replace(found, arrays={"margin": np.array([1.0, 2.0])}))
    assert words(bare) == ["margin of the top token"]


def test_samples_against_the_ceiling(finding: Callable[[str], Finding]) -> None:
    """Each group with its samples and median; the ceiling bounds tokens, not whole prefills."""
    figure = plot_throughput(finding("F-THR-002"))
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["decode, a token", "prefill"]
    assert axes.get_xlabel() == "time (ms)"
    assert words(figure) == ["median", "ceiling of the machine"]
    ceiling = next(line for line in axes.lines if line.get_label() == "ceiling of the machine")
    assert np.allclose(ceiling.get_xdata(), 1000 / 320)
    assert max(ceiling.get_ydata()) < 0.5
    assert sum(len(line.get_xdata()) for line in axes.lines if line.get_marker() in "os") == 45
    assert "decode, a token: 40 samples" in alt_text(figure)


@pytest.mark.parametrize(("seconds", "unit"), [(2.0, "s"), (4e-3, "ms"), (3e-5, "µs")])
def test_time_is_written_in_its_size(seconds: float, unit: str) -> None:
    """The unit follows the samples; zeros and negatives are no durations."""
    samples = np.array([seconds, seconds * 1.1, 0.0, -1.0, np.nan])
    found = made("F-THR-002", arrays={"decode_s_per_token": samples})
    assert plot_throughput(found).axes[0].get_xlabel() == f"time ({unit})"
    assert timings(material(found))["decode_s_per_token"].size == 2
    assert caption_of(plot_throughput(found)).endswith("too short for the clock to see.")


def test_far_apart_groups_get_decades() -> None:
    """Prefill of seconds beside tokens of microseconds: a logarithmic axis that holds both."""
    arrays = {"decode_s_per_token": np.full(3, 1e-4), "prefill_s": np.full(3, 2.0)}
    axes = plot_throughput(made("F-THR-002", arrays=arrays)).axes[0]
    assert axes.get_xscale() == "log"
    assert axes.get_xlim()[0] < axes.lines[0].get_xdata()[0]


def test_what_no_sample_can_undercut() -> None:
    """From the rows; nothing where they hold nothing."""
    assert least_time(material(made("F-THR-008", rows=[{"delay_s": 0.5}]))) == ("planted delay", 0.5)
    assert least_time(material(made("F-THR-002", rows=[{"quantity": "ceiling_tok_s", "value": 0.0}]))) is None


def test_limits_come_from_the_record_or_the_claim() -> None:
    """Stored limits win; a claim that counts, or measures a ratio to a limit, has no limit for what is drawn."""
    assert limits_of(material(made("F-PAR-004"))) == [1e-8]
    assert limits_of(material(made("F-PAR-001"))) == []
    assert limits_of(material(made("F-GT-001"))) == []
    assert limits_of(material(made("F-PAR-001", arrays={"limit": np.array([2.0, 1.0, 2.0, np.nan])}))) == [1.0, 2.0]


def test_decimation_keeps_the_extremes() -> None:
    """Of 100,000 points the one bad value is drawn, and at most 500 in all."""
    values = np.random.default_rng(0).normal(size=100_000)
    values[77_777], values[5], values[9] = 50.0, -50.0, np.nan
    kept = decimate(values)
    assert len(kept) <= 500
    assert {77_777, 5} <= set(kept.tolist())
    assert 9 not in kept
    assert (np.diff(kept) > 0).all()
    assert decimate(np.array([1.0, np.inf, 2.0])).tolist() == [0, 2]
    arrays = {"rel_l2": np.abs(values) + 1}
    assert "points drawn: the extremes." in caption_of(plot_positions(made("F-PAR-001", arrays=arrays)))


@pytest.mark.parametrize(
    ("values", "limits", "scale"),
    [
        ([1.0, 2.0], [], "linear"),
        ([1.0, 100.0], [], "log"),
        ([1e-7, 2e-7], [1e-5], "log"),
        ([0.0, 0.0], [1e-5], "log"),
        ([0.0, 0.0], [0.0], "linear"),
        ([0.0, 0.0], [50.0, 80.0], "linear"),
        ([-1.0, 100.0], [], "linear"),
    ],
)
def test_scale(values: list[float], limits: list[float], scale: str) -> None:
    """Decades where values or limits span them, never where something is negative or everything is zero."""
    with style():
        _, axes = new_figure(3.0)
        axes.plot(values, "o")
        scale_y(axes, np.array(values), limits)
    assert axes.get_yscale() == scale
    low, high = axes.get_ylim()
    assert low <= min(values) or min(values) == 0
    assert high >= max(values)


def test_labels_fit_every_font(strings: tuple[str, ...]) -> None:
    """Names from a file are cut and ASCII; dollars are no mathematics; the whole draws without a warning."""
    names = [*strings, "层.权重", "$\\frac{$"]
    assert all(label(n, 40).isascii() for n in names)
    rows = [{"name": n, "rel_l2": 1e-3} for n in names]
    source = adaptive(svg(plot(made("F-PAR-002", rows=rows))))
    assert "<script" not in source
