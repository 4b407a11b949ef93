"""What the tests of all kinds of adapters have in common: their rank, alpha, and names of tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch

RANK = 3
ALPHA = 5.0

Tensors = Mapping[str, torch.Tensor]
"""The tensors of one module, by PEFT's names for them behind the module's."""
