"""The ways that kernels of the table have to their results, and what each needs. The law `ways` asks that the
cases of a level have entered every one that this process can take; a kernel says which by `refimpl.entered`.

A way that needs another process (a level of SIMD is chosen once, so is Triton's interpreter) is judged in one
of its own, see `environments`. One that needs another machine is named as not judged here.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

from refimpl import ops
from refimpl.conformance.truth.compare import Mismatch

Environment = tuple[tuple[str, str], ...]
SIMD = "REFIMPL_SIMD"
INTERPRET = "TRITON_INTERPRET"
LEVELS = ("generic", "avx2", "vnni", "avx512", "bf16", "amx")


def _in_triton() -> bool:
    """Triton's kernels run, compiled or interpreted."""
    return ops.sees_gpu() or bool(os.environ.get(INTERPRET))


def _hopper() -> bool:
    if not ops.sees_gpu():
        return False
    import torch  # heavy, and there is a GPU, so that it is loaded anyway

    return torch.cuda.get_device_capability()[0] == 9


def _hopper_of_132() -> bool:
    if not _hopper():
        return False
    import torch  # heavy, and there is a GPU, so that it is loaded anyway

    return torch.cuda.get_device_properties(0).multi_processor_count == 132


def _level(*names: str) -> Callable[[], bool]:
    def chosen() -> bool:
        from refimpl.kernels.simd_llvm import choose  # brings llvmlite, which references do not need

        return choose() in names

    return chosen


class Need(NamedTuple):
    """What a way needs: in words, and whether this process has it."""

    says: str
    met: Callable[[], bool]


NEEDS = {
    "": Need("nothing", lambda: True),
    "gpu": Need("a GPU", ops.sees_gpu),
    "hopper": Need("a GPU of compute capability 9", _hopper),
    "hopper of 132": Need("an H100 (SXM) or H200, whose 132 processors the shapes are for", _hopper_of_132),
    "triton": Need("a GPU, or Triton's interpreter", _in_triton),
    "torch": Need("tensors on the CPU, outside Triton's interpreter", lambda: not _in_triton()),
    "interpreter": Need("Triton's interpreter", lambda: _in_triton() and not ops.sees_gpu()),
    "host": Need("no GPU", lambda: not ops.sees_gpu()),
    "codec": Need("the compiled codecs", lambda: find_spec(ops.CODEC) is not None),
    "no tiles": Need(f"{SIMD}=bf16 or a lower level", lambda: not _level("amx")()),
    "wide registers": Need(f"{SIMD}=avx512 or a higher level", _level("avx512", "bf16", "amx")),
    "products of bf16": Need(f"{SIMD}=bf16 or a higher level", _level("bf16", "amx")),
    **{level: Need(f"{SIMD}={level}, and a CPU that has it", _level(level)) for level in LEVELS},
}


def _strips(*more: str) -> dict[str, str]:
    """The ways of Numba's products: who works, and how few or many tokens meet which kind of strip."""
    counts = ("one token", "two tokens", "few tokens", "many tokens")
    strips = [f"{way}, {count}" for way in ("rows", "lanes") for count in counts]
    found = dict.fromkeys(("reference", "one thread", "a team", *strips, "blocks, many tokens", *more), "")
    found |= {"lanes, many tokens": "no tiles", "tiles, many tokens": "amx"}
    found |= {"wide, many tokens": "wide registers"}
    found |= {f"pairs, {count}": "products of bf16" for count in counts[1:3]}
    return found | {"pairs, many tokens": "bf16", "pair tiles, many tokens": "amx"}


# Experts alone are chosen so unevenly that one has a token where the others have several.
_ONE = {"pairs, one token": "products of bf16"}


def _interleaved(*more: str) -> dict[str, str]:
    """The ways of interleaved rows."""
    counts = ("one token", "two tokens", "few tokens")
    strips = [f"interleaved, {count}" for count in counts]
    found = dict.fromkeys(("reference", "one thread", "a team", *strips, *more), "")
    return found | {"interleaved, many tokens": "no tiles", "tiles, many tokens": "amx"}


def _codec(op: str) -> dict[str, str]:
    """The ways of Cython's codecs: who works, and the reference for numbers that they leave to it."""
    leaves = op.startswith("fp8.") or (op.endswith(".quantize") and op != "bf16.quantize")
    return dict.fromkeys(("one thread", "a team", *(("reference",) if leaves else ())), "codec")


_LEVELS = {f"simd {level}": level for level in LEVELS}
_LATENTS = (
    *("one register of heads", "several registers of heads"),
    *("the cache in one piece", "the cache in pieces"),
    *("expanded", "all heads at once", "heads in pieces"),
)
_ROWS_OF_CPU = dict.fromkeys(("one thread", "a team"), "")
_LISTS = ("gate and up as one list", "gate and up as two lists")
_ROWS = {f"{rows} rows a program": "triton" for rows in (1, 8, 32)}
_FLOATS = {"host, float32": "host", "device, float32": "gpu"}
_EITHER = {"in Triton": "triton", "in torch": "torch"}
_PRODUCTS = _FLOATS | {
    "fp8 in torch, fp8": "host",
    "fp8 in torch, ue8m0": "host",
    "fp8 in torch, exact": "host",
    "fp8 in Triton": "gpu",
}

TABLE: dict[tuple[str, str], dict[str, str]] = {
    ("linear", "cpu"): _strips() | _LEVELS,
    ("swiglu", "cpu"): _strips(*_LISTS) | _LEVELS,
    ("experts", "cpu"): _strips(*_LISTS) | _ONE | _LEVELS,
    ("interleaved.linear", "cpu"): _interleaved() | _LEVELS,
    ("interleaved.experts", "cpu"): _interleaved(_LISTS[0]) | _LEVELS,
    ("mla_absorbed", "cpu"): dict.fromkeys(("one query", "one thread", "a team", *_LATENTS), "") | _LEVELS,
    ("linear", "cuda"): _PRODUCTS | {"fp8 in torch, quantized": "host"},
    ("swiglu", "cuda"): _PRODUCTS,
    ("rms_norm", "cpu"): _ROWS_OF_CPU,
    ("rope", "cpu"): _ROWS_OF_CPU,
    ("rms_norm", "cuda"): _EITHER,
    ("rope", "cuda"): _EITHER,
    ("mla_absorbed", "cuda"): {
        **_FLOATS,
        "host, bfloat16": "host",
        "device, bfloat16": "gpu",
        "three products": "gpu",
        "three parts in one product": "gpu",
        "one query in Triton": "triton",
        "expanded, in Triton": "triton",
        "expanded, in torch": "",
        "absorbed": "",
        "all tokens at once": "",
        "tokens in pieces": "",
        "all heads at once": "",
        "heads in pieces": "",
        "all rows at once": "triton",
        "rows in pieces": "triton",
        "the cache in one share": "triton",
        "the cache in several shares": "triton",
        "the cache in large tiles": "triton",
    },
    ("index_rope", "cuda"): _EITHER,
    ("index_rows", "cuda"): dict.fromkeys(("all tokens at once", "tokens in pieces"), ""),
    ("route", "cuda"): {
        **_FLOATS,
        "few tokens in Triton": "triton",
        "many tokens in Triton": "triton",
        "in torch": "torch",
    },
    ("fp8.linear", "cuda"): {
        "fp8, 64 outputs": "triton",
        "fp8, 128 outputs": "gpu",
        "f32, 64 outputs": "triton",
        "K in one": "triton",
        "K in parts": "triton",
        "persistent, few tokens": "hopper",
        "persistent, 64 outputs": "hopper",
        "persistent, 128 outputs": "hopper",
        "persistent, 256 outputs": "hopper of 132",
        "outputs in two launches": "hopper of 132",
    },
    ("fp8.bf16.linear", "cuda"): {
        "bf16, 64 outputs": "triton",
        "K in one": "triton",
        "K in parts": "triton",
        "persistent bf16, 64 outputs": "hopper",
        "persistent bf16, 128 outputs": "hopper",
    },
    ("fp8.act_quant", "cuda"): _ROWS,
    ("fp8.act_quant_ue8m0", "cuda"): _ROWS,
    ("swiglu_quant", "cuda"): _ROWS | _EITHER,
    ("rms_norm_quant", "cuda"): _EITHER,
} | {(op, "cpu"): _codec(op) for op, row in ops.OPS.items() if row.fast.get("cpu", "").startswith(ops.CODEC)}
"""{(operation, backend): {way: what it needs}}."""

_KNOWN = {way for row in TABLE.values() for way in row}

ELSEWHERE = ("form", "edges", "integers", "dyadic", "extremes", "threads", "ways")
"""The laws that are tried again in another environment: those that run every way, exactly where that is asked
for, and those of sums that another level of SIMD keeps in fewer bits.
"""


def elsewhere(environment: Environment) -> tuple[str, ...] | None:
    """The laws that are tried in another environment; None for all of them. What torch does without Triton is
    other code altogether, and quick.
    """
    return ELSEWHERE if any(name != INTERPRET for name, _ in environment) else None


def environments(op: str, backend: str) -> list[Environment]:
    """Other environments in which a row takes ways that it cannot take in the first one."""
    needs = set(TABLE.get((op, backend), {}).values())
    found: list[Environment] = []
    if needs & set(_LEVELS.values()):
        from refimpl.kernels.simd_llvm import available  # brings llvmlite, as `_level` says

        found += [((SIMD, level),) for level in available()[:-1] if not os.environ.get(SIMD)]
    if "torch" in needs and not ops.sees_gpu() and not os.environ.get(INTERPRET):
        found.append(((INTERPRET, ""),))
    return found


def missing(ways: dict[str, str], heard: Counter[str]) -> Mismatch | None:
    """Whether all ways that this process can take were entered, and no other but those of rows of the table
    that the kernel calls.
    """
    never = [way for way, need in ways.items() if NEEDS[need].met() and not heard[way]]
    if never:
        return Mismatch(f"never entered: {'; '.join(never)}")
    if strange := sorted(heard.keys() - ways.keys() - _KNOWN):
        return Mismatch(f"entered, and declared by nobody: {'; '.join(strange)}")
    return None


def not_here(ways: dict[str, str]) -> str:
    """The ways that this process cannot take, and what they need; empty for none."""
    left: dict[str, list[str]] = {}
    for way, need in ways.items():
        if not NEEDS[need].met():
            left.setdefault(NEEDS[need].says, []).append(way)
    return "; ".join(f"{', '.join(names)} (needs {says})" for says, names in left.items())
