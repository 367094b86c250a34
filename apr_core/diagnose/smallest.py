"""The smallest reproduction: one damaged tensor cut to the fewest rows that still show the damage, and one command."""

from __future__ import annotations

import json
import shlex
import tempfile
from functools import partial
from math import prod
from pathlib import Path

from apr_core.contract.layout import EMBEDDING
from apr_core.diagnose.cause import Cause
from apr_core.diagnose.values import Pair, examine
from apr_core.errors import AprError, UsageError
from apr_core.formats.checkpoint import Checkpoint, TensorSource, open_checkpoint
from apr_core.formats.codecs import rows_of
from apr_core.formats.gguf import write_gguf
from apr_core.formats.safetensors import write_safetensors

MOST_BYTES = 1_000_000


def reproduce(cause: Cause, subject: Checkpoint, reference: Checkpoint, folder: Path) -> Path:
    """
    Write the damaged rows and what should stand there as two small files, and the command that shows the damage.

    Halves the rows as long as the same experiment names the same class; where no part shows it so (a transposition
    needs the whole matrix), as long as the rows differ at all and until they fit.

    Args:
        cause: A cause that names a tensor which both files have.
        subject: The failing file.
        reference: What it should say.
        folder: A new folder, beside the evidence.

    Returns:
        ``folder / "reproduce.json"`` with the command, the tensor, its rows and the bytes of both files.

    Raises:
        UsageError: The cause is in no tensor that both have, or the folder exists.
    """
    name, other = cause.tensor, cause.tensor if cause.tensor in reference.tensors else EMBEDDING
    if name not in subject.tensors or other not in reference.tensors:
        raise UsageError(f"the cause is {cause.klass}, in no tensor of both files", advice="give the files themselves")
    info, right = subject.tensors[name], reference.tensors[other]
    cuttable = info.shape == right.shape and len(info.shape) == 2 and "row" == info.dtype.layout == right.dtype.layout
    rows = (0, info.shape[0] if len(info.shape) == 2 else 1)
    with tempfile.TemporaryDirectory() as scratch:
        cut = _Cut(cause, subject, reference, Path(scratch))
        for same in (True, False):
            while cuttable and rows[1] - rows[0] > 1 and (same or cut.nbytes(rows) > MOST_BYTES):
                middle = (rows[0] + rows[1]) // 2
                half = next((r for r in ((rows[0], middle), (middle, rows[1])) if cut.shows(r, same=same)), None)
                if half is None:
                    break
                rows = half
        folder.mkdir(parents=True)
        files = [cut.write(rows if cuttable else None, side, folder) for side in (subject, reference)]
    command = shlex.join(["apr", "rosetta", "diff-tensors", files[1].name, files[0].name])
    body = {
        "command": command,
        "class": cause.klass,
        "tensor": name,
        "rows": list(rows) if cuttable else None,
        "of": info.shape[0] if info.shape else 1,
        "bytes": sum(file.stat().st_size for file in files),
    }
    path = folder / "reproduce.json"
    path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    return path


class _Cut:
    """Writes rows of the damaged tensor as files, and asks whether they still show the damage."""

    def __init__(self, cause: Cause, subject: Checkpoint, reference: Checkpoint, scratch: Path) -> None:
        self.cause, self.subject, self.reference, self.scratch = cause, subject, reference, scratch
        self.tries = 0

    def nbytes(self, rows: tuple[int, int]) -> int:
        """Bytes of both sides."""
        other = self._name(self.reference)
        infos = (self.subject.tensors[self.cause.tensor], self.reference.tensors[other])
        return sum(info.dtype.nbytes((rows[1] - rows[0], *info.shape[1:])) for info in infos)

    def _name(self, side: Checkpoint) -> str:
        return self.cause.tensor if self.cause.tensor in side.tensors else EMBEDDING

    def write(self, rows: tuple[int, int] | None, side: Checkpoint, folder: Path) -> Path:
        """Write one side's rows under the name of the damaged tensor; all of it without rows."""
        raw = side.raw(self._name(side))
        dtype, data, shape = raw.info.dtype, raw.data, raw.info.shape
        if rows is not None:
            dtype, data, shape = rows_of(raw, *rows)
        source = TensorSource(self.cause.tensor, dtype, shape, partial(list, [data]))
        kind = "subject" if side is self.subject else "reference"
        if side.format == "safetensors":
            path = folder / f"{kind}.safetensors"
            write_safetensors(path, [source], {})
        else:
            path = folder / f"{kind}.gguf"
            write_gguf(path, [source], {})
        return path

    def shows(self, rows: tuple[int, int], *, same: bool) -> bool:
        """Whether rows show the damage: by the same experiment, or in any way."""
        self.tries += 1
        folder = self.scratch / str(self.tries)
        folder.mkdir()
        try:
            paths = [self.write(rows, side, folder) for side in (self.subject, self.reference)]
            with open_checkpoint(paths[0]) as left, open_checkpoint(paths[1]) as right:
                pair = Pair(self.cause.tensor, left, right, self.cause.tensor, 0)
                if not pair.wrong.any() or not prod(pair.found.shape):
                    return False
                proof = examine(pair)
                return not same or (proof.klass, proof.question) == (self.cause.klass, self.cause.experiment)
        except AprError:
            return False
