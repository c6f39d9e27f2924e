"""Reference: refimpl.reference.attention.mla_absorbed, for one new token on a GPU whose cache is bfloat16 and
has room for many rows: the scores and the mixing that `mla_decode_triton` launches then in place of its own.

Many heads see the same rows, and there are many rows: products in large tiles, which the tensor cores of
Hopper take as they are. They multiply bfloat16. Float32 queries and shares are two of them each, 16 bits of
the significand, so that a product is two of theirs. 128 heads are one tile of scores, and a row of the cache
is read from memory once for the scores and once for the mixing.

    score    p[h, s] = exp(score[h, s] - the largest of the tile)      reads latents and turned keys
    mix      of a share of the rows: the latents in the proportion     reads p and the latents
             of p, brought to the largest of the share

That largest is known before `mix` begins: what it has summed up is never scaled down again, and it has no
exponential left to do but one for each head of a tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from refimpl.kernels.e4m3_triton import INTERPRETED, as_float32, capability, narrow
from refimpl.kernels.fp8_gemm_triton import rest, top

# How the kernels share out a cache of S rows, H heads and L latents; a program is a box:
#
#     score    p [tiles, H, ROWS]   | BH heads, a tile of ROWS rows   |  loops over L + r columns, BC each
#              peaks [tiles, H]     | the largest score of each head  |
#              tile_sums [tiles, H] | the sum of its p                |
#     mix      mixed [shares, H, L] | a share, BL columns, BH heads   |  loops over the share's rows, BS each
#
#     tiles     | 0 | 1 | 2 | 3 | 4 | 5 | 6 | ..  |  room, nothing there  |
#     shares    | 0     | 1     | 2     | 3 ..    ^ the number at `length`
#
# Shares are of the rows that are there, which the device alone knows: multiples of EACH rows, so long that
# there are SHARES of them at most. Behind the length p is zero to the end of a tile, and no row is read.
LONG = 4096  # rows of room from which these kernels are taken: 32 programs for scores. On an H200 they are as
# fast as the others with room for 2,048, and 1.3 times as fast where 4,096 rows are there
HEADS = 33  # from which tiles of 64 heads are filled better than those of 16
LATENTS = 128  # from which the bound of a sum, which grows with its terms, allows for 16 bits of a factor
SHARES = 64  # with two blocks of heads and two of columns two programs for each processor of Hopper's 132
ROWS = 128  # of a tile of scores
EACH = 256  # rows of a share at least: what is mixed of each is written to memory and read again


class Shape(NamedTuple):
    """What a kernel is compiled with: at most so many heads and columns at once, so many rows, and how."""

    heads: int
    rows: int
    columns: int
    warps: int
    stages: int  # of what it reads, on their way

    def of(self, heads: int, latents: int) -> Shape:
        """For a model of so many heads and latents."""
        fitting = self._replace(columns=min(self.columns, triton.next_power_of_2(latents)))
        # 64 heads are what four warps multiply on Hopper.
        return fitting if heads > 64 else fitting._replace(heads=64, warps=4)

    def options(self) -> dict[str, int]:
        """What Triton calls them."""
        return {"num_warps": self.warps, "num_stages": self.stages}


def shapes(chip: tuple[int, int]) -> dict[str, Shape]:
    """Of both kernels for a compute capability, chosen by registers and shared memory; on Hopper the fastest
    of fourteen on an H200. Two programs fit a processor there, so that one multiplies while the other waits.
    Shared memory has 99 KB on the smallest of the chips that are not named.
    """
    if chip[0] in (9, 10):
        return {"score": Shape(128, ROWS, 64, 8, 2), "mix": Shape(64, 32, 256, 4, 3)}
    return {"score": Shape(128, ROWS, 32, 8, 3), "mix": Shape(64, 32, 128, 4, 3)}


@triton.jit
def present(length, S, COUNTED: tl.constexpr):
    """Rows that are there: the number at `length` where it is COUNTED on the device, else all S."""
    if COUNTED:
        rows = tl.load(length).to(tl.int32)
    else:
        rows = S
    return rows


@triton.jit
def share(count, SHARES: tl.constexpr, EACH: tl.constexpr):
    """Rows of each of at most SHARES shares of so many: a multiple of EACH."""
    return tl.cdiv(tl.cdiv(count, SHARES), EACH) * EACH


@triton.jit
def parts(x):
    """f32, any shape -> two bf16 that add up to its first 16 bits. What is not finite is all in the first."""
    high = top(x)
    return high.to(tl.bfloat16), narrow(rest(x, high), tl.bfloat16)


@triton.jit
def multiply(high, low, w, total):
    """high + low, bf16 [M, K], times w bf16 [K, N], onto total f32 [M, N]."""
    if INTERPRETED:
        total += tl.dot(as_float32(high) + as_float32(low), as_float32(w), input_precision="ieee")
    else:
        # The small part is added first.
        total = tl.dot(low, w, total)
        total = tl.dot(high, w, total)
    return total


@triton.jit
def onto(
    total,
    q,
    keys,
    heads,
    there,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    Q_ROW: tl.constexpr,
    ROW: tl.constexpr,
    BC: tl.constexpr,
):
    """Adds q bf16 [2, H, WIDTH], rows Q_ROW apart, times the first `there` rows of keys bf16 [BS, WIDTH],
    rows ROW apart, to total f32 [BH, BS], for those heads.
    """
    rows = tl.arange(0, total.shape[1])
    for start in range(0, WIDTH, BC):
        columns = start + tl.arange(0, BC)
        inside = (columns < WIDTH)[None, :]
        at = heads[:, None] * Q_ROW + columns[None, :]
        mine = (heads < H)[:, None] & inside
        high = tl.load(q + at, mask=mine, other=0.0)
        low = tl.load(q + H * Q_ROW + at, mask=mine, other=0.0)
        at = rows[:, None] * ROW + columns[None, :]
        k = tl.load(keys + at, mask=(rows < there)[:, None] & inside, other=0.0)
        total = multiply(high, low, k.T, total)
    return total


@triton.jit(do_not_specialize=["S"])
def score(
    q,
    latent,
    k_pe,
    length,
    p,
    peaks,
    sums,
    S,
    scale,
    COUNTED: tl.constexpr,
    H: tl.constexpr,
    L: tl.constexpr,
    R: tl.constexpr,
    LATENT_ROW: tl.constexpr,
    PE_ROW: tl.constexpr,
    BH: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
):
    """A tile of p f32 [tiles, H, BS], for BH heads: exponentials of what a head's scores are below their
    largest in the tile, which goes to peaks f32 [tiles, H]; the sum of p goes to sums f32 [tiles, H]. Scores
    are q bf16 [2, H, L+R], the parts of queries in latents and of what is turned of them, times latent [S, L]
    and k_pe [S, R], bf16. COUNTED: only as many rows as the integer at `length`.
    """
    tile = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BH + tl.arange(0, BH)
    there = present(length, S, COUNTED) - tl.program_id(0) * BS
    # The grid is for the room that the cache has; programs whose rows are not there yet end here.
    if there > 0:
        total = tl.zeros((BH, BS), tl.float32)
        latent += tile * BS * LATENT_ROW
        k_pe += tile * BS * PE_ROW
        total = onto(total, q, latent, heads, there, H, L, L + R, LATENT_ROW, BC)
        total = onto(total, q + L, k_pe, heads, there, H, R, L + R, PE_ROW, BC)
        rows = tl.arange(0, BS)[None, :]
        total = tl.where(rows < there, total * scale, float("-inf"))
        best = tl.max(total, axis=1)
        # -inf minus -inf would be NaN.
        total = tl.exp(total - tl.where(best == float("-inf"), 0.0, best)[:, None])
        at, mine = tile * H + heads, heads < H
        tl.store(peaks + at, best, mask=mine)
        tl.store(sums + at, tl.sum(total, axis=1), mask=mine)
        tl.store(p + at[:, None] * BS + rows, total, mask=mine[:, None])


@triton.jit
def joined(peaks, sums, count, heads, H: tl.constexpr):
    """The largest f32 [BH] of so many tiles of peaks f32 [tiles, H], -inf beyond the last head; and what the
    sums f32 [tiles, H] of exponentials below each tile's largest make below that of all.
    """
    AT_ONCE: tl.constexpr = 16
    best = tl.full(heads.shape, float("-inf"), tl.float32)
    whole = tl.zeros(heads.shape, tl.float32)
    for start in range(0, count, AT_ONCE):
        tiles = start + tl.arange(0, AT_ONCE)
        inside = (tiles < count)[:, None] & (heads < H)[None, :]
        at = tiles[:, None] * H + heads[None, :]
        found = tl.load(peaks + at, mask=inside, other=float("-inf"))
        larger = tl.maximum(best, tl.max(found, axis=0))
        base = tl.where(larger == float("-inf"), 0.0, larger)  # -inf minus -inf would be NaN
        fewer = tl.load(sums + at, mask=inside, other=0.0) * tl.exp(found - base[None, :])
        whole = whole * tl.exp(best - base) + tl.sum(fewer, axis=0)
        best = larger
    return best, whole


@triton.jit(do_not_specialize=["S"])
def mix(
    p,
    peaks,
    tile_sums,
    latent,
    length,
    mixed,
    highest,
    sums,
    S,
    COUNTED: tl.constexpr,
    SHARES: tl.constexpr,
    TILE: tl.constexpr,
    EACH: tl.constexpr,
    H: tl.constexpr,
    L: tl.constexpr,
    LATENT_ROW: tl.constexpr,
    BH: tl.constexpr,
    BS: tl.constexpr,
    BL: tl.constexpr,
):
    """A share of the tiles that `score` left: highest f32 [shares, H] of their scores, sums f32 [shares, H]
    of the exponentials of what all are below it, and mixed f32 [shares, H, L], the sum of the latents bf16
    [S, L] times these.
    """
    # Programs of the same rows begin one after the other: they find them in the second-level cache.
    columns = tl.program_id(0) * BL + tl.arange(0, BL)
    heads = tl.program_id(1) * BH + tl.arange(0, BH)
    part = tl.program_id(2)
    count = present(length, S, COUNTED)
    each = share(count, SHARES, EACH)
    first = part * each
    end = tl.minimum(first + each, count)
    if first < end:
        mine, rows, there = heads < H, tl.arange(0, BS), end - first
        tile = (first // TILE).to(tl.int64) * H
        best, whole = joined(peaks + tile, tile_sums + tile, tl.cdiv(there, TILE), heads, H)
        base = tl.where(best == float("-inf"), 0.0, best)
        peaks += tile
        p += tile * TILE
        latent += first.to(tl.int64) * LATENT_ROW
        total = tl.zeros((BH, BL), tl.float32)
        for step in range(0, tl.cdiv(there, BS)):
            tiles = step // (TILE // BS) * H + heads
            # What tiles have below their own largest is brought to what it is below that of all.
            fewer = tl.exp(tl.load(peaks + tiles, mask=mine, other=float("-inf")) - base)
            at = tiles[:, None] * TILE + step % (TILE // BS) * BS + rows[None, :]
            x = tl.load(p + at, mask=mine[:, None], other=0.0) * fewer[:, None]
            at = (step * BS + rows)[:, None] * LATENT_ROW + columns[None, :]
            inside = (rows < there - step * BS)[:, None] & (columns < L)[None, :]
            c = tl.load(latent + at, mask=inside, other=0.0)
            high = top(x)
            total = multiply(high.to(tl.bfloat16), narrow(x - high, tl.bfloat16), c, total)
        at = part.to(tl.int64) * H + heads
        tl.store(
            mixed + at[:, None] * L + columns[None, :], total, mask=mine[:, None] & (columns < L)[None, :]
        )
        if tl.program_id(0) == 0:  # the same for all columns
            tl.store(highest + at, best, mask=mine)
            tl.store(sums + at, whole, mask=mine)


def takes(rows: int, heads: int, latent: torch.Tensor) -> bool:
    """Whether these kernels are for a model of so many heads with this cache [S, L], which has room for so
    many rows. How many are there must not matter: a CUDA graph holds what is chosen.
    """
    wide = latent.dtype == torch.bfloat16 and latent.shape[1] >= LATENTS
    return wide and rows >= LONG and heads >= HEADS


def mixed_in_tiles(
    q: torch.Tensor,
    latent: torch.Tensor,
    k_pe: torch.Tensor,
    scale: float,
    length: torch.Tensor,
    counted: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The latents in the proportion of the scores of q bf16 [2, H, L+r], the parts of queries that `absorb`
    left, by shares: mixed f32 [shares, H, L], highest and sums f32 [shares, H].
    """
    heads, (rows, latents), r, device = q.shape[1], latent.shape, k_pe.shape[1], latent.device
    tiles, shares = triton.cdiv(rows, ROWS), min(SHARES, triton.cdiv(rows, EACH))

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    p, peaks, tile_sums = empty(tiles, heads, ROWS), empty(tiles, heads), empty(tiles, heads)
    mixed, highest, sums = empty(shares, heads, latents), empty(shares, heads), empty(shares, heads)
    model = {"COUNTED": counted, "H": heads, "LATENT_ROW": latent.stride(0)}
    # A cache has the turned key of a row right behind its latents: both are one row of one product then.
    behind = latent.data_ptr() + latents * latent.element_size()
    one = k_pe.data_ptr() == behind and k_pe.stride(0) == latent.stride(0)
    widths = {"L": latents + r, "R": 0} if one else {"L": latents, "R": r}
    use = shapes(capability(device))["score"].of(heads, latents)
    score[(tiles, triton.cdiv(heads, use.heads))](
        *(q, latent, k_pe, length, p, peaks, tile_sums, rows, scale),
        **(model | widths | {"PE_ROW": k_pe.stride(0)}),
        **{"BH": use.heads, "BS": ROWS, "BC": use.columns},
        **use.options(),
    )
    use = shapes(capability(device))["mix"].of(heads, latents)
    mix[(triton.cdiv(latents, use.columns), triton.cdiv(heads, use.heads), shares)](
        *(p, peaks, tile_sums, latent, length, mixed, highest, sums, rows),
        **(model | {"L": latents, "SHARES": SHARES, "TILE": ROWS, "EACH": EACH}),
        **{"BH": use.heads, "BS": use.rows, "BL": use.columns},
        **use.options(),
    )
    return mixed, highest, sums
