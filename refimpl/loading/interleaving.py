"""Routed experts whose rows are laid side by side when a model is loaded (refimpl/reference/interleaved.py),
so that one token and a few are multiplied at the speed of memory.

    auto    where there is memory for a copy, and it takes no longer than SECONDS; or where one was kept.
            If reading the files takes longer than that, it ends after PATIENCE with what is done
    yes     in any case, and kept in the user's cache folder, from where the next process maps it
    no      weights stay in the files they are mapped from

What is kept is known by the file its tensor comes from: path, size, time of change, and place in the file.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from refimpl import formats
from refimpl.checkpoint import names
from refimpl.checkpoint.folder import Checkpoint
from refimpl.cli import Progress, note, size
from refimpl.devices.backend import Backend
from refimpl.devices.memory import Inventory, file_bytes, free_ram
from refimpl.errors import RefimplError, refusal
from refimpl.files import atomic, cache_folder, map_bytes, not_private
from refimpl.kernels import processors
from refimpl.reference import interleaved
from refimpl.tensors import Interleaved, Packed, Stack, TensorInfo, Weight

CHOICES = ("auto", "yes", "no")
SECONDS = 60  # that "auto" may be expected to take
PATIENCE = 120  # seconds that it takes at most, beside one tensor
RATE = 1e9  # bytes a second and thread of rearranging, below what is measured where others work too
THREADS = 16  # more are held up by memory
FULL = 0.9  # of the memory that is free
SHOWN = 1 << 30  # bytes: fewer take no time worth telling
ORDER = interleaved.ROWS, interleaved.GROUP, interleaved.PART  # of bytes: copies of another are not taken


@dataclass(frozen=True)
class Cost:
    """What interleaving a model's experts takes."""

    nbytes: int  # of memory, beside the files, whose pages the system takes back when it needs room
    seconds: float  # once the files have been read
    others: int  # bytes of all else that the files hold

    def why_not(self, free: int) -> str:
        """What speaks against it with so many bytes of memory free; "" for nothing."""
        if self.nbytes + self.others > FULL * free:
            return f"the copy of {size(self.nbytes)} leaves too little of {size(free)} free"
        return f"it takes about {self.seconds:.0f} s" if self.seconds > SECONDS else ""


def cost(nbytes: int, whole: int) -> Cost:
    """Of `nbytes` bytes of experts in a model of `whole` bytes, with this process's cores."""
    return Cost(nbytes, nbytes / RATE / threads(), whole - nbytes)


def is_made(choice: str, cost: Cost, free: int) -> bool:
    """Whether loading makes a copy of that cost, as `choice` says, with so many bytes of memory free: for a
    backend that gains from it, where no copy was kept.
    """
    return bool(cost.nbytes) and (choice == "yes" or (choice == "auto" and not cost.why_not(free)))


def add_flag(parser: ArgumentParser) -> None:
    """`--repack`, the `choice` of `experts`."""
    parser.add_argument(
        "--repack",
        default="auto",
        choices=CHOICES,
        help="a copy of the experts with rows side by side, which makes few tokens faster; auto: in memory, "
        "where that has the room and it is made soon; yes: on the disk, in the cache, made once; no: none",
    )


def threads() -> int:
    """That read and rearrange: as many as this process may use cores, up to THREADS."""
    return min(len(processors.affinity()), THREADS)


def cost_of(inventory: Inventory) -> Cost:
    """What interleaving the experts of this model takes here."""
    return cost(expert_bytes(inventory), sum(map(file_bytes, inventory.tensors.values())))


def expert_bytes(inventory: Inventory) -> int:
    """Bytes of the routed experts of a model that can be interleaved."""
    kinds = {m.NAME: m.GGML_TYPE for m in interleaved.FORMATS}
    return sum(
        formats.nbytes(kinds[s.kind], s.shape)
        for name, s in inventory.tensors.items()
        if names.is_routed_expert(name) and s.kind in kinds and s.shape[-2] % interleaved.ROWS == 0
    )


def pays(backend: str, activations: str) -> bool:
    """Whether the backend of that name multiplies interleaved weights by a kernel that gains from it."""
    if backend == "reference" or activations == "exact" or find_spec("numba") is None:
        return False
    from refimpl.kernels.simd_llvm import choose  # llvmlite, which the reference does without

    return choose() != "generic"


class InterleavedExperts(Mapping[str, Weight | Stack]):
    """A checkpoint with some of its tensors interleaved; all else is its own."""

    def __init__(self, checkpoint: Checkpoint, made: Mapping[str, Interleaved], nbytes: int, seconds: float):
        """`nbytes` of `made` are new, and took so many seconds; the rest was kept by an earlier process."""
        self.checkpoint, self.made, self.folder = checkpoint, made, checkpoint.folder
        self.new_bytes, self.seconds = nbytes, seconds

    def __getitem__(self, name: str) -> Weight | Stack:
        return self.made[name] if name in self.made else self.checkpoint[name]

    def __getattr__(self, name: str) -> Any:  # config, stored and what else a checkpoint has
        return getattr(self.checkpoint, name)

    def __contains__(self, name: object) -> bool:
        return name in self.checkpoint

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint)

    def __len__(self) -> int:
        return len(self.checkpoint)


def experts(checkpoint: Checkpoint, backend: Backend, choice: str = "auto") -> Mapping[str, Weight | Stack]:
    """The checkpoint with its routed experts interleaved, as `choice` says (see above), or itself.

    A long one is shown while it goes on, and what was asked for and cannot be is told in a note. ValueError
    for another choice; ResourceError E5102 where "yes" finds no room on the disk, and what `files.atomic`
    raises.
    """
    if choice not in CHOICES:
        raise ValueError(f"repack must be one of {', '.join(CHOICES)}, not {choice!r}")
    if choice == "no" or not pays(backend.name, backend.activations):
        if choice == "yes":
            note(f"experts are not rearranged: backend {backend.name}, {backend.activations} gain nothing")
        return checkpoint
    stacks = {
        n: w
        for n in checkpoint
        if names.is_routed_expert(n) and interleaved.can_interleave(w := checkpoint[n])
    }
    infos = {n: checkpoint.stored(n)[0] for n in stacks}
    made = {n: found for n, w in stacks.items() if (found := _kept(w, infos[n])) is not None}
    left = {n: w for n, w in stacks.items() if n not in made}
    nbytes = sum(w.data.nbytes for w in left.values())
    whole = sum(info.nbytes for info in checkpoint.tensors.values())
    if choice == "auto" and (why := cost(nbytes, whole).why_not(free_ram())):
        note(f"experts are left as they lie in the file: {why} (--repack yes keeps a copy on the disk)")
        left = {}
    if choice == "yes" and left:
        _check_room(nbytes)
    shown = "auto" if left and nbytes > SHOWN else "none"
    make, start, new_bytes = _keep if choice == "yes" else _in_memory, time.monotonic(), 0
    with Progress(nbytes, "rearranging experts", shown) as progress, ThreadPoolExecutor(threads()) as pool:
        for name, w in left.items():
            if choice == "auto" and time.monotonic() > start + PATIENCE:
                note(f"the files are read slowly: {len(stacks) - len(made)} stacks of experts stay in them")
                break
            made[name] = make(w, infos[name], pool, progress)
            new_bytes += w.data.nbytes
    seconds = time.monotonic() - start
    return InterleavedExperts(checkpoint, made, new_bytes, seconds) if made else checkpoint


def _matrices(w: Packed) -> list[Packed]:
    data = w.data.reshape(-1, *w.data.shape[-2:])
    return [Packed(d, w.ggml_type, w.shape[-2:]) for d in data]


def _in_memory(
    w: Packed, info: TensorInfo, pool: ThreadPoolExecutor, progress: Callable[[int], None]
) -> Interleaved:
    """The tensor's copy in new memory. Each thread writes what it rearranges: new pages come too slowly for
    one alone.
    """
    data = interleaved.new_bytes(w.data.shape)
    for found in pool.map(interleaved.interleave, _matrices(w), data.reshape(-1, *data.shape[-2:])):
        progress(found.data.nbytes)
    return Interleaved(data, w.ggml_type, w.shape)


# --- copies that are kept -----------------------------------------------------------------------------------


def _path(w: Packed, info: TensorInfo) -> Path:
    """Where a tensor's copy is kept, made or not."""
    of_file = os.stat(info.path)
    identity = (str(info.path.resolve()), of_file.st_size, of_file.st_mtime_ns, info.offset, info.nbytes)
    order = ORDER, interleaved.word_order(w.ggml_type)
    digest = hashlib.sha256(repr((order, identity, w.ggml_type, w.shape)).encode())
    return cache_folder("interleaved") / f"{digest.hexdigest()[:32]}.bin"


def _kept(w: Packed, info: TensorInfo) -> Interleaved | None:
    """The copy of a tensor that an earlier process kept, mapped; None where there is none that is the user's
    own and whole.
    """
    try:
        path = _path(w, info)
        found = os.lstat(path)
    except (OSError, RefimplError):  # nothing kept, or no cache
        return None
    if not_private(found) or found.st_size != w.data.nbytes:
        return None
    return Interleaved(map_bytes(path).reshape(w.data.shape), w.ggml_type, w.shape)


def _keep(
    w: Packed, info: TensorInfo, pool: ThreadPoolExecutor, progress: Callable[[int], None]
) -> Interleaved:
    """The tensor's copy written to the cache, and mapped."""
    path = _path(w, info)
    with atomic(path, force=True) as file:
        os.chmod(file.fileno(), 0o600)
        for found in pool.map(interleaved.interleave, _matrices(w)):
            file.write(found.data.data)
            progress(found.data.nbytes)
    return Interleaved(map_bytes(path).reshape(w.data.shape), w.ggml_type, w.shape)


def _check_room(nbytes: int) -> None:
    """ResourceError E5102 unless the cache's disk has so many bytes free."""
    folder = cache_folder("interleaved")
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise refusal("E5102 cache", folder, found=f"{size(free)} free", expected=size(nbytes))
