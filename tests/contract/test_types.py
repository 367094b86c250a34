"""Two ways to a validated tensor, and no third: every other road raises."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pytest

from apr_core.contract import types as types_module
from apr_core.contract.admit import Admission, admit
from apr_core.contract.gates import load_gates
from apr_core.contract.layout import Geometry
from apr_core.contract.types import (
    RepackedHead,
    ValidatedEmbedding,
    ValidatedHead,
    ValidatedModel,
    ValidatedVector,
    ValidatedWeight,
)
from apr_core.dtypes import FORMATS
from apr_core.errors import ContractViolation, UsageError
from apr_core.formats.checkpoint import RawTensor, TensorInfo, open_checkpoint

from .conftest import CONFIG, Save, Tensors

GEOMETRY = Geometry.from_config(CONFIG)
DOWN = "model.layers.1.mlp.down_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"
TYPES = {DOWN: ValidatedWeight, EMBEDDING: ValidatedEmbedding, NORM: ValidatedVector, HEAD: ValidatedHead}


def raw_of(name: str, values: np.ndarray) -> RawTensor:
    """Wrap an array, sharing its memory."""
    info = TensorInfo(name, FORMATS["F32"], values.shape, Path("made.up"), 0, values.nbytes, name)
    return RawTensor(info, values.reshape(-1).view(np.uint8))


@pytest.fixture
def tensors(tensors: Tensors) -> Tensors:
    """The model of the other tests with a head of its own beside the embedding that it is tied to."""
    return {**tensors, HEAD: tensors[EMBEDDING].copy()}


@pytest.fixture
def folder(tensors: Tensors, config: dict[str, object], save: Save) -> Path:
    """A healthy model on disk."""
    return save(tensors, config)


@pytest.fixture
def refused(tensors: Tensors, config: dict[str, object], save: Save) -> Path:
    """A model with one zeroed projection."""
    tensors[DOWN][:] = 0
    return save(tensors, config)


@pytest.mark.parametrize("name", TYPES)
def test_healthy_raw_bytes_are_accepted(name: str, tensors: Tensors) -> None:
    """The first way: bytes are measured and judged, and come back as they went in."""
    made = TYPES[name](raw_of(name, tensors[name]), GEOMETRY)
    assert np.array_equal(tensors[name], made.values())
    assert (made.name, made.shape, made.stats.count, made.bypassed) == (
        name,
        tensors[name].shape,
        tensors[name].size,
        False,
    )
    assert repr(made) == f"{TYPES[name].__name__}({name}, F32 {list(made.shape)})"


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("defect", [np.nan, np.inf, "zeros", "shape", "short", "type"])
def test_broken_raw_bytes_are_refused(name: str, defect: object, tensors: Tensors) -> None:
    """The same way refuses NaN, zeros, a wrong shape, missing bytes and a type without a decoder."""
    values = tensors[name]
    if isinstance(defect, float):
        values.reshape(-1)[-1] = defect
    elif defect == "zeros":
        values[:] = 0
    elif defect == "shape":
        values = np.concatenate([values, values])
    raw = raw_of(name, values)
    if defect == "short":
        raw = RawTensor(raw.info, raw.data[:-4])
    elif defect == "type":
        q8_1 = dataclasses.replace(raw.info, dtype=FORMATS["Q8_1"], nbytes=FORMATS["Q8_1"].nbytes(values.shape))
        raw = RawTensor(q8_1, np.zeros(q8_1.nbytes, np.uint8))
    with pytest.raises(ContractViolation, match=name) as caught:
        TYPES[name](raw, GEOMETRY)
    if defect == "short":
        assert [v.rule for v in caught.value.violations] == ["byte_difference"]


@pytest.mark.parametrize("name", TYPES)
def test_the_wrong_type_is_an_error(name: str, tensors: Tensors) -> None:
    """A norm is not a weight, and a tensor outside the contract is nothing at all."""
    for other in {*TYPES.values()} - {TYPES[name]}:
        if (name, other) == (EMBEDDING, ValidatedHead):
            continue  # a tied model's embedding is its head: the test below
        with pytest.raises(TypeError, match=name):
            other(raw_of(name, tensors[name]), GEOMETRY)
    with pytest.raises(TypeError, match="spare"):
        TYPES[name](raw_of("spare.weight", tensors[name]), GEOMETRY)


def test_the_bytes_are_owned(tensors: Tensors) -> None:
    """Zeroing the array after construction changes nothing: the bytes were copied before they were judged."""
    source = tensors[DOWN].copy()
    made = ValidatedWeight(raw_of(DOWN, source), GEOMETRY)
    source[:] = np.nan
    assert np.array_equal(tensors[DOWN], made.values())
    with pytest.raises(ValueError, match="WRITEABLE"):
        made.raw.data.flags.writeable = True


def test_immutable_bytes_are_not_copied(tensors: Tensors) -> None:
    """What nobody can change needs no copy."""
    raw = RawTensor(raw_of(DOWN, tensors[DOWN]).info, np.frombuffer(tensors[DOWN].tobytes(), np.uint8))
    assert ValidatedWeight(raw, GEOMETRY).raw is raw


def test_values_are_fresh(folder: Path) -> None:
    """Writing into the decoded values changes neither the tensor nor the next decoding."""
    model = admit(folder).require()
    before = model.tensors[DOWN].values()
    model.tensors[DOWN].values()[:] = np.nan
    assert np.array_equal(before, model.tensors[DOWN].values())


@pytest.mark.parametrize("field", ["raw", "stats", "role", "geometry", "bypassed", "spare"])
def test_frozen(field: str, tensors: Tensors) -> None:
    """No field can be set, and none can be added."""
    made = ValidatedWeight(raw_of(DOWN, tensors[DOWN]), GEOMETRY)
    with pytest.raises((dataclasses.FrozenInstanceError, TypeError)):
        setattr(made, field, None)
    with pytest.raises((dataclasses.FrozenInstanceError, TypeError)):
        delattr(made, field)
    assert not hasattr(made, "__dict__")


def test_replace_goes_through_the_gate(tensors: Tensors) -> None:
    """`dataclasses.replace` with healthy bytes measures them; with zeros it raises; the verdict cannot be replaced."""
    made = ValidatedWeight(raw_of(DOWN, tensors[DOWN]), GEOMETRY)
    twice = dataclasses.replace(made, raw=raw_of(DOWN, 2 * tensors[DOWN]))
    assert twice.stats.l2 == pytest.approx(2 * made.stats.l2)
    with pytest.raises(ContractViolation, match="F-DATA-QUALITY-001"):
        dataclasses.replace(made, raw=raw_of(DOWN, 0 * tensors[DOWN]))
    with pytest.raises(ContractViolation, match="F-LAYOUT-CONTRACT-001"):
        dataclasses.replace(made, geometry=dataclasses.replace(GEOMETRY, intermediate_size=97))
    with pytest.raises(ValueError, match="stats"):
        dataclasses.replace(made, stats=made.stats)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_copies_are_judged_again(again: object, tensors: Tensors, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy and pickle carry bytes, not verdicts: each arrival is measured."""
    made = ValidatedWeight(raw_of(DOWN, tensors[DOWN]), GEOMETRY)
    calls = []
    monkeypatch.setattr(types_module, "measure", lambda raw, **more: calls.append(raw) or made.stats)
    assert np.array_equal(again(made).values(), made.values())
    assert len(calls) == 1


def test_an_edited_pickle_is_refused(tensors: Tensors) -> None:
    """Zeros written into the pickled bytes are found on arrival."""
    made = ValidatedWeight(raw_of(DOWN, tensors[DOWN]), GEOMETRY)
    stored = pickle.dumps(made)
    body = tensors[DOWN].tobytes()
    assert body in stored
    with pytest.raises(ContractViolation, match="F-DATA-QUALITY-001"):
        pickle.loads(stored.replace(body, bytes(len(body))))


def test_an_unbuilt_instance_holds_nothing() -> None:
    """`object.__new__` makes a shell without bytes: whoever uses it fails at once."""
    shell = object.__new__(ValidatedWeight)
    with pytest.raises(AttributeError):
        shell.values()


def test_equality_is_identity(tensors: Tensors) -> None:
    """Arrays have no single truth value, so comparing two tensors must not compare their bytes."""
    one, other = (ValidatedWeight(raw_of(DOWN, tensors[DOWN]), GEOMETRY) for _ in range(2))
    assert (one == one, one == other, len({one, other})) == (True, False, 2)


def test_an_admission_is_not_measured_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second way: statistics come from the admission, bytes from its mapping, uncopied."""
    admission = admit(folder)
    monkeypatch.setattr(types_module, "measure", None)
    raw = admission.checkpoint.raw(DOWN)
    made = ValidatedWeight(raw, admission.geometry, admission)
    assert made.stats is admission.stats[DOWN]
    assert made.raw is raw


def test_an_admission_covers_only_its_own_bytes(folder: Path, tensors: Tensors) -> None:
    """Not the same file opened again, not a copy, not another span, not another geometry, not something else."""
    admission = admit(folder)
    mine = admission.checkpoint.raw(DOWN)
    other = admission.checkpoint.raw(DOWN.replace("layers.1", "layers.0"))
    foreign = [
        open_checkpoint(folder).raw(DOWN),
        RawTensor(mine.info, mine.data.copy()),
        RawTensor(mine.info, other.data),
        RawTensor(dataclasses.replace(mine.info, shape=(96, 64)), mine.data),
        RawTensor(dataclasses.replace(mine.info, name="model.layers.1.mlp.up_proj.weight"), mine.data),
        RawTensor(mine.info, mine.data[:-4]),
    ]
    for raw in foreign:
        with pytest.raises(UsageError, match="does not cover"):
            ValidatedWeight(raw, admission.geometry, admission)
    with pytest.raises(UsageError, match="geometry"):
        ValidatedWeight(mine, dataclasses.replace(GEOMETRY, intermediate_size=97), admission)
    with pytest.raises(TypeError, match="expected an Admission"):
        ValidatedWeight(mine, GEOMETRY, "yes")


def test_an_admission_of_old_gates_no_longer_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a change of the gate table the file is judged again."""
    admission = admit(folder)
    newer = dataclasses.replace(load_gates(), version=load_gates().version + 1)
    monkeypatch.setattr(types_module, "load_gates", lambda: newer)
    with pytest.raises(UsageError, match="gate version"):
        ValidatedWeight(admission.checkpoint.raw(DOWN), admission.geometry, admission)


def test_a_refused_admission_covers_nothing(refused: Path) -> None:
    """Not even its healthy tensors: the file as a whole was refused."""
    admission = admit(refused)
    with pytest.raises(ContractViolation, match="F-DATA-QUALITY-001"):
        ValidatedEmbedding(admission.checkpoint.raw(EMBEDDING), admission.geometry, admission)
    with pytest.raises(ContractViolation, match="F-DATA-QUALITY-001"):
        ValidatedModel(admission)


def test_an_admission_cannot_be_built_or_edited(refused: Path) -> None:
    """Neither the constructor nor `replace` makes an admission without violations."""
    admission = admit(refused)
    with pytest.raises(TypeError, match="comes from admit"):
        Admission(admission.checkpoint, admission.geometry, admission.stats, (), admission.gate_version)
    for change in ({"violations": ()}, {"bypassed": True}, {}):
        with pytest.raises(TypeError, match="comes from admit"):
            dataclasses.replace(admission, **change)
    with pytest.raises(dataclasses.FrozenInstanceError):
        admission.violations = ()
    with pytest.raises(TypeError):
        admission.stats[DOWN] = admission.stats[EMBEDDING]
    assert "ADMIT" not in repr(admission)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_an_admission_travels_as_a_path(again: object, tensors: Tensors, config: dict[str, object], save: Save) -> None:
    """What arrives is a new judgement: a file that changed meanwhile is refused."""
    from safetensors.numpy import save_file

    folder = save(tensors, config)
    model = admit(folder).require()
    assert list(again(model).tensors) == list(model.tensors)
    tensors[DOWN][:] = 0
    save_file(tensors, folder / "new")
    (folder / "new").replace(folder / "model.safetensors")
    assert again(model.admission).violations
    if again is copy.copy:  # a shallow copy shares the admission, whose mapping is still the file that was judged
        assert again(model).admission is model.admission
        return
    with pytest.raises(ContractViolation):
        again(model)


def test_a_bypass_stays_a_bypass(refused: Path) -> None:
    """The mark survives every copy, and a tensor that leaves the bypassed model is judged again."""
    model = admit(refused, skip=True).require()
    assert model.bypassed
    assert all(tensor.bypassed for tensor in model.tensors.values())
    assert pickle.loads(pickle.dumps(model)).bypassed
    with pytest.raises(ContractViolation):
        copy.copy(model.tensors[DOWN])
    assert not copy.copy(model.tensors[EMBEDDING]).bypassed


def test_a_model_needs_an_admission() -> None:
    """Something that looks like an admission is not one."""
    with pytest.raises(TypeError, match="expected an Admission"):
        ValidatedModel("models/pygmy")


def test_the_head_of_a_tied_model_is_its_embedding(folder: Path, tensors: Tensors) -> None:
    """As the geometry says, not as the file stores; the embedding of an untied model is no head."""
    head = admit(folder).require().head
    assert (type(head), head.name) == (ValidatedHead, EMBEDDING)
    with pytest.raises(TypeError, match="has one of its own"):
        ValidatedHead(raw_of(EMBEDDING, tensors[EMBEDDING]), dataclasses.replace(GEOMETRY, tied=False))


def test_the_head_of_an_untied_model_is_its_own(tensors: Tensors, config: dict[str, object], save: Save) -> None:
    """The stored matrix, uncopied."""
    config["tie_word_embeddings"] = False
    model = admit(save(tensors, config)).require()
    assert model.head is model.tensors[HEAD]


def test_take_names_what_it_found(folder: Path) -> None:
    """A tensor comes out as the type that it is, or not at all."""
    model = admit(folder).require()
    assert model.take(DOWN, ValidatedWeight) is model.tensors[DOWN]
    with pytest.raises(TypeError, match="is a ValidatedWeight, not a ValidatedVector"):
        model.take(DOWN, ValidatedVector)
    with pytest.raises(KeyError, match="spare"):
        model.take("spare", ValidatedWeight)


def test_a_repacked_head(folder: Path, tensors: Tensors) -> None:
    """Made from a judged head alone, in its own layout, and closed: neither editable nor a natural head again."""
    model = admit(folder).require()
    packed = RepackedHead(model.head)
    assert np.array_equal(packed.data, tensors[EMBEDDING].T)
    assert repr(packed) == f"RepackedHead({EMBEDDING}, float32 [64, 131])"
    for raises in (
        lambda: packed.data.__setitem__((0, 0), 1.0),
        lambda: setattr(packed.data.flags, "writeable", True),
        lambda: setattr(packed, "data", packed.data.copy()),
        lambda: RepackedHead(packed),
        lambda: RepackedHead(model.tensors[EMBEDDING]),
        lambda: RepackedHead(packed.data),
        lambda: ValidatedHead(packed, model.geometry, model.admission),
        lambda: dataclasses.replace(packed, data=packed.data),
    ):
        with pytest.raises((TypeError, ValueError, AttributeError)):
            raises()
    assert not isinstance(packed, ValidatedHead)


def halved(head: ValidatedHead) -> np.ndarray:
    """Pack to float16."""
    return head.values().astype(np.float16)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_copies_of_a_repacked_head_are_packed_again(again: object, tensors: Tensors) -> None:
    """What travels is the natural head and how to pack it, so the verdict is spoken again on arrival."""
    packed = RepackedHead(ValidatedHead(raw_of(HEAD, tensors[HEAD]), GEOMETRY), halved)
    arrived = again(packed)
    assert arrived.data is not packed.data
    assert np.array_equal(arrived.data, tensors[HEAD].astype(np.float16))
    stolen = pickle.dumps(packed).replace(tensors[HEAD].tobytes(), bytes(tensors[HEAD].nbytes))
    with pytest.raises(ContractViolation, match="F-DATA-QUALITY-001"):
        pickle.loads(stolen)


@pytest.mark.parametrize("closed", [*TYPES.values(), RepackedHead, ValidatedModel, Admission])
def test_no_type_has_a_subclass(closed: type) -> None:
    """A subclass could leave the gate out and pass for the type that has it: it cannot even be defined."""
    with pytest.raises(TypeError, match=f"{closed.__name__} cannot be subclassed"):
        type("Trusting", (closed,), {"__post_init__": lambda self, admission=None: None})
