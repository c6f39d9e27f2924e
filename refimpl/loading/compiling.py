"""Kernels of the cpu backend compiled ahead, by several processes.

A process compiles one kernel at a time, and a model's first answer needs some twenty of them. So its
operations are called once on weights of the model's formats, a few rows each, every operation in whichever
process is free; what they compile is kept on the disk, from where this process takes it. A mark beside the
kernels says what has been done. Nothing depends on it: what was not compiled ahead is compiled when it is
called.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refimpl import formats, ops
from refimpl.checkpoint import names
from refimpl.cli import Progress
from refimpl.config import DeepSeekConfig
from refimpl.devices.backend import Backend
from refimpl.devices.memory import free_memory
from refimpl.formats import f32
from refimpl.reference import interleaved
from refimpl.tensors import Interleaved, Packed, ScaledFP8, ScaledInt4, Stack, Weight

PROGRAM = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from refimpl.loading import compiling
compiling.serve()
"""
BESIDE = " beside"  # after a format's name: with rows side by side
ROWS, COLUMNS = 64, 256  # of weights that operations are called on
TOKENS = 16  # enough for the ways of many tokens
PROCESS_BYTES = 500e6  # of memory, with room to spare
ENOUGH = 16  # processes; a model has about as many units


class Unit(NamedTuple):
    """What a process does in one piece: an operation, or what it multiplies by ("ways"), on weights of these
    formats with so many tokens.
    """

    op: str
    kinds: tuple[str, ...] = ()
    tokens: int = 1
    activations: str = "fp8"


# --- what a model needs -------------------------------------------------------------------------------------


def stages(
    checkpoint: Mapping[str, Weight | Stack], config: DeepSeekConfig, backend: Backend, repack: bool = False
) -> list[list[Unit]]:
    """What the backend compiles for the weights of a model, with `repack` also as loading rearranges them.
    Units of a stage know nothing of each other, and find what the stages before have compiled.
    """
    if backend.name == "reference" or find_spec("numba") is None:
        return []
    how, on_cpu = backend.suited(config).activations, backend.name == "cpu"
    kinds = {n: _kind(checkpoint[g]) for n in names.shapes(config) if (g := names.to_gguf(n)) in checkpoint}
    # On a GPU experts alone are computed here.
    used = sorted({k for n, k in kinds.items() if k and (on_cpu or names.is_routed_expert(n))})
    if repack:
        experts = {k for n, k in kinds.items() if names.is_routed_expert(n)}
        used += sorted(k + BESIDE for k in experts & SIDE_BY_SIDE)
    # One token of E4M3 goes another way than more do; the ways of few tokens come with those of many else.
    first = [Unit("linear", (kind,), 1, how) for kind in used[:1]]
    first += [Unit("ways", (kind,), TOKENS, how) for kind in used]
    first += [Unit("ways", (kind,), 1, how) for kind in used if kind == "E4M3"]
    first += ATTENTION if on_cpu else []
    gates = [n for n in kinds if names.is_routed_expert(n) and "gate_proj" in n]
    sides = {tuple(kinds.get(n.replace("gate_", f"{side}_"), "") for side in SIDES) for n in gates}
    # Gate and up are one list of jobs, or two; nothing else of their formats matters once those are compiled.
    second = {gate == up: (gate, up, down) for gate, up, down in sorted(sides) if gate and up and down}
    return [[*first, Unit("team")], [Unit("experts", found, TOKENS, how) for found in second.values()]]


# A cache of one row is an array of another kind than one of more.
ATTENTION = [
    Unit("route"),
    Unit("mla_absorbed", tokens=1),
    Unit("mla_absorbed", tokens=2),
    Unit("latents"),
    Unit("rms_norm"),
    Unit("rope"),
]
SIDE_BY_SIDE = {m.NAME for m in interleaved.FORMATS}
SIDES = ("gate", "up", "down")


def _kind(weight: Weight | Stack) -> str:
    """A weight's format, F32 that of a plain matrix; "" for what no kernel is compiled for."""
    if isinstance(weight, ScaledFP8):
        return "E4M3"
    if isinstance(weight, ScaledInt4):
        return "INT4"
    if isinstance(weight, Packed | Interleaved):
        return formats.get(weight.ggml_type).NAME + BESIDE * isinstance(weight, Interleaved)
    if isinstance(weight, np.ndarray):
        return f32.NAME if weight.ndim == 2 else ""
    return "" if hasattr(weight, "dtype") else _kind(weight[0])


# --- in a process of its own --------------------------------------------------------------------------------


def serve() -> None:
    """Compile the units that are asked for on stdin, a line each, and answer each with a line."""
    from refimpl.kernels import kept  # Numba: seconds

    kept.hush()
    for line in sys.stdin:
        compile_unit(Unit(*json.loads(line)))
        print("done", flush=True)


def compile_unit(unit: Unit) -> None:
    """Call the unit's operation, by which its kernels are compiled and kept."""
    run = {"experts": _experts, "linear": _linear, "ways": _ways, "team": _team, "latents": _latents}.get(
        unit.op, _attention
    )
    run(unit)


def _weight(kind: str, *shape: int) -> Any:
    """Zeros in that format."""
    if kind == "E4M3":
        return ScaledFP8(np.zeros(shape, np.uint8), np.ones((*shape[:-2], 1, shape[-1] // 128), np.float32))
    if kind == "INT4":
        codes = np.zeros((*shape[:-1], shape[-1] // 2), np.uint8)
        return ScaledInt4(codes, np.zeros((*shape[:-1], shape[-1] // 32), np.uint16))
    if kind == f32.NAME:
        return np.zeros(shape, np.float32)
    number = formats.type_id(kind.removesuffix(BESIDE))
    module = formats.get(number)
    width = shape[-1] // module.WEIGHTS * module.BLOCK.itemsize
    found = Packed(np.zeros((*shape[:-1], width), np.uint8), number, shape)
    return interleaved.interleave(found) if kind.endswith(BESIDE) else found


def _linear(unit: Unit) -> None:
    x = np.zeros((unit.tokens, COLUMNS), np.float32)
    ops.load("linear", "cpu")(x, _weight(unit.kinds[0], ROWS, COLUMNS), unit.activations)


def _ways(unit: Unit) -> None:
    """What multiplies a matrix, without the operation around it."""
    from refimpl.kernels import linear_numba  # Numba: seconds

    w = _weight(unit.kinds[0], ROWS, COLUMNS)
    m = linear_numba.matrix(w)
    how = m and linear_numba.activation_layout(m, unit.activations)
    if m and how:
        many, pairs = (unit.tokens >= n for n in (linear_numba.BLOCKS_FROM, linear_numba.PAIRS_FROM))
        linear_numba.job_layout(m, how, many, pairs)


def _experts(unit: Unit) -> None:
    ids, shares = np.zeros((unit.tokens, 1), np.int64), np.ones((unit.tokens, 1), np.float32)
    stacks = [
        [_weight(k, COLUMNS, COLUMNS)] if k in ("E4M3", "INT4") else _weight(k, 1, COLUMNS, COLUMNS)
        for k in unit.kinds
    ]
    x = np.zeros((unit.tokens, COLUMNS), np.float32)
    ops.load("experts", "cpu")(x, ids, shares, *stacks, unit.activations)


def _team(unit: Unit) -> None:
    from refimpl.kernels.team import Team  # Numba: seconds

    Team(2).stop()


def _latents(unit: Unit) -> None:
    """Latent attention of a prompt or behind a long context, with latents as wide as models have them."""
    from refimpl.kernels import latent_numba  # Numba: seconds

    zeros = np.zeros((2, 2, 4), np.float32)  # tokens, heads, numbers of a head
    latent_numba.attend(zeros, zeros, np.zeros((2, 64)), zeros[0], np.zeros((2, 8, 64)), 1.0)


def _attention(unit: Unit) -> None:
    """One of the small operations, on arrays as a model has them."""
    heads, n, latent = 2, 4, 8

    def zeros(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.float32)

    function = ops.load(unit.op, "cpu")
    if unit.op == "rms_norm":
        function(zeros(1, latent), zeros(latent), 1e-6)
    elif unit.op == "rope":
        function(zeros(1, heads, n), zeros(1, n // 2), zeros(1, n // 2))
    elif unit.op == "route":
        bias = zeros(4)
        bias.setflags(write=False)  # mapped from a file
        config = DeepSeekConfig(n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=1)
        function(zeros(1, latent), zeros(4, latent), bias, config)
    else:
        rows = zeros(unit.tokens, latent + n)  # of a cache: latent and key side by side
        args = zeros(1, heads, n), zeros(1, heads, n), rows[:, :latent], rows[:, latent:]
        function(*args, zeros(heads, 2 * n, latent), 1.0)


# --- dealt out ----------------------------------------------------------------------------------------------


def for_model(model: Any, say: Callable[[int, int], None] | None = None) -> None:
    """`ahead` for a `Model` as it was loaded."""
    ahead(stages(model.checkpoint, model.config, model.backend), say)


def ahead(
    wanted: list[list[Unit]], say: Callable[[int, int], None] | None = None, processes: int | None = None
) -> None:
    """Compile what no earlier process has, stage by stage. `say(done, total)` is told at first and after each
    unit; without it a line on a terminal tells. Nothing is done where kernels cannot be kept, for one core,
    or for one unit.
    """
    if not any(wanted):
        return
    from refimpl.kernels import kept  # Numba: seconds

    if (folder := kept.folder()) is None:
        return
    left = [[u for u in stage if not _mark(folder, u).exists()] for stage in wanted]
    total, count = sum(map(len, left)), min(max(map(len, left)), processes or _processes())
    if count < 2:
        return
    kept.announce()
    shown = "auto" if say is None and sys.stderr.isatty() else "none"  # `announce` is enough for a log
    with Progress(total, "compiling kernels", shown, "{:.2g}".format) as progress:
        tell = say or (lambda done, total: progress(0))
        tell(0, total)
        # Processes end first, also for Ctrl-C: threads that wait for their answers would not.
        with ThreadPoolExecutor(count) as pool, _Children(count) as children:
            for stage in left:
                for unit in pool.map(children.compile, stage):
                    if unit is not None:
                        with suppress(OSError):
                            _mark(folder, unit).touch()
                        progress(1)
                        tell(int(progress.done), total)


def _mark(folder: Path, unit: Unit) -> Path:
    return folder / f"ahead-{hashlib.sha256(repr(unit).encode()).hexdigest()[:16]}"


def _processes() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, ENOUGH, int(free_memory()["cpu"] / PROCESS_BYTES))


class _Children:
    """Processes that compile, each a unit at a time. They are out of reach of the terminal's Ctrl-C, which is
    this process's to answer; they end with the `with`.
    """

    def __init__(self, count: int):
        command = [sys.executable, "-c", PROGRAM, json.dumps(sys.path)]
        self.all = [
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
            )
            for _ in range(count)
        ]
        self.idle: queue.SimpleQueue[subprocess.Popen[str] | None] = queue.SimpleQueue()
        for child in self.all:
            self.idle.put(child)

    def __enter__(self) -> _Children:
        return self

    def __exit__(self, *exc: object) -> None:
        for child in self.all:
            child.kill()
            child.communicate()

    def compile(self, unit: Unit) -> Unit | None:
        """Have an idle process compile it, and return it; None where that process failed, which says why on
        stderr and gets nothing more.
        """
        child = self.idle.get()
        done = child is not None and _ask(child, unit)
        self.idle.put(child if done else None)
        return unit if done else None


def _ask(child: subprocess.Popen[str], unit: Unit) -> bool:
    assert child.stdin and child.stdout
    try:
        child.stdin.write(json.dumps(unit) + "\n")
        child.stdin.flush()
    except OSError:
        return False
    return bool(child.stdout.readline())
