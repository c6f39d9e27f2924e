"""Reference: refimpl.reference.attention.mla_absorbed, with all threads of a team, for many tokens: their
latents are turned into keys and values, as `mla_naive` of the same file does, for a group of heads at a time.

    make          keys and values of a head: latents times W^UK and W^UV, LANES * WIDE of their numbers and
                  PIECE rows of the cache at a time
    attend        LANES * WIDE tokens of a head side by side, so that a register has one number of LANES
                  tokens: scores of TILE rows, their shares, and the values mixed by these

    made, f32     head 0  | keys, numbers 0 .. 63 of all rows | 64 .. 127 | values, numbers 0 .. 63 | ... |
                  head 1  ...
    panel, f32            | number 0 of tokens 0 .. 63 | number 1 of them | ... | number n + r - 1 |

With latents a score takes L + r products, and a share L; with keys and values n + r and v, which for
DeepSeek-V3 are 0.3 times as many. Making them costs as much for one token as for a thousand: `pays` says
where it is worth it. The loops are those of `latent_numba`, with tokens in the place of heads. Each number is
computed by one thread in one order, and how heads are grouped changes none.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.entered import entered, listened_to
from refimpl.kernels.jit import floats, integers, jit, signed_bytes
from refimpl.kernels.latent_llvm import LANES, WIDE, multiply_latents, soften
from refimpl.kernels.latent_numba import (
    KEY,
    KEY_ROW,
    LATENT,
    LATENT_ROW,
    MASK,
    MASK_ROW,
    OUT,
    PE,
    PE_HEAD,
    PE_TOKEN,
    Q_HEAD,
    Q_TOKEN,
    SCALE,
    SCRATCH,
    SCRATCH_BYTES,
    STRIP,
    TILE,
    ZEROS,
    Given,
    H,
    L,
    N,
    Q,
    R,
    S,
    T,
    V,
    address,
    bits_of,
    four_of,
    lay_part,
    mix_wide,
    rows_of,
    score_wide,
    scratch_memory,
    shrink_mixed,
    task,
)
from refimpl.kernels.simd_llvm import choose
from refimpl.kernels.team import done, region, workers
from refimpl.kernels.workspace import WORKSPACE

SIDE = LANES * WIDE  # tokens side by side, and numbers of keys and values
PIECE = 1024  # rows of the cache for which a thread makes keys or values
ROOM = 1 << 26  # bytes of keys and values at a time, or those of one head

# What a call is, as words of int64: those of `latent_numba` up to OUT and from SCALE on, and between them
# the address of keys and values, the first head of the group and how many it has, rows with up to three more,
# blocks of a head's keys, of its values, of the tokens, and pieces of the rows.
MADE, FIRST, GROUP, PADDED = 22, 23, 24, 25
KEYS, VALUES, TOKENS, PIECES = 27, 28, 29, 30
# A thread's scratch memory:
#
#     | zeros | STRIP rows of kv_b | a panel of them [L, SIDE]                                       make
#             | factors, largest scores and sums [SIDE] | scores [TILE, SIDE] | a panel of tokens
#             | values mixed [VALUES, SIDE tokens, SIDE]                                              attend


@jit
def _block(a, h, block):
    """The address of a block of a head's keys, or behind them of its values, f32 [PADDED, SIDE]."""
    return a[MADE] + 4 * (h * (a[KEYS] + a[VALUES]) + block) * a[PADDED] * SIDE


def _make(args, low, high, who):
    """Pieces of a block, then those of the next: keys or values of the group. A task of `team`."""
    a = integers(args)
    zeros, width = a[SCRATCH] + who * a[SCRATCH_BYTES], a[L]
    panel = zeros + ZEROS + 4 * STRIP * width
    for i in range(low, high):
        piece, block = i % a[PIECES] * PIECE, i // a[PIECES]
        h, block = block // (a[KEYS] + a[VALUES]), block % (a[KEYS] + a[VALUES])
        # Rows of kv_b: a head's keys, then its values.
        row, end = block * SIDE, a[N]
        if block >= a[KEYS]:
            row, end = a[N] + (block - a[KEYS]) * SIDE, a[N] + a[V]
        for j in range(0, min(SIDE, end - row), LANES):
            count = min(LANES, end - row - j)
            strip = rows_of(a, (a[FIRST] + h) * (a[N] + a[V]) + row + j, count, zeros + ZEROS)
            lay_part(strip, 4 * width, count - 1, 0, width, panel + 4 * j, 4 * SIDE)
        for s in range(piece, min(piece + PIECE, a[S]), TILE):
            at, out = a[LATENT] + s * a[LATENT_ROW], _block(a, h, block) + 4 * s * SIDE
            score_wide(panel, at, a[LATENT_ROW], width, min(TILE, a[S] - s), out, zeros, 0)
    return 1


@jit
def _lay_tokens(a, h, first, panel):
    """Queries of a head from token `first` on, numbers of latents and then of keys, to a panel. In place of
    tokens that there are not, the last is taken again.
    """
    for j in range(0, SIDE, LANES):
        t = min(first + j, a[T] - 1)
        last, to = a[T] - 1 - t, panel + 4 * j
        lay_part(a[Q] + t * a[Q_TOKEN] + h * a[Q_HEAD], a[Q_TOKEN], last, 0, a[N], to, 4 * SIDE)
        at = a[PE] + t * a[PE_TOKEN] + h * a[PE_HEAD] - 4 * a[N]
        lay_part(at, a[PE_TOKEN], last, a[N], a[N] + a[R], to, 4 * SIDE)


@jit
def _scores_of(a, h, panel, s, rows, scores, zeros):
    """Scores f32 [rows, SIDE] of a panel with rows of the cache from s on: of keys that were made, and of
    those that all heads share.
    """
    start, step = zeros, 0
    for block in range(a[KEYS]):
        at, width = _block(a, h, block) + 4 * s * SIDE, min(SIDE, a[N] - block * SIDE)
        score_wide(panel + 4 * block * SIDE * SIDE, at, 4 * SIDE, width, rows, scores, start, step)
        start, step = scores, 4 * SIDE
    behind, at = panel + 4 * a[N] * SIDE, a[KEY] + s * a[KEY_ROW]
    score_wide(behind, at, a[KEY_ROW], a[R], rows, scores, start, step)


@jit
def _hide(a, first, count, s, rows, scores):
    """-inf for the scores of rows from s on that a token of `count` from `first` on does not attend to."""
    at = floats(scores)
    for r in range(rows):
        # Before this token, all are too early for the row.
        early = min(count, max(0, s + r - (a[S] - a[T]) - first))
        for j in range(early):
            at[r * SIDE + j] = -np.inf
        if a[MASK]:
            for j in range(early, count):
                if not signed_bytes(a[MASK] + (first + j) * a[MASK_ROW])[s + r]:
                    at[r * SIDE + j] = -np.inf


@jit
def _mix_seen(values, rows, seen, scores, count, mixed, zeros, more):
    """`mix_wide` of a tile of which token j sees `seen` + j rows: what a later row holds, NaN maybe, is not
    multiplied, not even by a share of zero.
    """
    for j in range(0, count, 4):
        out, four = four_of(mixed + 4 * j * SIDE, 4 * SIDE, 0, 3), four_of(scores + 4 * j, 4, 0, 3)
        all_see = max(0, min(rows, seen + j))
        start = out if more else four_of(zeros, 0, 0, 0)
        multiply_latents(WIDE, all_see, values, 4 * SIDE, four, 4 * SIDE, start, out)
        for k in range(1, min(4, count - j)):
            own, to = max(0, min(rows, seen + j + k)) - all_see, (mixed + 4 * (j + k) * SIDE,)
            share = (scores + 4 * (all_see * SIDE + j + k),)
            multiply_latents(WIDE, own, values + 4 * all_see * SIDE, 4 * SIDE, share, 4 * SIDE, to, to)


def _attend(args, low, high, who):
    """Results of blocks of tokens, the last of all heads first, as it sees most rows. A task of `team`."""
    a = integers(args)
    scale, heads, v = np.int32(a[SCALE]).view(np.float32), a[GROUP], a[V]
    zeros = a[SCRATCH] + who * a[SCRATCH_BYTES]
    shrink = zeros + ZEROS
    largest, sums, scores = shrink + 4 * SIDE, shrink + 8 * SIDE, shrink + 12 * SIDE
    panel = scores + 4 * TILE * SIDE
    mixed = panel + 4 * (a[N] + a[R]) * SIDE
    for i in range(low, high):
        h, first = i % heads, (a[TOKENS] - 1 - i // heads) * SIDE
        count = min(SIDE, a[T] - first)
        _lay_tokens(a, a[FIRST] + h, first, panel)
        for j in range(SIDE):
            floats(largest)[j], floats(sums)[j] = -np.inf, 0
        seen = a[S] - a[T] + first + 1  # rows, by the first of the tokens
        for s in range(0, seen + count - 1, TILE):
            rows, more = min(TILE, seen + count - 1 - s), s > 0
            _scores_of(a, h, panel, s, rows, scores, zeros)
            if a[MASK] or s + rows > seen:
                _hide(a, first, count, s, rows, scores)
            soften(WIDE, rows, scores, scale, largest, sums, shrink)
            for block in range(a[VALUES]):
                values, out = _block(a, h, a[KEYS] + block) + 4 * s * SIDE, mixed + 4 * block * SIDE * SIDE
                if more:
                    shrink_mixed(shrink, count, out, SIDE)
                if s + rows > seen:
                    _mix_seen(values, rows, seen - s, scores, count, out, zeros, more)
                else:
                    mix_wide(values, 4 * SIDE, SIDE, rows, scores, SIDE, count, out, zeros, more)
        for j in range(count):
            to, total = floats(a[OUT] + 4 * ((first + j) * a[H] + a[FIRST] + h) * v), floats(sums)[j]
            for c in range(v):
                to[c] = floats(mixed + 4 * (c // SIDE * SIDE + j) * SIDE)[c % SIDE] / total
    return 1


TASKS = {"make": _make, "attend many": _attend}


def compile_part(name: str) -> None:
    """Compile one of the two tasks, "make" or "attend many"."""
    task(TASKS[name])


@jit
def _run(team, a, heads, make, attend):
    """Both tasks for `heads` heads at a time, of the call that the words int64 [34] describe. 1, or 0 where a
    worker failed.
    """
    well = 1
    for first in range(0, a[H], heads):
        a[FIRST], a[GROUP] = first, min(heads, a[H] - first)
        well &= region(team, make, a, a[GROUP] * (a[KEYS] + a[VALUES]) * a[PIECES], 1)
        well &= region(team, attend, a, a[GROUP] * a[TOKENS], 1)
    return well


def pays(tokens: int, heads: int, rows: int, n: int, r: int, v: int, latent: int) -> bool:
    """Whether this takes fewer products than latents as they are, by the sizes of `attend`. Places of a panel
    that nobody takes count too.
    """
    seen = rows - tokens / 2  # on average
    beside = -(-heads // SIDE) * SIDE if heads > LANES else LANES
    absorbed = tokens * (heads * latent * (n + v) + beside * seen * (2 * latent + r))
    blocks = -(-n // SIDE) + -(-v // SIDE)
    expanded = heads * (rows * latent + -(-tokens // SIDE) * SIDE * seen) * blocks * SIDE
    return expanded + heads * tokens * seen * r < absorbed


def attend(
    q_nope: np.ndarray,
    q_pe: np.ndarray,
    latent: np.ndarray,
    k_pe: np.ndarray,
    kv_b: Any,
    scale: float,
    rows: np.ndarray | None = None,
) -> np.ndarray:
    """What `latent_numba.attend` gives, of the same arguments."""
    given = Given.of(q_nope, q_pe, latent, k_pe, kv_b, rows)
    with workers(given.products()) as team:
        words, heads = _words(given, scale)
        if listened_to():
            entered("a team" if team else "one thread", f"simd {choose()}", "expanded")
            entered("all heads at once" if heads >= words[H] else "heads in pieces")
        done(_run(team, words, heads, *map(task, TASKS.values())))
    return given.out


def _words(given: Given, scale: float) -> tuple[np.ndarray, int]:
    """What the tasks read, int64 [34], and heads of a group: pieces of about equal size."""
    (tokens, heads, n), s, v = given.q_nope.shape, len(given.latent), given.out.shape[2]
    width, r = given.latent.shape[1], given.k_pe.shape[1]
    padded, keys, values = -(-s // 4) * 4, -(-n // SIDE), -(-v // SIDE)
    one = (keys + values) * padded * SIDE
    group = -(-heads // -(-heads // max(1, ROOM // (4 * one))))
    made = WORKSPACE.array("keys and values", (group, one))
    making = 4 * width * (STRIP + SIDE)
    scratch = scratch_memory(max(making, 4 * SIDE * (3 + TILE + n + r + values * SIDE)))
    words = given.words()
    words[SCRATCH_BYTES] = scratch.shape[1]
    words += [address(made), 0, group, padded, address(scratch)]
    words += [keys, values, -(-tokens // SIDE), -(-s // PIECE), bits_of(scale), *given.scales()]
    return np.array(words, np.int64), group
