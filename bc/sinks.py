"""Leading positions whose mean activation is unlike all others': attention sinks."""

from __future__ import annotations

from bc.statistics import PositionSums

OUTLIER = 4.0  # times the median distance over positions
MOST = 8


def find_sinks(sums: PositionSums) -> int:
    """Number of leading positions, at most 8, whose mean vectors are outliers: four times as far as the median is.

    Distances are from the mean of the later positions, which is what a shared bias would give them. The norm itself
    tells only inputs that no norm layer has scaled, though behind one a sink's differ as much, by their direction.

    Args:
        sums: Of a site's inputs, or of the differences of a part's outputs.
    """
    rows = sums.mean("positional")
    norms = (rows - rows[min(MOST, len(rows) // 2) :].mean(0)).norm(dim=1)
    bound = OUTLIER * norms.median()
    found = 0
    while found < min(MOST, len(norms) - 1) and norms[found] > bound:
        found += 1
    return found
