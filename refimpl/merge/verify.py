"""Whether a merged folder still is what was merged: every tensor's SHA-256 against the manifest's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from refimpl.checkpoint import gguf, link, safetensors
from refimpl.errors import RefimplError, refusal
from refimpl.files import chunks, read_small
from refimpl.merge import sglang_kt
from refimpl.merge.merge_plan import MANIFEST
from refimpl.tensors import TensorInfo


class Contents(NamedTuple):
    """What there is to check of a folder."""

    wanted: dict[str, str]  # checksums by name
    own: dict[str, TensorInfo]
    linked: dict[str, TensorInfo]  # in GGUF files that the folder refers to; those with a recorded checksum
    unrecorded: int  # linked tensors without one: only the size and time of their file are known

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.own.values(), *self.linked.values()))


def contents(folder: Path) -> Contents:
    """The contents of a merged folder, from its manifest and the headers. InputFormatError E3202 for a
    missing or malformed manifest; what the readers raise.
    """
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(read_small(path, safetensors.MAX_INDEX))
        wanted, pair = dict(manifest["sha256"]), manifest.get("layout") == sglang_kt.LAYOUT
    except (OSError, RefimplError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise refusal("E3202", path, found=type(error).__name__) from None
    linked = link.read(Path(folder))
    recorded = {n: t for n, t in linked.items() if n in wanted}
    own = _pair(Path(folder)) if pair else safetensors.read_folder(Path(folder))[0]
    return Contents(wanted, own, recorded, len(linked) - len(recorded))


def _pair(folder: Path) -> dict[str, TensorInfo]:
    """Tensors of the two folders for SGLang, but those of files that are linked."""
    found = dict(safetensors.read_folder(folder / sglang_kt.MODEL)[0])
    for path in sorted((folder / sglang_kt.KT).glob("*.gguf")):
        if not path.is_symlink():
            found |= gguf.read(path).tensors
    return found


def digest(info: TensorInfo, progress: Callable[[int], None] = lambda n: None) -> str:
    """SHA-256 of a tensor's bytes."""
    found = hashlib.sha256()
    for piece in chunks(info.path, info.offset, info.nbytes):
        found.update(piece)
        progress(len(piece))
    return found.hexdigest()


def verify(folder: Path, progress: Callable[[int], None] = lambda n: None, *, linked: bool = True) -> int:
    """Recompute every tensor's SHA-256 and compare with the manifest; returns the number of tensors.
    `linked`: those in linked GGUF files too, where their checksums were recorded; the files' size and time
    are looked at in any case.

    MismatchError E3201 for a tensor that is missing or has other bytes, E3204 for a linked file; others as
    `contents`.
    """
    wanted, own, others, _ = contents(folder)
    tensors = own | others
    names = sorted((wanted.keys() | own.keys()) - (set() if linked else others.keys()))
    for name in names:
        if name not in tensors or digest(tensors[name], progress) != wanted.get(name):
            where, hint = (
                (others[name].path, "fetch this file again") if name in others else (folder, "merge again")
            )
            raise refusal("E3201", where, name=name, expected=f"sha256 {wanted.get(name)}", hint=hint)
    return len(names)
