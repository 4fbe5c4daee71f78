"""Tile sizes and the order of tiles, for every product of nm_matmul.

A product is [A, depth] @ [depth, B] in tiles of BLOCK_A x BLOCK_B. 16-bit operands run on the matrix units with float32
sums. float32 follows torch.get_float32_matmul_precision(): "highest", the default, is exact (input_precision "ieee": no
matrix units on NVIDIA), anything else is TF32.
"""

import torch
import triton
import triton.language as tl
from maskops.kernels._common import cdiv

# Per element size: (A, B, depth) of a tile, warps, stages; the first one that gives enough programs is taken.
# A is the side that fills the rows of a matrix instruction, 64 at least on Hopper; a short B costs nothing but reuse.
TILES = {
    2: ((128, 128, 64, 8, 3), (64, 64, 64, 4, 3), (64, 16, 64, 4, 3)),
    4: ((64, 64, 16, 8, 2), (32, 64, 16, 4, 2), (32, 16, 32, 4, 2)),
    8: ((32, 32, 16, 8, 1), (32, 32, 16, 4, 1), (32, 16, 16, 4, 1)),
}
ENOUGH_PROGRAMS = 264  # two per multiprocessor of an H100


def gemm_tile(dtype, a, b, batch=1, largest=0, shortest=None, depth=64):
    """(A, B, depth) of a tile, and the launch options; a and b are the sizes of the result.

    A tile with more than twice the columns of the result is not taken, nor one before `largest` or after `shortest`. Kernels
    that make an operand in registers ask for at most `depth`, so that it fits there next to the sums.
    """
    tiles = TILES[dtype.itemsize][largest:shortest]
    tiles = [t for t in tiles if t[1] < 2 * max(b, 1)] or tiles[-1:]
    fills = [t for t in tiles if cdiv(a, t[0]) * cdiv(b, t[1]) * batch >= ENOUGH_PROGRAMS]
    tile = (fills or tiles[-1:])[0]
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    options = {"PRECISION": "ieee" if exact else "tf32", "num_warps": tile[3], "num_stages": tile[4]}
    return (*tile[:2], min(tile[2], depth)), options


def groups_per_tile(columns, m):
    """(PADDED, BLOCK_G): columns that a group takes in a dense tile, and groups of a tile of at least `columns` columns."""
    padded = triton.next_power_of_2(m)
    return padded, max(1, columns // padded)


@triton.jit
def tile_position(tile, tiles_a, tiles_b, SPAN: tl.constexpr = 8):
    """(a, b) of a tile: SPAN tiles along a for each along b, so that neighbours find both operands in L2."""
    first = tile // (SPAN * tiles_b) * SPAN
    span = min(tiles_a - first, SPAN)
    within = tile % (SPAN * tiles_b)
    return first + within % span, within // span
