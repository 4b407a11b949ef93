"""Which modules an adapter is put on: what PEFT means by the same words, and errors that help."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from adaptations import NF4, tiny, written
from torch import nn

from loratool.errors import AdapterError, LoratoolError, NotFoundError, UnsupportedError
from loratool.training.methods import attach
from loratool.training.options import LoRA
from loratool.training.targets import choose_targets

if TYPE_CHECKING:
    from tiny_models import TinyModels

LLAMA_NAMES = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")


def chosen_by_peft(model: Any, targets: Any) -> list[str]:
    config = peft.LoraConfig(target_modules=targets, fan_in_fan_out="GPT2" in type(model).__name__)
    wrapped = peft.get_peft_model(model, config).base_model.model
    return [name for name, module in wrapped.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)]


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2", "opt", "gpt_neox", "bert-headless", NF4])
def test_all_linear_is_pefts(architecture: str, tiny_models: TinyModels) -> None:
    expected = chosen_by_peft(tiny(tiny_models, architecture), "all-linear")
    for targets in ("all-linear", None):
        assert list(choose_targets(tiny(tiny_models, architecture), targets).modules) == expected


@pytest.mark.parametrize("targets", [
    ["q_proj"], ["self_attn.q_proj"], ["layers.1.self_attn.q_proj", "down_proj"], ["lm_head"],
    r".*\.[01]\.mlp\..*_proj", r"model\.layers\.\d+\.self_attn\.(q|v)_proj", r".*_proj$|lm_head", r"(.*\.)?[kv]_proj",
])  # fmt: skip
def test_names_and_patterns_mean_what_they_mean_to_peft(targets: Any, tiny_models: TinyModels) -> None:
    model = tiny(tiny_models, "llama")
    chosen = choose_targets(model, targets)
    assert list(chosen.modules) == chosen_by_peft(tiny(tiny_models, "llama"), targets)
    assert chosen.modules
    # And what is written means the same again.
    assert list(choose_targets(model, list(chosen.names)).modules) == list(chosen.modules)


def test_names_may_stand_in_one_string(tiny_models: TinyModels) -> None:
    model = tiny(tiny_models, "llama")
    for text in ("q_proj,v_proj", "q_proj, v_proj", " v_proj ,q_proj,"):
        assert choose_targets(model, text).names == ("q_proj", "v_proj")
    assert choose_targets(model).names == LLAMA_NAMES
    assert choose_targets(model, r".*layers\.0.*q_proj").names == ("model.layers.0.self_attn.q_proj",)


@pytest.mark.parametrize(("targets", "error", "message"), [
    ("q_prj", NotFoundError, "no module of LlamaForCausalLM is called 'q_prj'; the nearest are 'q_proj'"),
    ("q_proj,zzz", NotFoundError, "is called 'zzz'; the nearest are 'q_proj', 'k_proj'"),
    ("layers.7.self_attn.q_proj", NotFoundError, "nearest are 'model.layers.1.self_attn.q_proj'"),
    (".*query.*", NotFoundError, "matches the pattern '.*query.*'; a pattern must match a whole name, such as 'model.lay"),
    ("mlp", UnsupportedError, "'model.layers.0.mlp' is a LlamaMLP, but adapters go only on linear layers"),
    ("embed_tokens", UnsupportedError, "'model.embed_tokens' is a Embedding"),
    ([], LoratoolError, "no target is named"),
    ("*proj", AdapterError, "'*proj' in 'targets' is not a valid pattern"),
])  # fmt: skip
def test_what_cannot_be_a_target_is_refused(
    targets: Any, error: type[Exception], message: str, tiny_models: TinyModels
) -> None:
    model = tiny(tiny_models, "llama")
    with pytest.raises(error) as raised:
        attach(model, LoRA(), targets=targets)
    assert message in str(raised.value)
    assert all(parameter.requires_grad for parameter in model.parameters())  # nothing was touched


def test_a_tied_head_is_refused_as_a_merge_refuses_it(tiny_models: TinyModels) -> None:
    with pytest.raises(UnsupportedError, match=r"'lm_head' shares its weight with 'model\.embed_tokens'"):
        choose_targets(tiny(tiny_models, "llama-tied"), "q_proj,lm_head")


def test_a_second_adapter_is_refused(tiny_models: TinyModels) -> None:
    model = tiny(tiny_models, "llama")
    first = attach(model, LoRA(), targets="v_proj")
    for targets in (None, "v_proj", "q_proj"):
        with pytest.raises(LoratoolError, match=r"'model\.layers\.0\.self_attn\.v_proj' already has an adapter"):
            attach(model, LoRA(), targets=targets)
    first.detach()
    attach(model, LoRA())


def test_a_layer_that_its_model_never_calls_is_left_out() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "out": nn.Linear(8, 8)})
    assert list(choose_targets(model).modules) == ["out"]
    with pytest.raises(NotFoundError, match="has no linear layer except its head"):
        choose_targets(nn.Sequential(nn.LayerNorm(3)))


def test_gpt2s_weights_are_said_to_be_the_other_way_round(tiny_models: TinyModels, tmp_path: Path) -> None:
    model = tiny(tiny_models, "gpt2-untied")
    adaptation = attach(model, LoRA(rank=2), targets="c_attn,lm_head")
    assert adaptation.config()["fan_in_fan_out"]
    for factor in adaptation.parameters().values():
        torch.nn.init.normal_(factor, 0, 0.05)
    ids = torch.arange(12)[None]
    folder = written(adaptation, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT speaks of the head, and is right about it
        theirs = peft.PeftModel.from_pretrained(tiny(tiny_models, "gpt2-untied"), folder)
    assert torch.allclose(model(input_ids=ids).logits, theirs(input_ids=ids).logits, atol=2e-6)
