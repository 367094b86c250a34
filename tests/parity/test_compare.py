"""What compare must see, and what it must not be fooled by."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from apr_core.errors import UsageError
from apr_core.falsify.verdict import Verdict
from apr_core.model.trace import mandatory_names
from apr_core.parity.compare import compare, compare_rows, split_name
from apr_core.parity.distribution import bootstrap, compare_logits, top_margin
from apr_core.parity.tolerances import QUANTISED_TAU

Side = dict[str, NDArray[np.float32]]
TOKENS, WIDTH = 63, 257


def healthy(seed: int = 0) -> Side:
    """A trace of two layers with odd sizes."""
    random = np.random.default_rng(seed)
    return {name: random.standard_normal((TOKENS, WIDTH)).astype(np.float32) for name in mandatory_names(2)}


def rounded(side: Side) -> Side:
    """The same trace as another float32 implementation would leave it."""
    random = np.random.default_rng(9)
    return {k: (v * (1 + 1e-7 * random.standard_normal(v.shape))).astype(np.float32) for k, v in side.items()}


def permute(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Shuffle all but each row's largest value: same norm, same mean, same top token."""
    out = x.copy()
    for row in out:
        rest = np.delete(np.arange(row.size), row.argmax())
        row[rest] = row[np.random.default_rng(1).permutation(rest)]
    return out


def test_rounding_passes_every_measure() -> None:
    """Two healthy sides are close by each measure, and everything is counted."""
    reference = healthy()
    report = compare(reference, rounded(reference), expect=mandatory_names(2))
    assert report.required_tolerance < 5e-7
    assert report.logits is not None
    assert report.logits.kl_max < 1e-12
    assert report.logits.top1_agreement == 1
    assert report.compared == report.expected == TOKENS * 14
    assert report.values == TOKENS * WIDTH * 14
    assert (report.missing, report.nonfinite, report.same_object) == ((), 0, False)
    assert report.first_divergence(1e-5) is None


@pytest.mark.parametrize("fault", [permute, np.negative, lambda x: x * np.float32(1.3), lambda x: x + np.float32(5)])
def test_faults_that_norms_or_cosines_miss(fault: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> None:
    """A permutation of equal norm, a sign, a scale and an offset are each far beyond any limit in rel_l2."""
    reference = healthy()["logits"]
    report = compare({"logits": reference}, {"logits": fault(reference)})
    assert not report.required_tolerance <= 0.1


def test_permutation_keeps_what_peers_compare() -> None:
    """The permuted logits have the norm and the top tokens of the reference, so the test above is about rel_l2."""
    reference = healthy()["logits"]
    candidate = permute(reference)
    assert np.allclose(np.linalg.norm(candidate, axis=1), np.linalg.norm(reference, axis=1))
    assert (candidate.argmax(axis=1) == reference.argmax(axis=1)).all()
    assert compare_logits(reference, candidate).kl_mean > 0.1


def test_kl_sees_a_scale_and_not_an_offset() -> None:
    """Why both KL and rel_l2 are measured: each is blind where the other sees."""
    x = healthy()["logits"]
    assert compare_logits(x, x * np.float32(1.3)).kl_mean > 0.01
    assert compare_logits(x, x + np.float32(5)).kl_max < 1e-10
    assert compare_rows("x", x, x * np.float32(1.3)).cosine.min() == pytest.approx(1)


def test_kl_by_hand() -> None:
    """KL, total variation and margin equal what the definition gives on two tokens of three."""
    p, q = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.5, 0.25]])
    found = compare_logits(np.log(p), np.log(q))
    assert found.kl_mean == pytest.approx(0.25 * math.log(2))
    assert found.total_variation[0] == pytest.approx(0.25)
    assert found.margin[0] == pytest.approx(math.log(2))
    assert found.kl_median == found.kl_p999 == found.kl_max


def test_kl_of_rounding_is_exact_to_the_last_digits() -> None:
    """At rounding level KL agrees with extended precision far below what the plain sum of p ln(p/q) leaves."""
    random = np.random.default_rng(0)
    x = 3 * random.standard_normal((8, 20_000))
    y = x * (1 + 1e-7 * random.standard_normal(x.shape))

    def log_p(z: NDArray[np.float64]) -> NDArray[np.longdouble]:
        wide = z.astype(np.longdouble)
        return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))

    exact = (np.exp(log_p(x)) * (log_p(x) - log_p(y))).sum(axis=1)
    assert np.abs(compare_logits(x, y).kl - exact).max() < 1e-16


def test_swapped_layers_are_named_in_order() -> None:
    """The first divergence is the first in order of computation, not the largest."""
    reference = healthy()
    candidate = rounded(reference)
    candidate["layers.0.k"], candidate["layers.1.k"] = candidate["layers.1.k"], candidate["layers.0.k"]
    candidate["logits"] = -candidate["logits"]
    first = compare(reference, candidate).first_divergence(1e-5)
    assert first is not None
    assert (first.layer, first.op, first.position) == (0, "k", 0)
    assert 0 < first.largest_before < 1e-6
    assert "layers.0.k at position 0" in str(first)
    assert compare(reference, candidate).only("logits").first_divergence(1e-5).largest_before == -1


def test_first_divergence_names_the_position() -> None:
    """A fault from position 17 on is found there."""
    reference = healthy()
    candidate = rounded(reference)
    candidate["layers.1.q"][17:] += 1
    first = compare(reference, candidate).first_divergence(1e-5)
    assert first is not None
    assert (first.name, first.position) == ("layers.1.q", 17)


def test_truncated_candidate_is_not_paired_off() -> None:
    """A side that stops early is missing, never compared as far as it goes."""
    reference = healthy()
    candidate = {name: x[:-1].copy() for name, x in reference.items()}
    report = compare(reference, candidate)
    assert (report.compared, report.expected) == (0, TOKENS * 14)
    assert math.isnan(report.required_tolerance)
    assert report.logits is None
    assert "[63, 257] in the reference, [62, 257] in the candidate" in report.missing[0]


@pytest.mark.parametrize("side", [0, 1])
def test_absent_name_is_missing(side: int) -> None:
    """A name that one side lacks is listed, whichever side."""
    sides = [healthy(), rounded(healthy())]
    del sides[side]["layers.1.v"]
    report = compare(*sides)
    assert report.missing == (f"layers.1.v: absent in the {('reference', 'candidate')[side]}",)
    assert report.compared == report.expected - TOKENS


def test_name_absent_on_both_sides_is_missing() -> None:
    """Two traces that both lack a layer do not agree completely."""
    reference = {k: v for k, v in healthy().items() if not k.startswith("layers.1")}
    report = compare(reference, rounded(reference), expect=mandatory_names(2))
    assert len(report.missing) == 6
    assert "absent in the reference and the candidate" in report.missing[0]
    assert report.expected == TOKENS * 14


def test_nothing_against_nothing_compares_nothing() -> None:
    """Two empty sides give no number that could pass."""
    report = compare({}, {})
    assert (report.compared, report.expected) == (0, 0)
    assert not report.required_tolerance <= 1e9


@pytest.mark.parametrize("empty", [np.zeros((5, 7), np.float32), np.zeros((0, 7), np.float32)])
def test_dead_reference_counts_for_nothing(empty: NDArray[np.float32]) -> None:
    """A reference of zeros, or without rows, is not agreement."""
    report = compare({"x": empty}, {"x": empty.copy()})
    assert report.compared == 0
    assert len(report.missing) == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_nonfinite_fails_every_limit(value: float, side: int) -> None:
    """One value that is not finite, on either side, is counted and passes no limit."""
    sides = [healthy(), rounded(healthy())]
    sides[side]["logits"][3, 5] = value
    report = compare(*sides)
    assert report.nonfinite == 1
    assert report.required_tolerance == math.inf
    first = report.first_divergence(1e30)
    assert side == 0 or (first is not None and first.position == 3)
    assert report.logits is not None
    assert not report.logits.kl_max <= 1e-8


def test_zero_row_against_zero_row_is_equal() -> None:
    """A zero row equals a zero row and nothing else."""
    x = np.array([[0, 0], [1, 2], [0, 0]], np.float32)
    y = np.array([[0, 0], [1, 2], [0, 1]], np.float32)
    assert compare_rows("x", x, y).rel_l2.tolist() == [0, 0, math.inf]


@pytest.mark.parametrize("wrap", [lambda x: x, dict, lambda x: {k: v[:] for k, v in x.items()}])
def test_same_object_is_flagged(wrap: Callable[[Side], Side]) -> None:
    """The same mapping, a copy of the mapping, and views of the arrays are one side, not two."""
    reference = healthy()
    assert compare(reference, wrap(reference)).same_object


def test_near_tie_is_listed_apart() -> None:
    """A flip inside tau counts for nothing; the same flip outside it refutes."""
    reference = np.array([[1.00, 1.01, 0], [5, 0, 0]], np.float32)
    candidate = np.array([[1.01, 1.00, 0], [5, 0, 0]], np.float32)
    tie = compare_logits(reference, candidate, 0.02)
    assert (tie.near_tie_flips, tie.decisive_flips, tie.top1_agreement) == ((0,), (), 1)
    sharp = compare_logits(reference, candidate, 0.005)
    assert (sharp.near_tie_flips, sharp.decisive_flips, sharp.top1_agreement) == ((), (0,), 0.5)
    assert math.isnan(compare_logits(reference, candidate, 99).top1_agreement)
    assert compare_logits(reference, candidate, np.array([0.02, 9.0])).decisive.tolist() == [False, False]


def test_top_k_overlap_counts_shared_tokens() -> None:
    """Ten tokens of which two were replaced overlap by eight tenths."""
    reference = np.arange(40, 0, -1, dtype=np.float32)[None, :]
    candidate = reference.copy()
    candidate[0, [8, 9]] = -1
    assert compare_logits(reference, candidate).top_k_overlap.tolist() == [0.8]


def test_statistics_do_not_depend_on_chunks() -> None:
    """More rows than one chunk holds give the same as the formula on the whole, in float64."""
    random = np.random.default_rng(3)
    x, y = (random.standard_normal((97, 11)).astype(np.float32) for _ in range(2))
    wide = (x.astype(np.float64), y.astype(np.float64))
    found = compare_rows("x", x, y)
    assert found.rel_l2 == pytest.approx(np.linalg.norm(wide[1] - wide[0], axis=1) / np.linalg.norm(wide[0], axis=1))
    assert found.nmse == pytest.approx(((wide[1] - wide[0]) ** 2).sum() / (wide[0] ** 2).sum())
    assert found.max_abs == pytest.approx(np.abs(wide[1] - wide[0]).max(axis=1))
    assert (found.layer, found.op, found.worst) == (None, "x", int(found.rel_l2.argmax()))


def test_only_cuts_values_and_coverage() -> None:
    """A part of a report expects and misses only what it speaks about."""
    reference = healthy()
    candidate = rounded(reference)
    del candidate["final_hidden"]
    report = compare(reference, candidate)
    assert report.only("logits").missing == ()
    assert report.only("logits").expected == TOKENS
    assert report.only("final_hidden").missing == report.missing
    assert report.only("final_hidden").logits is None


def test_table_shows_the_tolerance_that_would_have_passed() -> None:
    """Each row carries its worst position and the smallest limit that holds."""
    reference = healthy()
    candidate = rounded(reference)
    candidate["layers.1.q"][40] *= 2
    row = next(r for r in compare(reference, candidate).table() if r["name"] == "layers.1.q")
    assert (row["layer"], row["op"], row["position"]) == (1, "q", 40)
    assert row["required_tolerance"] == row["rel_l2"] == pytest.approx(1)


def test_flat_array_is_refused() -> None:
    """An array without a token axis is a mistake of the caller, said so."""
    with pytest.raises(UsageError, match=r"\[tokens, dim\]"):
        compare({"x": np.zeros(3, np.float32)}, {})


def test_small_parts() -> None:
    """Names split at the layer; a vocabulary of one has no second token."""
    assert split_name("layers.12.attn_output") == (12, "attn_output")
    assert split_name("logits") == (None, "logits")
    assert top_margin(np.zeros((2, 1), np.float32)).tolist() == [math.inf, math.inf]


def test_a_report_is_judged_in_the_order_of_what_can_go_wrong() -> None:
    """One object, nothing compared, NaN, a divergence, a decisive flip, a lost name, too few positions."""
    side = healthy()
    other = rounded(side)

    def verdict(candidate: Side, limit: float = 1e-5, fewest: int = 1, reference: Side = side) -> tuple[Verdict, str]:
        return compare(reference, candidate, expect=mandatory_names(2)).judge(limit, fewest=fewest)

    assert verdict(other) == (Verdict.CORROBORATED, "")
    assert verdict(side) == (Verdict.INCONCLUSIVE, "both sides are one object")
    assert verdict({}) == (
        Verdict.INCONCLUSIVE,
        "nothing was compared: layers.0.q: absent in the candidate; layers.0.k: absent in the candidate; "
        "layers.0.v: absent in the candidate",
    )
    bad = {k: v.copy() for k, v in other.items()}
    bad["layers.1.k"][3, 4] = np.nan
    assert verdict(bad)[0] is Verdict.FALSIFIED
    assert "not finite" in verdict(bad)[1]
    assert verdict({**other, "layers.1.v": -other["layers.1.v"]})[1].startswith("first divergence: layers.1.v at posi")
    swapped = {**other, "logits": np.roll(other["logits"], 1, axis=1)}
    assert verdict(swapped, limit=9.0)[1] == "another top token at 63 decisive positions, the first at 0"
    lost = {k: v for k, v in other.items() if k != "layers.0.v"}
    assert verdict(lost) == (Verdict.INCONCLUSIVE, "layers.0.v: absent in the candidate")
    assert verdict(other, fewest=64) == (Verdict.INCONCLUSIVE, "63 positions, at least 64 are needed")


def test_limits_of_single_names() -> None:
    """A name within its own limit passes beside one that is not; a name without a limit is held to nothing at all."""
    side = healthy()
    noisy = rounded(side)
    limits = dict.fromkeys(side, 1e-5) | {"layers.1.k": 1e-12}
    first = compare(side, noisy).first_divergence(limits)
    assert first is not None
    assert first.name == "layers.1.k"
    del limits["layers.0.k"]
    first = compare(side, noisy).first_divergence(limits)
    assert first is not None
    assert first.name == "layers.0.k"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda x: x[:-1], r"\[63, 257\] in the reference, \[62, 257\] in the candidate"),
        (lambda x: x[:, :-1], r"\[63, 257\] in the reference, \[63, 256\] in the candidate"),
        (lambda x: x.astype(np.float16), "float16 in the candidate, expected float32 or float64"),
        (lambda x: x.astype(np.int32), "int32 in the candidate"),
        (lambda x: x[:0], r"\[0, 257\] in the candidate"),
    ],
)
def test_other_lengths_vocabularies_and_types_are_not_overlapped(change: Callable[[object], object], why: str) -> None:
    """The overlap of the two would agree; nothing of it is compared, and the reason says why."""
    x = healthy()["logits"]
    report = compare({"logits": x}, {"logits": change(x.copy())})  # type: ignore[dict-item]
    verdict, reason = report.judge(1e-5)
    assert (verdict, report.compared) == (Verdict.INCONCLUSIVE, 0)
    assert re.search(why, reason)


def test_optional_names_are_compared_where_both_have_them() -> None:
    """And demanded of nobody."""
    side, other = healthy(), rounded(healthy())
    x = side["logits"]
    report = compare({**side, "layers.0.mlp": x}, other)
    assert report.judge(1e-5) == (Verdict.CORROBORATED, "")
    both = compare({**side, "layers.0.mlp": x}, {**other, "layers.0.mlp": -x})
    assert both.judge(1e-5)[1].startswith("first divergence: layers.0.mlp")


def test_perplexity_and_change_of_probability_by_hand() -> None:
    """A vocabulary of two, 3/4 and 1/4; the candidate says one half each; behind the last nothing follows."""
    p = np.log(np.array([[3.0, 1.0], [1.0, 3.0], [3.0, 1.0]]))
    q = np.zeros((3, 2))
    found = compare_logits(p, q, tokens=np.array([0, 0, -1]))
    assert found.perplexity == pytest.approx(((4 / 3 * 4) ** 0.5, 2.0))
    assert found.delta_p == pytest.approx([-0.25, 0.25, -0.25])
    assert found.delta_p_rms == pytest.approx(0.25)
    assert all(math.isnan(x) for x in compare_logits(p, q).perplexity)


def test_the_interval_of_the_mean_holds_it_and_can_be_repeated() -> None:
    """Wider at a higher level; NaN stays NaN."""
    found = compare_logits(healthy(1)["logits"], healthy(2)["logits"])
    low, high = found.kl_interval()
    assert low < found.kl_mean < high
    assert found.kl_interval() == (low, high)
    wide = found.kl_interval(0.999)
    assert wide[0] < low < high < wide[1]
    assert all(math.isnan(x) for x in bootstrap(np.array([1.0, np.nan])))


def test_the_norms_rule_is_a_column_and_is_blind() -> None:
    """A permutation and a change of sign leave the specification's difference of norms at zero."""
    x = healthy()["logits"]
    for blind in (permute(x), -x):
        assert compare_logits(x, blind).norm_difference.max() < 1e-6
    assert compare_logits(x, x * np.float32(1.5)).norm_difference == pytest.approx(0.5, rel=1e-5)


def test_noise_of_a_fiftieth_flips_ties_and_nothing_that_is_decided() -> None:
    """K5 of the field: 0.02 on every logit overturns near-ties alone; with no band for them it would be an alarm."""
    random = np.random.default_rng(5)
    reference = random.standard_normal((4096, 64)).astype(np.float32)
    candidate = reference + random.uniform(-0.02, 0.02, reference.shape).astype(np.float32)
    found = compare_logits(reference, candidate, QUANTISED_TAU)
    assert len(found.near_tie_flips) > 20
    assert (found.decisive_flips, found.top1_agreement) == ((), 1)
    assert len(compare_logits(reference, candidate).decisive_flips) == len(found.near_tie_flips)
