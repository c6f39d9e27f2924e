"""Reference: refimpl.reference.linear.linear, and below it refimpl.reference.packed.linear and
refimpl.fp8.linear.

A linear layer is one job of `strips_numba.multiply_jobs`, behind the quantization of its activations
(`activations_numba`). Here a weight becomes a `Matrix`, addresses and sizes that compiled code understands,
and what the kernel does not take goes to the reference.
"""

from __future__ import annotations

import weakref
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from refimpl.entered import entered, listened_to
from refimpl.formats.f32 import GGML_TYPE as F32
from refimpl.kernels.activations_numba import LAYOUTS, quantize, quantizer
from refimpl.kernels.dot_llvm import KINDS, Q8_K_BYTES
from refimpl.kernels.floats_llvm import E4M3, FLOATS
from refimpl.kernels.int4_llvm import INT4
from refimpl.kernels.jit import jit
from refimpl.kernels.pair_llvm import PAIRS
from refimpl.kernels.pairs_numba import HEIGHT as PAIR_ROWS
from refimpl.kernels.pairs_numba import PAIR_SCRATCH
from refimpl.kernels.pairs_numba import act_bytes as pair_bytes
from refimpl.kernels.panel_llvm import INTERLEAVED, PANELS, ROWS, scratch_bytes
from refimpl.kernels.simd_llvm import LEVEL, choose
from refimpl.kernels.strip_words import STRIP_BYTES
from refimpl.kernels.strips_numba import (
    ACTS_BYTES,
    BLOCK_ROWS,
    BLOCKS_FROM,
    PART,
    WAYS,
    copies_task,
    multiply_jobs,
    strip,
    strips_task,
)
from refimpl.kernels.team import TEAM, done, set_threads, threads, workers
from refimpl.kernels.tiles_numba import BEHIND, tile_scratch_bytes
from refimpl.kernels.tiles_numba import HEIGHT as TILE_ROWS
from refimpl.kernels.wide_llvm import WIDE
from refimpl.kernels.workspace import U8, WORKSPACE
from refimpl.reference import linear as reference
from refimpl.reference.interleaved import GROUP
from refimpl.tensors import Interleaved, Packed, ScaledFP8, ScaledInt4, Weight

__all__ = ["linear", "set_threads", "threads"]

# A matrix of few rows has fewer strips than threads want. Its tokens are then parted into jobs of about
# TOKENS each, so that there is a strip for everybody; the weights are read once for each job.
TOKENS = 128  # of one job where a matrix has so few strips that threads must also part its tokens
FEW_STRIPS = 512
PAIRS_FROM = 2  # tokens, from where taking rows of E4M3 apart for products of bfloat16 pays
NOTHING = np.empty(0, np.uint8)
SCALED = (ScaledFP8, ScaledInt4)
# Whether many tokens go through tiles. Tests say so where loops are in their place.
TILES = LEVEL == "amx"


class Matrix(NamedTuple):
    """A weight as the kernel sees it. The arrays it points into must be kept alive."""

    kind: int
    rows: int
    columns: int
    data: int  # address
    row_bytes: int
    scale: int  # address of the scales of tiles (E4M3) or of groups (INT4)
    scale_bytes: int  # of one row of them


class _Known(NamedTuple):
    """What `matrix` found, and for what. It keeps no array alive, nor the file that one is mapped from."""

    data: weakref.ref
    scale: weakref.ref | None  # of FP8 and INT4
    kind: tuple | None  # class, shape and type of a packed one
    matrix: Matrix | None


# By id of the array of codes or bytes. An id may be used again once its array is gone: the weak reference
# tells whether it is still the same array, and takes the entry away with it.
_known: dict[int, _Known] = {}


def matrix(w: Weight) -> Matrix | None:
    """None for a weight the kernel does not take: formats without a row in KINDS, ragged or scattered ones,
    arrays of other numbers than float32.

    A stack [E, N, K] gives its first matrix. What was found for a weight is kept as long as its array is:
    asking numpy for addresses takes longer than a small product.
    """
    # Written for few steps of Python, as every product of a token asks: a tuple of types and no union.
    if isinstance(w, SCALED):
        data, found = w.codes, _known.get(id(w.codes))
        if found and found.data() is data and found.scale and found.scale() is w.scale:
            return found.matrix
        return _keep_matrix(data, weakref.ref(w.scale), None, _matrix(w))
    if isinstance(w, Packed | Interleaved):
        data, found, kind = w.data, _known.get(id(w.data)), (type(w), w.shape, w.ggml_type)
        if found and found.data() is data and found.kind == kind:
            return found.matrix
        return _keep_matrix(data, None, kind, _matrix(w))
    return _plain(w)


def _plain(w: np.ndarray) -> Matrix | None:
    """Of a float32 array, such as a router's. numpy would leave it to BLAS, whose threads look for more work
    for a tenth of a second afterwards, on the cores of the team.
    """
    if w.dtype != np.float32 or w.ndim != 2 or w.shape[1] % KINDS[F32].columns or not w.flags.c_contiguous:
        return None
    rows, columns = w.shape
    return Matrix(F32, rows, columns, _address(w), 4 * columns, 0, 0)


def _keep_matrix(
    data: np.ndarray, scale: weakref.ref | None, kind: tuple | None, found: Matrix | None
) -> Matrix | None:
    key = id(data)

    # The dict is bound as a default, because globals may be None already when the process ends.
    def forget(_: object, known: dict = _known) -> None:  # also while the process ends
        known.pop(key, None)

    _known[key] = _Known(weakref.ref(data, forget), scale, kind, found)
    return found


def _matrix(w: ScaledFP8 | ScaledInt4 | Packed | Interleaved) -> Matrix | None:
    if isinstance(w, ScaledFP8):
        (rows, columns), scale = w.codes.shape, w.scale
        # The kernel has addresses and row lengths alone, so rows must lie one behind the other.
        if columns % KINDS[E4M3].columns or not (w.codes.flags.c_contiguous and scale.flags.c_contiguous):
            return None
        return Matrix(E4M3, rows, columns, _address(w.codes), columns, _address(scale), 4 * scale.shape[1])
    if isinstance(w, ScaledInt4):
        (rows, width), scale = w.codes.shape, w.scale
        if 2 * width % KINDS[INT4].columns or not (w.codes.flags.c_contiguous and scale.flags.c_contiguous):
            return None
        return Matrix(INT4, rows, 2 * width, _address(w.codes), width, _address(scale), 2 * scale.shape[1])
    if w.ggml_type not in KINDS or w.shape[-1] % KINDS[w.ggml_type].columns or not w.data.flags.c_contiguous:
        return None
    kind = w.ggml_type + INTERLEAVED * isinstance(w, Interleaved)
    return Matrix(kind, w.shape[-2], w.shape[-1], _address(w.data), w.data.shape[-1], 0, 0)


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def activation_layout(m: Matrix, activations: str) -> str | None:
    """How the activations of a matrix are laid out; None where "exact" asks for a product that only the
    reference has.
    """
    acts = KINDS[m.kind % INTERLEAVED].acts
    if acts == "f32":
        # Only E4M3 weights meet activations that were rounded to E4M3; the others here take them as they are.
        if m.kind != E4M3 or activations == "exact":
            return "f32"
        return "e4m3_ue8m0" if activations == "ue8m0" else "e4m3"
    return None if activations == "exact" else acts


class JobLayout(NamedTuple):
    """What `multiply_jobs` and `quantize` need to know of matrices of one kind and shape."""

    # int64 [11]: addresses of the task and its two ways, rows of a strip, Matrix's four, most rows of a strip
    # with many tokens, and from how many bytes of activations on, address of what copies those for tiles or 0
    words: np.ndarray
    quantizer: int  # address; 0 for float32 as it is
    act_bytes: int  # of a token
    scratch_bytes: int  # of a thread
    blocks: int = 0  # of a token's activations, where strips with many tokens want those side by side


def ways(m: Matrix, how: str, many: bool, pairs: bool) -> tuple[str, str]:
    """The names of what multiplies strips of few and of many tokens, see `strip` and `job_layout`. Both are
    compiled by themselves and passed as addresses, so that one task serves every format:

        tokens     K-quants, IQ4_XS              the same, interleaved        floats            others
        < 8        lanes                         interleaved                  rows              rows
        >= 8       tiles with AMX, else lanes    with AMX tiles, else that    wide or blocks    rows

    Codes of E4M3 that meet codes of E4M3 are pairs of bfloat16 where the CPU multiplies those, and with AMX
    many tokens go through tiles. A K-quant of fewer rows than a panel has goes the way "rows".
    """
    if PAIRS and pairs and how in ("e4m3", "e4m3_ue8m0"):
        return "pairs", "pair tiles" if TILES and many else "pairs"
    beside, lanes = m.kind >= INTERLEAVED, m.kind in PANELS and m.rows >= ROWS
    few = "interleaved" if beside else "lanes" if lanes else "rows"
    if not many:
        return few, few
    if m.kind in FLOATS:
        return few, "wide" if m.kind in WIDE else "blocks"
    return few, "tiles" if TILES and (lanes or beside) else few


@lru_cache(4096)
def job_layout(m: Matrix, how: str, many: bool, pairs: bool = False) -> JobLayout:
    """For matrices of m's kind and shape, and activations in layout `how`. `many`: BLOCKS_FROM tokens or more
    in a job; `pairs`: PAIRS_FROM or more in the usual one.
    """
    names = ways(m, how, many, pairs)
    if "pairs" in names:
        return _of_pairs(m, how, names)
    few, much = (strip(m.kind, name).address for name in names)
    beside, lanes = m.kind >= INTERLEAVED, "lanes" in names
    blocks, tiles, wide = (name in names for name in ("blocks", "tiles", "wide"))
    most, from_bytes = (BLOCK_ROWS, ACTS_BYTES) if blocks else (TILE_ROWS, 0) if tiles else (ROWS, 0)
    if wide:
        most = PAIR_ROWS
    words = np.array(
        (
            strips_task().address,
            few,
            much,
            GROUP if beside else ROWS if lanes or wide else 4,
            *(m.rows, m.row_bytes, m.scale_bytes, m.columns),
            *(most, from_bytes, copies_task().address if tiles else 0),
        )
    )
    # Bytes of a thread: the words of a strip and 64 to spare, then what the way that needs most wants.
    scratch = STRIP_BYTES + 64
    if lanes or tiles:
        scratch += max(
            scratch_bytes(m.kind, m.columns) if lanes else 0, tile_scratch_bytes(m.kind) if tiles else 0
        )
    elif wide:
        scratch += PAIR_SCRATCH
    elif blocks:
        scratch += 4 * (BLOCK_ROWS * PART + 16)
    if how == "f32":
        return JobLayout(words, 0, 4 * m.columns, scratch)
    width, dtype, _ = LAYOUTS[how]
    of_token = m.columns // width
    return JobLayout(words, quantizer(how).address, of_token * dtype.itemsize, scratch, of_token * tiles)


def _of_pairs(m: Matrix, how: str, names: tuple[str, str]) -> JobLayout:
    """`job_layout` where codes of E4M3 meet codes of E4M3 as bfloat16, in jobs of any number of tokens."""
    few, much = (strip(m.kind, name).address for name in names)
    of_matrix = m.rows, m.row_bytes, m.scale_bytes, m.columns
    words = np.array((strips_task().address, few, much, ROWS, *of_matrix, PAIR_ROWS, 0, 0))
    scratch = STRIP_BYTES + 64 + PAIR_SCRATCH
    return JobLayout(words, quantizer(f"{how}_pairs").address, pair_bytes(m.columns), scratch)


@jit
def _linear(team, quantizer, x, acts, words, data, scale, parts, out, own, more):
    """x f32 [T, K] times the matrix at `data`, its tile scales at `scale`, as `parts` jobs that share the
    tokens evenly. The arrays of jobs are made here: handing an array over from Python takes longer.
    """
    # By loops: numpy's own functions, np.diff above all, take Numba seconds to compile.
    jobs, tokens = np.empty((4, parts), np.int64), np.empty(len(x), np.int64)
    for j in range(parts):
        first = len(x) * j // parts
        jobs[0, j], jobs[1, j], jobs[2, j], jobs[3, j] = data, scale, first, len(x) * (j + 1) // parts - first
    for t in range(len(x)):
        tokens[t] = t
    return quantize(team, quantizer, x, acts) & multiply_jobs(
        team, words, jobs[0], jobs[1], jobs[2], jobs[3], tokens, acts, out, own, more
    )


def linear(x: np.ndarray | ScaledFP8, w: Weight, activations: str = "fp8") -> np.ndarray:
    """x [..., K] f32 times the transpose of w [N, K] -> [..., N] f32, as the reference; what the kernel does
    not take goes there.
    """
    m = matrix(w)
    how = m and activation_layout(m, activations)
    if m is None or how is None or isinstance(x, ScaledFP8) or not x.size:
        entered("reference")
        return reference.linear(x, w, activations)
    flat = np.ascontiguousarray(x.reshape(-1, x.shape[-1]), np.float32)
    tokens = len(flat)
    out = np.empty((tokens, m.rows), np.float32)
    # All parts are jobs of one matrix.
    parts = -(-tokens // TOKENS) if m.rows < FEW_STRIPS * ROWS else 1
    of = job_layout(m, how, tokens // parts >= BLOCKS_FROM, tokens >= PAIRS_FROM)
    # A matrix of float32 is worth a team for its bytes, which one token waits for.
    with workers(m.rows * max(m.columns * tokens, m.row_bytes)) as team:
        if listened_to():
            say(team, of, np.array([tokens // parts, -(-tokens // parts)]))
        done(
            _linear(
                team,
                of.quantizer,
                flat,
                activations_of("x", flat, of),
                of.words,
                m.data,
                m.scale,
                parts,
                out,
                scratch(team, of.scratch_bytes),
                side_by_side(tokens, of.blocks),
            )
        )
    return out.reshape(*x.shape[:-1], m.rows)


HOW_MANY = ("no token", "one token", "two tokens", "few tokens")


def say(team: int, of: JobLayout, counts: np.ndarray) -> None:
    """Name to `entered` the threads, the level of SIMD, and the ways that jobs of `counts` tokens take."""
    few, many = (WAYS[int(address)] for address in of.words[1:3])
    taken = {f"{few}, {HOW_MANY[min(n, 3)]}" if n < BLOCKS_FROM else f"{many}, many tokens" for n in counts}
    entered("a team" if team else "one thread", f"simd {choose()}", *taken)


def activations_of(name: str, x: np.ndarray, of: JobLayout) -> np.ndarray:
    """Memory for x quantized, u8 [T, bytes]; x itself where it is not."""
    return WORKSPACE.array(name, (len(x), of.act_bytes), U8) if of.quantizer else x.view(U8)


def scratch(team: int, nbytes: int) -> np.ndarray:
    """Memory for each thread of a team, or for its caller alone: u8 [threads, nbytes]."""
    return WORKSPACE.array("strip", (TEAM.threads if team else 1, nbytes), U8)


def side_by_side(pairs: int, blocks: int) -> np.ndarray:
    """Memory for the activations of so many pairs, of so many blocks each, as tiles want them, u8 [bytes];
    empty where no blocks are.
    """
    nbytes = blocks * (pairs + BEHIND) * Q8_K_BYTES
    return WORKSPACE.array("side by side", (nbytes,), U8) if blocks else NOTHING
