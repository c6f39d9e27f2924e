"""Carry out a merge's plan so that the output is whole or absent, and go on where an earlier try stopped.

.OUT.lock              held while a process merges to OUT; its death frees it
.OUT.merging/plan      the ticket: that a merge made this folder, and a fingerprint of its plan and inputs
.OUT.merging/sums/     checksums of each finished file, and of those that are linked
.OUT.merging/result/   what becomes OUT, in one rename, when all is there and on the disk

Nothing is removed but what carries the ticket: a regular file in a real folder, looked at without following
links. A link, a pipe or somebody's files under these names end the merge before it begins.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from refimpl import formats
from refimpl.checkpoint import folder, gguf, link, safetensors
from refimpl.cli import size
from refimpl.errors import RefimplError, refusal
from refimpl.files import atomic, chunks, read_small, sync_folder, write_text
from refimpl.merge import sglang_kt
from refimpl.merge.merge_plan import MANIFEST, Item, MergePlan, Shard
from refimpl.merge.verify import digest

WORKERS = min(
    8, (os.cpu_count() or 1) + 1
)  # a checksum takes a core longer than the copy does; one more, for while another waits for the disk
SPARE = 16 << 20  # bytes for index, manifest and companions
LOCKED, TICKET = b"refimpl merge lock\n", "refimpl merge "
FULL = {
    errno.ENOSPC: "no space left",
    errno.EDQUOT: "over the quota",
    errno.EFBIG: "too large for a file here",
}


def write(
    p: MergePlan, output: Path, progress: Callable[[int], None] = lambda n: None, *, record: bool = False
) -> None:
    """Carry out a plan; `output` appears complete or not at all. `progress(n)` is told of every n bytes,
    those of an earlier try included, from several threads, one at a time. `record` reads linked experts too,
    once, so that the manifest has their checksums.

    ResourceError: E5101 the output exists, E5102 not enough room, E5103 another merge is writing it, E5107
    something foreign where the merge would work. MismatchError E5106: an input changed meanwhile.
    """
    check_output(output, ())
    output = Path(os.path.realpath(output))
    output.parent.mkdir(parents=True, exist_ok=True)
    stage = output.with_name(f".{output.name}.merging")
    with _full_disk(output), _Lock(output):
        if output.exists() and any(output.iterdir()):
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
    where a disk is mounted, E5107 when it is a link.
    """
    if os.path.islink(output):
        raise refusal("E5107 link", output, found=f"a link to {os.path.realpath(output)}")
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
    """One merge at a time to one output; the lock dies with its process. The file is ours when it is empty,
    as we make it, or says so; another one is left alone.
    """

    def __init__(self, output: Path):
        self.output, self.path = output, output.with_name(f".{output.name}.lock")

    def __enter__(self) -> None:
        # Its own open would do nothing against a pipe or a user's file of this name, so that only the call
        # that differs between systems is taken from the package. Put off: it takes 40 ms to import.
        from filelock import lock_descriptor

        before = _lstat(self.path)
        if before is not None and not stat.S_ISREG(before.st_mode):
            raise refusal("E5107 stage", self.path)  # a pipe would be waited for, a link followed
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        self.fd = os.open(self.path, flags, 0o666)
        try:
            info = os.fstat(self.fd)
            if not stat.S_ISREG(info.st_mode) or os.read(self.fd, len(LOCKED) + 1) not in (b"", LOCKED):
                raise refusal("E5107 stage", self.path)
            now = _lstat(self.path) if lock_descriptor(self.fd, blocking=False) else None
            # Held by another process, or by one that has finished and removed it since we opened it.
            if now is None or not os.path.samestat(now, info):
                raise refusal("E5103", self.output)
            if not info.st_size:
                os.write(self.fd, LOCKED)
        except BaseException:
            os.close(self.fd)
            raise

    def __exit__(self, *exc: object) -> None:
        # Removed before it is let go, or the next one could lock a file without a name. Windows removes no
        # open file: there it stays, and is ours.
        with suppress(PermissionError):
            self.path.unlink(missing_ok=True)
        os.close(self.fd)


def _lstat(path: Path) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None


# --- the stage ----------------------------------------------------------------------------------------------


def _ticket(stage: Path) -> str | None:
    """The fingerprint on the ticket of a stage; None for a folder that no merge made."""
    place = _lstat(stage)
    ticket = _lstat(stage / "plan") if place is not None and stat.S_ISDIR(place.st_mode) else None
    if ticket is None or not stat.S_ISREG(ticket.st_mode):
        return None
    with open(stage / "plan", "rb") as file:
        text = file.read(256).decode("ascii", "replace")
    return text.removeprefix(TICKET) if text.startswith(TICKET) else None


def _just_begun(stage: Path) -> bool:
    """Whether a process died between making the stage and its ticket: a real folder with nothing else."""
    place = _lstat(stage)
    return (
        place is not None
        and stat.S_ISDIR(place.st_mode)
        and all(_PART.fullmatch(f.name) and f.is_file() and not f.is_symlink() for f in stage.iterdir())
    )


_PART = re.compile(r"\.plan\.[0-9a-f]{8}\.part")


def _tidied(stage: Path, p: MergePlan) -> bool:
    """Remove the stage of this very merge when its result has become the output: its process died in between.
    Whether that was so.
    """
    if _ticket(stage) != p.fingerprint() or os.path.lexists(stage / "result"):
        # Empty where the ticket had gone and the folder could not go after it.
        with suppress(OSError):
            stage.rmdir()
        return False
    _remove(stage)
    return True


def _remove(stage: Path) -> None:
    """The ticket goes last, so that a stage is known for what it is until it has gone. What lies beside our
    own three, we did not put there: then the folder stays, with that.
    """
    for name in ("result", "sums"):
        if (info := _lstat(stage / name)) is not None and stat.S_ISDIR(info.st_mode):
            shutil.rmtree(stage / name)
    foreign = {f.name for f in stage.iterdir()} - {"plan"}
    (stage / "plan").unlink(missing_ok=True)
    if not {n for n in foreign if not _PART.fullmatch(n)}:
        for name in foreign:
            (stage / name).unlink()
        stage.rmdir()


def _prepare(stage: Path, p: MergePlan) -> None:
    """An empty stage, or that of an earlier try at the very same merge with its finished files."""
    result, sums = stage / "result", stage / "sums"
    found = _ticket(stage)
    if found is None and os.path.lexists(stage) and not _just_begun(stage):
        raise refusal("E5107 stage", stage)
    if found is not None and found != p.fingerprint():
        _remove(stage)
        if stage.exists():
            raise refusal("E5107 stage", stage)
    stage.mkdir(exist_ok=True)
    for orphan in (*stage.glob(".*.part"), *result.rglob(".*.part"), *sums.rglob(".*.part")):
        orphan.unlink()
    done = sum(f.stat().st_size for kind in ("safetensors", "gguf") for f in result.rglob(f"*.{kind}"))
    free = shutil.disk_usage(stage.parent).free
    needed = p.nbytes - done + SPARE
    if needed > free:
        if not any(stage.iterdir()):
            stage.rmdir()
        raise refusal("E5102 another", stage.parent, found=f"{size(free)} free", expected=size(needed))
    write_text(stage / "plan", TICKET + p.fingerprint(), force=True)
    for place in (result, sums):
        place.mkdir(exist_ok=True)
        if not stat.S_ISDIR(os.lstat(place).st_mode):
            raise refusal("E5107 stage", place)
    sync_folder(stage)
    sync_folder(stage.parent)


# --- copying ------------------------------------------------------------------------------------------------


def _write_files(p: MergePlan, stage: Path, progress: Callable[[int], None], links: Sequence[Path]) -> None:
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
    if _whole(path, sums, shard):
        progress(shard.nbytes)
        return
    for place in (path, sums):
        place.parent.mkdir(exist_ok=True)
    found: dict[str, str] = {}

    def pieces(item: Item) -> Iterator[bytes]:
        digest = hashlib.sha256()
        for piece in item.pieces():
            _go_on(stop)
            digest.update(piece)
            yield piece
        found[item.name] = digest.hexdigest()

    if path.suffix == ".gguf":
        stacks = [
            gguf.Entry(i.name, formats.type_id(i.dtype), i.shape, partial(pieces, i)) for i in shard.items
        ]
        gguf.write(path, shard.metadata, stacks, progress)
    else:
        entries = [safetensors.Entry(i.name, i.dtype, i.shape, partial(pieces, i)) for i in shard.items]
        safetensors.write(path, entries, shard.metadata, progress, force=True)
    write_text(sums, json.dumps(found), force=True)


def _whole(path: Path, sums: Path, shard: Shard) -> bool:
    """Whether a file that an earlier try finished still is what it wrote: its tensors have their checksums.
    It is read for that at a multiple of the speed at which it could be made again.
    """
    if not path.exists() or not sums.exists():
        return False
    try:
        wanted = json.loads(read_small(sums, safetensors.MAX_INDEX))
        header = gguf.read(path) if path.suffix == ".gguf" else safetensors.read(path)
        return (
            shard.metadata.items() <= header.metadata.items()
            and {n: (t.dtype, t.shape) for n, t in header.tensors.items()}
            == {i.name: (i.dtype, tuple(i.shape)) for i in shard.items}
            and all(digest(t) == wanted[n] for n, t in header.tensors.items())
        )
    except (RefimplError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _sum_link(path: Path, sums: Path, progress: Callable[[int], None], stop: threading.Event) -> None:
    """The checksums of the experts in a linked file."""
    experts = link.experts(path)
    if sums.exists():
        progress(sum(t.nbytes for t in experts.values()))
        return

    def tell(n: int) -> None:
        _go_on(stop)
        progress(n)

    write_text(sums, json.dumps({name: digest(info, tell) for name, info in experts.items()}), force=True)


def _go_on(stop: threading.Event) -> None:
    if stop.is_set():
        raise CancelledError  # another file failed; this one's part is removed


def _finish(p: MergePlan, stage: Path, output: Path) -> None:
    """Companion files, link, index and manifest, all on the disk before the folder gets its name."""
    result = stage / "result"
    for source in p.companions:
        target = result / p.placed(source)
        target.parent.mkdir(exist_ok=True)
        with atomic(target, force=True) as file:
            file.writelines(chunks(source, 0, os.stat(source).st_size))
    if p.links and p.layout == sglang_kt.LAYOUT:
        _link_side_by_side(p.links, result / sglang_kt.KT, output / sglang_kt.KT)
    if p.links:
        write_text(result / link.LINK, link.text(p.links, output), force=True)
    checksums = {
        name: digest
        for s in p.shards
        for name, digest in json.loads((stage / "sums" / s.file).read_bytes()).items()
    }
    indexed = [s for s in p.shards if s.file.endswith(".safetensors")]
    weight_map = {i.name: Path(s.file).name for s in indexed for i in s.items}
    total = sum(s.nbytes for s in indexed)
    write_text(
        result / p.home / safetensors.INDEX,
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1) + "\n",
        force=True,
    )
    ordered = {i.name: checksums[i.name] for s in p.shards for i in s.items}
    linked = {
        k: v for f in sorted((stage / "sums").glob("link-*")) for k, v in json.loads(f.read_bytes()).items()
    }
    manifest = {
        "format_version": folder.FORMAT_VERSION,
        "layout": p.layout,
        "tensors": len(ordered),
        "nbytes": p.nbytes,
        "sha256": ordered | linked,
    }
    write_text(result / MANIFEST, json.dumps(manifest, indent=1) + "\n", force=True)
    if _ticket(stage) != p.fingerprint():
        raise refusal("E5106", output)


def _link_side_by_side(files: Sequence[Path], kt: Path, final: Path) -> None:
    """A link to each GGUF file, as kt-kernel looks into one folder and no deeper. Links to what lies beside
    the output can be moved together with it.
    """
    kt.mkdir(exist_ok=True)
    beside = Path(os.path.realpath(final)).parent.parent
    for i, path in enumerate(map(Path, map(os.path.realpath, files))):
        shown = os.path.relpath(path, os.path.realpath(final)) if path.is_relative_to(beside) else str(path)
        link_path = kt / f"{i:03d}-{path.name}"
        link_path.unlink(missing_ok=True)
        os.symlink(shown, link_path)
