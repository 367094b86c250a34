"""
Copies of a subject in the other containers, made once, and what was measured on them.

They lie in a folder of their own under the system's temporary one and vanish with the subject, or when Python ends.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from apr_core.errors import ContractViolation, FormatError, InferenceError, LoadError, UsageError
from apr_core.formats.checkpoint import Checkpoint, open_checkpoint
from apr_core.kernels.codecs import decode
from apr_core.rosetta.convert import CONTAINERS, convert, lossless, named, plan
from apr_core.rosetta.diff import TensorDiff, compare_tensors, typed_as, unreadable
from apr_core.rosetta.identity import CORPUS

if TYPE_CHECKING:
    from apr_core.engines.subject import Subject
    from apr_core.model.tokens import PreparedTokens, Tokenizer
    from apr_core.model.trace import TracedForward

STIMULUS_TOKENS = 96
PROMPT_TOKENS = 32
BROKE_OFF = -1  # stands behind the tokens of a generation that could not go on
_WITNESSED = (
    "model.norm.weight",
    "model.layers.0.self_attn.k_proj.bias",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
)


class NoCopyError(LoadError):
    """The subject is one that another container cannot hold: nothing can be said about its copies."""


@dataclass(frozen=True, eq=False)
class CopyRun:
    """
    One copy, run against the subject on the same tokens.

    Attributes:
        format: Container of the copy.
        rel_l2: float64 [positions]: norm of the difference over the norm of the subject's logits.
        max_abs: Largest difference of a logit.
        nonfinite: Logits of the copy that are NaN or infinite.
        greedy: One list of generated ids per prompt, end token included.
        refusal: Why the copy does not run at all; then every position is NaN and every list is empty.
    """

    format: str
    rel_l2: NDArray[np.float64]
    max_abs: float
    nonfinite: int
    greedy: tuple[tuple[int, ...], ...]
    refusal: str = ""


class Copies:
    """The copies of one subject. Get it with `copies_of`."""

    def __init__(self, subject: Subject) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="apr-copies-"))
        self.formats = tuple(c for c in CONTAINERS if c != subject.checkpoint.format)
        self._checkpoint = subject.checkpoint
        self._runs: list[CopyRun] = []

    def path(self, format: str, quantize: str | None = None) -> Path:
        """
        Return the copy in a container, making it when it is not there yet; it changes no value unless it is asked to.

        Raises:
            NoCopyError: The container cannot hold the subject, for instance its tokenizer.
        """
        target = named(self.folder / (quantize or "keep"), format)
        return self._written(target, self._checkpoint, lambda: quantize or lossless(self._checkpoint, format))

    def onward(self, source: Path, format: str, quantize: str | None = None) -> Path:
        """
        Convert a copy once more: how a file comes about that was converted twice.

        Raises:
            NoCopyError: The container cannot hold it.
        """
        return self._written(
            named(self.folder / f"{quantize or 'keep'}-of-{source.name}", format), source, lambda: quantize
        )

    def _written(self, target: Path, source: Checkpoint | Path, recipe: Callable[[], str | None]) -> Path:
        """Convert, unless it has been done already."""
        if not target.exists():
            try:
                convert(source, target, quantize=recipe(), bare=True)
            except (LoadError, UsageError) as error:
                raise NoCopyError(error.message, advice=error.advice) from error
            _after_writing.get()(target)
        return target

    @cached_property
    def diffs(self) -> dict[str, TensorDiff]:
        """Every tensor of every copy against the subject's, bit for bit."""
        out: dict[str, TensorDiff] = {}
        for container in self.formats:
            path = self.path(container)
            try:
                with open_checkpoint(path) as copy:
                    found = compare_tensors(copy, self._checkpoint, exact=True)
                    asked = lossless(self._checkpoint, container)
                    out[container] = typed_as(found, plan(self._checkpoint, path, quantize=asked).types)
            except FormatError as error:  # a copy that does not open holds none of the tensors
                out[container] = unreadable(self._checkpoint, error.line[:300])
        return out

    def witnessed(self, format: str) -> Witnessed | None:
        """Let a foreign package read the copy in a container, or the subject's own file; None where there is none."""
        if format == self._checkpoint.format:
            return witness(self._checkpoint, self._checkpoint)
        try:
            with open_checkpoint(self.path(format)) as copy:
                return witness(copy, self._checkpoint)
        except FormatError:  # `diffs` says so
            return None

    def runs(self, subject: Subject) -> Sequence[CopyRun]:
        """Run each copy once, one at a time; the results are kept, the models are not."""
        if not self._runs:
            stimulus = subject.stimulus(min(STIMULUS_TOKENS, subject.model.config.max_position_embeddings))
            own = subject.model.forward(stimulus.ids)
            prompts = greedy_prompts(subject)
            self._runs = [self._run(subject, container, stimulus, own, prompts) for container in self.formats]
        return self._runs

    def _run(
        self,
        subject: Subject,
        container: str,
        stimulus: PreparedTokens,
        own: NDArray[np.float32],
        prompts: Sequence[PreparedTokens],
    ) -> CopyRun:
        path = self.path(container)
        try:
            model = load_copy(path, subject)
        except (FormatError, ContractViolation, LoadError) as error:
            # A copy of an admitted model that is refused is a finding about the copy, not a crash of the notebook.
            nothing = np.full(len(own), np.nan)
            return CopyRun(container, nothing, 0.0, 0, ((),) * len(prompts), error.line[:300])
        logits = model.forward(stimulus.ids)
        return CopyRun(
            container,
            rel_l2(own, logits),
            largest_difference(own, logits),
            int(logits.size - np.isfinite(logits).sum()),
            tuple(
                greedy(model, prompt, subject.max_new_tokens) if reads_alike(model.tokenizer, subject.tokenizer) else ()
                for prompt in prompts
            ),
        )


_after_writing: ContextVar[Callable[[Path], None]] = ContextVar("after_writing", default=lambda path: None)


@contextmanager
def tampered(tamper: Callable[[Path], None]) -> Iterator[None]:
    """Let ``tamper`` edit each copy right after it is written: how the zoo plants a broken converter."""
    token = _after_writing.set(tamper)
    try:
        yield
    finally:
        _after_writing.reset(token)


_COPIES: weakref.WeakKeyDictionary[Subject, Copies] = weakref.WeakKeyDictionary()


def copies_of(subject: Subject) -> Copies:
    """Return the copies of a subject, the same object as long as the subject lives."""
    found = _COPIES.get(subject)
    if found is None:
        found = _COPIES[subject] = Copies(subject)
        weakref.finalize(subject, shutil.rmtree, found.folder, ignore_errors=True)  # at exit, too
    return found


def load_copy(path: Path, subject: Subject) -> TracedForward:
    """Load a copy through the gate; that of a bypassed subject through the same bypass."""
    from apr_core.engines.load import load_model

    return load_model(path, skip_contract=subject.admission.bypassed)


def greedy_prompts(subject: Subject) -> list[PreparedTokens]:
    """Choose what the greedy comparison continues: the stimulus, and the first golden conversation if there is one."""
    from apr_core.model.tokens import prepare_tokens

    prompts = [subject.stimulus(min(PROMPT_TOKENS, subject.model.config.max_position_embeddings - 1))]
    able = not any(need in subject.lacks for need in ("tokenizer", "template", "golden"))
    if able and subject.golden and subject.golden["cases"]:
        prompts.append(prepare_tokens(subject.model, messages=subject.golden["cases"][0]["messages"]))
    return prompts


def reads_alike(copy: Tokenizer | None, original: Tokenizer | None) -> bool:
    """Tell whether a copy makes the same ids of the same texts and wraps messages the same way."""
    if copy is None or original is None:
        return copy is original
    return copy.chat_template == original.chat_template and all(
        copy.encode(text, parse_special=special) == original.encode(text, parse_special=special)
        for text in CORPUS
        for special in (False, True)
    )


def greedy(model: TracedForward, prompt: PreparedTokens, limit: int) -> tuple[int, ...]:
    """Generate greedily: token ids, the end token included, `BROKE_OFF` behind them when a step failed."""
    from apr_core.model.generate import generate

    generation = generate(model, prompt, max_new_tokens=limit)
    try:
        return tuple(generation)
    except InferenceError:
        return (*generation.ids, BROKE_OFF)


def mismatches(reference: Sequence[int], candidate: Sequence[int]) -> int:
    """Count positions that differ and tokens that one list has and the other has not; `BROKE_OFF` equals nothing."""
    pairs = list(zip(reference, candidate, strict=False))
    return sum(a != b or a == BROKE_OFF for a, b in pairs) + abs(len(reference) - len(candidate))


def rel_l2(reference: NDArray[np.floating[Any]], candidate: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """
    Norm of the difference over the norm of the reference, per position.

    Args:
        reference: [positions, vocabulary].
        candidate: The same shape.

    Returns:
        float64 [positions]; NaN where the candidate is not finite, so that no limit holds.
    """
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        given = np.asarray(reference, dtype=np.float64)
        out: NDArray[np.float64] = np.linalg.norm(candidate - given, axis=-1) / np.linalg.norm(given, axis=-1)
    return out


def largest_difference(reference: NDArray[np.float32], candidate: NDArray[np.float32]) -> float:
    """Largest absolute difference, over the finite ones."""
    with np.errstate(invalid="ignore", over="ignore"):
        distance = np.abs(reference.astype(np.float64) - candidate)
    return float(distance[np.isfinite(distance)].max(initial=0.0))


@dataclass(frozen=True)
class Witnessed:
    """What a foreign package read from one file, against what our reader and decoder say of the subject."""

    package: str
    names: tuple[str, ...]
    values: int
    mismatched: int
    first: str


def witness(file: Checkpoint, original: Checkpoint) -> Witnessed | None:
    """
    Read a few tensors with the field's own package, so that no reader of ours is the only judge of our writer.

    Args:
        file: A copy, or the subject's own file.
        original: The subject's checkpoint; its decoded values are what must come out.

    Returns:
        None for APR, which has no other reader.
    """
    read = {"safetensors": _read_safetensors, "gguf": _read_gguf}.get(file.format)
    if read is None:
        return None
    names = tuple(name for name in _WITNESSED if name in file.tensors and name in original.tensors)
    values, mismatched, first = 0, 0, ""
    for name, foreign in read(file, names).items():
        own = decode(original.raw(name))
        same = own.shape == foreign.shape
        wrong = own.view(np.uint32) != foreign.view(np.uint32) if same else np.ones(own.shape, dtype=bool)
        values += own.size
        mismatched += int(wrong.sum())
        if wrong.any() and not first:
            at = int(wrong.argmax())
            found = repr(float(foreign.reshape(-1)[at])) if same else f"shape {list(foreign.shape)}"
            first = f"{name} at {at}: expected {float(own.reshape(-1)[at])!r}, found {found}"
    return Witnessed(file.format, names, values, mismatched, first)


def _read_safetensors(file: Checkpoint, names: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    from safetensors import safe_open

    out: dict[str, NDArray[np.float32]] = {}
    for name in names:
        with safe_open(file.tensors[name].file, framework="pt") as opened:
            out[name] = np.ascontiguousarray(opened.get_tensor(name).float().numpy())
    return out


def _read_gguf(file: Checkpoint, names: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    import gguf

    stored = {file.tensors[name].stored_name: name for name in names}
    out: dict[str, NDArray[np.float32]] = {}
    for tensor in gguf.GGUFReader(file.path).tensors:
        if tensor.name in stored:
            try:
                values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            except NotImplementedError:  # gguf hands integers out as they are
                values = tensor.data.astype(np.float32)
            out[stored[tensor.name]] = np.ascontiguousarray(values).reshape(tuple(map(int, reversed(tensor.shape))))
    return out
