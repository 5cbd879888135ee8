"""16×16 blocks: rows taken sixteen at a time, and the order in which their errors are added."""

from torch import Tensor

ROWS = 16


def tile_rows(x: Tensor) -> Tensor:
    """[P, M, …] → [P, ceil(M/16), 16, …]; missing rows are zero."""
    missing = -x.shape[1] % ROWS
    padded = x.new_zeros(x.shape[0], x.shape[1] + missing, *x.shape[2:])
    padded[:, : x.shape[1]] = x
    tiles: Tensor = padded.unflatten(1, (-1, ROWS))
    return tiles


def untile_rows(tiles: Tensor, rows: int) -> Tensor:
    """The inverse of `tile_rows`, for M = rows."""
    return tiles.flatten(1, 2)[:, :rows]


def sum_tile_rows(row_error: Tensor) -> Tensor:
    """[P, M, …] → the same, each 16 rows replaced by their sum, added as a tree: i + (i+8), then 4, 2, 1."""
    tiles = tile_rows(row_error)
    total = tiles
    for half in (8, 4, 2, 1):
        total = total[:, :, :half] + total[:, :, half : 2 * half]
    return untile_rows(total.expand_as(tiles), row_error.shape[1])
