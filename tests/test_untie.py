"""A head that the base ties to its embedding gets a tensor of its own with --untie: as PEFT merges into the untied model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny_adapters import merge_by_peft, save_peft_adapter
from tiny_models import Layout, as_torch, digest, load, stored_tensors

import loratool
from loratool.cli import cli
from loratool.errors import LoratoolError, OutputError, PlacementError

if TYPE_CHECKING:
    from tiny_models import TinyModels

TIED = ("llama-tied", "qwen2", "gemma", "gpt2", "gpt_neox-tied")
EMBEDDINGS = {"gpt2": "wte", "gpt_neox-tied": "embed_in"}
TARGETS = {"gpt2": "c_attn", "gpt_neox-tied": "query_key_value"}
STORED_HEADS = {"gpt_neox-tied": "embed_out.weight"}
"""What a checkpoint calls the head, where that is not what transformers calls it in memory."""

TOKENS = torch.arange(8)[None]

ADAPTERS: dict[str, dict[str, Any]] = {
    "embedding and head": {"modules_to_save": ["EMBEDDING", "lm_head"]},
    "the embedding alone": {"modules_to_save": ["EMBEDDING"]},
    "the head alone": {"modules_to_save": ["lm_head"]},
    "a LoRA on the head": {"target_modules": ["lm_head"]},
}


def untied_model(base: Path, architecture: str) -> transformers.PreTrainedModel:
    """The model with its head untied, as transformers has it in memory."""
    model = load(base, architecture)
    model.config.tie_word_embeddings = False
    head = torch.nn.Parameter(model.get_output_embeddings().weight.detach().clone())
    model.get_output_embeddings().weight = head
    return model


def trained(case: str, architecture: str, base: Path, folder: Path) -> Path:
    """An adapter, trained on the untied model; every tensor of it is new."""
    embedding = EMBEDDINGS.get(architecture, "embed_tokens")
    usual = TARGETS.get(architecture, "q_proj")
    options = {"r": 4, "lora_alpha": 8, "target_modules": [usual], "fan_in_fan_out": architecture == "gpt2"} | ADAPTERS[
        case
    ]
    options["modules_to_save"] = [
        embedding if each == "EMBEDDING" else each for each in options.get("modules_to_save", ())
    ]
    model = untied_model(base, architecture).float()
    return save_peft_adapter(model, peft.LoraConfig(**options), folder, save_embedding_layers=False)


def logits(folder: Path) -> torch.Tensor:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)(TOKENS).logits


@pytest.mark.parametrize("case", ADAPTERS)
@pytest.mark.parametrize("architecture", TIED)
def test_the_merged_model_is_pefts_on_the_untied_one(
    architecture: str, case: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    base = tiny_models.folder(architecture, "fp32")
    adapter = trained(case, architecture, base, tmp_path / "adapter")
    merged = loratool.merge(adapter, into=base, out=tmp_path / "out", untie=True).out
    model = untied_model(base, architecture)
    theirs = merge_by_peft(model, adapter)
    ours = stored_tensors(merged)
    head = STORED_HEADS.get(architecture, "lm_head.weight")
    assert ours.keys() - stored_tensors(base).keys() == {head}
    ours["lm_head.weight"] = ours.pop(head)
    assert {name: tensor for name, tensor in theirs.items() if name in ours} == ours
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is False
    loaded = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype="auto", local_files_only=True)
    assert loaded.get_output_embeddings().weight is not loaded.get_input_embeddings().weight
    oracle = untied_model(base, architecture)
    oracle.load_state_dict({name: as_torch(tensor) for name, tensor in theirs.items()})
    assert torch.equal(loaded(TOKENS).logits, oracle(TOKENS).logits)


@pytest.mark.parametrize("options", [{"target_modules": ["lm_head", "dense"]}, {"modules_to_save": ["lm_head"]}])
def test_a_head_lands_on_the_name_that_the_familys_checkpoints_have(
    options: dict[str, Any], tiny_models: TinyModels, tmp_path: Path
) -> None:
    base = tiny_models.folder("gpt_neox", "fp32")
    config = peft.LoraConfig(**({"r": 4, "target_modules": ["query_key_value"]} | options))
    model = load(base, "gpt_neox").float()
    adapter = save_peft_adapter(model, config, tmp_path / "adapter", save_embedding_layers=False)
    ours = stored_tensors(loratool.merge(adapter, into=base, out=tmp_path / "out").out)
    theirs = merge_by_peft(load(base, "gpt_neox"), adapter)
    theirs["embed_out.weight"] = theirs.pop("lm_head.weight")
    assert ours["embed_out.weight"] != stored_tensors(base)["embed_out.weight"]
    assert ours == {name: theirs[name] for name in ours}


@pytest.mark.parametrize("layout", ["single", "sharded"])
@pytest.mark.parametrize("way", ["undo", "base"])
@pytest.mark.parametrize("case", ADAPTERS)
def test_it_comes_out_again_bit_for_bit(
    case: str, way: str, layout: Layout, tiny_models: TinyModels, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_models.folder("llama-tied", "bf16", layout), tmp_path / "base")
    before = digest(base)
    adapter = trained(case, "llama-tied", base, tmp_path / "adapter")
    merged = loratool.merge(adapter, into=base, out=tmp_path / "out", untie=True, undo=way == "undo").out
    assert loratool.verify(merged).replayed == "base"
    logits(merged)
    if way == "undo":
        shutil.rmtree(base)
        shutil.rmtree(adapter)
        assert loratool.verify(merged).replayed == "undo"
    back = loratool.unmerge(merged, out=tmp_path / "back")
    assert (back.method, back.inexact) == (way, ())
    assert digest(back.out) == before


def test_the_bases_fingerprint_is_that_of_the_tied_model(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models.folder("llama-tied", "bf16")
    adapter = trained("embedding and head", "llama-tied", base, tmp_path / "adapter")
    added = loratool.add(adapter, name="mine", base=base)  # it lands once the base is untied
    merged = loratool.merge("mine", out=tmp_path / "out", untie=True)
    assert merged.base_fingerprint == added.record.base_fingerprint


def test_files_whose_tensors_lie_in_another_order_come_back(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_models.folder("llama-tied", "bf16"), tmp_path / "base")
    tensors = stored_tensors(base)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "by": "hand"}}
    data = b""
    for name in sorted(tensors, key=lambda name: name[::-1]):
        entry = tensors[name]
        offsets = [len(data), len(data) + len(entry.data)]
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        data += entry.data
    text = json.dumps(header, indent=1).encode()
    text += b" " * (-len(text) % 8)
    (base / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    before = digest(base)
    adapter = trained("the embedding alone", "llama-tied", base, tmp_path / "adapter")
    merged = loratool.merge(adapter, into=base, out=tmp_path / "out", untie=True, undo=True).out
    shutil.rmtree(base)
    assert digest(loratool.unmerge(merged, out=tmp_path / "back").out) == before


@pytest.mark.parametrize("case", ADAPTERS)
def test_what_is_advised_works(case: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models.folder("llama-tied", "bf16")
    adapter = trained(case, "llama-tied", base, tmp_path / "adapter")
    words = ["merge", str(adapter), "--into", str(base), "--out", str(tmp_path / "out")]
    refused = CliRunner().invoke(cli, words)
    assert isinstance(refused.exception, PlacementError) and "--untie" in str(refused.exception)
    assert not (tmp_path / "out").exists()
    assert CliRunner().invoke(cli, [*words, "--untie"]).exit_code == 0
    logits(tmp_path / "out")


def test_a_model_that_stores_its_tied_head_again_is_untied(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tmp_path / "base"
    model = load(tiny_models.folder("llama-tied", "fp32"), "llama-tied")
    model.save_pretrained(base)
    tensors = load_file(base / "model.safetensors")
    twice = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(twice, base / "model.safetensors", {"format": "pt"})
    adapter = trained("the embedding alone", "llama-tied", base, tmp_path / "adapter")
    before = digest(base)
    merged = loratool.merge(adapter, into=base, out=tmp_path / "out", untie=True).out
    theirs = merge_by_peft(untied_model(base, "llama-tied"), adapter)
    assert stored_tensors(merged) == theirs
    assert digest(loratool.unmerge(merged, out=tmp_path / "back").out) == before


def test_what_cannot_be_is_refused(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_models.folder("llama-tied", "bf16"), tmp_path / "base")
    adapter = trained("the embedding alone", "llama-tied", base, tmp_path / "adapter")
    for options in ({"in_place": True}, {"quantize": "nf4"}, {"calibrate": "text.jsonl"}):
        with pytest.raises(LoratoolError, match=r"--untie|--calibrate"):
            loratool.merge(adapter, into=base, untie=True, **options)
    with pytest.raises(PlacementError, match=r"does not tie .* omit --untie"):
        loratool.merge(adapter, into=tiny_models.folder("llama", "bf16"), untie=True)
    merged = loratool.merge(adapter, into=base, out=tmp_path / "out", untie=True, undo=True).out
    before = digest(merged)
    with pytest.raises(OutputError, match=r"was untied.*--out"):
        loratool.unmerge(merged, in_place=True)
    assert digest(merged) == before
    for head in merged.rglob("*.head"):
        head.write_bytes(head.read_bytes()[:-1])
    shutil.rmtree(base)
    with pytest.raises(LoratoolError, match="is damaged in the undo folder"):
        loratool.unmerge(merged, out=tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_what_a_merge_cannot_untie_is_not_told_to_be_untied_by_it(tmp_path: Path) -> None:
    """An encoder-decoder: the way that is advised is the one that works."""
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, tie_word_embeddings=True
    )
    model = transformers.T5ForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "t5")
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(LoratoolError) as raised:
        loratool.merge([tmp_path / "adapter"], into=tmp_path / "t5", out=tmp_path / "out")
    assert "a model with an encoder" in str(raised.value) and "in transformers" in str(raised.value)
    with pytest.raises(LoratoolError, match="set tie_word_embeddings to False"):
        loratool.merge([tmp_path / "adapter"], into=tmp_path / "t5", out=tmp_path / "out", untie=True)
