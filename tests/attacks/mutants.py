"""
Damaged copies of valid files by the thousand: each is opened and read whole, or refused by a typed error.

Run as a module with the number of mutants (``make attacks-long``: 200,000): prints one line of JSON, and exits with 1
when a mutant met another exception, took longer than a second, or asked for more than 100 MB. Each mutant is made from
its number alone, so that a finding is repeated with ``--only NUMBER``.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from apr_core.dtypes import BY_SAFETENSORS
from apr_core.errors import AprError
from apr_core.formats.apr_unrunnable import describe_unrunnable
from apr_core.formats.checkpoint import open_checkpoint
from apr_core.formats.codecs import decode, scales
from tests.attacks.build import (
    VALID,
    VALID_APR,
    VALID_GGUF,
    apr,
    apr_entry,
    apr_packed,
    entry,
    gguf,
    pair,
    row,
    safetensors,
)
from tests.attacks.limits import SECONDS, limit_memory, timed_out

_NUMBERS = (0, 1, 2, 31, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**42 + 1, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
_BYTES = (0, 1, 2, 9, 0x22, 0x2D, 0x5B, 0x7B, 0x7F, 0x80, 0xFF)
_WORDS = (b"-1", b"1e309", b"NaN", b"null", b"true", b"[]", b"{}", b'"', b"9" * 30, b"\\ud800", b"0.5", b"[" * 40)


def _split(number: int) -> bytes:
    """Build a part of a split GGUF."""
    keys = (("split.no", 2, number, 2), ("split.count", 2, 2, 2), ("split.tensors.count", 5, 2, 4))
    pairs = [pair(key, kind, value.to_bytes(width, "little")) for key, kind, value, width in keys]
    return gguf([row(f"t{number}", (32,), 8)], pairs, bytes(34))


def _shard(number: int) -> bytes:
    """Build a shard of an APR file."""
    words = json.dumps({"sharding": {"shard_index": number, "shard_count": 2}}).encode()
    return apr([apr_entry(f"t{number}", 128, (32,), 0, 18)], bytes(64), flags=0x0410, metadata=words)


_INDEX = json.dumps(
    {"metadata": {"total_size": 16}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
).encode()
_JSON_APR = apr([b'[{"name":"weights","dtype":"json","shape":[2],"offset":0,"size":2}]'], bytes(64))
_V1 = b"APRN\1\0\x20\0" + (12).to_bytes(4, "little") + b"\1\0\0\0\1\0\0\0\3\0\0".ljust(20, b"\0")
_V1 += b"\x82\xa1k\x92\1\xa1x\xa1n\xcd\1\0" + b"p" + bytes(4)
_TYPES = [(f"t{kind}", kind) for kind in (2, 8, 12, 14, 20, 30, 39)]
_BLOCKS = gguf(
    [row(name, (256,), kind, 512 * n) for n, (name, kind) in enumerate(_TYPES)],
    data=bytes(range(256)) * 2 * len(_TYPES),
)
# What a mutant is made of: the files of a folder, the one that is damaged first, and the one that is opened.
SEEDS: dict[str, dict[str, bytes]] = {
    "safetensors": {
        "model.safetensors": VALID["safetensors"],
        "config.json": b'{"hidden_size": 2, "eos_token_id": [1]}',
    },
    "safetensors-header": {"model.safetensors": VALID["safetensors"]},
    "gguf": {"model.gguf": VALID_GGUF},
    "gguf-2": {"model.gguf": VALID_GGUF[:4] + b"\2" + VALID_GGUF[5:]},
    "gguf-blocks": {"model.gguf": _BLOCKS},
    "gguf-split": {f"m-0000{n + 1}-of-00002.gguf": _split(n) for n in (0, 1)},
    "apr": {"model.apr": VALID_APR},
    "apr-lz4": {"model.apr": apr_packed(VALID_APR, 0x0401)},
    "apr-zstd": {"model.apr": apr_packed(VALID_APR, 0x0402)},
    "apr-shards": {f"m-0000{n + 1}-of-00002.apr": _shard(n) for n in (0, 1)},
    "apr-json": {"model.apr": _JSON_APR},
    "apr-v1": {"model.apr": _V1},
    "index": {
        "model.safetensors.index.json": _INDEX,
        "1.safetensors": safetensors({"a": entry()}, bytes(8)),
        "2.safetensors": safetensors({"b": entry()}, bytes(8)),
    },
}


def damage(data: bytes, rng: random.Random) -> bytes:
    """Change a file in one to three of the ways in which files are changed by accident or malice."""
    bent = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        rng.choice(_WAYS)(bent, rng)
    return bytes(bent)


def _flip(bent: bytearray, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 4)):
        if bent:
            bent[rng.randrange(len(bent))] = rng.choice((*_BYTES, rng.randrange(256)))


def _number(bent: bytearray, rng: random.Random) -> None:
    """Overwrite a field of 2, 4 or 8 bytes."""
    width, at = rng.choice((2, 4, 4, 8, 8)), rng.randrange(len(bent) + 1)
    value = rng.choice((*_NUMBERS, len(bent), len(bent) + 1, rng.getrandbits(64)))
    bent[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little")[: len(bent) - at]


def _cut(bent: bytearray, rng: random.Random) -> None:
    del bent[rng.randrange(len(bent) + 1) :]


def _remove(bent: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(bent) + 1)
    del bent[at : at + rng.choice((1, 2, 8, 32, 100))]


def _insert(bent: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(bent) + 1)
    bent[at:at] = rng.choice((rng.randbytes(rng.choice((1, 8, 40))), bytes(rng.choice((1, 8, 64))), rng.choice(_WORDS)))


def _repeat(bent: bytearray, rng: random.Random) -> None:
    start, at = rng.randrange(len(bent) + 1), rng.randrange(len(bent) + 1)
    bent[at:at] = bent[start : start + rng.choice((8, 24, 64, 200))]


def _word(bent: bytearray, rng: random.Random) -> None:
    """Put a word of JSON where a digit stands, so that the text still parses more often than not."""
    digits = [at for at, byte in enumerate(bent) if 0x30 <= byte <= 0x39]
    if digits:
        at = rng.choice(digits)
        bent[at : at + 1] = rng.choice((*_WORDS, str(rng.choice(_NUMBERS)).encode()))


def _splice(bent: bytearray, rng: random.Random) -> None:
    """Continue with another file."""
    other = rng.choice(list(VALID.values()))
    at = rng.randrange(len(bent) + 1)
    bent[at:] = other[rng.randrange(len(other)) :]


_WAYS: tuple[Callable[[bytearray, random.Random], None], ...] = (
    _flip,
    _flip,
    _number,
    _number,
    _cut,
    _remove,
    _insert,
    _repeat,
    _word,
    _splice,
)


def _bend(header: dict[str, Any], rng: random.Random) -> None:
    """Change one value of a SafeTensors header."""
    entry = header[rng.choice(list(header))]
    field = rng.choice(list(entry)) if isinstance(entry, dict) and entry else None
    number = rng.choice((*_NUMBERS, -1, 0.5, 4, 8, 12))
    values: tuple[object, ...] = (number, str(number), None, True, [], {}, [number], [0, number], [number] * 3)
    if field is None or rng.random() < 0.1:
        header[rng.choice(("__metadata__", "a", "c", ""))] = rng.choice((entry, *values, {"k": "v"}, {"k": number}))
    elif field == "dtype" and rng.random() < 0.8:
        entry[field] = rng.choice((*BY_SAFETENSORS, "F4", "F31", ""))
    elif isinstance(entry[field], list) and entry[field] and rng.random() < 0.8:
        entry[field][rng.randrange(len(entry[field]))] = number
    else:
        entry[field] = rng.choice(values)


def with_checksums(data: bytes) -> bytes:
    """Repair an APR file's two checksums, so that damage gets past them and reaches the parser."""
    if len(data) < 68:
        return data
    bent = bytearray(data)
    bent[40:44] = zlib.crc32(bent[:40] + bent[44:64]).to_bytes(4, "little")
    bent[-4:] = zlib.crc32(bent[:-4]).to_bytes(4, "little")
    return bytes(bent)


def make(number: int) -> tuple[str, dict[str, bytes], str]:
    """Return kind, files and the name to open of the mutant of that number."""
    rng = random.Random(number)
    kind = list(SEEDS)[number % len(SEEDS)]
    files = dict(SEEDS[kind])
    target = rng.choice(list(files))
    packed = {"apr-lz4": 0x0401, "apr-zstd": 0x0402}.get(kind)
    if kind == "safetensors-header":  # damage to what the header says, in JSON that parses
        header, data = json.loads(files[target][8:-12]), files[target][-12:]
        for _ in range(rng.choice((1, 1, 2))):
            _bend(header, rng)
        files[target] = safetensors(header, data)
    elif packed and rng.random() < 0.6:  # damage inside the compressed bytes
        files[target] = apr_packed(with_checksums(damage(VALID_APR, rng)), packed)
    else:
        files[target] = damage(files[target], rng)
        if kind.startswith("apr") and not packed and rng.random() < 0.9:
            files[target] = with_checksums(files[target])
    return kind, files, rng.choice([name for name in files if name != "config.json"])


def read_whole(path: Path) -> str:
    """Open a file, read everything that opening offers, decode; returns ``opened`` or the name of the refusal."""
    try:
        with open_checkpoint(path) as checkpoint:
            dict(checkpoint.metadata)
            for name in checkpoint.tensors:
                raw = checkpoint.raw(name)
                decode(raw)
                scales(raw)
        return "opened"
    except AprError as error:
        if path.suffix == ".apr":
            _describe(path)
        return type(error).__name__


def _describe(path: Path) -> None:
    try:
        describe_unrunnable(path)
    except AprError:
        return


def attack(numbers: Iterator[int], folder: Path) -> tuple[Counter[str], list[str], float]:
    """
    Try mutants.

    Returns:
        How many met what, the findings (other exceptions, hangs, large allocations), and the slowest in seconds.
    """
    met: Counter[str] = Counter()
    findings: list[str] = []
    slowest = 0.0
    for number in numbers:
        kind, files, target = make(number)
        for name, data in files.items():
            (folder / name).write_bytes(data)
        signal.setitimer(signal.ITIMER_REAL, 10 * SECONDS)
        start = time.process_time()
        try:
            outcome = read_whole(folder / target)
        except Exception as error:
            outcome = "finding"
            findings.append(f"mutant {number} ({kind}): {type(error).__name__}: {error!s:.200}")
        taken = time.process_time() - start
        signal.setitimer(signal.ITIMER_REAL, 0)
        if taken > SECONDS:
            findings.append(f"mutant {number} ({kind}): {taken:.2f} s")
        slowest = max(slowest, taken)
        met[f"{kind}: {outcome}"] += 1
        for name in files:
            (folder / name).unlink()
    return met, findings, slowest


def warm_up(folder: Path) -> None:
    """Import what opening and decoding import, before memory is limited."""
    for kind, files in SEEDS.items():
        for name, data in files.items():
            (folder / name).write_bytes(data)
        outcome = read_whole(folder / next(iter(files)))
        assert (outcome == "opened") == (kind not in ("apr-json", "apr-v1")), (kind, outcome)
        for name in files:
            (folder / name).unlink()


def main() -> int:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=2000)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant")
    parser.add_argument("--only", type=int, help="one mutant, by number")
    given = parser.parse_args()
    numbers = range(given.first, given.first + given.count) if given.only is None else range(given.only, given.only + 1)
    signal.signal(signal.SIGALRM, timed_out)
    with tempfile.TemporaryDirectory() as name:
        warm_up(Path(name))
        limit_memory()
        start = time.perf_counter()
        met, findings, slowest = attack(iter(numbers), Path(name))
    print(
        json.dumps(
            {
                "mutants": sum(met.values()),
                "opened": sum(n for outcome, n in met.items() if outcome.endswith("opened")),
                "slowest_s": round(slowest, 4),
                "seconds": round(time.perf_counter() - start, 1),
                "met": dict(sorted(met.items())),
                "findings": findings,
            }
        )
    )
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
