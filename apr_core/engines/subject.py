"""What a notebook holds: an opened model with everything that claims ask of it, or its refusal."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from apr_core import provenance
from apr_core.contract.admit import Admission, admit
from apr_core.contract.receipt import COMPANIONS
from apr_core.errors import FormatError, LoadError, UsageError
from apr_core.falsify.evidence import SubjectRecord
from apr_core.falsify.finding import Finding
from apr_core.falsify.reuse import decided
from apr_core.falsify.rounds import Round
from apr_core.falsify.verdict import NEEDS
from apr_core.formats.checkpoint import Checkpoint

if TYPE_CHECKING:
    from apr_core.engines.plain import PlainQwen2
    from apr_core.model.tokens import PreparedTokens, Tokenizer
    from apr_core.model.trace import TracedForward

REUSE = "APR_REUSE"  # the folder of runs that the runner's --reuse names; kernels inherit it
# Beside the weights, what an answer or a verdict depends on.
BESIDE = (*COMPANIONS, "golden.json", "transformers_f64.npz")
ROOT = Path(__file__).resolve().parents[2]
BUNDLED = {"pygmy": ROOT / "models" / "pygmy"}
DEVICES = ("auto", "cpu", "cuda")

# Code, prose, digits and CJK: the stimulus of a model that has a tokenizer.
STIMULUS = (
    "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n\n"
    "The quick brown fox jumps over the lazy dog, 1234567890 times. "
    "What is 7-3? 7 - 3 equals 4. "
    "写一个快速排序。 Это проверка. "
    'for i, x in enumerate([3, 1, 2]):\n    print(f"{i}: {x}")\n'
)


def resolve_model(name: str) -> Path:
    """
    Turn a model name or path into a path; ``pygmy`` names the bundled model from any folder.

    A relative path that exists wins over a bundled name only when it holds a separator or a dot, so ``pygmy`` means
    the same thing everywhere.
    """
    return BUNDLED[name] if name in BUNDLED else Path(name).expanduser()


class _Lacks(Mapping[str, str]):
    """Need -> reason, for the needs that are not met; each is probed on first use (asking for CUDA imports torch)."""

    def __init__(self, probes: Mapping[str, Callable[[], bool]]) -> None:
        self._probes, self._met = probes, dict[str, bool]()

    def _lacking(self, need: str) -> bool:
        if need not in self._met:
            self._met[need] = bool(self._probes[need]())
        return not self._met[need]

    def __getitem__(self, need: str) -> str:
        if need in self._probes and self._lacking(need):
            return str(NEEDS[need])
        raise KeyError(need)

    def __iter__(self) -> Iterator[str]:
        return (need for need in self._probes if self._lacking(need))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Subject:
    """
    One opened model file: admission, companions, and the forwards of it, each made on first use.

    Built by ``obtain``. Attributes that need torch load it when they are first read.

    Attributes:
        peers: Names of the runtimes that a person wants its rates held against.
    """

    peers: tuple[str, ...] = ()

    def __init__(
        self,
        path: Path,
        admission: Admission,
        *,
        reference: Subject | None,
        device: str,
        seed: int,
        max_new_tokens: int,
    ) -> None:
        self.path, self.admission, self.reference = path, admission, reference
        self.device, self.seed, self.max_new_tokens = device, seed, max_new_tokens
        self.decided: Mapping[str, Finding] = {}
        self.lacks: Mapping[str, str] = _Lacks(
            {
                "tokenizer": lambda: self.tokenizer is not None,
                "template": lambda: self.tokenizer is not None and self.tokenizer.chat_template is not None,
                "golden": lambda: self.golden is not None,
                "golden_logits": lambda: self.golden_logits is not None,
                "trained": lambda: self.trained,
                "reference": lambda: self.reference is not None,
                "cuda": self._has_cuda,
                "peer": lambda: bool(self.peers),
            }
        )

    @property
    def checkpoint(self) -> Checkpoint:
        """The opened file."""
        return self.admission.checkpoint

    @property
    def refusal(self) -> str | None:
        """The gate and tensor that refused it, or None."""
        return None if self.admission.bypassed else self.admission.refusal

    @property
    def trained(self) -> bool:
        """False for files of ``apr synth``, which carry a mark."""
        return str(self.checkpoint.metadata.get("apr.untrained", "")).lower() != "true"

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The file's own tokenizer, or None when it has none; never another model's."""
        from apr_core.model.tokens import load_tokenizer

        try:
            return load_tokenizer(self.checkpoint)
        except LoadError:
            return None

    @cached_property
    def model(self) -> TracedForward:
        """The float32 torch reference on the CPU."""
        from apr_core.engines.load import build

        return build(self.admission, device="cpu", precision="reference")

    @cached_property
    def engine(self) -> TracedForward:
        """What ``apr run`` takes on the CPU unless asked otherwise."""
        from apr_core.engines.load import build, fastest_precision

        precision = fastest_precision("cpu")
        return self.model if precision == "reference" else build(self.admission, precision=precision)

    @cached_property
    def plain(self) -> PlainQwen2:
        """The independent numpy forward in float64."""
        from apr_core.engines.load import load_plain

        return load_plain(self.admission)

    @cached_property
    def golden(self) -> Mapping[str, Any] | None:
        """
        ``golden.json`` beside the weights: prompts and the answers they must give.

        Raises:
            FormatError: The file is there and unreadable: silence would skip the claim.
        """
        path = self.checkpoint.folder / "golden.json"
        if not path.is_file():
            return None
        try:
            body: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            [(c["id"], c["messages"], c["answer"]) for c in body["cases"]]
        except (ValueError, KeyError, TypeError) as error:
            raise FormatError(
                expected='{"cases": [{"id", "messages", "answer"}]}',
                found=str(error),
                file=path,
                advice="mend or remove it",
            ) from error
        return body

    @cached_property
    def golden_logits(self) -> Mapping[str, np.ndarray[Any, Any]] | None:
        """``transformers_f64.npz`` beside the weights: answers of an independent implementation."""
        path = self.checkpoint.folder / "transformers_f64.npz"
        if not path.is_file():
            return None
        with np.load(path, allow_pickle=False) as npz:
            return {name: npz[name] for name in npz.files}

    def stimulus(self, tokens: int) -> PreparedTokens:
        """
        Token ids to compare forwards on: text of code, prose and CJK, or seeded ids without a usable tokenizer.

        Args:
            tokens: How many; the text repeats until there are enough.
        """
        from apr_core.model.tokens import prepare_tokens

        if self.tokenizer is not None and self.trained:
            ids = self.tokenizer.encode(STIMULUS)
            ids = (ids * (tokens // max(1, len(ids)) + 1))[:tokens]
        else:
            ids = np.random.default_rng(self.seed).integers(0, self.model.config.vocab_size, tokens).tolist()
        return prepare_tokens(self.model, ids=ids)

    def _has_cuda(self) -> bool:
        if self.device == "cpu":
            return False
        import torch

        return torch.cuda.is_available()

    @cached_property
    def record(self) -> SubjectRecord:
        """What evidence says about this subject; hashes the whole file once."""
        checkpoint = self.checkpoint
        tensors = list(checkpoint.tensors.values())
        return SubjectRecord(
            name=self.path.name,
            path=str(self.path),
            format=checkpoint.format,
            sha256=checkpoint.content_hash,
            quant=dict(Counter(str(t.dtype) for t in tensors)),
            parameters=sum(int(np.prod(t.shape, dtype=object)) for t in tensors),
            file_bytes=sum(f.stat().st_size for f in checkpoint.files),
            device="cpu",
            template_sha256=(self.tokenizer.template_hash or "") if self.tokenizer else "",
            companions=_digest_beside(checkpoint.folder),
            refusal=self.admission.refusal or "",
            bypassed=self.admission.bypassed,
        )

    def close(self) -> None:
        """Drop the forwards and unmap the file."""
        for name in ("model", "engine", "plain", "tokenizer"):
            self.__dict__.pop(name, None)
        self.checkpoint.close()


def obtain(
    model: str,
    *,
    reference: str = "",
    device: str = "auto",
    seed: int = 0,
    max_new_tokens: int = 64,
    skip_contract: bool = False,
) -> Subject:
    """
    Open and judge a model; a refused one comes back as a Subject with its refusal.

    Args:
        model: Path, or the name of the bundled model.
        reference: The file that the model claims to be made from; empty for none.
        device: ``auto``, ``cpu`` or ``cuda``: which device claims are tried.
        seed: Of every stimulus that is drawn.
        max_new_tokens: Length of free-running comparisons.
        skip_contract: The explicit bypass: the subject is marked and nothing about it can be corroborated.

    Raises:
        UsageError: Unknown device.
        NotFound, FormatError, LoadError: The file cannot be opened at all.
    """
    if device not in DEVICES:
        raise UsageError(f"expected a device of {', '.join(DEVICES)}, found {device!r}")
    made_from = obtain(reference, seed=seed, max_new_tokens=max_new_tokens, device="cpu") if reference else None
    path = resolve_model(model)
    return Subject(
        path,
        admit(path, skip=skip_contract),
        reference=made_from,
        device=device,
        seed=seed,
        max_new_tokens=max_new_tokens,
    )


def open_round(notebook: str, subject: Subject, out_dir: str, parameters: Mapping[str, Any]) -> Round:
    """
    Begin the argument of one notebook about a subject.

    Args:
        notebook: Its name, e.g. ``20_parity``.
        subject: As ``obtain`` gave it.
        out_dir: The run folder; empty for a temporary one (exploring, nbval).
        parameters: The notebook's parameters, kept in every record.
    """
    folder = Path(out_dir) if out_dir else Path(tempfile.mkdtemp(prefix="apr-run-"))
    round_ = Round(
        notebook,
        subject.record,
        folder,
        parameters=parameters,
        provenance=provenance.collect(),
        reference=subject.reference.record if subject.reference else None,
    )
    if runs := os.environ.get(REUSE):
        subject.decided = decided(Path(runs), round_)
    return round_


def _digest_beside(folder: Path) -> str:
    """Hash the names and bytes of the companions that are there."""
    digest = hashlib.sha256()
    for path in (folder / name for name in BESIDE):
        if path.is_file():
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()
