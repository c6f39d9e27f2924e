"""Which kernel: a row of the table of operations, or the function that a name of somebody's module gives."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import NamedTuple

from refimpl.conformance.importing import find
from refimpl.conformance.inputs import arrays, draws
from refimpl.conformance.laws.ladder import LAWS
from refimpl.conformance.manifest import Manifest
from refimpl.conformance.strangers import add_format, add_reference, check_reference
from refimpl.conformance.trial import Trial
from refimpl.conformance.ways import TABLE, Environment
from refimpl.errors import meant, refusal
from refimpl.ops import CODEC, OPS
from refimpl.reference import interleaved


class Spec(NamedTuple):
    """Whom to judge, in words that another process understands: a backend's row of the table, or `kernel`,
    "package.module:function", under what it declares.
    """

    op: str
    backend: str = ""
    kernel: str = ""
    manifest: Manifest = Manifest()
    level: str = "quick"
    environment: Environment = ()  # of the process, beside what this one has
    reference: str = ""  # "module:function" that the kernel must equal, instead of the row's
    format: str = ""  # a file or module with a number format that is not ours

    @property
    def label(self) -> str:
        """What reports call the kernel: its name or its backend, then its environment variables."""
        return " ".join([self.kernel or self.backend, *(f"{n}={value}" for n, value in self.environment)])

    def brought(self) -> str:
        """The flags that say so."""
        flags = ("--reference", self.reference), ("--format", self.format)
        return " ".join(f"{flag} {value}" for flag, value in flags if value)

    def prepare(self) -> None:
        """Make known what a stranger brings. InputFormatError E8006, E8011; MismatchError E8003."""
        if self.format:
            add_format(self.format)
        if self.reference:
            add_reference(self.op, self.reference)

    def trial(self) -> Trial:
        """The kernel itself, imported. InputFormatError E8006, E8007, E8008."""
        self.prepare()
        if not self.kernel:
            return replace(row(self.op, self.backend, self.level), label=self.label)
        op = checked(self.op)
        declared = checked_manifest(op, self.manifest)
        taken = dict.fromkeys(declared.ways, "")
        if self.reference:
            check_reference(op, declared)
        kernel, brought = find(self.kernel), self.brought()
        return Trial(op, kernel, declared, self.kernel, self.level, ways=taken, brought=brought)


def checked(op: str) -> str:
    """The operation's own name; InputFormatError E8007 for none."""
    if op not in OPS:
        raise refusal("E8007", op, expected=meant(op, OPS))
    return op


def checked_law(name: str) -> str:
    """The law's own name; InputFormatError E8005 for none."""
    if name not in LAWS:
        raise refusal("E8005", name, expected=meant(name, LAWS))
    return name


MODES = ("fp8", "ue8m0", "exact")  # of our own rows


def checked_manifest(op: str, m: Manifest) -> Manifest:
    """The declaration, if the operation can be judged under it; InputFormatError E8001."""
    known = {"layouts": tuple(arrays.LAYOUTS), "weights": draws.WEIGHTS, "modes": MODES}
    for name, allowed in known.items():
        if strange := [v for v in getattr(m, name) if v not in allowed]:
            raise refusal("E8001 such", f"{name}={','.join(strange)}", expected=meant(strange[0], allowed))
    if not Trial(op, find, m).family.variants(op, m):
        declared = f"weights={','.join(m.weights)} modes={','.join(m.modes)}"
        raise refusal("E8001 kinds", declared, op=op)
    return m


def row(op: str, backend: str, level: str = "quick") -> Trial:
    """A row of the table: an operation on a backend, "reference" included, under this project's own
    promises.
    """
    target = OPS[op].fast.get(backend)
    if backend != "reference" and target is None:
        raise refusal("E8008", op, found=backend, expected=meant(backend, ("reference", *OPS[op].fast)))
    kernel = OPS[op].reference if target is None else find(target)
    manifest = _tensors(op) if backend == "cuda" else _arrays(op, backend)
    taken = TABLE.get((op, backend), {})
    return Trial(op, kernel, manifest, backend, level, brief=target is None, ways=taken)


def _arrays(op: str, backend: str) -> Manifest:
    """What is compiled from C keeps a NaN's sign and payload as its reference does. Interleaved weights are
    made of those that are drawn. The CPU's attention takes kv_b as a file has it, which its reference does
    not. Products of a reference are those of BLAS, which promises no bits with another number of threads.
    """
    if (op, backend) == ("mla_absorbed", "cpu"):
        return Manifest(modes=MODES, weights=("plain", "fp8"))
    threads = backend != "reference" or OPS[op].equal == "bits"
    if op.startswith("interleaved."):
        kinds = tuple(module.NAME.lower() for module in interleaved.FORMATS)
        prepare = f"{interleaved.__name__}:{interleaved.where_possible.__name__}"
        return Manifest(modes=MODES, weights=kinds, rows=interleaved.ROWS, prepare=prepare, threads=threads)
    nan = "bits" if OPS[op].fast.get("cpu", "").startswith(CODEC) else "any"
    return Manifest(nan=nan, modes=MODES, threads=threads)


def _tensors(op: str) -> Manifest:
    """What a GPU holds. Without one Triton's interpreter runs, which swaps parts of the language in during a
    call and has room for one thread.
    """
    import torch

    gpu = torch.cuda.is_available() and not os.environ.get("TRITON_INTERPRET")
    weights: tuple[str, ...] = ("plain", "bf16") if op.startswith("mla_") else ("fp8", "plain")
    weights += ("int4", "q4_k") if op == "embed" else ()  # which stay with the CPU
    sums = "tensor-core" if gpu else "float32"
    halves = op == "fp8.bf16.linear"
    return Manifest(
        input="bfloat16" if halves else "float32",
        output="bfloat16" if halves else "float32",
        array="torch",
        device="cuda" if gpu else "cpu",
        accumulation=sums,
        weights=weights,
        modes=("exact",) if halves else MODES,
        concurrent=gpu,
        threads=False,
    )


def table() -> list[tuple[str, str]]:
    """Every (operation, fast path) of OPS, and every reference, which has to obey the same laws."""
    return [(op, backend) for op, r in OPS.items() for backend in ("reference", *r.fast)]
