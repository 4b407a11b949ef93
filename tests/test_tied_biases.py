"""BERT's decoder has one bias under two names, ``cls.predictions.bias`` and ``cls.predictions.decoder.bias``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_adapters import merge_by_peft
from tiny_models import as_torch, assert_same_tensors, stored_tensors
from transformers import BertConfig, BertForMaskedLM

import loratool
from loratool.errors import LoratoolError

BIAS, DECODER = "cls.predictions.bias", "cls.predictions.decoder.bias"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model that stores its decoder's bias under one name, or under both."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=67, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
                        tie_word_embeddings=request.param)  # fmt: skip
    BertForMaskedLM(config).save_pretrained(tmp_path / "base")
    assert (DECODER in stored_tensors(tmp_path / "base")) != request.param
    return tmp_path / "base"


def trained(base: Path, folder: Path, **lora: Any) -> Path:
    model = peft.get_peft_model(BertForMaskedLM.from_pretrained(base), peft.LoraConfig(r=4, **lora))
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_a_trained_bias_reaches_the_decoder_as_in_peft(bias: str, base: Path, tmp_path: Path) -> None:
    adapter = trained(base, tmp_path / "adapter", bias=bias, target_modules=["query"])
    merged = loratool.merge(adapter, base, out=tmp_path / "merged", undo=True).out
    theirs = merge_by_peft(BertForMaskedLM.from_pretrained(base), adapter, tmp_path / "peft")
    found, before = stored_tensors(merged), stored_tensors(base)
    assert_same_tensors(found, theirs)
    assert (found[BIAS].data != before[BIAS].data) == (bias == "all")
    assert_same_tensors(stored_tensors(loratool.unmerge(merged, out=tmp_path / "back").out), before)


@pytest.mark.parametrize("base", [True], indirect=True)
def test_a_bias_under_its_second_name_alone_lands_on_the_first(base: Path, tmp_path: Path) -> None:
    adapter = trained(base, tmp_path / "adapter", bias="all", target_modules=["query"])
    tensors = load_file(adapter / WEIGHTS)
    wanted = tensors.pop(f"base_model.model.{BIAS}")
    save_file(tensors, adapter / WEIGHTS, {"format": "pt"})
    merged = stored_tensors(loratool.merge(adapter, base, out=tmp_path / "out").out)
    assert torch.equal(as_torch(merged[BIAS]), wanted)


@pytest.mark.parametrize("base", [True], indirect=True)
def test_two_biases_that_differ_are_refused(base: Path, tmp_path: Path) -> None:
    adapter = trained(base, tmp_path / "adapter", bias="all", target_modules=["query"])
    tensors = load_file(adapter / WEIGHTS)
    tensors[f"base_model.model.{DECODER}"] += 1
    save_file(tensors, adapter / WEIGHTS, {"format": "pt"})
    with pytest.raises(LoratoolError, match=r"two versions of 'cls\.predictions\.bias'"):
        loratool.merge(adapter, base, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
