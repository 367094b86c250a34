"""The matrix: what is a survivor, an alarm, a crash and a broken promise, on a tiny zoo and a synthetic twin."""

from __future__ import annotations

import json
import os
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import numpy as np
import pytest

from apr_core.errors import ContractViolation, Exit, UsageError
from apr_core.falsify.claims import load_claims
from apr_core.falsify.verdict import Verdict
from apr_core.zoo import acts, matrix, plants
from apr_core.zoo.draft import put_together
from apr_core.zoo.plants import DOWN, EMBED
from apr_core.zoo.registry import Benign, Defect, Later, NotApplicable, Zoo
from apr_core.zoo.score import Judged, Matrix, Outcome


def _dead(draft):
    draft.weights[DOWN][...] = 0


def _doubled(draft):
    draft.weights[DOWN] *= 2


def _nothing(draft):
    raise NotApplicable("no bias")


def _garbage(draft):
    draft.after.append(lambda path: path.write_bytes(b"\0" * 64))


def _shifted(config):
    return lambda name, values, at: values + 1 if name == "logits" and at.cached else None


def _overwritten(path):
    weights = path / "model.safetensors" if path.is_dir() else path
    data = np.fromfile(weights, dtype=np.uint8)
    data[len(data) // 2] ^= 0x40
    data.tofile(weights)


def _defect(id_, kills, **way):
    return Defect(id_, "class", "what", "here", "tensor-values", kills, **way)


DEAD = _defect("dead", ("F-DATA-QUALITY-003",), recipe=_dead)
DOUBLED = _defect("doubled", ("F-GT-010",), recipe=_doubled, invisible_alone="a factor that training could have made")
SHIFTED = _defect("shifted", ("F-PAR-003",), hook=_shifted)
WRITTEN = _defect("written", ("F-GT-001",), tamper=_overwritten)
GARBAGE = _defect("garbage", ("preflight",), recipe=_garbage)
ABSENT = _defect("absent", ("F-GT-001",), recipe=_nothing)
SAME = Benign("metadata", "a note", lambda draft: draft.metadata.update({"note": "NaN"}))


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """A healthy untrained model on the disk."""
    return put_together(acts.twin(), tmp_path_factory.mktemp("zoo") / "twin")


@pytest.fixture
def own_zoo(monkeypatch):
    """A zoo of the items that a test adds, and no faults of the suite."""
    zoo = Zoo()
    monkeypatch.setattr(matrix, "load_zoo", lambda: zoo)
    monkeypatch.setattr(matrix, "suite_faults", list)
    monkeypatch.setattr(matrix, "redundant", dict)
    return zoo


FEW = ("F-DATA-QUALITY-001", "F-DATA-QUALITY-003", "F-GT-001", "F-GT-010", "F-PAR-003")


def killers(item, twin):
    """Claim -> whether it spoke behind the gate."""
    outcome = matrix.evaluate(item, twin, claims=FEW)
    assert outcome.crash == ""
    return {j.claim: j.behind_gate for j in outcome.killers(load_claims())}


def test_a_refused_file_is_examined_behind_the_gate_too(twin):
    """The gate is the first killer, what sees it without the gate the second."""
    found = killers(DEAD, twin)

    assert found["F-DATA-QUALITY-003"] is False
    assert found["F-GT-010"] is True


def test_an_invisible_fault_needs_the_reference(twin):
    """A plausible factor passes every gate; contents differ."""
    found = killers(DOUBLED, twin)

    assert found["F-GT-010"] is False
    assert not any(claim.startswith("F-DATA") for claim in found)


def test_what_an_item_cannot_reach_is_known(pygmy):
    """Every claim of the healthy model: which looks at a copy, and that F-GT-007 runs no forward of the subject."""
    stand, looked, ran = matrix.stand_for(pygmy), set(), set()
    subject = matrix._open(stand.again, stand, lambda *_: ran.add(claim), skip=False)
    with matrix.tampered(lambda path: looked.add(claim)):
        # the others first: a copy that is there already would be looked at unseen
        for claim in sorted(matrix.claims_for(WRITTEN), key=lambda c: (c in matrix.OF_COPIES, c)):
            matrix._judge(claim, subject, False)
    subject.close()

    assert looked <= matrix.OF_COPIES
    assert matrix.OF_COPIES_ALONE in looked
    assert matrix.OF_COPIES_ALONE not in ran
    assert {"F-GT-006", "F-GT-002", "F-PAR-001"} <= ran


@pytest.mark.parametrize("item", [WRITTEN, SHIFTED], ids=lambda item: item.id)
def test_what_an_item_cannot_reach_is_judged_once(item, twin, monkeypatch):
    """The verdicts are those of asking again."""
    shared = matrix.evaluate(item, twin, claims=(*FEW, "F-GT-007"))
    monkeypatch.setattr(matrix, "out_of_reach", lambda *_: frozenset())
    asked = matrix.evaluate(item, twin, claims=(*FEW, "F-GT-007"))

    assert [replace(j, seconds=0) for j in shared.judged] == [replace(j, seconds=0) for j in asked.judged]


def test_a_backend_fault_is_planted_through_the_seam(twin):
    """A cache that shifts logits is seen by the claim about the cache, not by the gates."""
    found = killers(SHIFTED, twin)

    assert "F-PAR-003" in found
    assert "F-GT-010" not in found


def test_a_tampered_copy_is_seen_by_the_three_format_claim(twin):
    """And the tamper ends with the evaluation."""
    assert "F-GT-001" in killers(WRITTEN, twin)
    assert killers(matrix.HEALTHY, twin) == {}


def test_a_file_that_does_not_open_dies_in_the_preflight(twin):
    """A typed error before any claim is a kill of its own."""
    assert killers(GARBAGE, twin) == {"preflight": False}


def test_a_recipe_that_does_not_apply_says_why(twin):
    """It is counted, not killed."""
    assert matrix.evaluate(ABSENT, twin).not_applicable == "no bias"


@pytest.mark.parametrize("error", [KeyError("x"), ZeroDivisionError("y")])
def test_an_untyped_exception_of_a_claim_is_a_crash(twin, monkeypatch, error):
    """A defect that crashes a gate is a failure of the gate, named with the exception."""

    def crash(subject):
        raise error

    monkeypatch.setitem(matrix.ACTS, "F-PAR-007", crash)
    outcome = matrix.evaluate(DOUBLED, twin, claims=["F-GT-010", "F-PAR-007"])

    assert outcome.crash.startswith(f"F-PAR-007: {type(error).__name__}")
    assert [j.verdict for j in outcome.judged] == ["FALSIFIED", "CRASH"]


def test_a_recipe_that_raises_is_a_crash_of_the_planting(twin):
    """Silence would drop the defect."""
    assert matrix.evaluate(_defect("odd", ("F-GT-001",), recipe=lambda d: d.drop("no")), twin).crash == (
        "planting: KeyError: 'no'"
    )


def test_items_that_change_values_are_not_held_against_the_model():
    """Other zeros are legal and are not the reference's; timed claims are for faults of the meter."""
    zeros = Benign("zeros", "zeros", _dead, alone=True)

    assert "F-GT-010" not in matrix.claims_for(zeros)
    assert "F-GT-010" in matrix.claims_for(SAME)
    assert "F-THR-003" not in matrix.claims_for(DEAD)
    assert "F-THR-003" in matrix.claims_for(replace(SHIFTED, kills=("F-THR-003",)))


def test_a_run_resumes_where_it_was_interrupted(twin, own_zoo, tmp_path, monkeypatch):
    """Finished items stay; a line cut by the interruption is done again; other code starts anew."""
    own_zoo.add(DOUBLED, ABSENT, SAME, Later("later", "what", "here", 9))
    asked = []
    evaluate = matrix.evaluate

    def interrupted(item, model):
        asked.append(item.id)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return evaluate(item, model, claims=FEW)

    monkeypatch.setattr(matrix, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        matrix.run_matrix(twin, out=tmp_path, workers=1)
    with (tmp_path / "items.jsonl").open("a") as log:
        log.write('{"key": "cut')
    told = []
    found = matrix.run_matrix(twin, out=tmp_path, workers=1, progress=lambda *step: told.append(step[:2]))

    assert asked == ["healthy", "metadata", "doubled", "doubled", "absent"]
    assert told == [(3, 4), (4, 4)]
    assert len((tmp_path / "items.jsonl").read_text().splitlines()) == 4
    monkeypatch.setattr(matrix, "code_digest", lambda model: "other")
    matrix.run_matrix(twin, out=tmp_path, workers=1)
    assert asked[5:] == ["healthy", "metadata", "doubled", "absent"]

    body = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert body["not_applicable"] == [{"item": "absent", "reason": "no bias"}]
    assert [item["klass"] for item in body["not_plantable"]] == ["later"]
    assert body["survivors"] == body["alarms"] == body["broken_promises"] == body["crashes"] == []
    assert body["matrices"]["alone"]["of"] == 0
    assert body["matrices"]["with_reference"]["kills"][0]["first_killer"] == "F-GT-010"
    assert body["exit_code"] == Exit.INCONCLUSIVE
    assert body["model"]["name"] == "twin"


def test_what_kills_its_process_is_recorded_and_the_rest_goes_on(own_zoo, monkeypatch, tmp_path):
    """A dead worker breaks the pool: its item is tried again alone, then it is a crash."""

    class Pool:
        def __init__(self, workers, model):
            self.dead = False

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def submit(self, work, id_, model):
            future = Future()
            self.dead |= id_ == "dead"
            if self.dead:
                future.set_exception(BrokenProcessPool())
            else:
                future.set_result(Outcome(id_))
            return future

    monkeypatch.setattr(matrix, "_pool", Pool)
    items = [replace(SAME, id=id_) for id_ in ("a", "dead", "b", "c", "d", "e", "f", "g")]
    found = {o.id: o.crash for o in matrix._all(items, tmp_path, 2)}

    assert found == {"dead": "the process died"} | dict.fromkeys("abcdefg", "")


def test_workers_are_processes_of_one_thread(twin, monkeypatch):
    """The real pool, once: an outcome comes back, and the environment is as it was."""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    [outcome] = matrix._all([matrix.HEALTHY], twin, 2)

    assert (outcome.id, outcome.crash) == ("healthy", "")
    assert os.environ["OMP_NUM_THREADS"] == "3"


def test_a_refused_model_has_no_matrix(twin, own_zoo, tmp_path):
    """Nothing planted on a broken model would mean anything."""
    path, _ = matrix.plant(DEAD, acts.twin(), tmp_path / "dead", twin)
    with pytest.raises(ContractViolation):
        matrix.run_matrix(path, out=tmp_path, workers=1)


def test_an_unknown_item_names_its_neighbours(own_zoo):
    """A typo is a usage error."""
    own_zoo.add(DOUBLED)
    with pytest.raises(UsageError, match="near: doubled"):
        matrix.find("doubeld")
    assert matrix.find("healthy") is matrix.HEALTHY


def test_the_code_digest_follows_the_companions(twin):
    """An edited configuration is another model."""
    before = matrix.code_digest(twin)
    text = (twin / "config.json").read_text()
    (twin / "config.json").write_text(text + " ")
    after = matrix.code_digest(twin)
    (twin / "config.json").write_text(text)

    assert before != after
    assert matrix.code_digest(twin) == before


def _many(zoo, classes):
    for k in range(classes):
        for n in range(3):
            zoo.add(replace(DEAD, id=f"d-{k}-{n}", klass=f"class-{k}", kills=("F-GT-001", "F-PAR-001")[k % 2 :][:1]))


def test_the_quick_choice_is_wide_and_repeatable():
    """Every claim, many classes, some legal oddities."""
    zoo = Zoo()
    _many(zoo, 40)
    zoo.add(replace(DEAD, id="last", kills=("F-THR-003",)), *(replace(SAME, id=f"b{n}") for n in range(40)))
    defects, benign = matrix.choose(zoo, quick=True)

    assert (len(defects), len({d.klass for d in defects})) == (matrix.QUICK_DEFECTS, 41)
    assert len(benign) == matrix.QUICK_BENIGN
    assert defects[-1].id == "last"
    assert matrix.choose(zoo, quick=True) == (defects, benign)
    assert len(matrix.choose(zoo, quick=False)[0]) == 121


def scored(*rows, benign=(), suite=(), redundant=None, unavailable=None):
    """A matrix of (defect, claims that killed it) without planting anything."""
    outcomes = {d.id: Outcome(d.id, tuple(Judged(c, "FALSIFIED", "", 0.5) for c in ks)) for d, ks in rows}
    outcomes |= {b.id: Outcome(b.id, tuple(Judged(c, "FALSIFIED", "", 0.5) for c in ks)) for b, ks in benign}
    defects, legal = [d for d, _ in rows], [b for b, _ in benign]
    return Matrix(defects, legal, [], outcomes, suite, redundant or {}, unavailable or {}, {})


ALL = tuple(load_claims())


def test_everything_killed_and_silent_is_exit_0():
    """The only way to 0: each claim killed something, nothing was missed."""
    found = scored((DEAD, ALL), benign=[(SAME, ())])

    assert found.exit_code is Exit.OK
    assert found.as_json()["rates"] == {
        "kill_rate": 1.0,
        "kill_rate_without_identity": 1.0,
        "second_killer_rate": 1.0,
        "kill_rate_alone": 1.0,
        "share_invisible_alone": 0.0,
        "false_alarm_rate": 0.0,
        "suite_fault_rate": None,
    }


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (scored((DEAD, ALL), (DOUBLED, ())), "survivors"),
        (scored((DEAD, ALL), (replace(DEAD, id="x", kills=("F-GT-010",)), ("F-GT-010",))), "survivors"),
        (scored((DEAD, ALL), benign=[(SAME, ("F-GT-001",))]), "alarms"),
        (scored((DEAD, ALL), (DOUBLED, ("F-PAR-008",))), "broken_promises"),
    ],
)
def test_what_was_missed_or_cried_wolf_is_exit_5(found, why):
    """A survivor with a reference, one alone, an alarm, a promise that was not kept."""
    assert found.exit_code is Exit.REFUTED
    assert len(getattr(found, why)) == 1


def test_a_crash_survives_whatever_else_killed_it():
    """Other claims do not make a crashing gate good."""
    found = scored((DEAD, ALL))
    broken = replace(found, outcomes={"dead": replace(found.outcomes["dead"], crash="F-GT-002: KeyError")})

    assert (broken.exit_code, broken.survivors[0]["why"]) == (Exit.REFUTED, "a gate crashed: F-GT-002: KeyError")
    assert broken.crashes == [{"item": "dead", "crash": "F-GT-002: KeyError"}]


def test_an_uncaught_fault_of_the_suite_is_exit_5():
    """The harness is judged as the models are."""
    fault = {"id": "s", "klass": "s", "claims": [], "what": "", "caught": False}

    assert scored((DEAD, ALL), suite=[fault]).exit_code is Exit.REFUTED


def test_a_claim_without_a_defect_is_exit_11_unless_it_cannot_run():
    """A new claim without a defect fails; one without a device does not; a broken meter counts as a defect."""
    without = tuple(c for c in ALL if c != "F-PAR-010")
    fault = {"id": "m", "klass": "meter", "claims": ["F-PAR-010"], "what": "", "caught": True}

    assert scored((DEAD, without)).exit_code is Exit.INCONCLUSIVE
    assert scored((DEAD, without), unavailable={"F-PAR-010": "no device"}).exit_code is Exit.OK
    assert scored((DEAD, without), suite=[fault]).exit_code is Exit.OK


def test_a_promise_of_a_claim_that_cannot_run_here_is_not_broken():
    """A model without golden answers excuses them."""
    item = replace(DOUBLED, kills=("F-GT-006",))

    assert len(scored((item, ("F-GT-010",))).broken_promises) == 1
    assert scored((item, ("F-GT-010",)), unavailable={"F-GT-006": "no golden"}).broken_promises == []


def test_the_row_of_a_claim():
    """Three defects of two classes, one of its own: earned; less: not; covered: redundant."""
    rows = [(replace(DEAD, id=f"d{n}", klass=f"k{n % 2}"), ("F-GT-001", "F-GT-002")[: 1 + n % 2]) for n in range(4)]
    found = {c["claim"]: c for c in scored(*rows, redundant={"F-GT-002": "F-GT-001"}).claims}

    assert (found["F-GT-001"]["verdict"], found["F-GT-001"]["only"]) == ("earned", ["d0", "d2"])
    assert (found["F-GT-002"]["verdict"], found["F-GT-002"]["redundant_with"]) == ("redundant", "F-GT-001")
    assert found["F-GT-003"]["verdict"] == Verdict.INCONCLUSIVE
    assert {c["claim"]: c for c in scored(*rows).claims}["F-GT-002"]["verdict"] == "unearned"


def test_the_three_matrices_count_their_own_claims():
    """Alone has no golden answers, without identity no contents; time runs over the claims of the matrix only."""
    body = scored((DEAD, ("F-GT-010", "F-GT-008", "F-GT-002"))).as_json()["matrices"]
    first = {name: (m["kills"][0]["first_killer"], m["kills"][0]["time_to_kill_s"]) for name, m in body.items()}

    assert first == {
        "alone": ("F-GT-002", 0.5),
        "with_reference": ("F-GT-010", 0.5),
        "without_identity": ("F-GT-008", 0.5),
    }
    assert body["with_reference"]["kills"][0]["second_killer"] == "F-GT-008"
    assert body["alone"]["second_killer_rate"] == 0.0
    assert EMBED not in str(body)


def test_an_outcome_survives_its_line():
    """What is written to items.jsonl is what is read back."""
    outcome = Outcome("x", (Judged("F-GT-001", "FALSIFIED", "why", 0.1, True),), "", "", 1.0)

    assert Outcome.of_json(json.loads(json.dumps(matrix.asdict(outcome)))) == outcome


def test_a_defect_is_listed_with_the_tensors_that_it_really_changes(twin):
    """Role and tensor are observed, not typed in."""
    draft = matrix.stand_for(twin).draft
    planted = {d.id: d for d in plants.DEFECTS}

    assert matrix.touched(planted["q-81-zero"], draft) == ("model.layers.0.self_attn.q_proj.weight",)
    assert matrix.touched(planted["norm-dropped"], draft) == ("model.norm.weight",)
