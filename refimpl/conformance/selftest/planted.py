"""Changed kernels for a GPU, by their numbers in `gpu_faults.toml` and `gpu_rewrites.toml`, which another
process can be told: refimpl.conformance.selftest.planted:fault_0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from refimpl.conformance.selftest.mutant import read


def __getattr__(name: str) -> Callable[..., Any]:
    """The kernel of a name such as fault_0 or rewrite_3."""
    kind, _, number = name.partition("_")
    try:
        return read(f"gpu_{kind}s.toml", kind)[int(number)].make()
    except (OSError, ValueError, IndexError) as error:
        raise AttributeError(name) from error
