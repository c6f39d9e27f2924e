"""Copies of the compiled codecs with lines changed, built anew in a folder of their own: as `refimpl.mutate`
does for Python.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

import refimpl.kernels
from refimpl.errors import refusal

FLAGS = ("-O1", "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC", "-w")
"""As setup.py's, but for the level: what is built runs once."""
TEAM = 3
"""Threads of a copy, wherever there is work for so many: `ops.set_threads` knows the original alone."""
_serial = count()


def possible() -> str:
    """Why codecs cannot be built here; empty where they can."""
    if importlib.util.find_spec("Cython") is None:
        return "Cython is not installed"
    return "" if shutil.which("cc") else "there is no C compiler"


def compiled(*, edits: Sequence[Sequence[str]], function: str) -> Callable[..., Any]:
    """`function` of `ggml_codec` with these edits, each of a text that stands exactly once in its sources:
    MismatchError E8009 otherwise.
    """
    folder = Path(tempfile.mkdtemp(prefix="refimpl-codec-"))
    try:
        _write(folder, edits)
        changed = _imported(_built(folder))
        changed.set_threads(TEAM)
        return getattr(changed, function)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # what is loaded stays loaded


def _write(folder: Path, edits: Sequence[Sequence[str]]) -> None:
    kernels = Path(next(iter(refimpl.kernels.__path__)))
    sources = {path.name: path.read_text() for path in kernels.glob("*.p[yx][xi]")}
    for old, new in edits:
        found = [name for name, text in sources.items() for _ in range(text.count(old))]
        if len(found) != 1:
            raise refusal("E8009", "kernels/ggml_codec.pyx", found=len(found), expected=old)
        sources[found[0]] = sources[found[0]].replace(old, new)
    for name, text in sources.items():
        (folder / name).write_text(text)


def _built(folder: Path) -> Path:
    source, result = folder / "ggml_codec.pyx", folder / "ggml_codec.so"
    _run(sys.executable, "-m", "cython", "-3", str(source))
    includes = [f"-I{sysconfig.get_path('include')}", f"-I{np.get_include()}"]
    _run("cc", *FLAGS, *includes, str(source.with_suffix(".c")), "-o", str(result))
    return result


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def _imported(path: Path) -> Any:
    name = f"changed_{next(_serial)}.ggml_codec"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
