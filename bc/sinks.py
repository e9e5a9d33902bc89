"""Leading positions whose mean activation is unlike all others': attention sinks."""

from __future__ import annotations

from bc.statistics import PositionSums

OUTLIER = 4.0  # times the median norm over positions
MOST = 8


def find_sinks(sums: PositionSums) -> int:
    """Number of leading positions, at most 8, whose mean vector's norm is more than four times the median.

    Args:
        sums: Of a site's inputs, or of the differences of a part's outputs.
    """
    norms = sums.mean("positional").norm(dim=1)
    bound = OUTLIER * norms.median()
    found = 0
    while found < min(MOST, len(norms) - 1) and norms[found] > bound:
        found += 1
    return found
