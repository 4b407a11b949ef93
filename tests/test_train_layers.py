"""The layers that are trained compute what PEFT's compute, forwards and backwards, and what they write PEFT loads."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from adaptations import NF4, batch, in_peft, peft_name, randomize, tiny, written
from tiny_adapters import merge_by_peft
from tiny_models import as_stored, assert_same_tensors

import loratool
from loratool.errors import UnsupportedError
from loratool.formats.read import read_adapter
from loratool.training.methods import Adaptation, attach
from loratool.training.options import AdaLoRA, DyLoRA, LoRA, Options

if TYPE_CHECKING:
    from tiny_models import TinyModels

ALL: list[Options] = [LoRA(rank=3), DyLoRA(rank=3), AdaLoRA(rank=2)]
PEFTS: list[Options] = [
    LoRA(rank=3, alpha=5),
    LoRA(rank=3, alpha=5, rslora=True),
    DyLoRA(rank=3, alpha=5),
    AdaLoRA(rank=2, alpha=5),
]


def by_method(options: Options) -> str:
    return f"{options.method}{'-rs' if getattr(options, 'rslora', False) else ''}"


def attached(model: Any, options: Options, **choices: Any) -> Adaptation:
    adaptation = attach(model, options, **({"total_steps": 20} | choices))
    randomize(adaptation)
    return adaptation


def loss_and_gradients(model: Any, adaptation: Adaptation) -> tuple[float, dict[str, torch.Tensor]]:
    loss = model(**batch()).loss
    penalty = adaptation.penalty()
    loss = loss if penalty is None else loss + penalty
    loss.backward()
    gradients = {name: factor.grad for name, factor in adaptation.parameters().items()}
    assert all(gradient is not None for gradient in gradients.values())
    return float(loss.detach()), {name: gradient for name, gradient in gradients.items() if gradient is not None}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-6) -> None:
    """Equal to `tolerance` of the largest number."""
    assert actual.shape == expected.shape
    apart = float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    assert apart < tolerance, f"{apart:.2g} apart"


@pytest.mark.parametrize("options", PEFTS, ids=by_method)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", NF4])
def test_loss_logits_and_gradients_are_pefts(
    architecture: str, options: Options, tiny_models: TinyModels, tmp_path: Path
) -> None:
    ours = tiny(tiny_models, architecture).eval()  # GPT-2 has a dropout of its own
    adaptation = attached(ours, options)
    theirs = in_peft(tiny(tiny_models, architecture), written(adaptation, tmp_path / "adapter")).eval()
    assert_close(ours(**batch()).logits.detach(), theirs(**batch()).logits.detach())
    loss, gradients = loss_and_gradients(ours, adaptation)
    expected = theirs(**batch()).loss  # of an AdaLoRA with its regularization
    expected.backward()
    assert math.isclose(loss, float(expected.detach()), rel_tol=1e-6)
    trained = {name: factor for name, factor in theirs.named_parameters() if factor.requires_grad}
    assert sorted(peft_name(name, options.method) for name in gradients) == sorted(trained)
    for name, gradient in gradients.items():
        wanted = trained[peft_name(name, options.method)].grad
        assert wanted is not None
        assert wanted.abs().max() > 1e-6
        assert_close(gradient, wanted, 2e-5)


@pytest.mark.parametrize("options", ALL, ids=by_method)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", NF4])
def test_a_new_adapter_changes_nothing(architecture: str, options: Options, tiny_models: TinyModels) -> None:
    model = tiny(tiny_models, architecture)
    before = model(**batch()).logits
    adaptation = attach(model, options, total_steps=20)
    assert torch.equal(model(**batch()).logits, before)
    assert all(factor.dtype == torch.float32 for factor in adaptation.parameters().values())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == len(adaptation.parameters())
    adaptation.detach()
    assert torch.equal(model(**batch()).logits, before)
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_the_same_seed_gives_the_same_factors_and_another_gives_others(tiny_models: TinyModels) -> None:
    def factors(seed: int, targets: str | None = None) -> dict[str, torch.Tensor]:
        torch.rand(1)  # the global generator has no part in it
        return dict(attach(tiny(tiny_models, "llama"), LoRA(rank=3), targets=targets, seed=seed).parameters())

    one, same, other, fewer = factors(1), factors(1), factors(2), factors(1, "v_proj")
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one if name.endswith(".A"))
    assert len({float(factor.detach().sum()) for name, factor in one.items() if name.endswith(".A")}) == len(one) // 2
    assert all(torch.equal(fewer[name], one[name]) for name in fewer)


def test_factors_begin_as_their_initialisation_says(tiny_models: TinyModels) -> None:
    for initialisation, spread in (("kaiming", 1 / math.sqrt(3 * 64)), ("gaussian", 1 / 16)):
        options = LoRA(rank=16, initialisation=initialisation)  # type: ignore[arg-type]
        factors = attach(tiny(tiny_models, "llama"), options, targets="q_proj").parameters()
        for name, factor in factors.items():
            if name.endswith(".A"):
                assert float(factor.detach().std()) == pytest.approx(spread, rel=0.1)
            else:
                assert not factor.any()
    adalora = attach(tiny(tiny_models, "llama"), AdaLoRA(rank=16), targets="q_proj", total_steps=9)
    for name, factor in adalora.parameters().items():
        if name.endswith(".A"):
            assert float(factor.detach().std()) == pytest.approx(1 / math.sqrt(3 * 64), rel=0.1)
        else:
            assert torch.equal(factor.data, torch.full_like(factor, float(name.endswith(".E"))))


@pytest.mark.parametrize("options", PEFTS, ids=by_method)
def test_gradients_under_bf16_autocast_are_as_near_those_of_fp32_as_pefts(
    options: Options, tiny_models: TinyModels, tmp_path: Path
) -> None:
    ours = tiny(tiny_models, "llama").train()
    adaptation = attached(ours, options)
    theirs = in_peft(tiny(tiny_models, "llama"), written(adaptation, tmp_path / "adapter")).base_model.model.train()
    factors = adaptation.parameters()
    ours(**batch()).loss.backward()
    exact = {name: factor.grad for name, factor in factors.items()}
    ours.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        ours(**batch()).loss.backward()
        theirs(**batch()).loss.backward()
    found = {f"base_model.model.{name}": factor for name, factor in theirs.named_parameters()}

    def apart(gradients: dict[str, torch.Tensor]) -> float:
        errors = [(gradients[name] - exact[name]).norm() / exact[name].norm() for name in factors]
        return float(torch.stack(errors).square().mean().sqrt())

    of_ours = {name: factor.grad for name, factor in factors.items()}
    of_theirs = {name: found[peft_name(name, options.method)].grad for name in factors}
    assert all(gradient.dtype == torch.float32 for gradient in of_ours.values())
    assert 0 < apart(of_ours) < 1.2 * apart(of_theirs) < 0.1


@pytest.mark.parametrize("options", ALL, ids=by_method)
def test_a_bf16_model_computes_in_bf16(options: Options, tiny_models: TinyModels) -> None:
    model = tiny(tiny_models, "llama", "bf16").train()
    adaptation = attached(model, options)
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 5, 64, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    loss_and_gradients(model, adaptation)
    a, b, scaling = layer.leading_product()
    exact = x.double() @ layer.weight.double().T + scaling * (x.double() @ a.double().T @ b.double().T)
    assert_close(layer(x).detach().double(), exact.detach(), 0.02)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("options", ALL, ids=by_method)
def test_gradient_checkpointing_changes_no_gradient(options: Options, reentrant: bool, tiny_models: TinyModels) -> None:
    found = []
    for checkpointed in (False, True):
        model = tiny(tiny_models, "llama").train()
        adaptation = attached(model, options)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        adaptation.begin_step(3)
        found.append(loss_and_gradients(model, adaptation))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])


@pytest.mark.parametrize("options", [LoRA(rank=3, dropout=0.4), AdaLoRA(rank=2, dropout=0.4)], ids=by_method)
def test_dropout_is_pefts_in_training_and_none_in_evaluation(
    options: Options, tiny_models: TinyModels, tmp_path: Path
) -> None:
    ours = tiny(tiny_models, "llama")
    adaptation = attached(ours, options)
    theirs = in_peft(tiny(tiny_models, "llama"), written(adaptation, tmp_path / "adapter"))
    logits = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(3)
        logits.append(model(**batch()).logits.detach())
    assert_close(logits[0], logits[1])
    without = ours.eval()(**batch()).logits.detach()
    assert not torch.equal(without, logits[0])
    assert_close(without, theirs.eval()(**batch()).logits.detach())


def test_a_target_among_a_layers_modules_only_is_trained(tiny_models: TinyModels, tmp_path: Path) -> None:
    ours = tiny(tiny_models, "llama")
    adaptation = attached(ours, LoRA(rank=2), targets=r"model\.layers\.1\..*_proj")
    assert {name.split(".")[2] for name in adaptation.parameters()} == {"1"}
    theirs = in_peft(tiny(tiny_models, "llama"), written(adaptation, tmp_path / "adapter"), trained=False)
    assert_close(ours(**batch()).logits.detach(), theirs(**batch()).logits.detach())


# Merged into a live model


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("options", [LoRA(rank=3, alpha=5), AdaLoRA(rank=2, alpha=5)], ids=by_method)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "llama-many-blocks"])
def test_a_merge_has_pefts_bytes_and_comes_out_again(
    architecture: str, options: Options, dtype: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    model = tiny(tiny_models, architecture, dtype)
    before = {name: as_stored(tensor) for name, tensor in copy.deepcopy(model).state_dict().items()}
    adaptation = attached(model, options)
    folder = written(adaptation, tmp_path / "adapter")
    adaptation.merge()
    merged = {
        name.replace(".base.", "."): as_stored(tensor)
        for name, tensor in model.state_dict().items()
        if "lora_" not in name
    }
    assert_same_tensors(merged, merge_by_peft(tiny(tiny_models, architecture, dtype), folder))
    assert any(merged[name].data != before[name].data for name in before)
    randomize(adaptation, seed=8)  # what was merged comes out, whatever became of the factors since
    adaptation.unmerge()
    adaptation.detach()
    assert_same_tensors({name: as_stored(tensor) for name, tensor in model.state_dict().items()}, before)


def test_a_merged_model_computes_what_the_adapter_beside_it_does(tiny_models: TinyModels) -> None:
    model = tiny(tiny_models, "gpt2")
    adaptation = attached(model, DyLoRA(rank=3))
    adaptation.act_at(2)
    beside = model(**batch()).logits.detach()
    adaptation.merge()
    adaptation.merge()  # once is enough
    assert_close(model(**batch()).logits, beside, 1e-5)
    adaptation.unmerge()
    assert torch.equal(model(**batch()).logits, beside)
    adaptation.unmerge()
    assert torch.equal(model(**batch()).logits, beside)


def test_what_a_merge_keeps_is_a_small_part_of_a_bf16_weight(tiny_models: TinyModels) -> None:
    model = tiny(tiny_models, "llama-many-blocks", "bf16")
    adaptation = attach(model, LoRA(rank=4))
    generator = torch.Generator().manual_seed(1)
    for factor in adaptation.parameters().values():
        factor.data.copy_(torch.randn(factor.shape, generator=generator) * 0.01)
    adaptation.merge()
    layers = adaptation.layers.values()  # type: ignore[attr-defined]
    kept = sum(layer._live_weight.nbytes for layer in layers)
    assert 0 < kept < 0.1 * sum(layer.weight.nbytes for layer in layers)


def test_a_4_bit_layer_is_not_merged(tiny_models: TinyModels) -> None:
    model = tiny(tiny_models, NF4)
    adaptation = attached(model, LoRA(rank=2))
    before = model(**batch()).logits
    with pytest.raises(UnsupportedError, match=r"q_proj' is stored in 4 bits.*loratool merge"):
        adaptation.merge()
    assert torch.equal(model(**batch()).logits, before)


# Written


@pytest.mark.parametrize("options", ALL, ids=by_method)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_what_is_written_loratool_reads_as_what_it_is(
    architecture: str, options: Options, tiny_models: TinyModels, tmp_path: Path
) -> None:
    adaptation = attached(tiny(tiny_models, architecture), options)
    folder = written(adaptation, tmp_path / "adapter")
    adapter = read_adapter(folder)
    assert adapter.kind == options.method
    assert adapter.rank == adaptation.ranks[-1]
    assert adapter.alpha == options.lora_alpha
    assert set(adapter.ranked) == {name.rsplit(".", 1)[0] for name in adaptation.parameters()}
    loratool.merge([folder], into=tiny_models.folder(architecture), out=tmp_path / "merged")
