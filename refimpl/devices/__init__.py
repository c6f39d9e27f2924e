"""Where modules run and weights lie: the backends, placement rules, and what fits into which memory."""

from __future__ import annotations

from collections.abc import Callable

from refimpl import ops
from refimpl.devices.cpu import Host, check_gpu
from refimpl.errors import refusal


def open_machine(backend: str, activations: str, place: Callable[[str], str] | None = None) -> Host:
    """What runs the modules of a model on that backend, on "cuda" at `place`. UnsupportedError E5030 or E5031
    where "cuda" cannot run.
    """
    check_backend(backend)
    if backend != "cuda":
        return Host(backend)
    from refimpl.devices import cuda

    return cuda.Devices(place or cuda.hybrid, activations)


def check_backend(name: str) -> None:
    """UnsupportedError where it cannot run, before anything is read: E5010 no such backend; for "cuda" what
    `check_gpu` raises.
    """
    if name not in ("auto", *ops.BACKENDS):
        raise refusal("E5010", name, expected=" or ".join(("auto", *ops.BACKENDS)))
    if name == "cuda":
        check_gpu()
