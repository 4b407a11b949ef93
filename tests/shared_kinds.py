"""Kinds whose modules share tensors: the tensors of a module with what is shared, and what they do to a matrix, in fp64."""

from __future__ import annotations

import torch
from kind_sizes import ALPHA, RANK, Tensors


def projected(weight: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """The projections are those of a larger module, too."""
    shared = torch.Generator().manual_seed(9)
    return {
        "vera_A": torch.randn(RANK, 130, generator=shared),
        "vera_B": torch.randn(70, RANK, generator=shared),
        "vera_lambda_b": 0.2 * torch.randn(len(weight), generator=generator),
        "vera_lambda_d": 0.2 * torch.randn(RANK, generator=generator),
    }


def vera(weight: torch.Tensor, of: Tensors) -> torch.Tensor:
    """VeRA, equation 2, with the leading rows of B and columns of A."""
    b, a = of["vera_B"].double()[: len(weight)], of["vera_A"].double()[:, : weight.shape[1]]
    return weight.double() + of["vera_lambda_b"].double().diag() @ b @ of["vera_lambda_d"].double().diag() @ a


def projected_mean(weight: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    found = {f"p{name}": each for name, each in projected(weight, generator).items()}
    for name in ("pvera_lambda_d", "pvera_A"):
        found[name] = torch.cat([found[name], 7 + found[name]])
    return found


def pvera(weight: torch.Tensor, of: Tensors) -> torch.Tensor:
    """PVeRA at its mean: VeRA by the first halves of A and lambda_d."""
    mean = {name[1:]: each[:RANK] if name in ("pvera_lambda_d", "pvera_A") else each for name, each in of.items()}
    return vera(weight, mean)


def chosen(weight: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Vectors of one number, chosen from a bank of eight."""
    outputs, inputs = weight.shape
    return {
        "vblora_vector_bank": 0.6 * torch.randn(8, 1, generator=torch.Generator().manual_seed(9)),
        "vblora_logits_A": torch.randn(RANK, inputs, 8, generator=generator),
        "vblora_logits_B": torch.randn(outputs, RANK, 8, generator=generator),
    }


def vblora(weight: torch.Tensor, of: Tensors) -> torch.Tensor:
    """VB-LoRA, equation 3: means of the two vectors with the largest logits."""
    bank, found = of["vblora_vector_bank"].double()[:, 0], []
    for letter in "AB":
        largest = of[f"vblora_logits_{letter}"].double().topk(2)
        found.append((largest.values.softmax(-1) * bank[largest.indices]).sum(-1))
    return weight.double() + found[1] @ found[0]


def random_products(weight: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """The shared projections are those of a larger module, too."""
    shared, least = torch.Generator().manual_seed(9), min(weight.shape)
    count = -(-least // RANK)
    return {
        "randlora_A": torch.randn(RANK, 1, 70, generator=shared),
        "randlora_B": torch.randn(130, 24, RANK, generator=shared),
        "randlora_lambda": 0.2 * torch.randn(RANK, count, generator=generator),
        "randlora_gamma": 0.2 * torch.randn(count, least, generator=generator),
    }


def randlora(weight: torch.Tensor, of: Tensors) -> torch.Tensor:
    """RandLoRA, section 4.1, on the smaller side, in the order in which PEFT takes the ranks of both projections."""
    scales, gamma = of["randlora_lambda"].double(), of["randlora_gamma"].double()
    small = (scales[:, :, None] * of["randlora_A"].double()[:, :, : gamma.shape[1]] * gamma).flatten(0, 1)
    large = of["randlora_B"].double()[: max(weight.shape), : len(gamma)].flatten(1)
    product = large @ small
    return weight.double() + ALPHA / RANK * (product.T if weight.shape[0] < weight.shape[1] else product)


def shared_numbers(weight: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    outputs, inputs = weight.shape
    found = {"unilora_theta_d": torch.randn(11, generator=torch.Generator().manual_seed(9))}
    for letter, shape in {"A": (RANK, inputs), "B": (outputs, RANK)}.items():
        found[f"unilora_indices_{letter}"] = torch.randint(0, 11, shape, generator=generator)
        found[f"unilora_scales_{letter}"] = 0.2 + 0.2 * torch.rand(shape, generator=generator)
    return found


def unilora(weight: torch.Tensor, of: Tensors) -> torch.Tensor:
    """Uni-LoRA: both factors are scaled numbers of one vector."""
    theta = of["unilora_theta_d"].double()
    a, b = (theta[of[f"unilora_indices_{letter}"]] * of[f"unilora_scales_{letter}"].double() for letter in "AB")
    return weight.double() + b @ a


def tiny(weight: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    outputs, inputs = weight.shape
    return {
        "tinylora_v.0": torch.randn(4, generator=torch.Generator().manual_seed(9)),
        "tinylora_A": 0.3 * torch.randn(RANK, inputs, generator=generator),
        "tinylora_B": 0.3 * torch.randn(outputs, RANK, generator=generator),
        "tinylora_P": 0.3 * torch.randn(4, RANK, RANK, generator=generator),
    }


def tinylora(weight: torch.Tensor, of: Tensors) -> torch.Tensor:
    """TinyLoRA: fixed factors, and between them the sum of the matrices P, each times its number of v."""
    a, b, p = (of[f"tinylora_{letter}"].double() for letter in "ABP")
    between = (of["tinylora_v.0"].double()[:, None, None] * p).sum(0)
    return weight.double() + b @ between @ a
