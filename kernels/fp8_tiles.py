"""Reference: refimpl.reference.fp8.linear. Which tiles the products of `fp8_linear_triton` are cut into, and
how they are dealt out to programs: the table, and no trials at run time.

The figures behind it are in docs/fp8-linear.md. `python -m refimpl.bench fp8-sweep` times other tiles.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from refimpl.reference.fp8 import BLOCK


class Tiles(NamedTuple):
    """How a product is cut up. `splits` programs share the columns of a tile. For "gluon" it is about so
    many, only of tiles that are left when all programs have as many whole ones, and 0 there: as many as leave
    no program idle.
    """

    kernel: str  # "split" of `fp8_gemm_triton`; for Hopper "gluon", `stream` of `fp8_stream_gluon`, or of
    # `fp8_exact_gluon` for activations in bf16; and "wide", of `fp8_wide_gluon`
    outputs: int  # "wide": 256; else a divisor of 128, so that a tile has one weight scale a block
    tokens: int  # "gluon": 16, 64 or 128; "wide": 128
    warps: int
    stages: int  # 0: as many as fit, for "gluon" and "wide"
    splits: int = 1
    beside: int = 1  # programs that a processor holds, for "gluon"


WIDE = Tiles("wide", 256, 128, 4, 0)
H100_GBPS = 3352.0  # what its memory moves in a second, by its clock and width


@lru_cache(maxsize=4096)  # a launch takes less time than the choice
def tiles(
    m: int,
    n: int,
    k: int,
    chip: tuple[int, int],
    processors: int,
    kind: str,
    memory_gbps: float = H100_GBPS,
) -> Tiles:
    """The table. `kind`: "fp8", "bf16" or "f32" activations; `chip`: compute capability; `processors`:
    multiprocessors; `memory_gbps`: what the memory moves at most, GB/s.

    With few tokens a product waits for memory. Where there are fewer tiles than the processors hold programs,
    columns are split, as long as each program keeps some blocks to fetch ahead; where there are many tiles,
    each fetches less ahead, for more of them to run at once. Measured on Hopper; other chips get what
    compiles without spills.
    """
    blocks = -(-k // BLOCK)
    if chip[0] == 9 and (kind == "fp8" or (kind == "bf16" and m > 32)):
        return streamed(m, n, k, processors, kind, memory_gbps)
    most = {
        "fp8": 128 if chip >= (8, 9) else 64,
        "bf16": 64,
        "f32": 32 if chip[0] in (9, 10) else 16,
    }[kind]
    # The right operand has 16 columns at least.
    tokens = min(max(16, 1 << (m - 1).bit_length()), most)
    if m > 128 and tokens == 128:
        return Tiles("split", 128, 128, 8, 3)
    count = -(-n // 64) * -(-m // tokens)
    # As many programs as the processors hold, but no fewer than so many blocks for each.
    if kind == "fp8":
        programs = (2 if tokens <= 32 else 1.7) * processors
        least = 14
    else:
        programs = (4 if tokens <= 32 else 2) * processors
        least = 4
    splits = max(1, int(min(programs / count, blocks / least)))
    splits = 1 << (splits.bit_length() - 1)
    # Shared out evenly, fewer may do: no program is left without a block.
    splits = -(-blocks // -(-blocks // splits))
    stages = {"f32": 2, "bf16": 3, "fp8": 4}[kind]  # wider activations take more of the shared memory
    return Tiles("split", 64, tokens, 4, stages, splits)


class Prices(NamedTuple):
    """What a tile takes. The unit is about 1.8 nanoseconds of an H200."""

    blocks: dict[tuple[int, int], float]  # {(tokens, outputs): time of a block}
    reading: float  # 128 bytes from an H100's memory for each processor; from a faster one less
    storing: float  # ending a tile, for 128 of its results
    part: float  # adding up a part of a tile, for 128 of its results
    adding: float  # adding up parts, in any case


# Those of codes were fitted on an H200, of 16 tokens apart from the others: their blocks wait for memory, and
# several programs at a time make each slower. Those of bf16 were fitted on an H100, where the time of a block
# has its share of ending a tile.
FEW = Prices({(16, 64): 175}, 3.6, 17, 20, 2600)
PRICES = {
    "fp8": Prices({(64, 64): 135, (128, 64): 180, (128, 128): 231, (128, 256): 369}, 3.6, 17, 20, 0),
    "bf16": Prices({(64, 64): 390, (128, 64): 515, (128, 128): 560}, 4.3, 0, 21, 2000),
}
LAUNCH = 2000  # starting and ending one, some 4 microseconds


def streamed(
    m: int, n: int, k: int, processors: int, kind: str = "fp8", memory_gbps: float = H100_GBPS
) -> Tiles:
    """The tiles of the persistent kernel that are estimated to take the least time. `kind`: "fp8" or "bf16"
    activations; the rest as in `tiles`.
    """
    found = _choices(m, n, -(-k // BLOCK), processors, kind)
    return min(found, key=lambda tile: estimated(tile, m, n, k, processors, kind, memory_gbps))


def estimated(
    tile: Tiles,
    m: int,
    n: int,
    k: int,
    processors: int,
    kind: str,
    memory_gbps: float,
    storing: bool = True,
) -> float:
    """The time of whole rounds, of what is left then, of storing and of adding up parts, in the unit of
    PRICES. Each of the first two takes as long as its busiest program, or as reading its tiles' weights from
    memory. The arguments are those of `streamed`.
    """
    prices = FEW if tile.tokens < 64 else PRICES[kind]
    blocks, results = -(-k // BLOCK), tile.outputs * tile.tokens / 128
    count = -(-m // tile.tokens) * -(-n // tile.outputs)
    dealt = deal(count, blocks, processors * tile.beside, tile.splits)
    block = prices.blocks[tile.tokens, tile.outputs]
    weights = n * k / 128 / processors / count  # of a tile, to be read
    reading = prices.reading * H100_GBPS / memory_gbps * weights
    found = max(dealt.rounds * blocks * block, reading * (count - dealt.rest))
    found += max(dealt.each * block, reading * dealt.rest) if dealt.rest else 0
    if storing:
        found += prices.storing * results * (dealt.rounds + (dealt.rest > 0))
    if dealt.shared:
        parts = -(-blocks // dealt.each) + (tile.splits == 0)
        found += prices.part * results * parts + prices.adding
    return found


@lru_cache(maxsize=4096)
def launches(
    m: int,
    n: int,
    k: int,
    chip: tuple[int, int],
    processors: int,
    kind: str,
    memory_gbps: float = H100_GBPS,
) -> tuple[tuple[int, Tiles], ...]:
    """What a product is computed by, one launch or two: how many of its outputs, and their tiles. The
    arguments are those of `tiles`.

    Wide tiles rarely come out even. In the last round most programs may then have none. So as many outputs as
    make whole rounds of wide tiles are one launch, and the others another one, if that is estimated to take
    less time.
    """
    one = tiles(m, n, k, chip, processors, kind, memory_gbps)
    high = -(-m // WIDE.tokens)
    even = -(-n // WIDE.outputs) * high // processors * processors // high * WIDE.outputs
    if (
        one.kernel == "split"
        or WIDE not in _choices(m, n, -(-k // BLOCK), processors, kind)
        or not 0 < even < n
    ):
        return ((n, one),)
    rest = streamed(m, n - even, k, processors, kind, memory_gbps)
    times = [  # as much is stored in either case
        estimated(tile, m, outputs, k, processors, kind, memory_gbps, storing=False)
        for tile, outputs in ((WIDE, even), (rest, n - even), (one, n))
    ]
    return ((even, WIDE), (n - even, rest)) if times[0] + times[1] + LAUNCH < times[2] else ((n, one),)


def _choices(m: int, n: int, blocks: int, processors: int, kind: str) -> list[Tiles]:
    """Of tiles that take as long as each other the first is taken. Tiles are halved or quartered only where
    all parts run at once. "wide" ones are not shared, and have a multiple of four blocks.

    Up to 64 tokens tiles are small. From 17 on, one program has so many stages that it fills a processor.
    Where tiles are many and short, two have fewer: one stores while the other multiplies.
    """
    shares: tuple[int, ...] = (1, 2, 4, 0)
    if m <= 16 and kind == "fp8":
        shapes = [Tiles("gluon", 64, 16, 4, 6 if blocks <= 8 else 8, 1, beside) for beside in (1, 2)]
        shares = (1, 0)
    elif m <= 64 and kind == "fp8":
        beside = 2 if -(-n // 64) >= 2 * processors and blocks <= 8 else 1
        shapes = [Tiles("gluon", 64, 64, 4, 6 if beside == 2 else 8, 1, beside)]
        shares = (1, 0)
    elif m <= 64:
        shapes = [Tiles("gluon", 64, 64, 4, 4, 1, 2)]
    else:
        shapes = [Tiles("gluon", outputs, 128, 4, 0) for outputs in (64, 128)]
    found = []
    for tile in shapes:
        places = processors * tile.beside
        count = -(-m // tile.tokens) * -(-n // tile.outputs)
        # Behind whole tiles, parts of 64 x 64 take longer to add up than they save.
        equal = tile.tokens != 64 or count < places
        found += [
            tile._replace(splits=s)
            for s in shares
            if (s or equal) and (s < 2 or count % places * s <= places)
        ]
    return [*found, WIDE] if kind == "fp8" and m > 64 and blocks % 4 == 0 else found


class Deal(NamedTuple):
    """How the tiles of a product are dealt out to the programs of `stream`."""

    programs: int
    rounds: int  # whole tiles that each program gets
    rest: int  # tiles that are left then
    each: int  # blocks of these that each program gets
    shared: bool  # whether several programs have a part of one of them


def deal(tiles: int, blocks: int, places: int, splits: int) -> Deal:
    """`tiles` of so many blocks for the programs that run at the same time, one in each of the `places`.

    `splits` programs share a tile of those that are left when all have as many whole ones; 0: as many as
    leave no program idle.
    """
    rounds, rest = divmod(tiles, places)
    each = max(1, -(-rest * blocks // places))
    if splits:
        each = max(each, -(-blocks // splits))
    programs = places if rounds else -(-rest * blocks // each)
    return Deal(programs, rounds, rest, each, rest > 0 and each < blocks)


def band(k: int) -> int:
    """Tiles of 128 tokens that go through all outputs together: 32 if their activations of K columns, 9 MB at
    most, stay in the cache while the weights pass by. Otherwise 16, so that what all programs read at a time
    is, with 132 of them and wide tiles, about as many tokens as outputs, which is the least.
    """
    return 32 if 32 * 128 * k <= 9 << 20 else 16


def stages(tile: Tiles, itemsize: int, kind: str = "fp8") -> int:
    """Stages of the ring of `stream` that fit a processor's 227 KiB of shared memory beside a buffer for each
    group's results, numbers of `itemsize` bytes. `kind`: "fp8" or "bf16" activations.
    """
    room = 232448 if tile.beside == 1 else 115712
    buffers = tile.tokens * min(tile.outputs, 128) * itemsize
    tokens = tile.tokens * (1 if kind == "fp8" else 2)
    most = (room - buffers - 256) // ((tokens + tile.outputs) * 128)
    return min(tile.stages or most, most)
