"""Rows side by side: the bytes of a matrix of GGML blocks in another order, for kernels that work on sixteen
rows at once.

A block is a list of words of four bytes. Where the file has sixteen rows one below the other, a tile has the
first words of all sixteen, then their second words, and so on:

    file     row 0     | w0 w1 w2 ...            36 words, 144 bytes, are a block of Q4_K
             row 1     | w0 w1 w2 ...
             ...
             row 15    | w0 w1 w2 ...
    tile     | w0 of rows 0 .. 15 | w1 of rows 0 .. 15 | w2 of rows 0 .. 15 | ...

So a vector of sixteen words is a word of every row. A block of Q6_K has 52 words and two bytes more, its d:
the sixteen d lie behind the words, which have an order of their own (`word_order`). A tile is at most PART
blocks long: the activations that it meets then stay in a first-level cache for the next tile too, which
belongs to the rows below. Two tiles, one below the other, are a group:

    blocks           0 .. 6      7 .. 13     14 .. 20    21 .. 27         of rows of 28 blocks
    rows 0 .. 15     | tile 0    | tile 2    | tile 4    | tile 6
    rows 16 .. 31    | tile 1    | tile 3    | tile 5    | tile 7
    rows 32 .. 47    | tile 8    | tile 10   | ...

Tiles lie one behind the other, and a matrix is read from its first byte to its last. It takes as many bytes
as before. llama.cpp and ik_llama.cpp rearrange rows when they load a model for the same reason; their orders
are others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypeGuard

import numpy as np

from refimpl import formats
from refimpl.formats import q4_k, q6_k
from refimpl.tensors import Interleaved, Packed, Stack, Weight

ROWS = 16  # of a tile
GROUP = 32  # rows of a group; the last group of a matrix may be a single tile
PART = 8  # blocks of a tile at most
LINE = 64  # bytes, of caches
FORMATS = (q4_k, q6_k)
"""What is interleaved. Any format would do whose blocks are whole halves of words: the kernels know these."""


def can_interleave(w: Weight | Stack) -> TypeGuard[Packed]:
    """Whether a weight or a stack is packed in one of FORMATS, in one piece, its rows whole tiles."""
    return (
        isinstance(w, Packed)
        and formats.get(w.ggml_type) in FORMATS
        and len(w.shape) >= 2
        and w.shape[-2] % ROWS == 0
    )


def interleave(w: Packed, out: np.ndarray | None = None) -> Interleaved:
    """A packed matrix [N, K] or stack [..., N, K] with its rows side by side, in new memory or in `out`, u8
    of the shape of its bytes. ValueError for what `can_interleave` does not take.
    """
    if not can_interleave(w):
        raise ValueError(f"type {w.ggml_type} of shape {w.shape} is not interleaved")
    found = Interleaved(new_bytes(w.data.shape) if out is None else out, w.ggml_type, w.shape)
    for rows, order, tiles in _pieces(w.ggml_type, w.shape, np.ascontiguousarray(w.data), found.data):
        tiles[...] = rows[..., order]
    return found


def new_bytes(shape: tuple[int, ...]) -> np.ndarray:
    """New memory u8 of that shape, from the beginning of a line of the caches on: a vector of sixteen words
    is a line then, and no load of one takes two of them.
    """
    size = math.prod(shape)
    room = np.empty(size + LINE, np.uint8)
    return room[-room.ctypes.data % LINE :][:size].reshape(shape)


def where_possible(w: Weight | Stack) -> Weight | Stack:
    """`interleave` of what can be, anything else as it is."""
    return interleave(w) if can_interleave(w) else w


def plain(w: Interleaved) -> Packed:
    """The packed matrix or stack as a file has it, in new memory: what `interleave` was given."""
    found = Packed(np.empty(w.data.shape, np.uint8), w.ggml_type, w.shape)
    for rows, order, tiles in _pieces(w.ggml_type, w.shape, found.data, np.ascontiguousarray(w.data)):
        rows[..., order] = tiles
    return found


def word_order(ggml_type: int) -> list[int]:
    """The words of a block, by their number in the file, in the order in which a tile has them: for Q6_K that
    in which they are used. Its scales come first; then, for every four columns of 32, the word with the low
    bits of two groups of 32 columns, that of the next two groups, and that with the high bits of all four.
    """
    if ggml_type != q6_k.GGML_TYPE:
        return list(range(formats.get(ggml_type).BLOCK.itemsize // 4))
    low, high, scales = 0, 32, range(48, 52)
    used = [
        (low + 16 * part + k, low + 16 * part + 8 + k, high + 8 * part + k)
        for part in range(2)
        for k in range(8)
    ]
    return [*scales, *[word for words in used for word in words]]


def part_blocks(blocks: int) -> int:
    """Blocks of a tile of rows of so many blocks, the last ones apart: as even as PART allows."""
    return -(-blocks // -(-blocks // PART))


def _pieces(
    ggml_type: int, shape: tuple[int, ...], rows: np.ndarray, tiles: np.ndarray
) -> Iterator[tuple[np.ndarray, list[int] | slice, np.ndarray]]:
    """Views [stack, groups, tiles of a group, ROWS, blocks, words] of the same words in both orders, and of
    the halves behind them, for bytes in the file's order and in that of tiles; and which of the first the
    second has.
    """
    module = formats.get(ggml_type)
    count, blocks, size = shape[-2], shape[-1] // module.WEIGHTS, module.BLOCK.itemsize
    each, words, halves, own = part_blocks(blocks), size // 4, size % 4 // 2, word_order(ggml_type)
    order = slice(None) if own == list(range(words)) else own  # no list where it is not needed: it takes time
    of_row = np.dtype([("words", "<u4", (words,)), ("halves", "<u2", (halves,))])
    of_tile = np.dtype([("words", "<u4", (words, ROWS)), ("halves", "<u2", (halves, ROWS))])
    file = rows.reshape(-1).view(of_row).reshape(-1, count, blocks)
    flat = tiles.reshape(-1).view(of_tile).reshape(-1, count // ROWS * blocks)
    whole = count // GROUP * GROUP
    for first, last, height in ((0, whole, GROUP), (whole, count, ROWS)):
        groups, beside = (last - first) // height, height // ROWS
        if not groups:
            continue
        here = file[:, first:last].reshape(-1, groups, beside, ROWS, blocks)
        there = flat[:, first // ROWS * blocks : last // ROWS * blocks].reshape(-1, groups, beside * blocks)
        for start in range(0, blocks, each):
            n = min(each, blocks - start)
            piece = there[:, :, beside * start : beside * (start + n)].reshape(-1, groups, beside, n)
            for field, which in (("words", order), ("halves", slice(None))):
                yield here[..., start : start + n][field], which, piece[field].transpose(0, 1, 2, 5, 3, 4)
