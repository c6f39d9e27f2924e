"""The conformance suite: is a kernel equal to its reference, what does equal mean, and with which input is it
not.

    python -m refimpl.conformance                                      every row of the table of operations
    python -m refimpl.conformance --op q4_k.dequantize --kernel mine:decode
    test_mine = refimpl.conformance.suite("fp8.linear", mine.linear)   in a pytest file

    manifest     what a kernel declares: arrays, rounding, overflow, accumulation, shapes
    inputs family families*         numbers to feed it, by operation
    exhaustive products             small domains enumerated
    bounds routing policies compare what is true, and how far from it is still right; undecided: and which
    greedy tokens that leaves open
    relations laws                  the ladder
    trial judge report rows         a kernel on trial, verdicts, how they read, and the table row by row
    stateful     the latent KV cache against a list
    mutants harmless                faults that must be found, rewrites that must not be

Needs the extra `conformance` (hypothesis, pytest). `docs/conformance.md` derives the bounds.
"""

from __future__ import annotations

from importlib.util import find_spec

from refimpl.errors import refusal

if find_spec("hypothesis") is None:
    raise refusal("E8010", "hypothesis")

from refimpl.conformance.command import main
from refimpl.conformance.manifest import Manifest
from refimpl.conformance.suite import suite

__all__ = ["Manifest", "main", "suite"]
