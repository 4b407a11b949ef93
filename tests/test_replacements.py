"""Modules that an adapter holds whole (`modules_to_save`) take the place of the base's own, as in PEFT, and come out again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_adapters import copy_with, merge_by_peft, save_peft_adalora, save_peft_adapter, save_plain_adapter
from tiny_models import assert_same_tensors, load, stored_tensors

import loratool
from loratool.errors import LoratoolError, UnsupportedError
from loratool.formats.read import read_adapter

if TYPE_CHECKING:
    from tiny_adapters import TinyAdapters
    from tiny_models import TinyModels

PREFIX = "base_model.model."

SAVED: dict[str, tuple[str, dict[str, Any]]] = {
    "a head": ("llama", {"modules_to_save": ["lm_head"]}),
    "norms by the end of their names": ("llama", {"modules_to_save": ["input_layernorm", "model.norm"]}),
    "an untied embedding": ("llama", {"modules_to_save": ["embed_tokens"]}),
    "a linear layer with its bias": ("qwen2", {"modules_to_save": ["k_proj"], "target_modules": ["q_proj"]}),
    "a module with modules in it": ("llama", {"modules_to_save": ["layers.0.mlp"], "target_modules": ["q_proj"]}),
    "GPT-2's Conv1D": ("gpt2", {"modules_to_save": ["mlp.c_fc"], "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "a classifier": ("bert", {"modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}),
    "all biases": ("qwen2", {"bias": "all", "target_modules": ["q_proj"]}),
    "the biases of norms and of what is not adapted": ("bert", {"bias": "all", "modules_to_save": ["pooler"]}),
    "the biases of what is adapted": ("qwen2", {"bias": "lora_only", "target_modules": ["q_proj", "k_proj"]}),
    "GPT-2's biases": ("gpt2", {"bias": "lora_only", "target_modules": ["c_attn"], "fan_in_fan_out": True}),
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("case", SAVED)
def test_the_merged_bytes_are_pefts(
    case: str, dtype: str, tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    architecture, options = SAVED[case]
    adapter = tiny_adapters.folder(architecture, **options)
    assert read_adapter(adapter).replacements
    base = tiny_models.folder(architecture, dtype)
    merged = loratool.merge(adapter, into=base, out=tmp_path / "merged")
    assert_same_tensors(stored_tensors(merged.out), merge_by_peft(load(base, architecture), adapter, tmp_path / "peft"))
    assert any("modules_to_save" in note for note in merged.notes)


def test_names_may_differ_by_a_prefix(tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path) -> None:
    adapter = tiny_adapters.folder("gpt2", modules_to_save=["ln_f"], fan_in_fan_out=True)
    merged = loratool.merge(adapter, into=tiny_models.folder("gpt2-without-prefix", "fp32"), out=tmp_path / "merged")
    expected = load_file(adapter / "adapter_model.safetensors")[f"{PREFIX}transformer.ln_f.weight"]
    assert torch.equal(load_file(merged.out / "model.safetensors")["ln_f.weight"], expected)


@pytest.mark.parametrize("case", [("llama", {"modules_to_save": ["lm_head", "input_layernorm"]}), SAVED["all biases"]])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_merge_in_place_comes_out_again(
    dtype: str, case: tuple[str, dict[str, Any]], tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    architecture, options = case
    base = tiny_models.folder(architecture, dtype, "sharded")
    copy = shutil.copytree(base, tmp_path / "copy")
    adapter = tiny_adapters.folder(architecture, **options)
    loratool.merge(adapter, into=copy, in_place=True)
    assert stored_tensors(copy) != stored_tensors(base)
    assert loratool.verify(copy).replayed == "undo"
    assert loratool.unmerge(copy, in_place=True).method == "undo"
    assert_same_tensors(stored_tensors(copy), stored_tensors(base))


def test_arithmetic_cannot_take_a_replacement_out_and_says_which(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_models.folder("llama", "bf16"), tmp_path / "base")
    adapter = tiny_adapters.folder("llama", modules_to_save=["model.norm"])
    merged = loratool.merge(adapter, into=base, out=tmp_path / "merged")
    shutil.rmtree(base)
    result = loratool.unmerge(merged.out, out=tmp_path / "back", approximate=True)
    assert "model.norm.weight" in result.inexact


def test_it_is_catalogued_and_exported_with_all_its_bytes(tiny_adapters: TinyAdapters, tmp_path: Path) -> None:
    adapter = tiny_adapters.folder("llama", modules_to_save=["lm_head"])
    record = loratool.add(adapter, name="mine").record
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert record.parameter_count == sum(tensor.numel() for tensor in tensors.values())
    assert record.target_modules == sorted(set(record.target_modules or ()))
    assert "lm_head" not in (record.target_modules or ())
    loratool.export("mine", tmp_path / "single.st")
    exported = load_file(tmp_path / "single.st")
    assert exported.keys() == tensors.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("method", ["truncate", "prune", "prune to a LoRA"])
def test_a_smaller_rank_keeps_what_is_held_whole(
    method: str, tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    if method == "truncate":
        adapter = tiny_adapters.folder("llama", modules_to_save=["lm_head"])
        loratool.truncate(adapter, rank=2, out=tmp_path / "small")
    else:
        model = load(tiny_models.folder("llama"), "llama")
        adapter = save_peft_adalora(model, tmp_path / "adalora", modules_to_save=["lm_head"])
        loratool.prune(adapter, average_rank=2, as_="lora" if "LoRA" in method else "adalora", out=tmp_path / "small")
    small, large = read_adapter(tmp_path / "small"), load_file(adapter / "adapter_model.safetensors")
    assert list(small.replacements) == ["lm_head.weight"]
    assert small.config["modules_to_save"] == ["lm_head"]
    kept = load_file(tmp_path / "small" / "adapter_model.safetensors")
    assert torch.equal(kept[f"{PREFIX}lm_head.weight"], large[f"{PREFIX}lm_head.weight"])


# What is refused


def refuses(message: str, adapters: list[Any], base: Path, tmp_path: Path) -> None:
    with pytest.raises(LoratoolError, match=message):
        loratool.merge(adapters, into=base, out=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_weight_is_refused(tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path) -> None:
    adapter = tiny_adapters.folder("llama", modules_to_save=["lm_head"])
    refuses(
        "replaces whole tensors .* leave the weight 0.5 out", [(adapter, 0.5)], tiny_models.folder("llama"), tmp_path
    )


def test_a_tensor_that_two_adapters_change_is_refused(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    base = tiny_models.folder("llama")
    whole = [tiny_adapters.folder("llama", seed=seed, modules_to_save=["lm_head"]) for seed in (1, 2)]
    refuses("'lm_head.weight', which another update changes as well", whole, base, tmp_path)
    factors = tiny_adapters.folder("llama", target_modules=["lm_head"])
    refuses("'lm_head.weight', which another update changes as well", [factors, whole[0]], base, tmp_path)
    together = loratool.merge([whole[0], tiny_adapters.folder("llama", seed=9)], into=base, out=tmp_path / "both")
    assert len(together.adapters) == 2


@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2", "qwen2"])
def test_a_tied_embedding_is_refused(
    architecture: str, tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    saved = "wte" if architecture == "gpt2" else "embed_tokens"
    adapter = tiny_adapters.folder(architecture, modules_to_save=[saved])
    refuses("ties to its output head|lacks", [adapter], tiny_models.folder(architecture), tmp_path)


def save_plain(folder: Path, biases: dict[str, torch.Tensor], **config: Any) -> Path:
    """A LoRA on one module of the tiny Llama, with tensors beside its factors."""
    save_plain_adapter(folder, {"model.layers.0.self_attn.q_proj": (64, 64)}, **config)
    tensors = load_file(folder / "adapter_model.safetensors")
    more = {f"{PREFIX}model.layers.0.self_attn.{name}": tensor for name, tensor in biases.items()}
    save_file(tensors | more, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("saved", ["embed_tokens", "lm_head"])
def test_a_tied_embedding_that_is_trained_as_one_with_its_head_stays_tied(
    saved: str, dtype: str, tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    base = tiny_models.folder("llama-tied", dtype)
    adapter = tiny_adapters.folder("llama-tied", modules_to_save=[saved], ensure_weight_tying=True)
    assert set(read_adapter(adapter).replacements) == {"lm_head.weight", "model.embed_tokens.weight"}
    theirs = merge_by_peft(load(base, "llama-tied"), adapter, tmp_path / "peft")
    merged = loratool.merge(adapter, into=base, out=tmp_path / "merged", undo=True)
    assert_same_tensors(stored_tensors(merged.out), theirs)
    assert_same_tensors(stored_tensors(loratool.unmerge(merged.out, out=tmp_path / "back").out), stored_tensors(base))
    twice = shutil.copytree(base, tmp_path / "twice")
    tensors = load_file(twice / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, twice / "model.safetensors", {"format": "pt"})
    both = stored_tensors(loratool.merge(adapter, into=twice, out=tmp_path / "both").out)
    assert both["lm_head.weight"].data == both["model.embed_tokens.weight"].data
    assert both["model.embed_tokens.weight"] == theirs["model.embed_tokens.weight"]
    tensors = load_file(adapter / "adapter_model.safetensors")
    other = shutil.copytree(adapter, tmp_path / "other")
    tensors[f"{PREFIX}lm_head.weight"] += 1
    save_file(tensors, other / "adapter_model.safetensors", {"format": "pt"})
    refuses("'lm_head.weight' .* which the base lacks", [other], base, tmp_path / "none")


def changed(source: Path, folder: Path, name: str, tensor: torch.Tensor | None, **config: Any) -> Path:
    """A copy of an adapter with one tensor replaced, or taken out."""
    copy = copy_with(source, folder, **config)
    tensors = load_file(copy / "adapter_model.safetensors")
    del tensors[f"{PREFIX}{name}"]
    if tensor is not None:
        tensors[f"{PREFIX}{name}"] = tensor
    save_file(tensors, copy / "adapter_model.safetensors", {"format": "pt"})
    return copy


DAMAGED: dict[str, tuple[torch.Tensor | None, str]] = {
    "another shape": (torch.ones(140, 64), r"shape \[140, 64\], which has \[131, 64\] there"),
    "NaN": (torch.full((131, 64), float("nan")), "'base_model.model.lm_head.weight' .* holds NaN"),
    "whole numbers": (torch.ones(131, 64, dtype=torch.int32), "is I32 and replaces 'lm_head.weight'"),
    "nothing": (None, "holds none of their tensors"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_replacement_is_refused(
    case: str, tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    tensor, message = DAMAGED[case]
    adapter = tiny_adapters.folder("llama", modules_to_save=["lm_head"])
    damaged = changed(adapter, tmp_path / "damaged", "lm_head.weight", tensor)
    refuses(message, [damaged], tiny_models.folder("llama"), tmp_path)
    if case == "NaN":
        with pytest.raises(LoratoolError, match=message):
            loratool.add(damaged)


BIAS = "model.layers.0.self_attn.q_proj.base_layer.bias"


@pytest.fixture
def biased(tiny_adapters: TinyAdapters) -> Path:
    return tiny_adapters.folder("qwen2", bias="lora_only", target_modules=["q_proj"])


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(55), r"'model.layers.0.self_attn.q_proj.bias' by a tensor of shape \[55\], which has \[56\] there"),
        (torch.full((56,), float("nan")), "q_proj.base_layer.bias' .* holds NaN"),
        (torch.ones(56, dtype=torch.int32), "is I32 and replaces 'model.layers.0.self_attn.q_proj.bias'"),
    ],
)
def test_a_damaged_bias_is_refused(
    tensor: torch.Tensor, message: str, biased: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    refuses(message, [changed(biased, tmp_path / "damaged", BIAS, tensor)], tiny_models.folder("qwen2"), tmp_path)


def test_a_bias_that_the_base_lacks_is_refused(tiny_models: TinyModels, tmp_path: Path) -> None:
    adapter = save_plain(tmp_path / "adapter", {"q_proj.base_layer.bias": torch.ones(64)}, bias="lora_only")
    message = r"'model.layers.0.self_attn.q_proj.bias' by a tensor of shape \[64\], which the base lacks"
    refuses(message, [adapter], tiny_models.folder("llama"), tmp_path)


def test_biases_that_peft_lost_are_told(biased: Path, tiny_models: TinyModels, tmp_path: Path) -> None:
    adapter, base = changed(biased, tmp_path / "lost", BIAS, None), tiny_models.folder("qwen2")
    merged = loratool.merge(adapter, into=base, out=tmp_path / "merged")
    (note,) = (each for each in merged.notes if "trained with biases" in each)
    assert "holds no 'model.layers.0.self_attn.q_proj.bias': they stay the base's, as in PEFT" in note
    assert_same_tensors(stored_tensors(merged.out), merge_by_peft(load(base, "qwen2"), adapter, tmp_path / "peft"))


def test_what_is_exported_is_loaded_by_peft_with_its_biases(
    biased: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    base = tiny_models.folder("qwen2", "fp32")
    assert load_file(biased / "adapter_model.safetensors").keys() >= {PREFIX + BIAS}
    raw = changed(biased, tmp_path / "raw", BIAS, None)
    tensors, bias = load_file(raw / "adapter_model.safetensors"), load_file(biased / "adapter_model.safetensors")
    renamed = tensors | {f"{PREFIX}{BIAS.replace('.base_layer', '')}": bias[PREFIX + BIAS]}
    save_file(renamed, raw / "adapter_model.safetensors", {"format": "pt"})
    folder = loratool.export(loratool.export(raw, tmp_path / "single.st"), tmp_path / "folder")
    theirs = merge_by_peft(load(base, "qwen2"), folder, tmp_path / "peft")
    for number, adapter in enumerate((biased, raw, folder)):
        merged = loratool.merge(adapter, into=base, out=tmp_path / f"merged-{number}")
        assert_same_tensors(stored_tensors(merged.out), theirs)


SPELLINGS: dict[str, dict[str, str]] = {
    "PEFT's own": {"weight": "lm_head.weight"},
    "inside a model": {"weight": "lm_head.modules_to_save.default.weight"},
    "without the adapter's name": {"weight": "lm_head.modules_to_save.weight"},
    "twice": {"weight": "lm_head.weight", "again": "lm_head.modules_to_save.default.weight"},
    "beside the base's own": {
        "weight": "lm_head.modules_to_save.default.weight", "base": "lm_head.original_module.weight",
    },
}  # fmt: skip


@pytest.mark.parametrize("case", SPELLINGS)
def test_a_whole_module_is_the_same_under_each_of_pefts_names(
    case: str, tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    base, plain = tiny_models.folder("llama", "fp32"), tiny_adapters.folder("llama", modules_to_save=["lm_head"])
    tensors = load_file(plain / "adapter_model.safetensors")
    head = tensors.pop(f"{PREFIX}lm_head.weight")
    named = {f"{PREFIX}{name}": head * (2 if which == "base" else 1) for which, name in SPELLINGS[case].items()}
    spelled = shutil.copytree(plain, tmp_path / "spelled")
    save_file(tensors | named, spelled / "adapter_model.safetensors", {"format": "pt"})
    assert list(read_adapter(spelled).replacements) == ["lm_head.weight"]
    merged = loratool.merge(spelled, into=base, out=tmp_path / "merged")
    assert_same_tensors(stored_tensors(merged.out), merge_by_peft(load(base, "llama"), plain, tmp_path / "peft"))


def test_the_bases_own_copy_alone_is_no_module_that_was_trained(tiny_adapters: TinyAdapters, tmp_path: Path) -> None:
    plain = tiny_adapters.folder("llama", modules_to_save=["lm_head"])
    rename = {f"{PREFIX}lm_head.weight": f"{PREFIX}lm_head.original_module.weight"}
    only = copy_with(plain, tmp_path / "only", rename=lambda key: rename.get(key, key))
    with pytest.raises(LoratoolError, match="holds none of their tensors; the file is incomplete"):
        read_adapter(only)
    (only / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, "peft_type": "LORA"}))
    with pytest.raises(LoratoolError, match=r"lm_head\.original_module\.weight"):
        read_adapter(only)


def test_norms_that_were_saved_beside_the_factors_replace_the_bases_as_peft_loads_them(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    base = tiny_models.folder("llama", "bf16")
    adapter = save_plain(tmp_path / "adapter", {})
    tensors = load_file(adapter / "adapter_model.safetensors")
    norms = {f"{PREFIX}model.norm.weight": torch.full((64,), 1.5),
             f"{PREFIX}model.layers.1.input_layernorm.weight": torch.full((64,), 0.7)}  # fmt: skip
    save_file(tensors | norms, adapter / "adapter_model.safetensors", {"format": "pt"})
    merged = loratool.merge(adapter, into=base, out=tmp_path / "merged", undo=True)
    assert_same_tensors(stored_tensors(merged.out), merge_by_peft(load(base, "llama"), adapter, tmp_path / "peft"))
    back = loratool.unmerge(merged.out, out=tmp_path / "back")
    assert_same_tensors(stored_tensors(back.out), stored_tensors(base))


@pytest.mark.parametrize("saved", ["lm_head", [3], {"lm_head": 1}, [""]])
def test_a_list_that_is_none_is_refused(saved: Any, tiny_adapters: TinyAdapters, tmp_path: Path) -> None:
    adapter = copy_with(tiny_adapters.folder("llama"), tmp_path / "adapter", modules_to_save=saved)
    with pytest.raises(LoratoolError, match="must be a list of names"):
        read_adapter(adapter)


def test_a_module_that_the_base_lacks_is_refused(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    adapter = tiny_adapters.folder(
        "bert", modules_to_save=["classifier"], auto=transformers.AutoModelForSequenceClassification
    )
    how = r"which the base lacks.*AutoModelForSequenceClassification.from_pretrained\(BASE, num_labels=3\)"
    refuses(rf"'classifier.bias' .* {how}", [adapter], tiny_models.folder("bert-headless"), tmp_path)


def test_a_classifier_that_peft_lists_and_the_model_has_under_another_name_is_not_missed(tmp_path: Path) -> None:
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 131}  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BartForSequenceClassification(transformers.BartConfig(**sizes))
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
    adapter = save_peft_adapter(model, config, tmp_path / "adapter")
    assert json.loads((adapter / "adapter_config.json").read_text())["modules_to_save"] == ["classifier", "score"]
    loratool.merge(adapter, into=tmp_path / "base", out=tmp_path / "merged")
    load_base = transformers.BartForSequenceClassification.from_pretrained
    theirs = merge_by_peft(load_base(tmp_path / "base"), adapter, tmp_path / "peft")
    assert_same_tensors(stored_tensors(tmp_path / "merged"), theirs)


def test_a_classifier_that_the_base_has_and_the_adapter_lost_is_missed(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    adapter = copy_with(tiny_adapters.folder("bert"), tmp_path / "adapter", modules_to_save=["classifier", "score"])
    message = r"of which it holds no tensors, and the base has 'classifier\.(bias|weight)'; the file is incomplete"
    refuses(message, [adapter], tiny_models.folder("bert"), tmp_path)


def test_a_classifier_that_was_lost_beside_a_norm_that_was_not_is_missed(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    kept = tiny_adapters.folder("bert", modules_to_save=["pooler"])
    adapter = copy_with(kept, tmp_path / "adapter", modules_to_save=["pooler", "classifier", "score"])
    refuses("the base has 'classifier", [adapter], tiny_models.folder("bert"), tmp_path)


def test_half_a_module_is_refused(tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path) -> None:
    adapter = tiny_adapters.folder("bert", modules_to_save=["classifier"], task_type="SEQ_CLS")
    for half in ("weight", "bias"):
        damaged = changed(adapter, tmp_path / half, f"classifier.{half}", None)
        message = rf"and holds no 'classifier.{half}'; the file is incomplete"
        refuses(message, [damaged], tiny_models.folder("bert"), tmp_path)


def test_it_is_not_combined(tiny_adapters: TinyAdapters, tmp_path: Path) -> None:
    adapters = [tiny_adapters.folder("llama", modules_to_save=["lm_head"]), tiny_adapters.folder("llama", seed=2)]
    with pytest.raises(LoratoolError, match=r"'lm_head.weight' whole \(modules_to_save\)"):
        loratool.combine(adapters, "cat", out=tmp_path / "both.st")


def test_a_matrix_that_is_stored_in_4_bits_is_not_replaced_and_it_says_what_to_do(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    image = loratool.quantize(tiny_models.folder("llama", "bf16"), out=tmp_path / "image").out
    adapter = tiny_adapters.folder("llama", target_modules=["v_proj"], modules_to_save=["k_proj"])
    with pytest.raises(UnsupportedError, match=r"stores in 4 bits; .*--quantize nf4"):
        loratool.merge([adapter], into=image, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Embeddings that PEFT saves whole by itself


def grown(base: Path, folder: Path, tokens: int, architecture: str = "llama", **lora: Any) -> Path:
    """What PEFT saves of an adapter that was trained on a model with another vocabulary."""
    model = load(base, architecture)
    model.resize_token_embeddings(tokens)
    config = peft.LoraConfig(**({"r": 4, "target_modules": ["q_proj"]} | lora))
    return save_peft_adapter(model, config, folder, save_embedding_layers="auto")


@pytest.mark.parametrize(("architecture", "targets"), [("llama", ["q_proj"]), ("gpt2-untied", ["c_attn"])])
def test_embeddings_beside_the_factors_take_the_place_of_the_bases_as_in_peft(
    architecture: str, targets: list[str], tiny_models: TinyModels, tmp_path: Path
) -> None:
    base = tiny_models.folder(architecture, "fp32")
    config = peft.LoraConfig(r=4, target_modules=targets)
    adapter = save_peft_adapter(load(base, architecture), config, tmp_path / "adapter", save_embedding_layers=True)
    tensors = load_file(adapter / "adapter_model.safetensors")
    whole = {name: tensor + 1 for name, tensor in tensors.items() if ".lora_" not in name}
    assert len(whole) == 2
    save_file(tensors | whole, adapter / "adapter_model.safetensors", {"format": "pt"})
    merged = loratool.merge(adapter, into=base, out=tmp_path / "merged")
    assert_same_tensors(stored_tensors(merged.out), merge_by_peft(load(base, architecture), adapter, tmp_path / "peft"))
    copy = shutil.copytree(base, tmp_path / "copy")
    loratool.merge(adapter, into=copy, in_place=True)
    loratool.unmerge(copy, in_place=True)
    assert_same_tensors(stored_tensors(copy), stored_tensors(base))


@pytest.mark.parametrize(
    "lora", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}, {"target_modules": ["lm_head", "q_proj"]}]
)
def test_a_grown_vocabulary_is_called_that_and_merges_into_a_base_that_was_grown(
    lora: dict[str, Any], tiny_models: TinyModels, tmp_path: Path
) -> None:
    base = tiny_models.folder("llama", "fp32")
    rows = int(load_file(base / "model.safetensors")["lm_head.weight"].shape[0])
    adapter = grown(base, tmp_path / "adapter", rows + 8, **lora)
    tensors = load_file(adapter / "adapter_model.safetensors")
    plain = {name: tensor for name, tensor in tensors.items() if "base_layer" not in name}
    save_file(plain, adapter / "adapter_model.safetensors", {"format": "pt"})
    sentence = (
        rf"vocabulary of {rows + 8} tokens and the base has {rows}: grow the base's first .*_embeddings\({rows + 8}\)"
    )
    with pytest.raises(LoratoolError, match=sentence) as raised:
        loratool.merge(adapter, into=base, out=tmp_path / "merged")
    assert "right base" not in str(raised.value)
    model = load(base, "llama")
    model.resize_token_embeddings(rows + 8)
    model.save_pretrained(tmp_path / "larger")
    merged = loratool.merge(adapter, into=tmp_path / "larger", out=tmp_path / "merged")
    theirs = merge_by_peft(load(tmp_path / "larger", "llama"), adapter, tmp_path / "peft")
    assert_same_tensors(stored_tensors(merged.out), theirs)


def test_a_vocabulary_that_shrank_is_called_that_and_merges_into_a_base_that_was_cut(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    base = tiny_models.folder("llama", "fp32")
    adapter = grown(base, tmp_path / "adapter", 100)
    with pytest.raises(
        LoratoolError, match=r"of 100 tokens and the base has .* cut the base's first .*_embeddings\(100\)"
    ):
        loratool.merge(adapter, into=base, out=tmp_path / "merged")
    smaller = resized(base, tmp_path / "smaller", 100)
    merged = loratool.merge(adapter, into=smaller, out=tmp_path / "merged")
    assert_same_tensors(stored_tensors(merged.out), merge_by_peft(load(smaller, "llama"), adapter, tmp_path / "peft"))


def resized(base: Path, folder: Path, tokens: int, architecture: str = "llama") -> Path:
    """The base with another number of tokens, as the messages advise."""
    model = load(base, architecture)
    model.resize_token_embeddings(tokens)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [192, 139, 100])
def test_a_tied_pair_that_was_saved_whole_with_another_vocabulary_stays_tied(
    tokens: int, dtype: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    """192 is the base's vocabulary padded to a multiple of 64."""
    base = tiny_models.folder("llama-tied", dtype)
    adapter = grown(tiny_models.folder("llama-tied", "fp32"), tmp_path / "adapter", tokens, "llama-tied")
    assert set(read_adapter(adapter).replacements) == {"lm_head.weight", "model.embed_tokens.weight"}
    refuses(rf"vocabulary of {tokens} tokens .*_embeddings\({tokens}\)", [adapter], base, tmp_path / "none")
    other = resized(base, tmp_path / "resized", tokens, "llama-tied")
    merged = loratool.merge(adapter, into=other, out=tmp_path / "merged", undo=True)
    ours = stored_tensors(merged.out)
    assert "lm_head.weight" not in ours
    theirs = merge_by_peft(load(other, "llama-tied"), adapter, tmp_path / "peft")
    assert_same_tensors(ours, theirs)
    assert_same_tensors(stored_tensors(loratool.unmerge(merged.out, out=tmp_path / "back").out), stored_tensors(other))


def test_inner_copies_that_differ_are_refused(tiny_models: TinyModels, tmp_path: Path) -> None:
    adapter = grown(tiny_models.folder("llama", "fp32"), tmp_path / "adapter", 140, modules_to_save=["lm_head"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    inner = f"{PREFIX}lm_head.modules_to_save.weight"
    assert inner in tensors
    assert list(read_adapter(adapter).replacements) == ["lm_head.weight", "model.embed_tokens.weight"]
    save_file(tensors | {inner: tensors[inner] + 1}, adapter / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(LoratoolError, match=r"two versions of .*lm_head\.weight.*save it again"):
        read_adapter(adapter)
    del tensors[f"{PREFIX}lm_head.weight"]
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    assert list(read_adapter(adapter).replacements) == ["lm_head.weight", "model.embed_tokens.weight"]
