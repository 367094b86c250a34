"""The defects of model files: each applies, damages only a copy, and is killed by what its table says."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from apr_core.contract.admit import admit
from apr_core.diagnose.cause import CAUSES
from apr_core.engines.load import tokenizer_of
from apr_core.errors import AprError
from apr_core.falsify.claims import claims_of, load_claims
from apr_core.formats.checkpoint import open_checkpoint
from apr_core.model.config import Qwen2Config
from apr_core.zoo import containers, edits, files, plants
from apr_core.zoo.draft import put_together, take_apart
from apr_core.zoo.registry import NotApplicable, Zoo

# Claims of the notebook that are no gates of a file: about the gates themselves, and about generated text.
ELSEWHERE = ("F-BENIGN-001", "F-ADMIT-001", "F-LAYOUT-CONTRACT-005")
GATES = [c.id for c in claims_of("10_contract_gates") if c.id not in ELSEWHERE]
BY_ID = {d.id: d for d in files.DEFECTS}


@pytest.fixture(scope="module")
def healthy(pygmy):
    """The bundled model, taken apart once."""
    with open_checkpoint(pygmy) as checkpoint:
        return take_apart(checkpoint)


def gates_of(path) -> set[str]:
    """The gates that refuse a file; ``preflight`` when it does not open, or is admitted and makes no model."""
    try:
        admission = admit(path)
        with admission.checkpoint:
            if not admission.violations:
                Qwen2Config.of(admission.require())
                tokenizer_of(admission.require())
    except AprError:
        return {"preflight"}
    return {v.gate for v in admission.violations}


@pytest.mark.parametrize("defect", files.DEFECTS, ids=lambda d: d.id)
def test_the_gates_see_what_the_table_says_and_nothing_of_what_is_invisible(defect, healthy, tmp_path):
    """Every recipe applies to the bundled model; its gates refuse it, and a defect without a gate passes them all."""
    draft = healthy.copy()
    defect.recipe(draft)
    found = gates_of(put_together(draft, tmp_path / "m"))
    wanted = set(defect.kills) & {*GATES, "preflight"}

    assert wanted <= found
    assert bool(found) == bool(wanted)
    assert not (defect.invisible_alone and found)


def test_the_table_is_well_formed():
    """Unique ids, causes of the closed list, at most four of a class, claims that exist."""
    Zoo().add(*plants.DEFECTS, *files.DEFECTS)
    counts = Counter(d.klass for d in (*plants.DEFECTS, *files.DEFECTS))

    assert len(files.DEFECTS) >= 120
    assert len({d.klass for d in files.DEFECTS}) >= 38
    assert [k for k, n in counts.items() if n > 4] == []
    assert {d.cause for d in files.DEFECTS} <= set(CAUSES)
    assert {k for d in files.DEFECTS for k in d.kills} <= {*load_claims(), "preflight"}


def test_no_recipe_touches_the_draft_that_it_was_given_a_copy_of(healthy):
    """One healthy draft serves the whole matrix; a leak would make every later defect two defects."""
    before = {name: values.tobytes() for name, values in healthy.weights.items()}
    config, carried = dict(healthy.config), dict(healthy.carried)
    for defect in files.DEFECTS:
        defect.recipe(healthy.copy())

    assert {name: values.tobytes() for name, values in healthy.weights.items()} == before
    assert (healthy.config, healthy.carried, healthy.after) == (config, carried, [])


@pytest.mark.parametrize("gate", GATES)
def test_each_gate_has_a_defect_that_no_other_gate_kills(gate, healthy, tmp_path):
    """A gate whose every kill is another's too could be deleted without anybody noticing."""
    for number, defect in enumerate(d for d in files.DEFECTS if d.kills == (gate,)):
        draft = healthy.copy()
        defect.recipe(draft)
        if gates_of(put_together(draft, tmp_path / str(number))) == {gate}:
            return
    raise AssertionError(f"{gate} kills nothing alone")


def test_a_recipe_that_finds_nothing_says_so(healthy, tmp_path):
    """On a file of one tensor a recipe applies or says that it does not; it never breaks."""
    outcomes = Counter()
    for defect in files.DEFECTS:
        draft = healthy.copy()
        draft.weights = {n: v for n, v in draft.weights.items() if n == edits.EMBEDDING}
        try:
            defect.recipe(draft)
            put_together(draft, tmp_path / defect.id)
            outcomes["applied"] += 1
        except (NotApplicable, AprError):
            outcomes["not applicable"] += 1

    assert outcomes["applied"] >= 60
    assert outcomes["not applicable"] >= 80


def test_an_edit_that_changes_nothing_is_not_a_defect(healthy):
    """Norms that are 1.0 already cannot be reset to 1.0: the survivor would be a healthy file."""
    draft = healthy.copy()
    BY_ID["norms-reset"].recipe(draft)

    with pytest.raises(NotApplicable, match="as it is"):
        BY_ID["norms-reset"].recipe(draft)
    with pytest.raises(NotApplicable, match="hold the same"):
        BY_ID["norms-swapped"].recipe(draft)


def test_seeds_make_recipes_repeatable(healthy):
    """Two plantings of one defect are the same bytes."""
    twice = []
    for _ in range(2):
        draft = healthy.copy()
        BY_ID["noise-10"].recipe(draft)
        twice.append(draft.weights[files.DOWN])

    assert np.array_equal(*twice)
    assert not np.array_equal(twice[0], healthy.weights[files.DOWN])


def test_permutations_keep_every_statistic(healthy):
    """What is called invisible because it permutes must be a permutation."""
    permuted = [d for d in files.DEFECTS if d.invisible_alone == files.PERMUTED]
    for defect in permuted:
        draft = healthy.copy()
        defect.recipe(draft)
        moved = [n for n, v in draft.weights.items() if not np.array_equal(v, healthy.weights[n])]

        assert moved, defect.id
        for name in moved:
            assert np.array_equal(np.sort(draft.weights[name], axis=None), np.sort(healthy.weights[name], axis=None))
    assert len(permuted) >= 10


def test_a_quantised_file_leaves_the_golden_logits_behind(healthy):
    """They are those of the unquantised weights: every honest Q8_0 file would be refuted by them."""
    draft = healthy.copy()
    containers.stored_as(draft, "gguf", "Q8_0")

    assert containers.TRANSFORMERS in healthy.carried
    assert containers.TRANSFORMERS not in draft.carried


@pytest.mark.parametrize(("bits", "levels"), [(2, 3), (3, 7), (4, 15)])
def test_coarse_values_have_as_many_levels_as_bits_allow(bits, levels, healthy):
    """By hand: symmetric rounding to b bits leaves at most 2**b - 1 different values in a block."""
    edited = edits.coarse(bits)(healthy.weights[files.DOWN].copy(), healthy)

    assert edited is not None
    assert max(len(np.unique(block)) for block in edited.reshape(-1, 32)[:200]) <= levels


def test_llamas_permutation_undoes_itself_as_its_converter_does(healthy):
    """Halves to pairs and back: a bijection of the rows of each head."""
    heads = np.arange(2 * 8 * 3, dtype=np.float32).reshape(2, 8, 3)
    there = edits.interleaved(heads)

    assert there[0, :, 0].tolist() == [0.0, 12.0, 3.0, 15.0, 6.0, 18.0, 9.0, 21.0]
    assert np.array_equal(there.reshape(2, 4, 2, 3).swapaxes(1, 2).reshape(heads.shape), heads)
