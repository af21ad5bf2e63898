"""Resolution: scale the picture down so that the encoder emits fewer tokens; the null competitor.

No paper: what anyone can do without any of them. Studies of pruning find it hard to beat on common benchmarks.
"""

from __future__ import annotations

from dataclasses import dataclass

from vtprune.pruner import Budget, Pruner, ShrinkView


def nearest_grid(rows: int, columns: int, tokens: int) -> tuple[int, int]:
    """The grid of at most `rows` x `columns` whose cell count is nearest to `tokens`, then nearest to the same shape.

    Never more cells than `tokens`, so that a budget is not exceeded; at least one.
    """

    def cost(grid: tuple[int, int]) -> tuple[float, float, int]:
        r, c = grid
        shape = max(r * columns, c * rows) / min(r * columns, c * rows)
        # 5 % of the budget weigh as much as 10 % of distortion
        return (tokens - r * c) / tokens + (shape - 1) / 2, shape, r

    fitting = [(r, min(columns, tokens // r)) for r in range(1, min(rows, tokens) + 1)]
    return min(fitting, key=cost)


@dataclass
class Resolution(Pruner):
    """Input downscaling: fewer patches, hence fewer tokens, and less work in the encoder as well.

    The picture is scaled (bicubic, antialiased) to the grid of patches of at most `keep` cells that comes nearest to the
    budget and to the picture's shape; the encoder interpolates its position table. The report names each token by the
    cell in the middle of the area it covers, and counts the area as merged into it.

    Parameters:
        keep: visual tokens per image (int) or share of them (float); what no fitting grid reaches is left unspent, and
            the report says so.
    Raises:
        UnsupportedError: for a vision encoder that cannot take smaller pictures.
    """

    keep: Budget = 0.25

    name = "resolution"
    paper = "baseline"
    positions = "compact"

    def shrink(self, view: ShrinkView) -> tuple[int, int] | None:
        target = view.target(self.keep)
        if target >= view.total:
            return None
        grid = nearest_grid(*view.grid, target)
        if grid[0] * grid[1] != target:
            view.note(f"resolution: keep={self.keep} is {target} tokens; the nearest grid, {grid[0]} x {grid[1]}, has fewer.")
        return grid
