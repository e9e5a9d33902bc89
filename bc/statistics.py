"""Running statistics by token position."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bc.errors import UserError
from bc.regularise import Estimates


def odd_samples(before: int, rows: int, run: int = 1, device: torch.device | None = None) -> Tensor:
    """Which rows of a batch, bool of shape (rows,), belong to every other sample: the second half of all samples.

    Args:
        before: Samples in earlier batches.
        rows: Rows of the batch.
        run: Rows of one sample.
        device: Where the answer is wanted.
    """
    return (before + torch.arange(rows, device=device) // run) % 2 == 1


class PositionSums:
    """Running sums of vectors by token position: mergeable, weighted by samples.

    Args:
        positions: Number of positions (the window).
        channels: Length of a vector.
        device: Where to keep the sums.
        halves: Keep the sums of every other sample besides, counted over batches, whose size does not matter so.

    Attributes:
        total: Shape (positions, channels); fp64 while it grows, fp32 once it is stored.
        count: fp64, shape (positions,): how many vectors were added at each position.
        second: The sums of the second half, or None.
    """

    def __init__(self, positions: int, channels: int, device: torch.device | None = None, halves: bool = False) -> None:
        self.total = torch.zeros(positions, channels, dtype=torch.float64, device=device)
        self.count = torch.zeros(positions, dtype=torch.float64, device=device)
        self.second = PositionSums(positions, channels, device) if halves else None
        self._seen = 0

    def add(self, values: Tensor, positions: Tensor, valid: Tensor | None = None, run: int = 1) -> None:
        """Add a batch.

        Args:
            values: Shape (batch, tokens, channels), or (batch · tokens, channels) in the same order.
            positions: int64, shape (1 or batch, tokens).
            valid: bool, shape (batch, tokens): False entries are left out.
            run: How many of the batch's rows in turn are of one sample (an image's windows), which no half splits.
        """
        values = values.reshape(-1, positions.shape[1], values.shape[-1])
        if self.second is not None:
            rows = odd_samples(self._seen, len(values), run, values.device)
            self._seen += len(values) // run
            if bool(rows.any()):
                part = positions if positions.shape[0] == 1 else positions[rows]
                self.second.add(values[rows], part, None if valid is None else valid[rows])
        if valid is None and positions.shape[0] == 1:
            self.total.index_add_(0, positions[0], values.sum(0, dtype=torch.float32).double())
            self.count.index_add_(0, positions[0], torch.full_like(positions[0], len(values), dtype=torch.float64))
            return
        index = positions.expand(len(values), -1).reshape(-1)
        flat = values.reshape(-1, values.shape[-1]).double()
        if valid is not None:
            keep = valid.reshape(-1)
            index, flat = index[keep], flat[keep]
        self.total.index_add_(0, index, flat)
        self.count.index_add_(0, index, torch.ones_like(index, dtype=torch.float64))

    def merge(self, other: PositionSums) -> None:
        """Add the sums of other samples."""
        self.total = self.total.double() + other.total.to(self.total.device)
        self.count += other.count.to(self.count.device)
        if self.second is not None and other.second is not None:
            self.second.merge(other.second)

    def blended(self, other: PositionSums, share: float) -> PositionSums:
        """(1 − share) · these sums + share · others, of the same samples."""
        assert torch.equal(self.count, other.count.to(self.count.device)), "the samples differ"
        found = PositionSums(self.total.shape[0], self.total.shape[1], self.total.device)
        found.total = (1 - share) * self.total.double() + share * other.total.to(self.total.device).double()
        found.count = self.count
        if self.second is not None and other.second is not None:
            found.second = self.second.blended(other.second, share)
        return found

    def as_stored(self) -> PositionSums:
        """The sums on the CPU with the precision and the size that they have in a file."""
        self.total, self.count = self.total.cpu().float(), self.count.cpu()
        if self.second is not None:
            self.second.as_stored()
        return self

    def estimates(self, rows: Callable[[Tensor], Tensor] = lambda mean: mean) -> Estimates:
        """Positional tables from all samples and from either half.

        Args:
            rows: Positional mean ↦ the rows of interest, a linear map.
        """
        assert self.second is not None, "the halves were not kept"
        parts = (self, self.first(), self.second)
        tables = [
            rows(part.mean("positional") if bool(part.count.any()) else self.mean("positional")) for part in parts
        ]
        return Estimates(tables[0], tables[1], tables[2], torch.stack([part.count for part in parts]))

    def first(self) -> PositionSums:
        """Sums of the first half of the samples."""
        assert self.second is not None, "the halves were not kept"
        found = PositionSums(self.total.shape[0], self.total.shape[1], self.total.device)
        found.total, found.count = self.total.double() - self.second.total, self.count - self.second.count
        return found

    def mean(self, granularity: str, sink_positions: int = 1) -> Tensor:
        """Means as rows of a bias table.

        Args:
            granularity: ``channel``, ``sink`` or ``positional``.
            sink_positions: k of ``sink``.

        Returns:
            fp32, shape (1, channels), (k + 1, channels) or (positions, channels). A position that no sample reached
            gets the mean over all samples.

        Raises:
            UserError: No sample was added.
        """
        samples = self.count.sum()
        if samples == 0:
            raise UserError("calibration: no samples were seen; give at least one")
        if granularity == "positional":
            rows = self.total.float() / self.count.clamp(min=1).float()[:, None]
            return rows if bool(self.count.all()) else torch.where(self.count[:, None] > 0, rows, self._overall())
        if granularity == "channel" or len(self.count) == 1:
            return self._overall()
        k = min(sink_positions, len(self.count) - 1)
        total = torch.cat([self.total[:k].double(), self.total[k:].sum(0, keepdim=True, dtype=torch.float64)])
        count = torch.cat([self.count[:k], self.count[k:].sum(0, keepdim=True)])
        overall = total.sum(0, keepdim=True) / samples
        return torch.where(count[:, None] > 0, total / count.clamp(min=1)[:, None], overall).float()

    def _overall(self) -> Tensor:
        """Mean over all samples and positions, fp32, shape (1, channels)."""
        return (self.total.sum(0, keepdim=True, dtype=torch.float64) / self.count.sum()).float()
