"""
Hostile folders, one function each: builds it in an empty folder and returns what is opened.

``REFUSALS`` says which error each meets, and words of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from apr_core.errors import AprError, FormatError, NotFound, ReadWriteError, UsageError
from tests.attacks.build import VALID_GGUF, VALID_SAFETENSORS, gguf, pair, row

INDEX = "model.safetensors.index.json"


def nothing(folder: Path) -> Path:
    """An empty folder."""
    return folder


def a_pipe(folder: Path) -> Path:
    """A pipe that nobody writes to."""
    os.mkfifo(folder / "model.gguf")
    return folder


def a_pipe_as_configuration(folder: Path) -> Path:
    """Good weights beside a pipe called config.json."""
    (folder / "model.safetensors").write_bytes(VALID_SAFETENSORS)
    os.mkfifo(folder / "config.json")
    return folder


def an_endless_device(folder: Path) -> Path:
    """A link to a device that yields zeros for ever."""
    (folder / "model.safetensors").symlink_to("/dev/zero")
    return folder


def a_folder_as_file(folder: Path) -> Path:
    """A folder that is called like a model."""
    (folder / "model.safetensors").mkdir()
    return folder / "model.safetensors" / ".." / "model.safetensors"


def links_in_a_circle(folder: Path) -> Path:
    """Two links that lead to each other."""
    (folder / "model.gguf").symlink_to("b")
    (folder / "b").symlink_to("model.gguf")
    return folder


def a_link_to_itself(folder: Path) -> Path:
    """A path through a link that leads to itself."""
    (folder / "loop").symlink_to("loop")
    return folder / "loop" / "model.gguf"


def a_link_to_nothing(folder: Path) -> Path:
    """A cache whose blob is gone."""
    (folder / "model.safetensors").symlink_to("blobs/0123")
    return folder


def a_hole(folder: Path) -> Path:
    """Four terabytes that were never written, behind a valid beginning."""
    with (folder / "model.gguf").open("wb") as stream:
        stream.write(VALID_GGUF)
        stream.truncate(1 << 42)
    return folder


def a_hole_as_configuration(folder: Path) -> Path:
    """A configuration of a terabyte."""
    (folder / "model.safetensors").write_bytes(VALID_SAFETENSORS)
    with (folder / "config.json").open("wb") as stream:
        stream.truncate(1 << 40)
    return folder


def a_bomb_as_configuration(folder: Path) -> Path:
    """A configuration of half a million lists."""
    (folder / "model.safetensors").write_bytes(VALID_SAFETENSORS)
    (folder / "config.json").write_bytes(b'{"a": [' + b"[]," * 650_000 + b"1], NaN}")
    return folder


def a_larger_bomb_as_configuration(folder: Path) -> Path:
    """A configuration of eight million lists, which would take half a gigabyte."""
    (folder / "model.safetensors").write_bytes(VALID_SAFETENSORS)
    (folder / "config.json").write_bytes(b'{"a": [' + b"[]," * 8_000_000 + b"1]}")
    return folder


def a_deep_configuration(folder: Path) -> Path:
    """A configuration nested a hundred thousand times."""
    (folder / "model.safetensors").write_bytes(VALID_SAFETENSORS)
    (folder / "config.json").write_bytes(b'{"a":' * 100_000)
    return folder


def many_parts(folder: Path) -> Path:
    """A part that says it is one of 99,999."""
    keys = (("split.no", 4, 0), ("split.count", 4, 99_999), ("split.tensors.count", 4, 2**31))
    pairs = [pair(key, kind, value.to_bytes(4, "little")) for key, kind, value in keys]
    (folder / "m-00001-of-99999.gguf").write_bytes(gguf([row("a")], pairs, bytes(8)))
    return folder


def more_parts_than_numbers(folder: Path) -> Path:
    """A part of 2^64 - 1."""
    pairs = [pair("split.count", 10, b"\xff" * 8)]
    (folder / "m-00001-of-99999.gguf").write_bytes(gguf([row("a")], pairs, bytes(8)))
    return folder


def many_shards(folder: Path) -> Path:
    """An index of fifty thousand shards, none of which is there."""
    (folder / INDEX).write_text(json.dumps({"weight_map": {f"t{n}": f"{n}.safetensors" for n in range(50_000)}}))
    return folder


def a_shard_outside(folder: Path) -> Path:
    """An index that points at the password file."""
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../../../../../../etc/passwd"}}))
    return folder


def a_shard_that_is_a_device(folder: Path) -> Path:
    """An index whose shard is a link to an endless device."""
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "1.safetensors"}}))
    (folder / "1.safetensors").symlink_to("/dev/urandom")
    return folder


def a_shard_that_is_the_index(folder: Path) -> Path:
    """An index that names itself as a shard."""
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": INDEX}}))
    return folder


def a_manifest_that_names_itself(folder: Path) -> Path:
    """An APR manifest whose shard is the manifest."""
    rows = [{"filename": "m.json", "index": 0}]
    (folder / "m.json").write_text(json.dumps({"shard_count": 1, "shards": rows, "weight_map": {}}))
    return folder / "m.json"


def a_pickle_alone(folder: Path) -> Path:
    """A pickle that would remove files, as the only weights."""
    (folder / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'rm -rf ~'\ntR.")
    return folder


def several_models(folder: Path) -> Path:
    """Ten thousand files that could each be the model."""
    for number in range(10_000):
        (folder / f"{number}.gguf").touch()
    return folder


REFUSALS: dict[Callable[[Path], Path], tuple[type[AprError], str]] = {
    nothing: (NotFound, r"no model\.safetensors, \.gguf or \.apr in"),
    a_pipe: (FormatError, "a regular file, found a directory, pipe, socket or device"),
    a_pipe_as_configuration: (FormatError, r"a regular file.*config\.json"),
    an_endless_device: (FormatError, "a regular file"),
    a_folder_as_file: (NotFound, "no model"),
    links_in_a_circle: (ReadWriteError, "its symbolic links lead in a circle"),
    a_link_to_itself: (ReadWriteError, "its symbolic links lead in a circle"),
    a_link_to_nothing: (NotFound, "no such file"),
    a_hole: (FormatError, "the rest of the file is a hole"),
    a_hole_as_configuration: (FormatError, r"at most \d+ bytes, found 1099511627776"),
    a_bomb_as_configuration: (FormatError, "JSON error"),
    a_larger_bomb_as_configuration: (FormatError, r"at most \d+ bytes"),
    a_deep_configuration: (FormatError, "nesting too deep|JSON error"),
    many_parts: (FormatError, r"99998 missing: m-00002-of-99999\.gguf"),
    more_parts_than_numbers: (FormatError, "split.count as a number from 0 to 99999"),
    many_shards: (FormatError, r"shard 1 of 50000, 0\.safetensors, found no such file"),
    a_shard_outside: (FormatError, "a shard inside the folder of the index"),
    a_shard_that_is_a_device: (FormatError, "a regular file"),
    a_shard_that_is_the_index: (FormatError, "a SafeTensors shard, found index data"),
    a_manifest_that_names_itself: (FormatError, "the magic 'APR'"),
    a_pickle_alone: (FormatError, r"executable content alone: pytorch_model\.bin"),
    several_models: (UsageError, "holds 10000 models: 0.gguf"),
}
