"""Where a model comes from: a local folder, a repository of the Hugging Face hub (extra `hub`), or the
embedded model's merged folder.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import sys
import tempfile
import time
from contextlib import redirect_stderr
from pathlib import Path

from refimpl.checkpoint import safetensors
from refimpl.checkpoint.folder import read_config
from refimpl.cli import Progress, note, own
from refimpl.config import DeepSeekConfig
from refimpl.errors import RefimplError, ResourceError, printable, refusal
from refimpl.files import cache_base, not_private, private_folder, read_small, real_folder
from refimpl.merge import merge_plan
from refimpl.merge.verify import verify
from refimpl.merge.write import write
from refimpl.tiny import FP8_DIR, GGUF_DIR, GGUF_FILE

# `*` crosses folders, as in additional_chat_templates/NAME.jinja. Of `*.model` only this one is read.
SMALL_FILES = ["*.json", "*.jinja", "tiktoken.model"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def embedded() -> Path:
    """The embedded model as a hybrid folder, merged into the cache the first time, which is shown on stderr;
    into a temporary folder, for this process, where it cannot be kept or what lies there is not the user's.
    """
    digest = hashlib.sha256()
    for file in (*sorted(FP8_DIR.iterdir()), GGUF_FILE):
        digest.update(file.read_bytes())
    name = f"tiny-{digest.hexdigest()[:16]}"
    try:
        return _embedded_in(real_folder(cache_base()) / name)
    except (ResourceError, OSError) as error:
        return _embedded_for_now(name, str(error))


def _embedded_in(folder: Path) -> Path:
    """In the cache, whoever owns that: what is not the user's alone is not believed, and what is there has
    the package's bytes or is made anew, with a note. ResourceError E5104, and what a merge raises.
    """
    if os.path.lexists(folder):
        private_folder(folder)
        for file in folder.iterdir():
            if why := not_private(os.lstat(file)):
                raise refusal("E5104 private", file, found=why)
        if why := _damage(folder):
            note(f"the embedded model is damaged and made anew: {why}")
            shutil.rmtree(folder)
    if not folder.exists():
        _merge_embedded(folder)
        for path in (folder, *folder.iterdir()):  # whatever the umask lets others do
            path.chmod(path.stat().st_mode & ~0o022)
    return folder


def _damage(folder: Path) -> str:
    """What is wrong with the embedded model's folder, of which some milliseconds tell; "" for nothing."""
    try:
        verify(folder)
        for file in FP8_DIR.glob("*.json"):
            if file.read_bytes() != read_small(folder / file.name, safetensors.MAX_INDEX):
                return f"{folder / file.name}: other bytes"
    except (RefimplError, OSError) as error:
        return str(error)
    return ""


@functools.cache
def _embedded_for_now(name: str, why: str) -> Path:
    """In a temporary folder, which goes with the process."""
    note(f"the embedded model is not kept: {why}")
    place = tempfile.TemporaryDirectory(prefix="refimpl-", ignore_cleanup_errors=True)
    _temporary.append(place)
    folder = Path(place.name) / name
    _merge_embedded(folder)
    return folder


_temporary: list[tempfile.TemporaryDirectory] = []  # held: each is removed when nobody does


def _merge_embedded(folder: Path) -> None:
    plan = merge_plan.plan(FP8_DIR, GGUF_DIR)
    print(
        f"first run: merging the embedded model's FP8 checkpoint ({FP8_DIR.name}/) and GGUF "
        f"({GGUF_FILE.name}) into {printable(str(folder), 400)}",
        file=sys.stderr,
    )
    try:
        with Progress(plan.nbytes, "merging") as progress:
            write(plan, folder, progress)
    except ResourceError as error:
        if error.code not in ("E5101", "E5103"):
            raise
        _wait_for(folder / merge_plan.MANIFEST, error)


def _wait_for(path: Path, error: RefimplError, seconds: float = 60) -> None:
    """Another process is at the same merge: its result is as good."""
    end = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > end:
            raise error
        time.sleep(0.05)


def resolve(name: str | os.PathLike, weights: bool = True) -> Path:
    """A local path as it is, or the folder that a hub id like `deepseek-ai/DeepSeek-R1` is downloaded to;
    without `weights` its small files only.

    MismatchError E4021 when it is neither; ResourceError E5110 without the package, E5111 when the download
    fails.
    """
    path = Path(name)
    if path.exists():
        return path
    if not _HUB_ID.fullmatch(str(name)):
        raise refusal("E4021 hub or folder", name, expected="a folder, a .gguf file or owner/name")
    # Code and pickles are left where they are.
    return _download(str(name), [*SMALL_FILES, "*.safetensors", "*.gguf"] if weights else SMALL_FILES)


def checkpoint(name: str) -> Path:
    """A repository's folder with its small files and those safetensors that a merge reads: not the ones that
    hold routed experts alone.

    Raises as `resolve`, and what the readers of index and config do.
    """
    if not _HUB_ID.fullmatch(name):
        raise refusal("E4021 safetensor", name, expected="owner/name")
    folder = _download(name, SMALL_FILES)
    if not (folder / safetensors.INDEX).exists():
        return _download(name, [*SMALL_FILES, "*.safetensors"])
    config = DeepSeekConfig.from_dict(read_config(folder), where=folder / "config.json")
    files = {
        file
        for tensor, file in safetensors.read_index(folder).items()
        if merge_plan.is_copied(tensor, config, set())
    }
    return _download(name, [*SMALL_FILES, *sorted(files)])


def _download(name: str, wanted: list[str]) -> Path:
    try:
        import huggingface_hub  # optional, and a second to import
    except ImportError:
        hint = 'pip install "refimpl[hub]", or download the files yourself and name their folder'
        raise refusal("E5110", name, hint=hint) from None
    try:
        with redirect_stderr(own(sys.stderr)):  # its progress rewrites a line
            return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # the package raises its own, requests' and urllib's kinds
        hint = "check the name and the network; gated models need `hf auth login`"
        first = str(error).partition("\n")[0]  # the rest tells what the package might do
        raise refusal("E5111", name, found=f"{type(error).__name__}: {first}"[:300], hint=hint) from None
