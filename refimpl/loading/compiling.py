"""Kernels of the cpu backend compiled ahead, by several processes.

A process compiles one kernel at a time, and a model's first answer needs some twenty of them. So its
operations are called once on weights of the model's formats, a few rows each, every operation in whichever
process is free; what they compile is kept on the disk, from where this process takes it. A mark beside the
kernels says what has been done. Nothing depends on it: what was not compiled ahead is compiled when it is
called.

To import Numba and to compile for the first time, which makes it read its tables, takes a second. On Linux
one process does that, and the others are its forks:

    this process -- starts --> one that imports and compiles a little -- forks --> one that compiles units
                 ---------- a unit, a line of JSON, by a pipe of its own ------->  ...
                 <---------- a line when it is compiled --------------------------

Forks are safe there: it has no thread but one, as BLAS and OpenMP are told to start none.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from contextlib import ExitStack, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from refimpl import formats, ops
from refimpl.checkpoint import names
from refimpl.cli import Progress
from refimpl.config import DeepSeekConfig
from refimpl.devices.backend import Backend
from refimpl.devices.memory import free_ram
from refimpl.errors import RefimplError
from refimpl.files import cache_base
from refimpl.formats import f32
from refimpl.kernels import processors
from refimpl.reference import interleaved
from refimpl.tensors import Interleaved, Packed, ScaledFP8, ScaledInt4, Stack, Weight

PROGRAM = """
import json, sys
sys.path[:], pipes = json.loads(sys.argv[1])
from refimpl.loading import compiling
compiling.serve(pipes)
"""
FORKS = sys.platform == "linux"  # elsewhere libraries of the system's have threads of their own, or none fork
ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"), "1")
BESIDE = " beside"  # after a format's name: with rows side by side
ROWS, COLUMNS = 64, 256  # of weights that operations are called on
TOKENS = 16  # enough for the ways of many tokens
PROCESS_BYTES = 500e6  # of memory, with room to spare
ENOUGH = 16  # processes; a model has about as many units
ENDING_S = 5.0  # for a process to end by itself


class Unit(NamedTuple):
    """What a process does in one piece: an operation on weights of these formats with so many tokens, or a
    part of one, as the "way" by which a format is multiplied where tokens are "few" or "many".
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
    Units of a stage know nothing of each other, and find what those of NEEDS have compiled in stages before.
    """
    if backend.name == "reference" or find_spec("numba") is None:
        return []
    how, on_cpu = backend.suited(config).activations, backend.name == "cpu"
    kinds = {n: _kind(checkpoint[g]) for n in names.shapes(config) if (g := names.to_gguf(n)) in checkpoint}
    # A router multiplies in float32, whatever its matrix is stored as.
    kinds |= {n: f32.NAME for n in kinds if n.endswith("mlp.gate.weight")}
    # On a GPU experts alone are computed here.
    used = sorted({k for n, k in kinds.items() if k and (on_cpu or names.is_routed_expert(n))})
    if repack:
        experts = {k for n, k in kinds.items() if names.is_routed_expert(n)}
        used += sorted(k + BESIDE for k in experts & SIDE_BY_SIDE)
    # What takes longest, and what others wait for, begins first.
    first = [Unit("attention part", (part,)) for part in LATENT_PARTS if on_cpu]
    first += [Unit("linear", (kind,), 1, how) for kind in used[:1]]
    # One token of E4M3 goes another way than more do; the way of few tokens is the same for many else.
    first += [Unit("way", (kind, which), TOKENS, how) for which in ("few", "many") for kind in used]
    first += [Unit("way", (kind, "few"), 1, how) for kind in used if kind == "E4M3"]
    quantized = [k for k in used if "_K" in k][:1] + [k for k in used if k == "E4M3"]
    first += [Unit("quantizer", (kind,), TOKENS, how) for kind in quantized]
    first += ATTENTION if on_cpu else []
    gates = [n for n in kinds if names.is_routed_expert(n) and "gate_proj" in n]
    sides = {tuple(kinds.get(n.replace("gate_", f"{side}_"), "") for side in SIDES) for n in gates}
    # Gate and up are one list of jobs, or two; nothing else of their formats matters once those are compiled.
    lists = {gate == up: (gate, up, down) for gate, up, down in sorted(sides) if gate and up and down}
    first += [Unit("experts part", (part,)) for part in EXPERT_PARTS if lists]
    second = [Unit("experts", found, TOKENS, how) for found in lists.values()]
    second += [Unit("latents")] if on_cpu else []
    return [[*first, Unit("team")], second]


# A cache of one row is an array of another kind than one of more.
ATTENTION = [
    Unit("route"),
    Unit("mla_absorbed", tokens=1),
    Unit("mla_absorbed", tokens=2),
    Unit("rms_norm"),
    Unit("rope"),
    Unit("rows"),
]
# Of latent attention and of experts, so that several processes share them.
LATENT_PARTS = ("attend", "attend many", "make", "turn_out", "turn_in", "fill_panels")
EXPERT_PARTS = ("plan", "silu", "weighted", "sum")
NEEDS = {
    "experts": ("way", "linear", "quantizer", "experts part"),
    "latents": ("attention part",),
}
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


def serve(pipes: list[tuple[int, int]]) -> None:
    """Be a process for each pair of file descriptors; where none are given, this one for stdin and stdout."""
    from refimpl.kernels import kept  # Numba: seconds

    kept.hush()
    if not pipes:
        _work(sys.stdin, sys.stdout)
        return
    _prepare()
    for pair in pipes:
        if not os.fork():
            # Who holds another's end of a pipe would keep it open when that one has ended.
            for fd in {fd for other in pipes for fd in other} - set(pair):
                os.close(fd)
            with suppress(BrokenPipeError):  # nobody wants the answer any more
                _work(os.fdopen(pair[0]), os.fdopen(pair[1], "w"))
            os._exit(0)
    # What ends the group ends the forks; this one stays until it has seen them end, as nobody else will.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for fd in (fd for pair in pipes for fd in pair):
        os.close(fd)
    with suppress(ChildProcessError):
        while True:
            os.wait()


def _prepare() -> None:
    """What every process would do by itself, done before there are several."""
    import_module("refimpl.kernels.attention_numba")
    import_module("refimpl.kernels.norm_rope_numba")
    import_module("refimpl.kernels.experts_numba")
    numba = import_module("numba")
    # Arrays and a callback bring in the tables that kernels need; none of it is kept on the disk.
    numba.njit(lambda n: np.empty((n, n), np.int64)[:1].ctypes.data)(1)
    numba.cfunc("int64(int64)")(lambda n: n)


def _work(asked: IO[str], answers: IO[str]) -> None:
    """Compile the units that are asked for, a line each, and answer each with a line."""
    for line in asked:
        compile_unit(Unit(*json.loads(line)))
        print("done", file=answers, flush=True)


def compile_unit(unit: Unit) -> None:
    """Call the unit's operation, by which its kernels are compiled and kept."""
    run = {
        "experts": _experts,
        "linear": _linear,
        "way": _way,
        "quantizer": _quantizer,
        "attention part": _part,
        "experts part": _part,
        "team": _team,
        "latents": _latents,
    }
    run.get(unit.op, _attention)(unit)


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


def _way(unit: Unit) -> None:
    """What multiplies strips of a matrix, without the operation around it."""
    from refimpl.kernels import linear_numba, strips_numba  # Numba: seconds

    kind, which = unit.kinds
    m = linear_numba.matrix(_weight(kind, ROWS, COLUMNS))
    how = m and linear_numba.activation_layout(m, unit.activations)
    if m and how:
        many, pairs = (unit.tokens >= n for n in (linear_numba.BLOCKS_FROM, linear_numba.PAIRS_FROM))
        few, much = linear_numba.ways(m, how, many, pairs)
        if which == "few" or much != few:
            strips_numba.strip(m.kind, few if which == "few" else much)


def _quantizer(unit: Unit) -> None:
    """What quantizes activations for a matrix, and the tasks that all formats share."""
    from refimpl.kernels import linear_numba, strips_numba  # Numba: seconds

    m = linear_numba.matrix(_weight(unit.kinds[0], ROWS, COLUMNS))
    how = m and linear_numba.activation_layout(m, unit.activations)
    if m and how:
        names = linear_numba.ways(m, how, True, True)
        if how in linear_numba.LAYOUTS:
            linear_numba.quantizer(how)
        if "pairs" in names:
            linear_numba.quantizer(f"{how}_pairs")
        strips_numba.strips_task()
        if "tiles" in names:
            strips_numba.copies_task()


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


def _part(unit: Unit) -> None:
    """A part of latent attention or of experts."""
    from refimpl.kernels import expanded_numba, experts_numba, latent_numba  # Numba: seconds

    name = unit.kinds[0]
    latents = expanded_numba if name in expanded_numba.TASKS else latent_numba
    (experts_numba if unit.op == "experts part" else latents).compile_part(name)


def _latents(unit: Unit) -> None:
    """Latent attention of a prompt or behind a long context, with latents as wide as models have them."""
    from refimpl.kernels import expanded_numba, latent_numba  # Numba: seconds

    zeros = np.zeros((2, 2, 4), np.float32)  # tokens, heads, numbers of a head
    for form in (latent_numba, expanded_numba):
        form.attend(zeros, zeros, np.zeros((2, 64)), zeros[0], np.zeros((2, 8, 64)), 1.0)


def _attention(unit: Unit) -> None:
    """One of the small operations, on arrays as a model has them."""
    heads, n, latent = 2, 4, 8

    def zeros(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.float32)

    if unit.op == "rows":  # of norms and angles of a prompt
        import_module("refimpl.kernels.norm_rope_numba").compile_rows()
        return
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
    """Compile what no earlier process has, what others need first. `say(done, total)` is told at first and
    after each unit; without it a line on a terminal tells. Nothing is done where kernels cannot be kept, for
    one core, or for one unit.
    """
    units, most = [u for stage in wanted for u in stage], processes or _processes()
    if min(len(units), most) < 2:
        return
    # A thread for each process, so that units begin in their order. Processes end first, also for Ctrl-C:
    # threads that wait for their answers would not.
    with ThreadPoolExecutor(min(len(units), most)) as pool, ExitStack() as stack:
        # Where nothing was ever compiled they are wanted for sure, and import Numba while this process does.
        children = None if _compiled_before() else stack.enter_context(_Children(min(len(units), most)))
        from refimpl.kernels import kept  # Numba: seconds

        if (folder := kept.folder()) is None:
            return
        left = [u for u in units if not _mark(folder, u).exists()]
        if min(len(left), most) < 2:
            return
        kept.announce()
        shown = "auto" if say is None and sys.stderr.isatty() else "none"  # `announce` is enough for a log
        progress = stack.enter_context(Progress(len(left), "compiling kernels", shown, "{:.2g}".format))
        tell = say or (lambda done, total: progress(0))
        tell(0, len(left))
        children = children or stack.enter_context(_Children(min(len(left), most)))
        for future in as_completed(_submitted(pool, children, left)):
            if (unit := future.result()) is not None:
                with suppress(OSError):
                    _mark(folder, unit).touch()
                progress(1)
                tell(int(progress.done), len(left))


def _compiled_before() -> bool:
    """Whether units of any version were compiled ahead, and so perhaps those of this one."""
    try:
        return any(cache_base().glob("numba-*/ahead-*"))
    except RefimplError:  # there is no cache
        return True


def _submitted(pool: ThreadPoolExecutor, children: _Children, units: list[Unit]) -> list[Future]:
    """A future for each, None where its process failed. A unit waits for those before it that compile what it
    needs, which have begun before it.
    """
    futures: list[Future] = []

    def compiled(unit: Unit, before: list[Future]) -> Unit | None:
        wait(before)
        return children.compile(unit)

    for unit in units:
        before = [f for f, other in zip(futures, units) if other.op in NEEDS.get(unit.op, ())]
        futures.append(pool.submit(compiled, unit, before))
    return futures


def _mark(folder: Path, unit: Unit) -> Path:
    return folder / f"ahead-{hashlib.sha256(repr(unit).encode()).hexdigest()[:16]}"


def _processes() -> int:
    return min(processors.usable(), ENOUGH, int(free_ram() / PROCESS_BYTES))


class _Child(NamedTuple):
    """The ends of a process's pipes that are ours."""

    stdin: IO[str]
    stdout: IO[str]


class _Children:
    """Processes that compile, each a unit at a time. They are out of reach of the terminal's Ctrl-C, which is
    this process's to answer; they end with the `with`.
    """

    def __init__(self, count: int):
        self.started: list[subprocess.Popen] = []
        self.all = self._forked(count) if FORKS else [self._spawned() for _ in range(count)]
        self.idle: queue.SimpleQueue[_Child | None] = queue.SimpleQueue()
        for child in self.all:
            self.idle.put(child)

    def _start(self, pipes: list[tuple[int, int]], **how: Any) -> subprocess.Popen:
        command = [sys.executable, "-c", PROGRAM, json.dumps((sys.path, pipes))]
        self.started.append(
            subprocess.Popen(command, env=os.environ | ONE_THREAD, start_new_session=True, **how)
        )
        return self.started[-1]

    def _spawned(self) -> _Child:
        process = self._start([], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdin and process.stdout
        return _Child(process.stdin, process.stdout)

    def _forked(self, count: int) -> list[_Child]:
        """Children of one process, which is their leader: what ends its group ends them."""
        asked, answered = [os.pipe() for _ in range(count)], [os.pipe() for _ in range(count)]
        theirs = [(a[0], b[1]) for a, b in zip(asked, answered)]
        given = [fd for pair in theirs for fd in pair]
        try:
            self._start(theirs, pass_fds=given, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        finally:
            for fd in given:
                os.close(fd)
        return [_Child(open(a[1], "w"), open(b[0])) for a, b in zip(asked, answered)]

    def __enter__(self) -> _Children:
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        for child in self.all if kind is None else ():  # they are idle, and end when nothing more can come
            with suppress(OSError):
                child.stdin.close()
        for process in self.started:
            if kind is not None:
                self._signal(process, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(ENDING_S)
            self._signal(process, signal.SIGTERM if sys.platform == "win32" else signal.SIGKILL)
            process.wait()
        for stream in (stream for child in self.all for stream in child):
            with suppress(OSError):  # of a line that nobody will read
                stream.close()

    def _signal(self, process: subprocess.Popen, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number) if FORKS else process.send_signal(number)

    def compile(self, unit: Unit) -> Unit | None:
        """Have an idle process compile it, and return it; None where that process failed, which says why on
        stderr and gets nothing more.
        """
        child = self.idle.get()
        done = child is not None and _ask(child, unit)
        self.idle.put(child if done else None)
        return unit if done else None


def _ask(child: _Child, unit: Unit) -> bool:
    try:
        child.stdin.write(json.dumps(unit) + "\n")
        child.stdin.flush()
    except OSError:
        return False
    return bool(child.stdout.readline())
