"""The training layers on a CUDA device: what PEFT computes there, and weights that come back bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from adaptations import NF4, batch, in_peft, peft_name, randomize, tiny, written

from loratool.training.methods import attach
from loratool.training.options import AdaLoRA, DyLoRA, LoRA, Options

if TYPE_CHECKING:
    from tiny_models import TinyModels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize("options", [LoRA(rank=3), DyLoRA(rank=3), AdaLoRA(rank=2)], ids=lambda each: each.method)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", NF4])
def test_logits_and_gradients_on_cuda_are_pefts(
    architecture: str, options: Options, tiny_models: TinyModels, tmp_path: Path
) -> None:
    ours = tiny(tiny_models, architecture).cuda().eval()
    adaptation = attach(ours, options, total_steps=20)
    randomize(adaptation)
    theirs = in_peft(tiny(tiny_models, architecture).cuda(), written(adaptation, tmp_path / "adapter")).eval()
    samples = {name: tensor.cuda() for name, tensor in batch().items()}
    assert torch.allclose(ours(**samples).logits, theirs(**samples).logits, atol=1e-4)
    penalty = adaptation.penalty()
    loss = ours(**samples).loss
    (loss if penalty is None else loss + penalty).backward()
    theirs(**samples).loss.backward()
    found = dict(theirs.named_parameters())
    for name, factor in adaptation.parameters().items():
        wanted = found[peft_name(name, options.method)].grad
        assert factor.grad is not None
        assert factor.grad.is_cuda
        assert float((factor.grad - wanted).norm() / wanted.norm()) < 1e-3


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("architecture", ["llama-many-blocks", "gpt2"])
def test_a_merge_on_cuda_comes_out_bit_for_bit(architecture: str, dtype: str, tiny_models: TinyModels) -> None:
    model = tiny(tiny_models, architecture, dtype).cuda()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adaptation = attach(model, LoRA(rank=3))
    randomize(adaptation)
    adaptation.merge()
    layer = next(iter(adaptation.layers.values()))  # type: ignore[attr-defined]
    assert layer.merged
    adaptation.unmerge()
    adaptation.detach()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("options", [DyLoRA(rank=3), AdaLoRA(rank=2)], ids=lambda each: each.method)
def test_steps_on_cuda_end_as_they_should(options: Options, tiny_models: TinyModels, tmp_path: Path) -> None:
    model = tiny(tiny_models, "llama").cuda()
    adaptation = attach(model, options, total_steps=8)
    samples = {name: tensor.cuda() for name, tensor in batch().items()}
    optimizer = torch.optim.AdamW(adaptation.parameters().values(), lr=1e-2)
    for step in range(8):
        adaptation.begin_step(step)
        penalty = adaptation.penalty()
        loss = model(**samples).loss
        (loss if penalty is None else loss + penalty).backward()
        adaptation.after_backward(step)
        optimizer.step()
        adaptation.after_step(step)
        optimizer.zero_grad()
        adaptation.load_buffers(adaptation.buffers())
    adaptation.act_at(adaptation.ranks[-1])
    theirs = in_peft(tiny(tiny_models, "llama").cuda(), written(adaptation, tmp_path / "adapter"), trained=False)
    ids = {"input_ids": samples["input_ids"]}
    assert torch.allclose(model(**ids).logits, theirs(**ids).logits, atol=1e-4)
