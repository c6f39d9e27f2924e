"""Rows side by side: the bytes of a matrix of GGML blocks in another order, for kernels that work on sixteen
rows at once.

A block is a list of words of four bytes. Where the file has sixteen rows one below the other, a tile has the
first words of all sixteen, then their second words, and so on:

    file     row 0     | w0 w1 w2 ...            36 words, 144 bytes, are a block of Q4_K
             row 1     | w0 w1 w2 ...
             ...
             row 15    | w0 w1 w2 ...
    tile     | w0 of rows 0 .. 15 | w1 of rows 0 .. 15 | w2 of rows 0 .. 15 | ...

So a vector of sixteen words is a word of every row. A tile is at most PART blocks long: the activations that
it meets then stay in a first-level cache for the next tile too, which belongs to the rows below. Two tiles,
one below the other, are a group:

    blocks           0 .. 6      7 .. 13     14 .. 20    21 .. 27         of rows of 28 blocks
    rows 0 .. 15     | tile 0    | tile 2    | tile 4    | tile 6
    rows 16 .. 31    | tile 1    | tile 3    | tile 5    | tile 7
    rows 32 .. 47    | tile 8    | tile 10   | ...

Tiles lie one behind the other, and a matrix is read from its first byte to its last. It takes as many bytes
as before. llama.cpp and ik_llama.cpp rearrange rows when they load a model for the same reason; their orders
are others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeGuard

import numpy as np

from refimpl import formats
from refimpl.formats import q4_k
from refimpl.tensors import Interleaved, Packed, Stack, Weight

ROWS = 16  # of a tile
GROUP = 32  # rows of a group; the last group of a matrix may be a single tile
PART = 8  # blocks of a tile at most
FORMATS = (q4_k,)
"""What is interleaved. Any format would do whose blocks are whole words: the kernels know these."""


def can_interleave(w: Weight | Stack) -> TypeGuard[Packed]:
    """Whether a weight or a stack is packed in one of FORMATS, in one piece, its rows whole tiles."""
    return (
        isinstance(w, Packed)
        and formats.get(w.ggml_type) in FORMATS
        and len(w.shape) >= 2
        and w.shape[-2] % ROWS == 0
    )


def interleave(w: Packed) -> Interleaved:
    """A packed matrix [N, K] or stack [..., N, K] with its rows side by side, in new memory. ValueError for
    what `can_interleave` does not take.
    """
    if not can_interleave(w):
        raise ValueError(f"type {w.ggml_type} of shape {w.shape} is not interleaved")
    found = Interleaved(np.empty(w.data.shape, np.uint8), w.ggml_type, w.shape)
    for rows, tiles in _pieces(w, np.ascontiguousarray(w.data), found.data):
        tiles[...] = rows
    return found


def where_possible(w: Weight | Stack) -> Weight | Stack:
    """`interleave` of what can be, anything else as it is."""
    return interleave(w) if can_interleave(w) else w


def plain(w: Interleaved) -> Packed:
    """The packed matrix or stack as a file has it, in new memory: what `interleave` was given."""
    found = Packed(np.empty(w.data.shape, np.uint8), w.ggml_type, w.shape)
    for rows, tiles in _pieces(w, found.data, np.ascontiguousarray(w.data)):
        rows[...] = tiles
    return found


def part_blocks(blocks: int) -> int:
    """Blocks of a tile of rows of so many blocks, the last ones apart: as even as PART allows."""
    return -(-blocks // -(-blocks // PART))


def _pieces(
    w: Packed | Interleaved, rows: np.ndarray, tiles: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Views u32 [stack, groups, tiles of a group, blocks, words, ROWS] of the same words in both orders, for
    bytes in the file's order and in that of tiles.
    """
    blocks = w.shape[-1] // formats.get(w.ggml_type).WEIGHTS
    words, count, each = w.data.shape[-1] // 4 // blocks, w.shape[-2], part_blocks(blocks)
    file = rows.reshape(-1).view(np.uint32).reshape(-1, count, blocks, words)
    flat = tiles.reshape(-1).view(np.uint32).reshape(-1, count, blocks * words)
    whole = count // GROUP * GROUP
    for first, last, height in ((0, whole, GROUP), (whole, count, ROWS)):
        groups = (last - first) // height
        if not groups:
            continue
        here = file[:, first:last].reshape(-1, groups, height // ROWS, ROWS, blocks, words)
        there = flat[:, first:last].reshape(-1, groups, height * blocks * words)
        for start in range(0, blocks, each):
            n = min(each, blocks - start)
            piece = there[:, :, height * start * words : height * (start + n) * words]
            yield (
                here[..., start : start + n, :].transpose(0, 1, 2, 4, 5, 3),
                piece.reshape(-1, groups, height // ROWS, n, words, ROWS),
            )
