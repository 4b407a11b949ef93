"""The exponential that is made of sums and products, against numpy's."""

from __future__ import annotations

import numpy as np
import torch

from loratool.updates.fixed_functions import fixed_exp


def test_an_exponential_is_numpys_but_for_its_last_bits() -> None:
    numbers = torch.linspace(-600, 0, 20_011, dtype=torch.float64)
    assert np.allclose(fixed_exp(numbers).numpy(), np.exp(numbers.numpy()), rtol=1e-14, atol=0)
    assert float(fixed_exp(torch.tensor(-1e9))) < 1e-300
