"""Configuration, tokenizer, ends and template: each planted difference is one field, and benign twins are none."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from apr_core.formats.checkpoint import open_checkpoint
from apr_core.rosetta.convert import convert, named
from apr_core.rosetta.identity import IdentityDiff, compare_identity

Edit = Callable[..., Path]


def compare(subject: Path, reference: Path) -> IdentityDiff:
    """Open both sides, compare, close."""
    with open_checkpoint(subject) as left, open_checkpoint(reference) as right:
        return compare_identity(left, right)


def differing(subject: Path, reference: Path) -> list[str]:
    """Names of the fields that differ."""
    return [field.name for field in compare(subject, reference).differences]


@pytest.mark.parametrize("target", ["gguf", "apr", "safetensors"])
def test_a_copy_has_no_difference(target: str, tiny: Path, tmp_path: Path) -> None:
    """All 18 fields are compared and agree, in either direction."""
    path = convert(tiny, named(tmp_path / "t", target))
    for pair in ((path, tiny), (tiny, path)):
        found = compare(*pair)
        assert (len(found.fields), found.differences, found.missing) == (18, [], ())


@pytest.mark.oracle
def test_files_of_llama_cpp_have_no_difference(oracle: Path) -> None:
    """What llama.cpp's converter wrote says what the Hugging Face folder says."""
    found = compare(oracle / "mini" / "gguf" / "Q8_0.gguf", oracle / "mini")
    assert (len(found.fields), found.differences, found.missing) == (18, [], ())


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"rope_theta": 10000.0}, "rope_theta"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps"),
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
        ({"max_position_embeddings": 128}, "max_position_embeddings"),
        ({"intermediate_size": 97}, "intermediate_size"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"rope_theta": None}, "configuration"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "configuration"),
    ],
)
def test_a_changed_configuration_is_one_difference(
    change: Mapping[str, Any], field: str, edited: Edit, tiny: Path
) -> None:
    """Each key that decides the arithmetic is compared; an unusable configuration is a difference of its own."""
    folder = edited(**{"config.json": change})
    assert differing(folder, tiny) == [field]
    assert differing(tiny, folder) == [field]


def test_numbers_are_compared_as_gguf_can_keep_them(edited: Edit, tiny: Path, tmp_path: Path) -> None:
    """0.1 has no exact float32: the GGUF made from it holds the nearest one, which is the same number here."""
    folder = edited(**{"config.json": {"rms_norm_eps": 1.1e-6}})
    assert differing(convert(folder, tmp_path / "t.gguf"), folder) == []
    assert differing(convert(folder, tmp_path / "u.gguf"), tiny) == ["rms_norm_eps"]


def test_a_stored_tied_head_is_tied(edited: Edit, tiny: Path, tmp_path: Path) -> None:
    """A GGUF with a stored head says that it is not tied; when the head is the embedding it is, all the same."""
    stored = edited(lambda held: held.update({"lm_head.weight": held["model.embed_tokens.weight"].clone()}))
    assert differing(convert(stored, tmp_path / "t.gguf"), tiny) == []
    untied = edited(
        lambda held: held.update({"lm_head.weight": torch.ones_like(held["model.embed_tokens.weight"])}),
        **{"config.json": {"tie_word_embeddings": False}},
    )
    assert differing(convert(untied, tmp_path / "u.gguf"), tiny) == ["tie_word_embeddings"]


def tokenizer_of(folder: Path) -> dict[str, Any]:
    """The tokenizer's document, to be changed."""
    document: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text())
    return document


def test_two_swapped_tokens_and_two_swapped_merges_are_seen(edited: Edit, tiny: Path) -> None:
    """The vocabulary has the same tokens, the merges the same pairs: only their numbers differ."""
    model = tokenizer_of(tiny)["model"]
    a, b = list(model["vocab"])[260:262]
    vocab = {**model["vocab"], a: model["vocab"][b], b: model["vocab"][a]}
    found = compare(edited(**{"tokenizer.json": {"model": {**model, "vocab": vocab}}}), tiny).differences
    assert [field.name for field in found][:1] == ["vocabulary"]
    assert "first at id 260" in found[0].note
    merges = [model["merges"][1], model["merges"][0], *model["merges"][2:]]
    found = compare(edited(**{"tokenizer.json": {"model": {**model, "merges": merges}}}), tiny).differences
    assert [(field.name, field.note) for field in found][:1] == [("merges", "2 differ, first at rank 0")]
    shorter = {**model, "merges": model["merges"][:-1]}
    found = compare(edited(**{"tokenizer.json": {"model": shorter}}), tiny).differences
    assert found[0].note == f"0 differ, first at rank {len(shorter['merges'])}"


def test_another_normalizer_is_seen_by_the_corpus(edited: Edit, tiny: Path) -> None:
    """Vocabulary and merges are equal; a decomposed é still gets other ids."""
    found = compare(edited(**{"tokenizer.json": {"normalizer": {"type": "Lowercase"}}}), tiny).differences
    assert [field.name for field in found] == ["ids of the corpus"]


def test_a_control_token_that_became_plain_is_seen(edited: Edit, tiny: Path) -> None:
    """Without the token, its text is split: a chat would not be a chat."""
    added = tokenizer_of(tiny)["added_tokens"]
    found = differing(edited(**{"tokenizer.json": {"added_tokens": added[:1] + added[2:]}}), tiny)
    assert found == ["vocabulary", "control tokens", "ids of the corpus"]


def test_add_bos_is_compared(edited: Edit, tiny: Path) -> None:
    """A token put before every raw text changes every raw text."""
    assert differing(edited(**{"tokenizer_config.json": {"add_bos_token": True}}), tiny) == ["add_bos_token"]


def test_a_lost_end_token_is_seen(edited: Edit, tiny: Path) -> None:
    """A folder that no longer names one of two ends talks on; the same folder as GGUF does not, by its text."""
    folder = edited(drop=("generation_config.json",))
    assert differing(folder, tiny) == ["end tokens"]
    assert differing(tiny, folder) == ["end tokens"]


def test_ends_that_gguf_readers_add_by_text_are_excused(edited: Edit, tmp_path: Path) -> None:
    """A folder with one end token and the GGUF made from it are not different because llama.cpp ends on both texts."""
    folder = edited(drop=("generation_config.json",))
    path = convert(folder, tmp_path / "t.gguf")
    assert differing(path, folder) == []
    assert differing(folder, path) == []


def test_an_end_token_of_another_text_is_never_excused(edited: Edit, tiny: Path, tmp_path: Path) -> None:
    """An ordinary word that ends generation is a difference in any container."""
    folder = edited(**{"generation_config.json": {"eos_token_id": [317, 315, 260]}})
    assert differing(convert(folder, tmp_path / "t.gguf"), tiny) == ["end tokens"]


def test_templates(edited: Edit, tiny: Path) -> None:
    """A missing or changed template is a difference; Windows line ends are not."""
    template = json.loads((tiny / "tokenizer_config.json").read_text())["chat_template"]
    assert differing(edited(**{"tokenizer_config.json": {"chat_template": None}}), tiny) == ["chat template"]
    changed = template.replace("assistant\\n", "assistant")
    found = compare(edited(**{"tokenizer_config.json": {"chat_template": changed}}), tiny).differences
    assert [field.name for field in found] == ["chat template"]
    assert found[0].note.startswith("first at character")
    shorter = compare(edited(**{"tokenizer_config.json": {"chat_template": template[:-5]}}), tiny).differences
    assert shorter[0].note.startswith(f"first at character {len(template) - 5}: ''")
    lines = template.replace("{%- endfor", "\n{%- endfor")
    unix = edited(**{"tokenizer_config.json": {"chat_template": lines}})
    windows = edited(**{"tokenizer_config.json": {"chat_template": lines.replace("\n", "\r\n")}})
    assert differing(windows, unix) == []


def test_what_one_side_does_not_carry_is_named(edited: Edit, tiny: Path) -> None:
    """A reference without tokenizer says nothing about tokens: neither a difference nor a match."""
    bare = edited(drop=("tokenizer.json", "tokenizer_config.json"))
    for pair, side in (((bare, tiny), "subject"), ((tiny, bare), "reference")):
        found = compare(*pair)
        assert found.missing == (f"tokenizer, end tokens and template ({side} has none)",)
        assert (len(found.fields), found.differences) == (11, [])
    found = compare(bare, bare)
    assert (found.missing, found.differences) == ((), [])
    untemplated = edited(**{"tokenizer_config.json": {"chat_template": None}})
    assert compare(tiny, untemplated).missing == ("chat template (reference has none)",)
    assert compare(untemplated, untemplated).missing == ()


def test_rows_say_both_sides(edited: Edit, tiny: Path) -> None:
    """The table shows what each side says."""
    found = compare(edited(**{"config.json": {"rope_theta": 10000.0}}), tiny)
    (row,) = [field.as_row() for field in found.differences]
    assert row == {"field": "rope_theta", "subject": "10000", "reference": "1e+06", "same": False, "note": ""}
