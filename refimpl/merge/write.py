"""Carry out a merge's plan so that the output is whole or absent, and go on where an earlier try stopped.

.OUT.lock              held while a process merges to OUT; its death frees it
.OUT.merging/plan      fingerprint of plan and inputs: whose stage this is
.OUT.merging/sums/     checksums of each finished file, and of those that are linked
.OUT.merging/result/   what becomes OUT, in one rename, when all is there and on the disk
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO

from refimpl.checkpoint import folder, link, safetensors
from refimpl.cli import size
from refimpl.errors import refusal
from refimpl.files import atomic, chunks, sync_folder, write_text
from refimpl.merge.plan import MANIFEST, Item, Plan, Shard
from refimpl.merge.verify import digest

WORKERS = min(
    8, (os.cpu_count() or 1) + 1
)  # a checksum takes a core longer than the copy does; one more, for while another waits for the disk
SPARE = 16 << 20  # bytes for index, manifest and companions
FULL = {
    errno.ENOSPC: "no space left",
    errno.EDQUOT: "over the quota",
    errno.EFBIG: "too large for a file here",
}


def write(
    p: Plan, output: Path, progress: Callable[[int], None] = lambda n: None, *, record: bool = False
) -> None:
    """Carry out a plan; `output` appears complete or not at all. `progress(n)` is told of every n bytes,
    those of an earlier try included, from several threads, one at a time. `record` reads linked experts too,
    once, so that the manifest has their checksums.

    ResourceError: E5101 the output exists, E5102 not enough room, E5103 another merge is writing it.
    MismatchError E5106: an input changed meanwhile.
    """
    output = Path(os.path.realpath(output))
    check_output(output, ())
    output.parent.mkdir(parents=True, exist_ok=True)
    stage = output.with_name(f".{output.name}.merging")
    with _full_disk(output), _Lock(output):
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            if not _tidied(stage, p):
                raise refusal("E5101 empty", output)
            progress(p.nbytes)
            return
        _prepare(stage, p)
        _write_files(p, stage, progress, p.links if record else ())
        _finish(p, stage, output)
        if output.exists():
            output.rmdir()
        os.rename(stage / "result", output)
        sync_folder(output.parent)
        _remove(stage)


def check_output(output: Path, inputs: Sequence[Path]) -> None:
    """ResourceError E5105 when the output is one of the inputs or lies inside one, E5101 when it is a file or
    where a disk is mounted.
    """
    output = Path(os.path.realpath(output))
    for given in (Path(os.path.realpath(i)) for i in inputs):
        if output == given or (given.is_dir() and output.is_relative_to(given)):
            raise refusal("E5105", output, found=given)
    if output.exists() and not output.is_dir():
        raise refusal("E5101 file", output)
    if os.path.ismount(output):
        raise refusal("E5101 mounted", output)


@contextmanager
def _full_disk(output: Path) -> Iterator[None]:
    """OSErrors that mean a lack of room, as E5102."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise refusal("E5102 command", error.filename or output, found=FULL[error.errno]) from None


class _Lock:
    """One merge at a time to one output; the lock dies with its process."""

    def __init__(self, output: Path):
        self.output, self.path = output, output.with_name(f".{output.name}.lock")

    def __enter__(self) -> None:
        # Where others can write, somebody may have put a link to a precious file there: it is neither
        # followed nor cut off.
        self.file = open(
            self.path,
            "w",
            opener=lambda path, flags: os.open(
                path, flags & ~os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0), 0o666
            ),
        )
        if (
            not _locked(self.file)
            or not self.path.exists()
            or os.stat(self.path).st_ino != os.fstat(self.file.fileno()).st_ino
        ):
            # Held by another process, or by one that has finished and removed it since we opened it.
            self.file.close()
            raise refusal("E5103", self.output)

    def __exit__(self, *exc: object) -> None:
        self.path.unlink(missing_ok=True)
        self.file.close()


def _locked(file: IO) -> bool:
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows
        return True
    except OSError:
        return False
    return True


# --- the stage ----------------------------------------------------------------------------------------------


def _ours(stage: Path, p: Plan) -> bool:
    """Whether the stage was made for the very same merge."""
    ticket = stage / "plan"
    return ticket.exists() and ticket.read_bytes() == p.fingerprint().encode()


def _tidied(stage: Path, p: Plan) -> bool:
    """Remove a stage whose result has become the output: its process died in between. Whether that was this
    merge.
    """
    if not stage.is_dir() or (stage / "result").exists():
        return False
    ours = _ours(stage, p)
    _remove(stage)
    return ours


def _remove(stage: Path) -> None:
    """The ticket goes last, so that a stage is known for what it is until it has gone."""
    for path in sorted(stage.iterdir(), key=lambda f: f.name == "plan"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    stage.rmdir()


def _prepare(stage: Path, p: Plan) -> None:
    """An empty stage, or that of an earlier try at the very same merge with its finished files."""
    result, sums = stage / "result", stage / "sums"
    if stage.exists() and not _ours(stage, p):
        shutil.rmtree(stage)
    for orphan in stage.rglob(".*.part"):
        orphan.unlink()
    done = sum(f.stat().st_size for f in result.glob("*.safetensors"))
    free = shutil.disk_usage(stage.parent).free
    needed = p.nbytes - done + SPARE
    if needed > free:
        raise refusal("E5102 another", stage.parent, found=f"{size(free)} free", expected=size(needed))
    result.mkdir(parents=True, exist_ok=True)
    sums.mkdir(exist_ok=True)
    sync_folder(stage)
    sync_folder(stage.parent)
    write_text(stage / "plan", p.fingerprint())


# --- copying ------------------------------------------------------------------------------------------------


def _write_files(p: Plan, stage: Path, progress: Callable[[int], None], links: Sequence[Path]) -> None:
    """Every file that is not there yet, several at a time: two writers of one file would wait for each other.
    And the checksums of `links`.
    """
    stop, told = threading.Event(), threading.Lock()

    def tell(n: int) -> None:
        with told:
            progress(n)

    with ThreadPoolExecutor(WORKERS) as pool:
        try:
            try:
                jobs = [pool.submit(_write_shard, shard, stage, tell, stop) for shard in p.shards]
                jobs += [
                    pool.submit(_sum_link, path, stage / "sums" / f"link-{i}", tell, stop)
                    for i, path in enumerate(links)
                ]
            except RuntimeError:
                raise MemoryError("no thread can be started") from None
            for job in as_completed(jobs):
                job.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _write_shard(shard: Shard, stage: Path, progress: Callable[[int], None], stop: threading.Event) -> None:
    path, sums = stage / "result" / shard.file, stage / "sums" / shard.file
    if path.exists() and sums.exists():
        progress(shard.nbytes)
        return
    found: dict[str, str] = {}

    def pieces(item: Item) -> Iterator[bytes]:
        digest = hashlib.sha256()
        for piece in item.pieces():
            _go_on(stop)
            digest.update(piece)
            yield piece
        found[item.name] = digest.hexdigest()

    entries = [safetensors.Entry(i.name, i.dtype, i.shape, partial(pieces, i)) for i in shard.items]
    try:
        safetensors.write(path, entries, shard.metadata, progress)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # reads and writes do not say of what
            error.filename = str(path)
        raise
    write_text(sums, json.dumps(found))


def _sum_link(path: Path, sums: Path, progress: Callable[[int], None], stop: threading.Event) -> None:
    """The checksums of the experts in a linked file."""
    experts = link.experts(path)
    if sums.exists():
        progress(sum(t.nbytes for t in experts.values()))
        return

    def tell(n: int) -> None:
        _go_on(stop)
        progress(n)

    write_text(sums, json.dumps({name: digest(info, tell) for name, info in experts.items()}))


def _go_on(stop: threading.Event) -> None:
    if stop.is_set():
        raise CancelledError  # another file failed; this one's part is removed


def _finish(p: Plan, stage: Path, output: Path) -> None:
    """Companion files, link, index and manifest, all on the disk before the folder gets its name."""
    result = stage / "result"
    for source in p.companions:
        with atomic(result / source.name) as file:
            file.writelines(chunks(source, 0, os.stat(source).st_size))
    if p.links:
        write_text(result / link.LINK, link.text(p.links, output))
    checksums = {
        name: digest
        for s in p.shards
        for name, digest in json.loads((stage / "sums" / s.file).read_bytes()).items()
    }
    weight_map = {i.name: s.file for s in p.shards for i in s.items}
    write_text(
        result / safetensors.INDEX,
        json.dumps({"metadata": {"total_size": p.nbytes}, "weight_map": weight_map}, indent=1) + "\n",
    )
    ordered = {i.name: checksums[i.name] for s in p.shards for i in s.items}
    linked = {
        k: v for f in sorted((stage / "sums").glob("link-*")) for k, v in json.loads(f.read_bytes()).items()
    }
    manifest = {
        "format_version": folder.FORMAT_VERSION,
        "tensors": len(ordered),
        "nbytes": p.nbytes,
        "sha256": ordered | linked,
    }
    write_text(result / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    if not _ours(stage, p):
        raise refusal("E5106", output)
