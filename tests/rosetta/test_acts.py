"""Each of the twelve claims: corroborated on a healthy model, and red on the fault that it exists for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from apr_core.dtypes import FORMATS
from apr_core.engines.subject import Subject
from apr_core.errors import InferenceError
from apr_core.falsify.claims import claims_of
from apr_core.falsify.finding import ACTS, Finding
from apr_core.falsify.rounds import Round
from apr_core.falsify.verdict import NotRun, Verdict
from apr_core.formats import names
from apr_core.formats.checkpoint import open_checkpoint
from apr_core.model import tokens
from apr_core.rosetta import acts, chatml, copies
from apr_core.rosetta.convert import convert
from apr_core.zoo.draft import put_together, take_apart

Edit = Callable[..., Path]
Open = Callable[..., Subject]
Q = "model.layers.0.self_attn.q_proj.weight"


def judged(claim: str, subject: Subject) -> tuple[Verdict, Finding]:
    """Run the act of a claim and judge it, as a round would."""
    finding = ACTS[claim](subject)
    return finding.judge(bypassed=subject.admission.bypassed)[0], finding


def test_every_claim_of_the_notebook_has_its_act() -> None:
    """A claim without a measurement would close the round with a hole."""
    mine = [c.id for c in claims_of("00_ground_truth")]
    assert set(mine) <= set(ACTS)
    assert {ACTS[c].__wrapped__.__module__ for c in mine} == {acts.__name__}  # type: ignore[attr-defined]


def test_the_bundled_model_holds(pygmy: Path, tmp_path: Path, open_subject: Open) -> None:
    """The default run: ten claims corroborated, the two about a reference not run, every record writable."""
    subject = open_subject(pygmy, max_new_tokens=16)
    held = Round("00_ground_truth", subject.record, tmp_path, parameters={}, provenance={})
    for claim in claims_of("00_ground_truth"):
        held.record(claim.id, ACTS[claim.id](subject))
    found = {e.id: e.verdict for e in held.records}
    idle = {"F-GT-010", "F-GT-011"}
    assert {k for k, v in found.items() if v is Verdict.NOT_RUN} == idle
    assert {k for k, v in found.items() if v is Verdict.CORROBORATED} == set(found) - idle
    assert all(len(str(e)) < 200 for e in held.records)


def test_a_gguf_of_the_bundled_model_holds_against_it(pygmy: Path, tmp_path: Path, open_subject: Open) -> None:
    """With the reference given, no reference claim is left alone, and none is refuted."""
    path = convert(pygmy, tmp_path / "pygmy.gguf", quantize="Q8_0")
    subject = open_subject(path, pygmy)
    for claim in ("F-GT-010", "F-GT-011"):
        assert judged(claim, subject)[0] is Verdict.CORROBORATED


def test_no_canonical_line_holds_a_number_that_differs_from_machine_to_machine(tiny: Path, open_subject: Open) -> None:
    """Details are integers and words."""
    subject = open_subject(tiny)
    for claim in ("F-GT-001", "F-GT-002", "F-GT-003", "F-GT-004", "F-GT-005", "F-GT-012"):
        verdict, finding = judged(claim, subject)
        assert verdict is Verdict.CORROBORATED, (claim, finding.whys)
        assert "." not in finding.detail
        assert finding.compared == finding.expected > 0
        assert finding.rows
        assert finding.reference
        assert not finding.whys


def corrupt(subject: Subject, container: str, name: str) -> None:
    """Flip one bit of a copy after it was made."""
    path = copies.copies_of(subject).path(container)
    with open_checkpoint(path) as copy:
        info = copy.tensors[name]
    data = bytearray(info.file.read_bytes())
    data[info.offset + 7] ^= 1
    info.file.write_bytes(data)


def test_gt_001_sees_one_flipped_bit_in_one_copy(tiny: Path, open_subject: Open) -> None:
    """One value of 85,000 in one of two copies: refuted, by our reader and by the foreign one, with its index."""
    subject = open_subject(tiny)
    corrupt(subject, "gguf", Q)
    verdict, finding = judged("F-GT-001", subject)
    assert verdict is Verdict.FALSIFIED
    assert finding.value == 2.0
    assert finding.whys[0][1].startswith(f"{Q} (BF16 to BF16): 1 of 4096 values, the first at [0, 3]")
    assert "gguf package" in finding.whys[1][0]


def test_gt_001_sees_a_tensor_that_a_copy_lost(
    tiny: Path, edited: Edit, open_subject: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy without one bias is refuted with all of the bias's values."""
    subject = open_subject(tiny)
    short = edited(lambda held: held.pop("model.layers.0.self_attn.q_proj.bias"))
    made = copies.copies_of(subject)
    real = convert(short, made.folder / "keep.apr")
    assert made.path("apr") == real
    verdict, finding = judged("F-GT-001", subject)
    assert (verdict, finding.value) == (Verdict.FALSIFIED, 64.0)


def write_rope(base: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the GGUF border write another RoPE base."""
    honest = names.gguf_metadata

    def broken(config: Mapping[str, object]) -> dict[str, object]:
        return {**honest(config), "qwen2.rope.freq_base": base}

    monkeypatch.setattr(names, "gguf_metadata", broken)


def test_gt_002_and_003_see_a_changed_rope_base(
    tiny: Path, open_subject: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensors are the same, the logits are not, and the whys say that it is the configuration."""
    write_rope(20000.0, monkeypatch)
    subject = open_subject(tiny, max_new_tokens=24)
    assert judged("F-GT-001", subject)[0] is Verdict.CORROBORATED
    verdict, finding = judged("F-GT-002", subject)
    assert verdict is Verdict.FALSIFIED
    assert finding.value is not None
    assert finding.value > 1e-3
    said = dict(finding.whys)
    assert said["Do the tensors differ?"].startswith("0 of ")
    assert "rope_theta: 20000 for 1e+06" in said["Does the configuration differ?"]
    assert judged("F-GT-003", subject)[0] is Verdict.FALSIFIED


def test_a_copy_that_is_refused_is_a_finding(pygmy: Path, open_subject: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that does not pass the gates refutes what was claimed of it; the notebook does not die of it."""
    write_rope(10000.0, monkeypatch)  # the default of a lost configuration, which a gate knows
    subject = open_subject(pygmy, max_new_tokens=8)
    golden(subject)
    for claim in ("F-GT-002", "F-GT-003", "F-GT-007"):
        verdict, finding = judged(claim, subject)
        assert verdict is Verdict.FALSIFIED, claim
        if claim != "F-GT-003":
            assert "copy not run" in finding.whys[0][0]
            assert "rope_theta is 10000" in finding.whys[0][1]


def test_gt_002_does_not_call_nan_agreement(tiny: Path, open_subject: Open) -> None:
    """A copy whose logits are NaN is refuted although no comparison with NaN is true."""
    subject = open_subject(tiny)
    runs = copies.copies_of(subject).runs(subject)
    runs[0].rel_l2[3] = np.nan
    verdict, finding = judged("F-GT-002", subject)
    assert verdict is Verdict.FALSIFIED
    assert finding.value is None
    assert "position 3" in finding.whys[0][1]


def test_gt_003_counts_tokens_and_lengths(tiny: Path, open_subject: Open) -> None:
    """A copy that stops earlier has not agreed."""
    subject = open_subject(tiny)
    made = copies.copies_of(subject)
    run = made.runs(subject)[0]
    made._runs[0] = copies.CopyRun(run.format, run.rel_l2, 0.0, 0, (run.greedy[0][:-1],))
    verdict, finding = judged("F-GT-003", subject)
    assert (verdict, finding.value) == (Verdict.FALSIFIED, 1.0)
    assert "found nothing" in finding.whys[0][1]


def template(tiny: Path) -> str:
    """The tiny model's template."""
    return str(json.loads((tiny / "tokenizer_config.json").read_text())["chat_template"])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("message.role + '\\n' +", "message.role +"),
        ("'<|im_end|>' + '\\n'", "'<|im_end|>'"),
        ("'<|im_start|>assistant\\n'", "''"),
        ("'<|im_start|>assistant\\n'", "'<|im_start|>assistant'"),
        ("+ message.content +", "+ message.content.upper() +"),
        ("{%- for message in messages %}", "{%- for message in messages[-1:] %}"),
        ("'<|im_start|>' + message.role", "'<|im_ start|>' + message.role"),
    ],
)
def test_gt_004_sees_a_broken_template(old: str, new: str, tiny: Path, edited: Edit, open_subject: Open) -> None:
    """A missing line end, role header or generation prompt, changed content, a lost turn, a split control token."""
    text = template(tiny)
    assert old in text
    folder = edited(**{"tokenizer_config.json": {"chat_template": text.replace(old, new)}})
    verdict, finding = judged("F-GT-004", open_subject(folder))
    assert verdict is Verdict.FALSIFIED
    assert "Where does" in finding.whys[0][0]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("You are a helpful assistant.", "You are brief. You don't guess."),
        ("{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}", ""),
    ],
)
def test_gt_004_follows_the_templates_own_default(
    old: str, new: str, tiny: Path, edited: Edit, open_subject: Open
) -> None:
    """Another default system sentence, or none, is legal."""
    text = template(tiny).replace(old, new.replace("'", "\\'") if "don't" in new else new)
    folder = edited(**{"tokenizer_config.json": {"chat_template": text}})
    assert judged("F-GT-004", open_subject(folder))[0] is Verdict.CORROBORATED


def test_gt_004_does_not_apply_to_other_formats(edited: Edit, open_subject: Open) -> None:
    """A template of another family is not judged by ChatML."""
    folder = edited(**{"tokenizer_config.json": {"chat_template": "{{ messages[0].content }}"}})
    assert judged("F-GT-004", open_subject(folder))[1].not_run is NotRun.NOT_APPLICABLE


def test_gt_004_a_template_that_refuses_is_refuted(tiny: Path, edited: Edit, open_subject: Open) -> None:
    """A rendering that does not come about is no rendering."""
    text = "{{ raise_exception('no') }}" + template(tiny)
    verdict, finding = judged("F-GT-004", open_subject(edited(**{"tokenizer_config.json": {"chat_template": text}})))
    assert verdict is Verdict.FALSIFIED
    assert "no" in finding.whys[0][1]


def test_gt_005_sees_raw_text_that_is_parsed(tiny: Path, open_subject: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder that takes control tokens in raw text is caught in every spelling."""
    honest = tokens.Tokenizer.encode
    monkeypatch.setattr(tokens.Tokenizer, "encode", lambda self, text, parse_special=False: honest(self, text, True))
    verdict, finding = judged("F-GT-005", open_subject(tiny))
    assert verdict is Verdict.FALSIFIED
    counts = {str(row["place"]): row["injected"] for row in finding.rows}
    assert counts["raw text"] > 0  # type: ignore[operator]
    assert counts["user"] == 0


def test_gt_005_sees_content_that_is_parsed(tiny: Path, open_subject: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """A template engine that encodes its rendering naively is caught in every role."""

    def naive(self: tokens.Tokenizer, rendering: str, bars: Mapping[str, str]) -> list[int]:
        return self.encode(rendering.translate(str.maketrans(dict(bars))), parse_special=True)

    monkeypatch.setattr(tokens.Tokenizer, "encode_rendering", naive)
    verdict, finding = judged("F-GT-005", open_subject(tiny))
    assert verdict is Verdict.FALSIFIED
    counts = {str(row["place"]): int(str(row["injected"])) for row in finding.rows}
    assert all(counts[place] > 0 for place in ("user", "system", "assistant"))
    assert counts["raw text"] == 0


def test_gt_005_without_a_template_tries_raw_text_alone(edited: Edit, open_subject: Open) -> None:
    """A base model has no messages to inject into."""
    subject = open_subject(edited(**{"tokenizer_config.json": {"chat_template": None}}))
    verdict, finding = judged("F-GT-005", subject)
    assert verdict is Verdict.CORROBORATED
    assert [row["place"] for row in finding.rows] == ["raw text"]


def test_gt_005_skips_a_role_that_the_template_refuses(tiny: Path, edited: Edit, open_subject: Open) -> None:
    """Where the template takes no system prompt, nothing can be injected into one."""
    text = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + template(tiny)
    folder = edited(**{"tokenizer_config.json": {"chat_template": text}})
    verdict, finding = judged("F-GT-005", open_subject(folder))
    assert verdict is Verdict.CORROBORATED
    assert "system" not in [row["place"] for row in finding.rows]


def golden(subject: Subject, **change: object) -> None:
    """Replace the first golden case."""
    cases = [dict(case) for case in subject.golden["cases"]]  # type: ignore[index]
    cases[0] |= change
    subject.__dict__["golden"] = {"schema": 1, "cases": cases[:2]}


@pytest.mark.parametrize("claim", ["F-GT-006", "F-GT-007"])
def test_gt_006_and_007_see_another_answer(claim: str, pygmy: Path, open_subject: Open) -> None:
    """One answer that is not the recorded one, in the file or in its Q8_0 copy; the copy is removed afterwards."""
    subject = open_subject(pygmy)
    golden(subject, answer="something else")
    verdict, finding = judged(claim, subject)
    assert (verdict, finding.value, finding.compared) == (Verdict.FALSIFIED, 1.0, 2)
    assert "expected 'something else'" in finding.whys[0][1]
    assert list(copies.copies_of(subject).folder.glob("Q8_0*")) == []


def test_gt_006_sees_an_answer_that_does_not_end(
    pygmy: Path, open_subject: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The right words without an end are a wrong answer: the model would talk on."""
    from apr_core.model import generate

    subject = open_subject(pygmy)
    golden(subject)
    monkeypatch.setattr(generate, "ends_of", lambda _: frozenset())
    verdict, finding = judged("F-GT-006", subject)
    assert (verdict, finding.value) == (Verdict.FALSIFIED, 2.0)
    assert "stopped: length" in finding.whys[0][1]


def test_gt_006_right_words_without_an_end_are_wrong(
    pygmy: Path, open_subject: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off exactly behind the right answer: the text is equal, and it has not ended by itself."""
    from apr_core.model import generate

    subject = open_subject(pygmy, max_new_tokens=1)
    golden(subject)
    monkeypatch.setattr(acts, "_SPARE_TOKENS", 0)
    monkeypatch.setattr(generate, "ends_of", lambda _: frozenset())
    verdict, finding = judged("F-GT-006", subject)
    assert [row["answer"] for row in finding.rows] == [row["expected"] for row in finding.rows]
    assert (verdict, finding.value) == (Verdict.FALSIFIED, 2.0)


def test_gt_006_counts_a_failure_as_a_wrong_answer(
    pygmy: Path, open_subject: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A generation that raises gave no answer; the other cases are still asked."""
    from apr_core.model import generate

    def fail(*_: object, **__: object) -> None:
        raise InferenceError("7 of 9 logits are not finite")

    subject = open_subject(pygmy)
    golden(subject)
    monkeypatch.setattr(generate, "generate", fail)
    verdict, finding = judged("F-GT-006", subject)
    assert (verdict, finding.value, finding.compared) == (Verdict.FALSIFIED, 2.0, 2)
    assert "not finite" in finding.whys[0][1]


def test_gt_006_without_cases_decides_nothing(pygmy: Path, open_subject: Open) -> None:
    """An empty list of golden prompts is not a list of right answers."""
    subject = open_subject(pygmy)
    subject.__dict__["golden"] = {"schema": 1, "cases": []}
    assert judged("F-GT-006", subject)[0] is Verdict.INCONCLUSIVE


def test_gt_008_and_009_see_a_negated_bias(pygmy: Path, tmp_path: Path, open_subject: Open) -> None:
    """A sign that was lost in one bias changes the logits at every position."""
    from safetensors.torch import load_file, save_file

    for path in pygmy.iterdir():
        if path.suffix in (".json", ".npz"):
            (tmp_path / path.name).symlink_to(path)
    held = load_file(pygmy / "model.safetensors")
    name = "model.layers.1.self_attn.v_proj.bias"
    save_file({**held, name: -held[name]}, tmp_path / "model.safetensors")
    subject = open_subject(tmp_path)
    assert subject.refusal is None
    verdict, finding = judged("F-GT-008", subject)
    assert verdict is Verdict.FALSIFIED
    assert len(finding.whys) == 3
    assert finding.arrays["rel_l2"].size == finding.compared == 96


def changed(subject: Subject, **change: Any) -> None:
    """Replace arrays of the recorded logits."""
    subject.__dict__["golden_logits"] = {**subject.golden_logits, **change}  # type: ignore[dict-item]


def test_gt_008_sees_one_position_and_nan(pygmy: Path, open_subject: Open) -> None:
    """A single position that is off decides, whatever the average says; NaN on the other side decides too."""
    subject = open_subject(pygmy)
    logits = subject.golden_logits["logits"].copy()  # type: ignore[index]
    logits[17] *= 1.0001
    changed(subject, logits=logits)
    verdict, finding = judged("F-GT-008", subject)
    assert verdict is Verdict.FALSIFIED
    assert int(finding.arrays["rel_l2"].argmax()) == 17
    logits[17, 3] = np.nan
    assert judged("F-GT-008", subject)[0] is Verdict.FALSIFIED


def test_gt_008_refutes_answers_of_another_model(pygmy: Path, open_subject: Open) -> None:
    """Logits of another vocabulary cannot be compared, and are not left out of the verdict."""
    subject = open_subject(pygmy)
    changed(subject, logits=np.zeros((96, 7)))
    verdict, finding = judged("F-GT-008", subject)
    assert verdict is Verdict.FALSIFIED
    assert "[96, 7]" in finding.whys[0][1]


def test_gt_009_sees_one_other_token(pygmy: Path, open_subject: Open) -> None:
    """The recorded continuation with one token changed is refuted at its position."""
    subject = open_subject(pygmy)
    other = subject.golden_logits["greedy"].copy()  # type: ignore[index]
    other[4] += 1
    changed(subject, greedy=other)
    verdict, finding = judged("F-GT-009", subject)
    assert (verdict, finding.value) == (Verdict.FALSIFIED, 1.0)
    assert finding.whys[0][1].startswith("at 4: expected ")
    changed(subject, greedy=other[:0])
    assert judged("F-GT-009", subject)[0] is Verdict.INCONCLUSIVE


@pytest.mark.oracle
def test_gt_008_and_009_on_random_weights(oracle: Path, open_subject: Open) -> None:
    """Biases and positions of a random model: rounding level against transformers, and the same 48 tokens."""
    subject = open_subject(oracle / "mini")
    verdict, finding = judged("F-GT-008", subject)
    assert verdict is Verdict.CORROBORATED
    assert finding.compared == 160
    verdict, finding = judged("F-GT-009", subject)
    assert (verdict, finding.compared) == (Verdict.CORROBORATED, 48)


def negate(held: dict[str, torch.Tensor]) -> None:
    """Turn the sign of a bias around."""
    held["model.layers.0.self_attn.k_proj.bias"] *= -1


def test_gt_010_names_the_tensor(edited: Edit, tiny: Path, open_subject: Open) -> None:
    """A negated bias is refuted with the tensor, the count, the index and both numbers."""
    subject = open_subject(edited(negate), tiny)
    verdict, finding = judged("F-GT-010", subject)
    assert (verdict, finding.value) == (Verdict.FALSIFIED, 32.0)
    assert finding.whys[0][1].startswith("model.layers.0.self_attn.k_proj.bias (BF16 to BF16): 32 of 32 values")
    assert finding.rows[0]["mismatched"] == 32


def test_gt_010_a_tensor_that_only_the_reference_has(edited: Edit, tiny: Path, open_subject: Open) -> None:
    """A dropped tensor refutes even on a subject that was let past the gates."""
    folder = edited(lambda held: held.pop("model.layers.1.self_attn.q_proj.bias"))
    refused = open_subject(folder, tiny)
    assert judged("F-GT-010", refused)[1].not_run is NotRun.REFUSED
    bypassed = open_subject(folder, tiny, skip_contract=True)
    verdict, finding = judged("F-GT-010", bypassed)
    assert (verdict, finding.value) == (Verdict.FALSIFIED, 64.0)
    assert "missing in the subject" in finding.whys[0][1]


@pytest.mark.parametrize("claim", ["F-GT-010", "F-GT-011"])
def test_both_sides_one_file_decides_nothing(claim: str, tiny: Path, tmp_path: Path, open_subject: Open) -> None:
    """A comparison of a file with itself, under another path or as another copy of the same bytes, is no comparison."""
    assert judged(claim, open_subject(tiny, tiny))[0] is Verdict.INCONCLUSIVE
    link = tmp_path / "link"
    link.symlink_to(tiny)
    assert judged(claim, open_subject(link, tiny))[0] is Verdict.INCONCLUSIVE
    twin = tmp_path / "twin"
    twin.mkdir()
    for path in tiny.iterdir():
        (twin / path.name).write_bytes(path.read_bytes())
    verdict, finding = judged(claim, open_subject(twin, tiny))
    assert (verdict, finding.inconclusive) == (Verdict.INCONCLUSIVE, "subject and reference are the same file")


@pytest.mark.parametrize(
    ("companions", "field"),
    [
        ({"config.json": {"rope_theta": 500000.0}}, "rope_theta"),
        ({"tokenizer_config.json": {"chat_template": None}}, "chat template"),
    ],
)
def test_gt_011_names_the_field(
    companions: Mapping[str, Mapping[str, object]], field: str, edited: Edit, tiny: Path, open_subject: Open
) -> None:
    """A changed RoPE base and a missing template are one difference each."""
    verdict, finding = judged("F-GT-011", open_subject(edited(**companions), tiny))
    assert (verdict, finding.value) == (Verdict.FALSIFIED, 1.0)
    assert finding.whys[0][0] == f"What does {field} say?"


def test_gt_011_without_a_tokenizer_on_one_side_is_undecided(edited: Edit, tiny: Path, open_subject: Open) -> None:
    """What was not compared is named; the rest agrees, which is not enough."""
    subject = open_subject(edited(drop=("tokenizer.json",)), tiny)
    verdict, finding = judged("F-GT-011", subject)
    assert (verdict, finding.value) == (Verdict.INCONCLUSIVE, 0.0)
    assert finding.missing[0].startswith("tokenizer")


def test_a_bypassed_subject_is_never_corroborated(tiny: Path, open_subject: Open) -> None:
    """Its copies are loaded through the same bypass, and what would hold is inconclusive."""
    subject = open_subject(tiny, skip_contract=True)
    for claim in ("F-GT-001", "F-GT-002", "F-GT-004"):
        assert judged(claim, subject)[0] is Verdict.INCONCLUSIVE


def test_conversations_are_many() -> None:
    """The comparison of templates is not one conversation."""
    assert len(chatml.CONVERSATIONS) >= 6


@pytest.mark.parametrize(
    ("name", "quantize", "key", "verdict"),
    [
        ("model-Q8_0.gguf", "Q8_0", None, Verdict.CORROBORATED),
        ("model-Q4_K_M.gguf", "Q8_0", None, Verdict.FALSIFIED),
        ("model.gguf", "Q8_0", 15, Verdict.FALSIFIED),
        ("model.gguf", "Q8_0", 30, Verdict.NOT_RUN),
    ],
)
def test_a_label_is_held_against_the_content(
    tiny: Path, tmp_path: Path, open_subject: Open, name: str, quantize: str, key: int | None, verdict: Verdict
) -> None:
    """By the name, by the key; a kind of file whose rules are not ours is left alone."""
    path = convert(tiny, tmp_path / name, quantize=quantize)
    if key is not None:
        data, word = path.read_bytes(), b"general.file_type"
        at = data.index(word) + len(word) + 4
        path.write_bytes(data[:at] + key.to_bytes(4, "little") + data[at + 4 :])
    found, finding = judged("F-GT-012", open_subject(path))
    assert found is verdict
    assert bool(finding.whys) == (verdict is Verdict.FALSIFIED)


def test_a_copy_of_mixed_types_gets_no_label(tiny: Path, tmp_path: Path) -> None:
    """A file of two types is neither; before, the type of most weights gave it a name."""
    with open_checkpoint(tiny) as whole:
        draft = take_apart(whole)
    draft.dtypes |= {name: FORMATS["F32"] for name in draft.dtypes if "mlp" in name}
    with open_checkpoint(convert(put_together(draft, tmp_path / "mixed"), tmp_path / "mixed.gguf")) as opened:
        assert "general.file_type" not in opened.metadata
