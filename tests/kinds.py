"""Every kind of adapter that loratool computes, as small as it can be, with what it does to a matrix by its paper, in fp64.

A new kind is one more row of `CASES`; `test_every_kind.py` holds what must be true of all of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from kind_sizes import ALPHA, RANK, Tensors
from safetensors.torch import save_file
from shared_kinds import (
    chosen,
    projected,
    projected_mean,
    pvera,
    randlora,
    random_products,
    shared_numbers,
    tiny,
    tinylora,
    unilora,
    vblora,
    vera,
)

PREFIX = "base_model.model."
MODULE = "model.layers.0.self_attn.q_proj"
OTHER = "model.layers.0.self_attn.v_proj"


@dataclass(frozen=True)
class Case:
    """One kind.

    Attributes:
        name: a row's name in `loratool.formats.kinds`.
        tensors: those of a module, fp32, for a weight (outputs, inputs) that is given.
        wanted: W' of that weight, fp64.
        beside: W' of a weight that other adapters have changed before, given the base's as well, if it depends on both.
        config: what its PEFT configuration has beside rank, alpha and targets.
        alpha: the alpha of its configuration; None if it has none.
        facts: what loratool records beside it.
        shared: the names of tensors that all modules share, which are the same for every weight.
    """

    name: str
    tensors: Callable[[torch.Tensor, torch.Generator], dict[str, torch.Tensor]]
    wanted: Callable[[torch.Tensor, Tensors], torch.Tensor]
    config: Mapping[str, Any] = field(default_factory=lambda: {"peft_type": "LORA", "r": RANK})
    facts: Mapping[str, Any] = field(default_factory=dict)
    beside: Callable[[torch.Tensor, torch.Tensor, Tensors], torch.Tensor] | None = None
    alpha: float | None = ALPHA
    shared: frozenset[str] = frozenset()


def _factors(weight: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    outputs, inputs = weight.shape
    return {
        "lora_A.weight": torch.randn(RANK, inputs, generator=generator),
        "lora_B.weight": 0.05 * torch.randn(outputs, RANK, generator=generator),
    }


def _triplets(weight: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    pair = {name.removesuffix(".weight"): factor for name, factor in _factors(weight, generator).items()}
    return pair | {"lora_E": torch.randn(RANK, 1, generator=generator)}


def _with_magnitudes(weight: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    moved = 1 + 0.05 * torch.randn(len(weight), generator=generator)
    return _factors(weight, generator) | {"lora_magnitude_vector": weight.norm(dim=1) * moved}


def _hadamard(weight: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    outputs, inputs = weight.shape
    shapes = {"w1_a": (outputs, RANK), "w1_b": (RANK, inputs), "w2_a": (outputs, RANK), "w2_b": (RANK, inputs)}
    return {f"hada_{letter}": 0.4 * torch.randn(shape, generator=generator) for letter, shape in shapes.items()}


def _kronecker(weight: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """The first factor has one output, or four of many; the second is a product."""
    outputs, inputs = weight.shape
    first = 1 if outputs % 4 or inputs % 4 else 4
    shapes = {"w1": (first, first), "w2_a": (outputs // first, RANK), "w2_b": (RANK, inputs // first)}
    return {f"lokr_{letter}": 0.3 * torch.randn(shape, generator=generator) for letter, shape in shapes.items()}


def _bounded(weight: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    pair = {
        name.removesuffix(".weight").replace("lora", "delora"): each
        for name, each in _factors(weight, generator).items()
    }
    return pair | {"delora_lambda": torch.tensor([2.0]), "delora_w_norm": weight.norm(dim=0)}


def _blocks(weight: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    outputs, inputs = weight.shape
    return {
        "lora_A.weight": torch.randn(4, inputs // 2, generator=generator),
        "lora_B.weight": 0.05 * torch.randn(outputs, 4, generator=generator),
    }


def _lora(weight: torch.Tensor, of: Tensors) -> torch.Tensor:
    """LoRA, section 4.1."""
    return weight.double() + ALPHA / RANK * (of["lora_B.weight"].double() @ of["lora_A.weight"].double())


def _adalora(weight: torch.Tensor, of: Tensors) -> torch.Tensor:
    """AdaLoRA, equation 3, with the scaling of its authors' code."""
    product = of["lora_B"].double() @ (of["lora_E"].double() * of["lora_A"].double())
    return weight.double() + ALPHA / (RANK + 1e-5) * product


def _bdlora(weight: torch.Tensor, of: Tensors) -> torch.Tensor:
    """LoRA whose A has two blocks on its diagonal."""
    upper, lower = of["lora_A.weight"].double().split(2)
    a = torch.cat([torch.cat([upper, 0 * upper], 1), torch.cat([0 * lower, lower], 1)])
    return weight.double() + ALPHA / 4 * (of["lora_B.weight"].double() @ a)


def _dora(weight: torch.Tensor, of: Tensors) -> torch.Tensor:
    """DoRA, equation 5."""
    total = _lora(weight, of)
    return of["lora_magnitude_vector"].double()[:, None] * total / total.norm(dim=1, keepdim=True)


def _dora_beside(weight: torch.Tensor, base: torch.Tensor, of: Tensors) -> torch.Tensor:
    """DoRA, equation 5. Its norms are the base's, as in PEFT: it was trained beside nothing else."""
    norms = _lora(base, of).norm(dim=1, keepdim=True)
    return of["lora_magnitude_vector"].double()[:, None] * _lora(weight, of) / norms


def _loha(weight: torch.Tensor, of: Tensors) -> torch.Tensor:
    """LoHa: FedPara, proposition 1, times alpha over rank."""
    first, second = (of[f"hada_w{place}_a"].double() @ of[f"hada_w{place}_b"].double() for place in (1, 2))
    return weight.double() + ALPHA / RANK * first * second


def _lokr(weight: torch.Tensor, of: Tensors) -> torch.Tensor:
    """LoKr: LyCORIS, times alpha over rank."""
    second = of["lokr_w2_a"].double() @ of["lokr_w2_b"].double()
    return weight.double() + ALPHA / RANK * torch.kron(of["lokr_w1"].double(), second)


def _delora(weight: torch.Tensor, of: Tensors) -> torch.Tensor:
    """DeLoRA, scaled by the norms of the inputs as in the authors' code."""
    a, b, bound = (of[f"delora_{name}"].double() for name in ("A", "B", "lambda"))
    normed = (b / b.norm(dim=0)) @ (a / a.norm(dim=1, keepdim=True))
    return weight.double() + bound / RANK * normed * of["delora_w_norm"].double()


def _tile(weight: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"miss_block": 0.1 * torch.randn(RANK, len(weight), generator=generator)}


def _miss(weight: torch.Tensor, of: Tensors) -> torch.Tensor:
    """MiSS: B^T beside itself, as often as it fits, and cut."""
    tile, inputs = of["miss_block"].double().T, weight.shape[1]
    return weight.double() + tile.repeat(1, -(-inputs // RANK))[:, :inputs]


def _places(weight: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    chosen = torch.randperm(weight.numel(), generator=generator)[: weight.numel() // 2]
    indices = torch.stack([chosen // weight.shape[1], chosen % weight.shape[1]]).int()
    return {"shira_weight": 0.1 * torch.randn(len(chosen), generator=generator), "shira_indices": indices}


def _shira(weight: torch.Tensor, of: Tensors) -> torch.Tensor:
    """SHiRA: values added at their indices."""
    return weight.double().index_put(tuple(of["shira_indices"].long()), of["shira_weight"].double(), accumulate=True)


def _granular(weight: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """One block, which any matrix has; configurations in ``test_other_kinds.py`` have more."""
    outputs, inputs = weight.shape
    shapes = {
        "A": (1, inputs, RANK),
        "B": (1, RANK, outputs),
        "A_general.weight": (2, inputs),
        "B_general.weight": (outputs, 2),
    }
    return {f"gralora_{name}": 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _gralora(weight: torch.Tensor, of: Tensors) -> torch.Tensor:
    """GraLoRA of one block, and the LoRA of its hybrid."""
    a, b, left, right = (of[f"gralora_{name}"].double() for name in ("A", "B", "A_general.weight", "B_general.weight"))
    return weight.double() + ALPHA / (RANK + 2) * (b[0].T @ a[0].T + right @ left)


def _output_factors(weight: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"ia3_l": 0.95 + 0.1 * torch.randn(len(weight), 1, generator=generator)}


def _ia3(weight: torch.Tensor, of: Tensors) -> torch.Tensor:
    """(IA)^3, section 3.3: each output times its factor."""
    return of["ia3_l"].double() * weight.double()


TOKENS = (7, 1)
"""The rows that are trained."""


def _rows(weight: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"trainable_tokens_delta": 0.5 * weight[list(TOKENS)]}


def _tokens(weight: torch.Tensor, of: Tensors) -> torch.Tensor:
    changed = weight.double().clone()
    changed[list(TOKENS)] = of["trainable_tokens_delta"].double()
    return changed


def _norm(weight: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"ln_tuning_layers.weight": weight + torch.randn(weight.shape, generator=generator)}


def _tuned(weight: torch.Tensor, of: Tensors) -> torch.Tensor:
    """LayerNorm tuning, section 2: the whole parameter is another."""
    return of["ln_tuning_layers.weight"].double()


VECTORS = frozenset({"beft", "bitfit"})
"""Kinds that change vectors only, which `test_beside_factors.py` and `test_bitfit.py` merge."""


def _triangles(weight: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    n = _block(weight)
    return {"oft_R.weight": 0.05 * torch.randn(weight.shape[1] // n, n * (n - 1) // 2, generator=generator)}


def _block(weight: torch.Tensor) -> int:
    return 3 if weight.shape[1] % 3 == 0 else 4


def _cayley(q: torch.Tensor) -> torch.Tensor:
    identity = torch.eye(q.shape[-1]).double()
    return (identity - q) @ torch.linalg.inv(identity + q)


def _oft(weight: torch.Tensor, of: Tensors) -> torch.Tensor:
    """OFT, section 3.3: each block of inputs is rotated by Cayley's transform of a skew-symmetric matrix."""
    r, n = of["oft_R.weight"].double(), _block(weight)
    q = torch.zeros(len(r), n, n).double()
    upper = torch.triu_indices(n, n, 1)
    q[:, upper[0], upper[1]] = r
    return weight.double() @ torch.block_diag(*_cayley(q - q.mT)).T


def _blocks_and_factors(weight: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    n = _block(weight)
    return {
        "boft_R": 0.05 * torch.randn(1, weight.shape[1] // n, n, n, generator=generator),
        "boft_s": 0.95 + 0.05 * torch.randn(len(weight), 1, generator=generator),
    }


def _boft(weight: torch.Tensor, of: Tensors) -> torch.Tensor:
    """BOFT, section 4, with one butterfly factor and the factors of PEFT."""
    r = of["boft_R"][0].double()
    return of["boft_s"].double() * (weight.double() @ torch.block_diag(*_cayley(0.5 * (r - r.mT))).T)


def _reflections(weight: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    u = torch.randn(weight.shape[1], 1, generator=generator)
    return {"hra_u": torch.cat([u, u + 0.05 * torch.randn(u.shape, generator=generator)], 1)}


def _hra(weight: torch.Tensor, of: Tensors) -> torch.Tensor:
    """HRA, equation 3."""
    for u in of["hra_u"].double().T:
        weight = weight.double() @ (torch.eye(len(u)).double() - 2 * torch.outer(u, u) / (u @ u))
    return weight


def _shares(weight: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {
        "hira_A": 0.5 * torch.randn(RANK, weight.shape[1], generator=generator),
        "hira_B": 0.05 * torch.randn(len(weight), RANK, generator=generator),
    }


def _hira(weight: torch.Tensor, of: Tensors) -> torch.Tensor:
    """HiRA, equation 4."""
    return weight.double() * (1 + of["hira_B"].double() @ of["hira_A"].double())


def _kernels(weight: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    outputs, inputs = weight.shape
    size = 2 if outputs % 64 or inputs % 64 else 64  # the sizes of the case's configuration
    return {"c3a_kernel": inputs * 0.1 * torch.randn(outputs // size, inputs // size, size, generator=generator)}


def _c3a(weight: torch.Tensor, of: Tensors) -> torch.Tensor:
    """C3A, section 3.2: blocks whose rows are turned by one place each."""
    kernel = of["c3a_kernel"].double() / weight.shape[1]
    size = kernel.shape[2]
    blocks = torch.stack([kernel.roll(turn, 2) for turn in range(size)], 1)
    return weight.double() + blocks.reshape(-1, *blocks.shape[2:]).reshape(weight.shape)


def _frequencies(weight: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"fourierft_spectrum": 0.05 * weight.numel() * torch.randn(10, generator=generator)}


def _fourierft(weight: torch.Tensor, of: Tensors) -> torch.Tensor:
    """FourierFT, equation 4, with the places that PEFT draws."""
    spectrum = torch.zeros(weight.numel()).double()
    places = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(3))[:10]
    spectrum[places] = of["fourierft_spectrum"].double()
    return weight.double() + 0.5 * torch.fft.ifft2(spectrum.view(weight.shape)).real


def _coefficients(weight: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"waveft_spectrum": torch.randn(weight.numel() // 3, generator=generator)}


def _waveft(weight: torch.Tensor, of: Tensors) -> torch.Tensor:
    """WaveFT, section 3, with Haar's wavelet and the places that PEFT draws."""
    outputs, inputs = weight.shape
    height, width = -(-outputs // 2), -(-inputs // 2)
    places = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(3))[: weight.numel() // 3]
    quarters = torch.zeros(2 * height, 2 * width).double()
    quarters[places // inputs, places % inputs] = of["waveft_spectrum"].double()
    mean, across, along, both = (quarters[r : r + height, c : c + width] for r in (0, height) for c in (0, width))
    signs = ((1, 1, 1, 1), (1, -1, 1, -1), (1, 1, -1, -1), (1, -1, -1, 1))  # of the squares' four numbers
    squares = [
        sum(sign * each for sign, each in zip(row, (mean, along, across, both), strict=True)) / 2 for row in signs
    ]
    found = torch.stack(squares, -1).view(height, width, 2, 2).permute(0, 2, 1, 3).reshape(2 * height, 2 * width)
    return weight.double() + 0.5 * found[:outputs, :inputs]


def _numbers_and_product(weight: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    factors = _factors(weight, generator)
    count = weight.numel() // 3
    return {
        "supertuning_values": 0.2 * torch.randn(count, generator=generator),
        "supertuning_indices": torch.randperm(weight.numel(), generator=generator)[:count].int(),
        "supertuning_lora_A.weight": factors["lora_A.weight"],
        "supertuning_lora_B.weight": factors["lora_B.weight"],
    }


def _supertuning(weight: torch.Tensor, of: Tensors) -> torch.Tensor:
    """Super-Tuning with its low-rank part, as PEFT's documentation describes it."""
    added = torch.zeros(weight.numel()).double()
    added[of["supertuning_indices"].long()] = of["supertuning_values"].double()
    product = of["supertuning_lora_B.weight"].double() @ of["supertuning_lora_A.weight"].double()
    return weight.double() + added.view(weight.shape) + ALPHA / RANK * product


def _terms(weight: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    outputs, inputs = weight.shape
    return {
        "glora_A.Xd": -0.05 * torch.randn(outputs, RANK, generator=generator).abs(),
        "glora_A.Xu": torch.randn(RANK, inputs, generator=generator).abs(),
        "glora_B.X": 0.1 * torch.randn(outputs, 1, generator=generator),
        "glora_C.zeros": torch.zeros(inputs, 1),
        "glora_D.zeros": torch.zeros(outputs),
        "glora_E.zeros": torch.zeros(outputs),
    }


def _glora(weight: torch.Tensor, of: Tensors) -> torch.Tensor:
    """GLoRA, equation 11."""
    factors = of["glora_A.Xd"].double() @ of["glora_A.Xu"].double()
    return weight.double() + weight.double() * factors + of["glora_B.X"].double()


def _angles(weight: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {
        "road_theta": 0.1 * torch.randn(len(weight), generator=generator),
        "road_alpha": 0.95 + 0.05 * torch.randn(len(weight), generator=generator),
    }


def _road(weight: torch.Tensor, of: Tensors) -> torch.Tensor:
    """RoAd, equation 4, variant 2, in pairs of neighbours."""
    f, s = (of["road_alpha"].double() * turn(of["road_theta"].double()) for turn in (torch.cos, torch.sin))
    x = weight.double().unflatten(0, (-1, 2))
    turned = torch.stack([-x[:, 1], x[:, 0]], 1).flatten(0, 1)
    return f[:, None] * weight.double() + s[:, None] * turned


CASES: Mapping[str, Case] = {
    case.name: case
    for case in (
        Case("lora", _factors, _lora),
        Case("dylora", _factors, _lora, facts={"kind": "dylora"}),
        Case("adalora", _triplets, _adalora, {
            "peft_type": "ADALORA", "init_r": RANK, "target_r": RANK, "total_step": 1,
        }),
        Case("bdlora", _blocks, _bdlora, {
            "peft_type": "LORA", "r": 4, "use_bdlora": {"nblocks": 2, "target_modules_bd_a": ["_proj"]},
        }),
        Case("dora", _with_magnitudes, _dora, {"peft_type": "LORA", "r": RANK, "use_dora": True}, beside=_dora_beside),
        Case("lokr", _kronecker, _lokr, {"peft_type": "LOKR", "r": RANK, "alpha": ALPHA}),
        Case("miss", _tile, _miss, {"peft_type": "MISS", "r": RANK}, alpha=None),
        Case("shira", _places, _shira, {"peft_type": "SHIRA", "r": 1}, alpha=None),
        Case("delora", _bounded, _delora, {"peft_type": "DELORA", "r": RANK}),
        Case("oft", _triangles, _oft, {"peft_type": "OFT", "use_cayley_neumann": False}, alpha=None),
        Case("boft", _blocks_and_factors, _boft, {"peft_type": "BOFT"}, alpha=None),
        Case("hra", _reflections, _hra, {"peft_type": "HRA", "r": 2}, alpha=None),
        Case("hira", _shares, _hira, {"peft_type": "HIRA", "r": RANK}, alpha=None),
        Case("c3a", _kernels, _c3a, {"peft_type": "C3A", "block_size": 2, "block_size_pattern": {"q_proj": 64}}, alpha=None),
        Case("fourierft", _frequencies, _fourierft, {
            "peft_type": "FOURIERFT", "n_frequency": 10, "random_loc_seed": 3, "scaling": 0.5,
        }, alpha=None),
        Case("waveft", _coefficients, _waveft, {
            "peft_type": "WAVEFT", "n_frequency": 10, "proportional_parameters": True, "random_loc_seed": 3, "scaling": 0.5,
        }, alpha=None),
        Case("vera", projected, vera, {"peft_type": "VERA", "r": RANK}, alpha=None, shared=frozenset({"vera_A", "vera_B"})),
        Case("randlora", random_products, randlora, {"peft_type": "RANDLORA", "r": RANK, "randlora_alpha": ALPHA},
             shared=frozenset({"randlora_A", "randlora_B"})),
        Case("gralora", _granular, _gralora, {
            "peft_type": "GRALORA", "r": RANK, "alpha": ALPHA, "gralora_k": 1, "hybrid_r": 2,
        }),
        Case("unilora", shared_numbers, unilora, {"peft_type": "UNILORA", "r": RANK, "save_indices": True}, alpha=None,
             shared=frozenset({"unilora_theta_d"})),
        Case("tinylora", tiny, tinylora, {"peft_type": "TINYLORA", "r": RANK, "u": 4, "weight_tying": 1.0}, alpha=None,
             shared=frozenset({"tinylora_v.0"})),
        Case("pvera", projected_mean, pvera, {"peft_type": "PVERA", "r": RANK}, alpha=None,
             shared=frozenset({"pvera_A", "pvera_B"})),
        Case("vblora", chosen, vblora, {
            "peft_type": "VBLORA", "r": RANK, "num_vectors": 8, "vector_length": 1, "topk": 2,
        }, alpha=None, shared=frozenset({"vblora_vector_bank"})),
        Case("supertuning", _numbers_and_product, _supertuning, {"peft_type": "SUPERTUNING", "r": RANK}),
        Case("glora", _terms, _glora, {"peft_type": "GLORA"}, alpha=None),
        Case("road", _angles, _road, {"peft_type": "ROAD", "variant": "road_2", "group_size": 2}, alpha=None),
        Case("ia3", _output_factors, _ia3, {"peft_type": "IA3", "feedforward_modules": []}, alpha=None),
        Case("loha", _hadamard, _loha, {"peft_type": "LOHA", "r": RANK, "alpha": ALPHA}),
        Case("trainable_tokens", _rows, _tokens, {"peft_type": "TRAINABLE_TOKENS", "token_indices": list(TOKENS)}),
        Case("ln_tuning", _norm, _tuned, {"peft_type": "LN_TUNING"}),
    )
}  # fmt: skip


def save_case(folder: Path, case: Case, weights: Mapping[str, torch.Tensor], seed: int = 1) -> dict[str, Tensors]:
    """Write an adapter of the weights of modules, as PEFT would; return the tensors of each module."""
    generator = torch.Generator().manual_seed(seed)
    found = {module: case.tensors(weight, generator) for module, weight in weights.items()}
    named = {
        f"base_model.{name}" if name in case.shared else f"{PREFIX}{module}.{name}": each
        for module, of in found.items()
        for name, each in of.items()
    }
    folder.mkdir(parents=True)
    save_file(named, folder / "adapter_model.safetensors", {"format": "pt"})
    targets = sorted({module.rpartition(".")[2] for module in weights})
    alpha = {} if "alpha" in case.config or case.alpha is None else {"lora_alpha": case.alpha}
    config = {**alpha, "target_modules": targets, **case.config}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if case.facts:
        (folder / "loratool.json").write_text(json.dumps(case.facts))
    return found
