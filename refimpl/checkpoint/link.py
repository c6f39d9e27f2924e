"""A hybrid folder whose routed experts stay in their GGUF: `refimpl-link.json` names the files, and their
headers say where everything lies.

    {"format_version": "1", "files": [{"path": "../gguf/model-00001-of-00009.gguf", "size": 48999999999,
    "mtime_ns": 1737000000000000000}, ...]}

A path is relative to the folder where the GGUF lies below the folder's parent, so that both can be moved
together, and absolute elsewhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from refimpl.checkpoint import gguf, names
from refimpl.errors import refusal
from refimpl.files import read_small
from refimpl.tensors import TensorInfo

LINK = "refimpl-link.json"
VERSION = "1"
MAX_LINK = 1 << 20  # bytes
_AGAIN = "merge with --link again, which copies the small tensors only"


def text(files: Sequence[Path], folder: Path) -> str:
    """The link from `folder` to GGUF files, as written."""
    beside = Path(os.path.realpath(folder)).parent
    rows = []
    for path in (Path(os.path.abspath(f)) for f in files):
        info = os.stat(path)
        shown = os.path.join("..", path.relative_to(beside)) if path.is_relative_to(beside) else str(path)
        rows.append({"path": shown, "size": info.st_size, "mtime_ns": info.st_mtime_ns})
    return json.dumps({"format_version": VERSION, "files": rows}, indent=1) + "\n"


def read(folder: Path) -> dict[str, TensorInfo]:
    """The routed experts that a folder refers to, by GGUF name; {} for a folder without a link.

    InputFormatError E3203 for a malformed link, MismatchError E3204 when a file it names is missing or
    another than was linked; beside what `gguf.read` raises.
    """
    path = folder / LINK
    if not path.exists():
        return {}
    tensors: dict[str, TensorInfo] = {}
    for target, size, mtime_ns in _files(path):
        file = Path(os.path.realpath(folder)) / target
        try:
            info = os.stat(file)
        except (OSError, ValueError):
            raise refusal("E3204 back", path, again=_AGAIN, expected=target) from None
        if (info.st_size, info.st_mtime_ns) != (size, mtime_ns):
            other = f"{info.st_size} bytes of {info.st_mtime_ns / 1e9:.3f}"
            raise refusal(
                "E3204 another",
                path,
                target=target,
                found=other,
                expected=f"{size} bytes of {mtime_ns / 1e9:.3f}",
            )
        found = experts(file)
        if twice := tensors.keys() & found.keys():
            raise refusal("E3204 files", path, value=min(twice))
        tensors |= found
    return tensors


def experts(path: Path) -> dict[str, TensorInfo]:
    """The routed experts of one GGUF file."""
    tensors = gguf.unfused(gguf.read(path).tensors)
    return {n: t for n, t in tensors.items() if names.is_routed_expert(n)}


def _files(path: Path) -> list[tuple[str, int, int]]:
    try:
        raw = json.loads(read_small(path, MAX_LINK))
        found = [(row["path"], row["size"], row["mtime_ns"]) for row in raw["files"]]
        good = raw["format_version"] == VERSION and all(
            type(p) is str and p.endswith(".gguf") and type(s) is type(m) is int for p, s, m in found
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        good = False
    if not good:
        raise refusal("E3203", path, expected=f"version {VERSION} and files with path, size, mtime_ns")
    return found
