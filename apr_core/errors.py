"""
The error tree and the exit codes: one home for both.

    AprError                  1   unexpected
    ├── UsageError            2   wrong arguments
    ├── NotFound              3   no such file
    ├── FormatError           4   not recognised, or malformed
    ├── ContractViolation     5   readable, but refused by a gate
    ├── LoadError             6   a companion is missing, or the model is too large
    ├── ReadWriteError        7   the operating system said no
    ├── InferenceError        8   a forward pass or a generation failed
    └── Unavailable           9   a feature or a device is not there

Every message says what was expected, what was found, where, and what to do next. Wording is part of the interface.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import ClassVar


class Exit(IntEnum):
    """Process exit codes, the same for `apr`, the scripts and the notebooks' runner."""

    OK = 0
    UNEXPECTED = 1
    USAGE = 2
    NOT_FOUND = 3
    FORMAT = 4
    REFUTED = 5
    LOAD = 6
    IO = 7
    INFERENCE = 8
    UNAVAILABLE = 9
    NETWORK = 10
    INCONCLUSIVE = 11


class AprError(Exception):
    """Base of every error that input can cause. ``advice`` is the next step, as an imperative."""

    exit_code: ClassVar[Exit] = Exit.UNEXPECTED

    def __init__(self, message: str, *, advice: str = "") -> None:
        message, advice = printable(message), printable(advice)
        super().__init__(f"{message}; {advice}" if advice else message)
        self.message = message
        self.advice = advice

    @property
    def line(self) -> str:
        """The message on one line, for the cell of a table."""
        return " ".join(self.message.split())


def printable(text: str) -> str:
    """Escape what is not printable: a tensor name from a file must not move a terminal's cursor."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in text)


class UsageError(AprError):
    """The call itself is wrong (unknown parameter, contradicting options)."""

    exit_code = Exit.USAGE


class NotFound(AprError):
    """The path that was given does not exist."""

    exit_code = Exit.NOT_FOUND


class FormatError(AprError):
    """
    A file is not what it claims to be, or not a model file at all.

    Args:
        expected: What the format demands at this place.
        found: What stands there.
        file: The file that was read.
        tensor: The tensor concerned, when there is one.
        at: Byte offset in the file, when known.
        advice: The next step.
    """

    exit_code = Exit.FORMAT

    def __init__(
        self,
        *,
        expected: str,
        found: str,
        file: Path | str,
        tensor: str | None = None,
        at: int | None = None,
        advice: str,
    ) -> None:
        place = f"in {file}"
        if tensor is not None:
            place += f", tensor {tensor}"
        if at is not None:
            place += f" at byte {at}"
        super().__init__(f"expected {expected}, found {found}, {place}", advice=advice)
        self.expected, self.found, self.file, self.tensor, self.at = expected, found, str(file), tensor, at


class ContractViolation(AprError):
    """
    A readable model is refused by the contract; carries every violation at once, and its message shows the first.

    Args:
        subject: The path of the model.
        violations: All of them, in the order of judging; each prints as one line that names gate, tensor, measured
            value and limit.
    """

    exit_code = Exit.REFUTED
    shown: ClassVar[int] = 8  # lines of the message: a zeroed model has hundreds, and the first ones name the cause

    def __init__(self, subject: Path | str, violations: Sequence[object]) -> None:
        count, tensors = len(violations), len({getattr(v, "tensor", None) for v in violations})
        lines = [str(v) for v in violations[: self.shown]]
        if count > self.shown:
            lines.append(f"... and {count - self.shown} more")
        listed = "\n  ".join(lines)
        # what leaves nothing to run cannot be waived, so the bypass is named only where it helps
        waivable = all(getattr(v, "waivable", False) for v in violations)
        super().__init__(
            f"{subject} is refused by the contract, {count} violation{'s' * (count != 1)} in "
            f"{tensors} tensor{'s' * (tensors != 1)}:"
            f"\n  {listed}\n",
            advice=f"see all with `apr validate {subject}`, or get a fresh copy of the file"
            + (" (--skip-contract runs it in spite of them, and marks what comes out)" if waivable else ""),
        )
        self.subject, self.violations = str(subject), tuple(violations)


class LoadError(AprError):
    """The weights are there, but something that a model needs is not (config, tokenizer, memory)."""

    exit_code = Exit.LOAD


class ReadWriteError(AprError):
    """Reading or writing failed below us (disk full, permission, file vanished)."""

    exit_code = Exit.IO


class InferenceError(AprError):
    """A forward pass or a generation could not be done."""

    exit_code = Exit.INFERENCE


class Unavailable(AprError):
    """A feature, an engine or a device that was asked for is not there; nothing falls back in silence."""

    exit_code = Exit.UNAVAILABLE
