"""refimpl: quantized inference of DeepSeek-V3/R1, readable and verified.

    formats/      every GGML and FP8 number format as a numpy module
    reference/    the operations of the paper in numpy; kernels/ has the same, fast
    ops           the table that pairs them
    checkpoint/   safetensors, GGUF, the names of tensors; merge/ makes one folder of two
    devices/      where modules run, and what that takes
    model, cache, generate      the network and how it is run
    tracing       every operation of a pass with its values; two models compared step by step
    chat          the command

Importing this package imports nothing: `formats` and `fp8` come, with numpy, when they are asked for.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refimpl import formats
    from refimpl.model import Model
    from refimpl.reference import fp8
    from refimpl.tracing import Comparison, Trace

if getattr(sys, "argv", [])[:1] == ["-m"]:  # while `python -m refimpl.chat` looks for it: a command
    from refimpl import interrupts

    interrupts.take()

__version__ = "0.2.0"
__all__ = ["compare", "formats", "fp8", "load", "trace"]


def load(
    folder: str | os.PathLike | None = None,
    backend: str = "auto",
    rules: str | os.PathLike | None = None,
    activations: str = "fp8",
    threads: int | None = None,
    repack: str = "auto",
) -> Model:
    """Open a model: a hybrid folder, a safetensors folder or a GGUF; None is the embedded model, merged into
    the user's cache once.

    `backend` is "reference", "cpu", "cuda" or "auto" (the fastest there is here); `rules` a file of placement
    rules for "cuda" (docs/placement.md); `activations` "fp8" (what the real system computes) or "exact"
    (float32 throughout); `threads` limits numpy's BLAS and the kernels; `repack` "auto", "yes" or "no" says
    whether the experts' rows are laid side by side for speed (docs/chat.md). Raises RefimplError for anything
    wrong with the files, or when a GPU is not there or too small.
    """
    from refimpl.loading.opening import (
        open_model,  # the model's rooms, put off so that formats alone come quickly
    )

    return open_model(
        None if folder is None else os.fspath(folder),
        backend,
        None if rules is None else os.fspath(rules),
        activations,
        threads,
        repack=repack,
    )


def trace(model: Model, prompt: str | Sequence[int], decode: int | None = None) -> Trace:
    """Yield every operation of a pass with its name, module, backend, shapes, dtypes, bytes and values;
    `.to_html(FILE)` of what is returned writes them as a page. See `refimpl.tracing`.
    """
    from refimpl import tracing  # as in `load`

    return tracing.trace(model, prompt, decode)


def compare(
    a: Model,
    b: Model,
    prompt: str | Sequence[int],
    bound: float = 0.01,
    decode: int | None = None,
    stop: bool = False,
) -> Comparison:
    """Walk two models through one prompt and say at which operation they part; see `refimpl.tracing`."""
    from refimpl import tracing  # as in `load`

    return tracing.compare(a, b, prompt, bound, decode, stop)


def __getattr__(name: str) -> Any:
    """The two that import numpy, put off so that a command can answer Ctrl-C before."""
    if name not in ("formats", "fp8"):
        raise AttributeError(f"module 'refimpl' has no attribute {name!r}")
    return importlib.import_module(f"refimpl.{name}")
