"""Elementary functions that are made of sums and products, against those of numpy."""

from __future__ import annotations

import numpy as np
import torch

from loratool.updates.fixed_functions import fixed_exp, fixed_turn


def test_an_exponential_is_numpys_but_for_its_last_bits() -> None:
    numbers = torch.linspace(-600, 0, 20_011, dtype=torch.float64)
    assert np.allclose(fixed_exp(numbers).numpy(), np.exp(numbers.numpy()), rtol=1e-14, atol=0)
    assert float(fixed_exp(torch.tensor(-1e9))) < 1e-300


def test_a_turn_is_numpys_cosine_and_sine_at_each_of_its_parts() -> None:
    for count in (1, 2, 3, 4, 7, 8, 64, 1001):
        places = torch.arange(count)
        cosine, sine = fixed_turn(places, count)
        angles = 2 * np.pi * np.arange(count) / count
        assert np.allclose(cosine.numpy(), np.cos(angles), rtol=0, atol=1e-15)
        assert np.allclose(sine.numpy(), np.sin(angles), rtol=0, atol=1e-15)
