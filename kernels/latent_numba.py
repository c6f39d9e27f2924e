"""Reference: refimpl.reference.attention.mla_absorbed, with all threads of a team, for one token and for
prompts. It reads each row of the cache once for up to 64 heads, and no scores of a whole context are kept.

    turn in       each head's queries into the space of the latents: times W^UK, a head at a time
    panels        a token's heads side by side, so that a register has one number of LANES heads
    attend        a panel and a piece of the cache: TILE rows at a time, their scores, their shares, and the
                  latents mixed by these, with what came before shrunk where a larger score is met
    turn out      each head's pieces joined, and out of the space of latents: times W^UV

    panel, f32        | number 0 of heads 0 .. 63 | number 1 of them | ... | number L + r - 1 |
    cache, f32        row 0  | latent [L] | key [r] |                      rows need not lie side by side
                      ...                                                  piece 0 of a panel
                      row 127
                      ...                                                  piece 1

One token has few panels, so the cache is cut into pieces, as many as give threads enough to do. The cut goes
by the sizes alone. Each number is computed by one thread in one order, so results do not depend on the number
of threads.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from refimpl.entered import entered, listened_to
from refimpl.kernels.block_llvm import fetch, multiply_block
from refimpl.kernels.floats_llvm import E4M3, decode
from refimpl.kernels.jit import callback, floats, integers, jit, signed_bytes, variant
from refimpl.kernels.latent_llvm import LANES, WIDE, lay_side_by_side, multiply_latents, soften
from refimpl.kernels.simd_llvm import choose
from refimpl.kernels.team import done, region, threads, workers
from refimpl.kernels.workspace import U8, WORKSPACE
from refimpl.reference.packed import dense
from refimpl.tensors import ScaledFP8

TILE = 32  # rows of the cache whose scores are held: with those of 64 heads 8 kB of the first-level cache
BLOCK = 64  # numbers of a query, of a panel's 64 heads 16 kB of that cache
SHARES = 64  # panels' pieces that there are for threads, where the cache has so many tiles
TOKENS = 64  # at a time: of 128 heads, 50 MB of working memory
STRIP = 16  # rows of kv_b at a time: 32 kB in float32
TILE_ROWS = 128  # of kv_b that share scales
COLUMNS = 32  # latents are a multiple of it, by zeros where need be: what `multiply_block` takes

# What a call is, as words of int64 that every task reads: sizes, bytes between things, addresses.
T, H, S, N, V, L, R = range(7)  # sizes, by the reference's letters
Q_TOKEN, Q_HEAD, PE_TOKEN, PE_HEAD, LATENT_ROW, KEY_ROW, MASK_ROW, SCRATCH_BYTES = range(7, 15)
Q, PE, LATENT, KEY, MASK, KV_B, OUT = range(15, 22)  # addresses; MASK is 0, or of bytes [T, S]
TURNED, PANELS, MIXED, FOUND, SCRATCH = range(22, 27)  # addresses of what is in between
# heads of a panel, panels of a token, pieces of a panel's cache, rows of a piece, the bits of a float32
LANES_OF, OF_TOKEN, PIECES, PIECE, SCALE = range(27, 32)
SCALES, SCALE_ROW = 32, 33  # of tiles of kv_b, where it is codes of E4M3: address, or 0, and bytes of a row
# A thread's scratch memory:
#
#     | zeros: f32 [LANES * WIDE] | rows of kv_b [STRIP, L]                                    turn in
#                                 | factors that older shares shrink by, scores [TILE, lanes]  attend
#                                 | sixteen outputs, rows of kv_b, mixed latents [T, L]        turn out
ZEROS = 4 * LANES * WIDE

QUERIES: Any = None  # registers of a panel's row, given to variants: 1 or WIDE
LATENTS: Any = None  # registers of a cache row's columns that are mixed at once


@jit
def rows_of(a, row, count, scratch):
    """The address of `count` rows of kv_b from this one on, f32 [count, L]: where they lie, or decoded to
    `scratch`. Of codes, as many behind them are asked for.
    """
    width = a[L]
    if a[SCALES]:
        for i in range(row, row + count):
            at = a[KV_B] + i * width
            fetch(at + STRIP * width, width)
            decode(
                E4M3, at, a[SCALES] + i // TILE_ROWS * a[SCALE_ROW], width, scratch + 4 * (i - row) * width
            )
        return scratch
    return a[KV_B] + 4 * row * width


@jit
def four_of(at, row_bytes, s, last):
    """Addresses of rows s to s + 3, none behind `last`."""
    return (
        at + s * row_bytes,
        at + min(s + 1, last) * row_bytes,
        at + min(s + 2, last) * row_bytes,
        at + min(s + 3, last) * row_bytes,
    )


def _turn_in(args, low, high, who):
    """turned[t, h] = W^UK^T q, f32 [L], of all tokens of heads `low` to `high` - 1. A task of `team`."""
    a = integers(args)
    n, width, places = a[N], a[L], 4 * a[H] * a[L]
    zeros = a[SCRATCH] + who * a[SCRATCH_BYTES]
    for h in range(low, high):
        q, to = a[Q] + h * a[Q_HEAD], a[TURNED] + 4 * h * width
        # A few rows of the matrix at a time, so that it is read in one stream.
        for i in range(0, n, STRIP):
            count = min(STRIP, n - i)
            strip = rows_of(a, h * (n + a[V]) + i, count, zeros + ZEROS)
            for c in range(0, 4 * width, 4 * LANES * LATENTS):
                if not a[SCALES]:  # a part of the next rows: all at once is more than memory takes down
                    fetch(strip + STRIP * (4 * width + c), STRIP * 4 * LANES * LATENTS)
                panel = strip + c
                if a[T] == 1:
                    start = to + c if i else zeros
                    multiply_latents(LATENTS, count, panel, 4 * width, (q + 4 * i,), 4, (start,), (to + c,))
                    continue
                for t in range(0, a[T], 4):
                    four = four_of(q + 4 * i, a[Q_TOKEN], t, a[T] - 1)
                    out = four_of(to + c, places, t, a[T] - 1)
                    before = out if i else four_of(zeros, 0, 0, 0)
                    multiply_latents(LATENTS, count, panel, 4 * width, four, 4, before, out)
    return 1


@jit
def lay_part(rows, row_bytes, last, first, end, to, step):
    """Numbers `first` to `end` - 1 of LANES rows, none behind row `last`, to their registers from `to` on."""
    whole = max(0, end - first) // 4 * 4
    lay_side_by_side(rows + 4 * first, row_bytes, last, whole, to + first * step, step)
    for k in range(first + whole, end):
        for r in range(LANES):
            floats(to + k * step)[r] = floats(rows + min(r, last) * row_bytes)[k]


def _fill_panels(args, low, high, who):
    """Numbers of queries, BLOCK of each head at a time, laid side by side: what `attend` takes as panels.
    In place of heads that there are not, the last is taken again. A task of `team`.
    """
    a = integers(args)
    heads, width, every = a[H], a[LANES_OF], a[L] + a[R]
    blocks = -(-every // BLOCK)
    for i in range(low, high):
        panel, first = i // blocks, i % blocks * BLOCK
        t, h = panel // a[OF_TOKEN], panel % a[OF_TOKEN] * width
        to = a[PANELS] + 4 * panel * every * width
        for j in range(0, width, LANES):
            head, place, step = min(h + j, heads - 1), to + 4 * j, 4 * width
            last = heads - 1 - head
            # Of the latents first, of the keys then.
            at, end = a[TURNED] + 4 * (t * heads + head) * a[L], min(first + BLOCK, a[L])
            lay_part(at, 4 * a[L], last, first, end, place, step)
            at, end = a[PE] + t * a[PE_TOKEN] + head * a[PE_HEAD], min(first + BLOCK, every)
            lay_part(at - 4 * a[L], a[PE_HEAD], last, max(first, a[L]), end, place, step)
    return 1


def _score_part(panel, at, step, width, rows, scores, start, start_step):
    """Products of `width` numbers of a panel and of so many rows of the cache, `step` bytes apart, and what
    is at `start`, to scores f32 [rows, lanes].
    """
    lanes = 4 * LANES * QUERIES
    for k in range(0, width, BLOCK):
        count = min(BLOCK, width - k)
        for s in range(0, rows, 4):
            four, out = four_of(at + 4 * k, step, s, rows - 1), four_of(scores, lanes, s, s + 3)
            before = four_of(start, start_step, s, s + 3)
            multiply_latents(QUERIES, count, panel + k * lanes, lanes, four, 4, before, out)
            # The same of the next tile, to be there when it is needed.
            for r in range(s, min(s + 4, rows)):
                fetch(at + (r + TILE) * step + 4 * k, 4 * count)
        start, start_step = scores, lanes


_score_one, score_wide = (jit(variant(_score_part, f"{n}", QUERIES=n)) for n in (1, WIDE))


def _mix_tile(latents, row_bytes, width, rows, scores, lanes, heads, mixed, zeros, more):
    """Shares f32 [rows, lanes] of so many heads times as many rows of the cache, `width` numbers each, to
    mixed f32 [heads, width]; with `more` on top of what is there.
    """
    wide = LANES * LATENTS
    for c in range(0, width, wide):
        for q in range(0, heads, 4):
            four, out = four_of(scores, 4, q, q + 3), four_of(mixed + 4 * c, 4 * width, q, q + 3)
            start = out if more else four_of(zeros, 0, 0, 0)
            multiply_latents(LATENTS, rows, latents + 4 * c, row_bytes, four, 4 * lanes, start, out)


_mix_one, mix_wide = (jit(variant(_mix_tile, f"{n}", LATENTS=n)) for n in (1, WIDE))


@jit
def _hide(mask, rows, scores, lanes):
    """-inf for the scores of rows that the bytes at `mask` say a token does not attend to."""
    seen, at = signed_bytes(mask), floats(scores)
    for s in range(rows):
        if not seen[s]:
            for j in range(lanes):
                at[s * lanes + j] = -np.inf


@jit
def shrink_mixed(factors, heads, mixed, width):
    """What was mixed so far, f32 [heads, width], times each head's factor."""
    by, numbers = floats(factors), floats(mixed)
    for q in range(heads):
        if by[q] != np.float32(1):
            for c in range(width):
                numbers[q * width + c] *= by[q]


@jit
def _scores_of(panel, a, s, rows, lanes, scores, zeros):
    """Scores f32 [rows, lanes] of a panel with rows of the cache from s on: of their latents and of their
    keys.
    """
    latents, keys = a[LATENT] + s * a[LATENT_ROW], a[KEY] + s * a[KEY_ROW]
    behind = panel + 4 * a[L] * lanes
    if lanes > LANES:
        score_wide(panel, latents, a[LATENT_ROW], a[L], rows, scores, zeros, 0)
        score_wide(behind, keys, a[KEY_ROW], a[R], rows, scores, scores, 4 * lanes)
    else:
        _score_one(panel, latents, a[LATENT_ROW], a[L], rows, scores, zeros, 0)
        _score_one(behind, keys, a[KEY_ROW], a[R], rows, scores, scores, 4 * lanes)


def _attend(args, low, high, who):
    """Pieces of the cache, all of the first panel, then of the next, ...: what its heads mix of them, and the
    largest score and the sum of shares that this goes by. A task of `team`.
    """
    a = integers(args)
    width, lanes, scale = a[L], a[LANES_OF], np.int32(a[SCALE]).view(np.float32)
    zeros = a[SCRATCH] + who * a[SCRATCH_BYTES]
    shrink = zeros + ZEROS
    scores = shrink + 4 * lanes
    for i in range(low, high):
        number, first = i // a[PIECES], i % a[PIECES] * a[PIECE]
        t, panel = number // a[OF_TOKEN], a[PANELS] + 4 * number * (width + a[R]) * lanes
        heads = min(lanes, a[H] - number % a[OF_TOKEN] * lanes)
        mixed, largest = a[MIXED] + 4 * i * lanes * width, a[FOUND] + 8 * i * lanes
        sums = largest + 4 * lanes
        for j in range(lanes):
            floats(largest)[j], floats(sums)[j] = -np.inf, 0
        end = min(first + a[PIECE], a[S] - a[T] + t + 1)
        for s in range(first, end, TILE):
            rows, more, latents = min(TILE, end - s), s > first, a[LATENT] + s * a[LATENT_ROW]
            _scores_of(panel, a, s, rows, lanes, scores, zeros)
            if a[MASK]:
                _hide(a[MASK] + t * a[MASK_ROW] + s, rows, scores, lanes)
            if lanes > LANES:
                soften(WIDE, rows, scores, scale, largest, sums, shrink)
            else:
                soften(1, rows, scores, scale, largest, sums, shrink)
            if more:
                shrink_mixed(shrink, heads, mixed, width)
            if width % (LANES * WIDE):
                _mix_one(latents, a[LATENT_ROW], width, rows, scores, lanes, heads, mixed, zeros, more)
            else:
                mix_wide(latents, a[LATENT_ROW], width, rows, scores, lanes, heads, mixed, zeros, more)
    return 1


@jit
def _join(a, h, t, out):
    """What head h of token t mixed of all pieces, over its shares' sum, f32 [L] to the address `out`."""
    width, lanes, j = a[L], a[LANES_OF], h % a[LANES_OF]
    number = (t * a[OF_TOKEN] + h // lanes) * a[PIECES]
    pieces = -(-(a[S] - a[T] + t + 1) // a[PIECE])  # later ones have no row that the token sees
    found, mixed = floats(a[FOUND] + 8 * number * lanes), floats(a[MIXED] + 4 * number * lanes * width)
    largest, total, to = np.float32(-np.inf), np.float32(0), floats(out)
    for p in range(pieces):
        largest = max(largest, found[2 * p * lanes + j])
    for p in range(pieces):
        weight = np.exp(found[2 * p * lanes + j] - largest)
        total += weight * found[(2 * p + 1) * lanes + j]
        at = (p * lanes + j) * width
        if p == 0:
            for c in range(width):
                to[c] = weight * mixed[at + c]
        else:
            for c in range(width):
                to[c] += weight * mixed[at + c]
    for c in range(width):
        to[c] /= total


@jit
def _one_token(a, strip, mixed, out):
    """STRIP rows of kv_b times what one token mixed, f32 [STRIP] to the address `out`."""
    for r in range(0, STRIP, LANES):
        at = strip + 4 * r * a[L]
        if not a[SCALES]:
            fetch(at + 4 * STRIP * a[L], 4 * LANES * a[L])
        multiply_block(at, 4 * a[L], a[L], (mixed,), out + 4 * r)


@jit
def _several_tokens(a, strip, count, mixed, t, out, numbers):
    """`count` rows of kv_b times what four tokens from t on mixed, to the address `out` of the first of these
    outputs. `numbers` is room for sixteen.
    """
    four, tokens, step = four_of(mixed, 4 * a[L], t, a[T] - 1), min(4, a[T] - t), a[H] * a[V]
    for r in range(0, count, 4):
        if t == 0 and not a[SCALES]:
            fetch(strip + 4 * (STRIP + r) * a[L], 16 * a[L])
        # Of fewer rows than four, one at a time is read four times.
        whole = count - r >= 4
        for one in range(1 if whole else count - r):
            at = strip + 4 * (r + one) * a[L]
            multiply_block(at, 4 * a[L] * whole, a[L], four, numbers)
            for j in range(tokens):
                for k in range(4 if whole else 1):
                    floats(out)[j * step + r + one + k] = floats(numbers)[4 * j + k]


def _turn_out(args, low, high, who):
    """out[t, h] = W^UV times what the head mixed, f32 [v], of all tokens of heads `low` to `high` - 1. A task
    of `team`.
    """
    a = integers(args)
    heads, width, v = a[H], a[L], a[V]
    numbers = a[SCRATCH] + who * a[SCRATCH_BYTES] + ZEROS
    scratch = numbers + 64
    mixed = scratch + 4 * STRIP * width
    for h in range(low, high):
        for t in range(a[T]):
            _join(a, h, t, mixed + 4 * t * width)
        for i in range(0, v, STRIP):
            count = min(STRIP, v - i)
            strip = rows_of(a, h * (a[N] + v) + a[N] + i, count, scratch)
            if a[T] == 1 and count == STRIP:
                _one_token(a, strip, mixed, a[OUT] + 4 * (h * v + i))
            else:
                for t in range(0, a[T], 4):
                    out = a[OUT] + 4 * ((t * heads + h) * v + i)
                    _several_tokens(a, strip, count, mixed, t, out, numbers)
    return 1


_turns = {n: variant(_turn_in, f"{n}", LATENTS=n) for n in (1, WIDE)}


@cache
def task(function: Any) -> int:
    """The address by which a team calls it, compiled once."""
    return callback(function, answers=True).address


def _tasks(width: int) -> tuple[int, ...]:
    """Addresses of the four tasks, for latents of so many numbers."""
    turn_in = _turns[1 if width % (LANES * WIDE) else WIDE]
    return tuple(map(task, (turn_in, _fill_panels, _attend, _turn_out)))


def compile_part(name: str) -> None:
    """Compile one of the four tasks, for latents as wide as models have them: "turn_in", "fill_panels",
    "attend" or "turn_out".
    """
    parts = {"turn_in": _turns[WIDE], "fill_panels": _fill_panels, "attend": _attend, "turn_out": _turn_out}
    task(parts[name])


@jit
def _run(team, a, turn_in, fill_panels, attend, turn_out):
    """All four tasks, one after the other, of the call that the words int64 [34] describe. 1, or 0 where a
    worker failed.
    """
    panels, heads = a[T] * a[OF_TOKEN], a[H]
    blocks = -(-(a[L] + a[R]) // BLOCK)
    return (
        region(team, turn_in, a, heads, 1)
        & region(team, fill_panels, a, panels * blocks, 1)
        & region(team, attend, a, panels * a[PIECES], 1)
        & region(team, turn_out, a, heads, 1)
    )


def attend(
    q_nope: np.ndarray,
    q_pe: np.ndarray,
    latent: np.ndarray,
    k_pe: np.ndarray,
    kv_b: np.ndarray | ScaledFP8,
    scale: float,
    rows: np.ndarray | None = None,
) -> np.ndarray:
    """`mla_absorbed` of the reference, of S rows: q_nope f32 [T, H, n], q_pe [T, H, r], latent [S, L], k_pe
    [S, r], kv_b [H, n+v, L], rows bool [T, S] -> f32 [T, H, v]. The cache is read where it lies; where
    numbers of a row are not side by side, it is copied first.

    kv_b may also be codes of E4M3 with scales, [H * (n+v), L]: they are decoded as they are read, and the
    result has the bits of the dequantized array.
    """
    given = Given.of(q_nope, q_pe, latent, k_pe, kv_b, rows)
    with workers(given.products()) as team:
        for first in range(0, given.tokens, TOKENS):
            words = _words(given.part(first, first + TOKENS), scale)
            if listened_to():
                say(team, words)
            done(_run(team, words, *_tasks(given.latent.shape[1])))
    return given.out


class Given(NamedTuple):
    """Arguments as tasks take them: numbers of a row side by side, in float32, latents a multiple of COLUMNS;
    and room for the result.
    """

    q_nope: np.ndarray
    q_pe: np.ndarray
    latent: np.ndarray
    k_pe: np.ndarray
    kv_b: np.ndarray | ScaledFP8
    mask: np.ndarray | None  # u8 [T, S]
    out: np.ndarray  # f32 [T, H, v]

    @classmethod
    def of(
        cls,
        q_nope: np.ndarray,
        q_pe: np.ndarray,
        latent: np.ndarray,
        k_pe: np.ndarray,
        kv_b: np.ndarray | ScaledFP8,
        rows: np.ndarray | None,
    ) -> Given:
        """From the arguments of `attend`."""
        tokens, heads, n = q_nope.shape
        of_head = kv_b.shape[0] // heads if isinstance(kv_b, ScaledFP8) else kv_b.shape[1]
        if missing := -latent.shape[1] % COLUMNS:
            kv_b = dense(kv_b).reshape(heads, of_head, -1)
            latent = np.pad(latent, ((0, 0), (0, missing)))
            kv_b = np.pad(kv_b, ((0, 0), (0, 0), (0, missing)))
        if isinstance(kv_b, ScaledFP8):
            kv_b = ScaledFP8(*map(np.ascontiguousarray, kv_b))
        else:
            kv_b = np.ascontiguousarray(kv_b, np.float32)
        mask = None if rows is None else np.ascontiguousarray(rows, np.uint8)
        out = np.empty((tokens, heads, of_head - n), np.float32)
        q_nope, q_pe, latent, k_pe = map(_side_by_side, (q_nope, q_pe, latent, k_pe))
        return cls(q_nope, q_pe, latent, k_pe, kv_b, mask, out)

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.out)

    def products(self) -> int:
        """Multiplications, about."""
        of_head = self.q_nope.shape[2] + self.out.shape[2]
        return self.out.shape[1] * self.tokens * (of_head + 2 * len(self.latent)) * self.latent.shape[1]

    def part(self, first: int, end: int) -> Given:
        """Of the tokens from `first` to before `end` alone, and the rows that they see."""
        end = min(end, self.tokens)
        seen = len(self.latent) - self.tokens + end
        mask = None if self.mask is None else self.mask[first:end, :seen]
        queries, out = (self.q_nope[first:end], self.q_pe[first:end]), self.out[first:end]
        return Given(*queries, self.latent[:seen], self.k_pe, self.kv_b, mask, out)

    def words(self) -> list[int]:
        """The first SCRATCH_BYTES + 1 + 7 words, T to OUT, but for the bytes of scratch memory."""
        (tokens, heads, n), (s, width), r = self.q_nope.shape, self.latent.shape, self.k_pe.shape[1]
        sizes = tokens, heads, s, n, self.out.shape[2], width, r
        steps = *self.q_nope.strides[:2], *self.q_pe.strides[:2], self.latent.strides[0], self.k_pe.strides[0]
        mask_row, mask_at = (self.mask.strides[0], address(self.mask)) if self.mask is not None else (0, 0)
        kv_b = self.kv_b.codes if isinstance(self.kv_b, ScaledFP8) else self.kv_b
        given = *map(address, (self.q_nope, self.q_pe, self.latent, self.k_pe)), mask_at, address(kv_b)
        return [*sizes, *steps, mask_row, 0, *given, address(self.out)]

    def scales(self) -> tuple[int, int]:
        """Where the scales of kv_b are, and the bytes of a row of them; zeros without."""
        if not isinstance(self.kv_b, ScaledFP8):
            return 0, 0
        return address(self.kv_b.scale), self.kv_b.scale.strides[0]


def _words(given: Given, scale: float) -> np.ndarray:
    """What the tasks read, int64 [34]: arguments of `attend`, and addresses of the workspace."""
    (tokens, heads, _), (s, width), r = given.q_nope.shape, given.latent.shape, given.k_pe.shape[1]
    lanes = LANES * (WIDE if heads > LANES else 1)
    panels, tiles = -(-heads // lanes), -(-s // TILE)
    # As many pieces as make SHARES of all panels, at least one, and at most one for each tile.
    piece = -(-tiles // max(1, min(tiles, SHARES // (tokens * panels)))) * TILE
    pieces = -(-s // piece)
    every = tokens * panels
    scratch = scratch_memory(max(4 * lanes * (TILE + 1), 4 * width * (STRIP + tokens) + 64))
    room = [
        WORKSPACE.array("latents turned", (tokens * heads, width)),
        WORKSPACE.array("latents' panels", (every, (width + r) * lanes)),
        WORKSPACE.array("latents mixed", (every * pieces, lanes * width)),
        WORKSPACE.array("latents found", (every * pieces, 2 * lanes)),
        scratch,
    ]
    words = given.words()
    words[SCRATCH_BYTES] = scratch.shape[1]
    rest = lanes, panels, pieces, piece, bits_of(scale), *given.scales()
    return np.array([*words, *map(address, room), *rest], np.int64)


def scratch_memory(nbytes: int) -> np.ndarray:
    """Of each thread u8 [threads, ...]: zeros, and so many bytes behind them."""
    scratch = WORKSPACE.array("latents' scratch", (threads(), -(-(ZEROS + nbytes) // 64) * 64), U8)
    scratch[:, :ZEROS] = 0
    return scratch


def bits_of(scale: float) -> int:
    """A float32's."""
    return int(np.float32(scale).view(np.int32))


def address(array: np.ndarray) -> int:
    """Where it lies."""
    return array.__array_interface__["data"][0]


def say(team: int, words: np.ndarray) -> None:
    """Name to `entered` the threads, the level of SIMD, and the ways that these words take."""
    entered("a team" if team else "one thread", f"simd {choose()}")
    entered("several registers of heads" if words[LANES_OF] > LANES else "one register of heads")
    entered("the cache in pieces" if words[PIECES] > 1 else "the cache in one piece")


def _side_by_side(x: np.ndarray) -> np.ndarray:
    """f32 of the same shape whose last axis lies side by side; x itself where it does."""
    return x if x.strides[-1] == x.itemsize == 4 else np.ascontiguousarray(x, np.float32)
