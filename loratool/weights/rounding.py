"""Chance for codecs that round by it: the same on every machine, for the same seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Rounding:
    """How a matrix is rounded to a storage that is much coarser than what was added to it.

    `seed`, below 2**64, is made from what is merged, so that equal merges give equal bytes.
    """

    seed: int

    def noise(self, rows: range, count: int, device: torch.device) -> torch.Tensor:
        """`count` numbers between 0 and 1, fp32, for a block that begins with row ``rows.start``.

        They are the 16-bit words of Philox4x64 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") with
        the seed and the row as its key.
        """
        import numpy as np
        import torch

        words = np.random.Philox(key=[self.seed, rows.start]).random_raw(-(-count // 4)).astype("<u8", copy=False)
        noise = torch.from_numpy(words.view("<u2")[:count].astype(np.float32)).to(device)
        return noise.add_(0.5).mul_(2.0**-16)
