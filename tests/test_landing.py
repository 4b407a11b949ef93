"""Where an adapter lands under the names, and in the packed parameters, that its base has in other programs: PEFT's own bytes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_adapters import ADAPTER_PREFIX, copy_with, merge_by_peft, save_peft_adapter, save_plain_adapter
from tiny_models import as_stored, as_torch, assert_same_tensors, rewrite_tensors, stored_in_file, stored_tensors

import loratool
from loratool.architecture import Architecture, Spelling, View, architecture_of
from loratool.errors import LoratoolError
from loratool.formats.read import read_adapter
from loratool.formats.write import write_peft, write_single_file

IMAGE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
         "image_size": 8, "patch_size": 4}  # fmt: skip
TEXT = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SWIN = {"embed_dim": 8, "depths": [1, 2], "num_heads": [2, 2], "image_size": 16, "patch_size": 2, "window_size": 2}

RENAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "ViTForImageClassification": ("ViTConfig", IMAGE),
    "DeiTForImageClassification": ("DeiTConfig", IMAGE),
    "Dinov2ForImageClassification": ("Dinov2Config", IMAGE),
    "BeitForImageClassification": ("BeitConfig", IMAGE),
    "SwinForImageClassification": ("SwinConfig", SWIN),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", TEXT),
    "NomicBertForMaskedLM": ("NomicBertConfig", TEXT),
}
"""Models whose modules transformers 5 renames beyond a prefix, with small sizes."""


def save_base(model_class: str, config: str, sizes: dict[str, Any], folder: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config)(**sizes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.to(dtype).save_pretrained(folder)


def load_base(model_class: str, folder: Path, dtype: torch.dtype) -> Any:
    return getattr(transformers, model_class).from_pretrained(folder, dtype=dtype)


def architecture(folder: Path) -> Architecture:
    return architecture_of(json.loads((folder / "config.json").read_text()), stored_tensors(folder))


def in_other_words(adapter: Path, folder: Path, rename: Callable[[str], str]) -> Path:
    """Copy an adapter, with `rename` applied to the names of its modules' weights."""

    def key(name: str) -> str:
        module, _, rest = name.removeprefix(ADAPTER_PREFIX).partition(".lora_")
        return f"{ADAPTER_PREFIX}{rename(f'{module}.weight').removesuffix('.weight')}.lora_{rest}"

    return copy_with(adapter, folder, key, target_modules=None)


@pytest.mark.parametrize("model_class", RENAMED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapter_of_transformers_5_lands_in_a_checkpoint_with_names_of_transformers_4_and_the_reverse(
    model_class: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    config, sizes = RENAMED[model_class]
    base = tmp_path / "base"
    save_base(model_class, config, sizes, base, dtype)
    lora = peft.LoraConfig(r=2, lora_alpha=3, target_modules="all-linear")
    adapter = save_peft_adapter(
        load_base(model_class, base, torch.float32), lora, tmp_path / "adapter", save_embedding_layers=False
    )
    result = loratool.merge([adapter], into=base, out=tmp_path / "out")
    merge_by_peft(load_base(model_class, base, dtype), adapter, tmp_path / "theirs")
    theirs = stored_tensors(tmp_path / "theirs")
    assert_same_tensors(stored_tensors(tmp_path / "out"), theirs)
    assert any("matched by what is known of models of type" in note for note in result.notes) != (
        model_class == "GPTNeoXForCausalLM"
    )

    names = architecture(base)
    old = in_other_words(
        adapter, tmp_path / "old", lambda name: names.spelled(names.canonical(name), Spelling.TRANSFORMERS_4)
    )
    loratool.merge([old], into=base, out=tmp_path / "of old")
    assert_same_tensors(stored_tensors(tmp_path / "of old"), theirs)

    rewrite_tensors(base, names.canonical)
    loratool.merge([old], into=base, out=tmp_path / "into new")
    assert_same_tensors(
        stored_tensors(tmp_path / "into new"), {names.canonical(name): tensor for name, tensor in theirs.items()}
    )


def test_a_renamed_module_lands_below_a_prefix_that_the_adapter_lacks(tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_base("ViTForImageClassification", "ViTConfig", IMAGE, base, torch.bfloat16)
    headless = transformers.ViTModel.from_pretrained(base, dtype=torch.float32, add_pooling_layer=False)
    lora = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "fc1"])
    adapter = save_peft_adapter(headless, lora, tmp_path / "adapter")
    loratool.merge([adapter], into=base, out=tmp_path / "out")
    with_head = copy_with(adapter, tmp_path / "with head", lambda key: key.replace(".model.", ".model.vit."))
    merge_by_peft(load_base("ViTForImageClassification", base, torch.bfloat16), with_head, tmp_path / "theirs")
    assert_same_tensors(stored_tensors(tmp_path / "out"), stored_tensors(tmp_path / "theirs"))


def test_the_head_of_gpt_neox_lands_under_its_stored_name(tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_base("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT, base, torch.float32)
    assert "embed_out.weight" in stored_tensors(base)
    lora = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["lm_head", "query_key_value"])
    model = load_base("GPTNeoXForCausalLM", base, torch.float32)
    adapter = save_peft_adapter(model, lora, tmp_path / "adapter", save_embedding_layers=False)
    loratool.merge([adapter], into=base, out=tmp_path / "out")
    merge_by_peft(load_base("GPTNeoXForCausalLM", base, torch.float32), adapter, tmp_path / "theirs")
    assert_same_tensors(stored_tensors(tmp_path / "out"), stored_tensors(tmp_path / "theirs"))


def test_two_names_of_one_parameter_are_refused(tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_base("ViTForImageClassification", "ViTConfig", IMAGE, base, torch.float32)
    lora = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"])
    new = save_peft_adapter(load_base("ViTForImageClassification", base, torch.float32), lora, tmp_path / "new")
    names = architecture(base)
    both = in_other_words(
        new,
        tmp_path / "both",
        lambda name: name if ".0." in name else names.spelled(name, Spelling.STORED).replace(".1.", ".0."),
    )
    with pytest.raises(
        LoratoolError, match=r"both land on 'vit\.encoder\.layer\.0\.attention\.attention\.query\.weight'"
    ):
        loratool.merge([both], into=base, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_module_that_no_table_knows_is_refused_with_the_nearest_names(tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_base("ViTForImageClassification", "ViTConfig", IMAGE, base, torch.float32)
    lora = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "fc1"])
    new = save_peft_adapter(load_base("ViTForImageClassification", base, torch.float32), lora, tmp_path / "new")
    wrong = in_other_words(new, tmp_path / "wrong", lambda name: name.replace("1.mlp.fc1", "7.mlp.fc1"))
    with pytest.raises(
        LoratoolError, match=r"1 of the modules of 'wrong' land on no tensor(.|\n)*vit\.layers\.7\.mlp\.fc1"
    ):
        loratool.merge([wrong], into=base, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


PHI = TEXT | {"num_key_value_heads": 1, "pad_token_id": 0}


def test_a_fused_linear_layer_stored_in_parts_gets_each_part_of_its_update(tmp_path: Path) -> None:
    """Phi-3 fuses query, key and value, and gate and up. This checkpoint has a tensor for each of them."""
    fused = tmp_path / "fused"
    save_base("Phi3ForCausalLM", "Phi3Config", PHI, fused, torch.bfloat16)
    lora = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["qkv_proj", "gate_up_proj", "o_proj"])
    adapter = save_peft_adapter(load_base("Phi3ForCausalLM", fused, torch.float32), lora, tmp_path / "adapter")
    merge_by_peft(load_base("Phi3ForCausalLM", fused, torch.bfloat16), adapter, tmp_path / "theirs")
    split = divided(fused, tmp_path / "split")
    result = loratool.merge([adapter], into=split, out=tmp_path / "out")
    assert len(result.plan.targets) == 2 * (3 + 2 + 1)
    theirs = divided(tmp_path / "theirs", tmp_path / "theirs in parts")
    assert_same_tensors(stored_tensors(tmp_path / "out"), stored_tensors(theirs))


@pytest.mark.parametrize("feedforward", [["gate_up_proj"], []])
def test_a_vector_over_inputs_or_outputs_of_a_fused_layer_reaches_its_parts(
    feedforward: list[str], tmp_path: Path
) -> None:
    fused = tmp_path / "fused"
    save_base("Phi3ForCausalLM", "Phi3Config", PHI, fused, torch.float32)
    config = peft.IA3Config(target_modules=["qkv_proj", "gate_up_proj"], feedforward_modules=feedforward)
    adapter = save_peft_adapter(load_base("Phi3ForCausalLM", fused, torch.float32), config, tmp_path / "adapter")
    merge_by_peft(load_base("Phi3ForCausalLM", fused, torch.float32), adapter, tmp_path / "theirs")
    split = divided(fused, tmp_path / "split")
    loratool.merge([adapter], into=split, out=tmp_path / "out")
    theirs = divided(tmp_path / "theirs", tmp_path / "theirs in parts")
    assert_same_tensors(stored_tensors(tmp_path / "out"), stored_tensors(theirs))
    assert stored_tensors(theirs) != stored_tensors(split)


@pytest.mark.parametrize(
    "config",
    [
        peft.ShiraConfig(r=2, target_modules=["qkv_proj"], random_seed=1),
        peft.FourierFTConfig(n_frequency=9, target_modules=["qkv_proj"], init_weights=False),
        peft.MissConfig(r=2, target_modules=["qkv_proj"], init_weights="mini", mini_r=8),
    ],
    ids=["shira", "fourierft", "miss mini"],
)
def test_an_update_that_has_no_parts_is_refused_where_a_layer_is_stored_in_parts(
    config: peft.PeftConfig, tmp_path: Path
) -> None:
    """The file does not tell the outputs of the whole layer, which decide what each of them adds."""
    fused = tmp_path / "fused"
    save_base("Phi3ForCausalLM", "Phi3Config", PHI, fused, torch.float32)
    adapter = save_peft_adapter(load_base("Phi3ForCausalLM", fused, torch.float32), config, tmp_path / "adapter")
    split = divided(fused, tmp_path / "split")
    with pytest.raises(
        LoratoolError, match=r"qkv_proj\.weight.* has no parts, and the base stores them apart, as in '.*q_proj"
    ):
        loratool.merge([adapter], into=split, out=tmp_path / "out")
    loratool.merge([adapter], into=fused, out=tmp_path / "whole")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("use_dora", [False, True])
def test_layers_that_a_checkpoint_fuses_get_their_updates_side_by_side(use_dora: bool, tmp_path: Path) -> None:
    """The reverse: an adapter of the parts, in a checkpoint that fuses them. Its undo restores the base."""
    fused = tmp_path / "fused"
    save_base("Phi3ForCausalLM", "Phi3Config", PHI, fused, torch.bfloat16)
    split = divided(fused, tmp_path / "split")
    targets = ["q_proj", "v_proj", "up_proj"]
    shapes = {
        name.removesuffix(".weight"): torch.Size(tensor.shape)
        for name, tensor in stored_tensors(split).items()
        if name.split(".")[-2] in targets
    }
    adapter = save_plain_adapter(tmp_path / "adapter", dict(shapes), use_dora=use_dora)
    if use_dora:
        file = adapter / "adapter_model.safetensors"
        m = {f"{ADAPTER_PREFIX}{name}.lora_magnitude_vector": torch.rand(rows) for name, (rows, _) in shapes.items()}
        save_file(load_file(file) | m, file)
    loratool.merge([adapter], into=split, out=tmp_path / "parts")
    loratool.merge([adapter], into=fused, out=tmp_path / "out", undo=True)
    ours = divided(tmp_path / "out", tmp_path / "ours")
    assert_same_tensors(stored_tensors(ours), stored_tensors(tmp_path / "parts"))
    assert stored_tensors(ours) != stored_tensors(split)
    loratool.unmerge(tmp_path / "out", out=tmp_path / "again")
    assert_same_tensors(stored_tensors(tmp_path / "again"), stored_tensors(fused))


def divided(source: Path, folder: Path) -> Path:
    """Copy a model, with a tensor for each matrix that a tensor of the source packs."""
    known, stored = architecture(source), stored_tensors(source)
    tensors = {}
    for name in stored:
        for matrix in known.matrices(name, spelling=Spelling.STORED):
            tensors[name if matrix.view.is_whole else matrix.name] = viewed(as_torch(stored[name]), matrix.view)
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def viewed(tensor: torch.Tensor, view: View) -> torch.Tensor:
    """Return the matrix or vector that a view of a parameter shows; of a whole one all, in its own orientation."""
    part = tensor if view.expert is None else tensor[view.expert]
    if view.is_whole:
        return tensor
    return part[:, view.outputs].T if view.transposed and part.dim() == 2 else part[view.outputs]


def test_two_updates_of_one_part_of_a_tensor_are_refused(tmp_path: Path) -> None:
    fused = tmp_path / "fused"
    save_base("Phi3ForCausalLM", "Phi3Config", PHI, fused, torch.float32)
    modules = {f"model.layers.0.self_attn.{name}_proj": (rows, 16) for name, rows in (("q", 16), ("qkv", 32))}
    adapter = save_plain_adapter(tmp_path / "adapter", modules)
    with pytest.raises(LoratoolError, match=r"both land on 'model\.layers\.0\.self_attn\.qkv_proj\.weight'"):
        loratool.merge([adapter], into=fused, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "rows"), [("q_proj", 17), ("k_proj", 16), ("gate_proj", 48)])
def test_an_update_that_does_not_fit_its_part_is_refused(name: str, rows: int, tmp_path: Path) -> None:
    fused = tmp_path / "fused"
    save_base("Phi3ForCausalLM", "Phi3Config", PHI, fused, torch.float32)
    block = "mlp" if name == "gate_proj" else "self_attn"
    adapter = save_plain_adapter(tmp_path / "adapter", {f"model.layers.0.{block}.{name}": (rows, 16)})
    with pytest.raises(LoratoolError, match=rf"fits a matrix of shape \[{rows}, 16\]"):
        loratool.merge([adapter], into=fused, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


MOE = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
       "head_dim": 8, "intermediate_size": 24, "moe_intermediate_size": 24, "num_experts": 3, "num_local_experts": 3,
       "num_experts_per_tok": 1}  # fmt: skip
STACKS: dict[str, tuple[str, dict[str, Any]]] = {
    "GptOssForCausalLM": ("GptOssConfig", MOE),
    "Llama4ForCausalLM": ("Llama4TextConfig", MOE | {"intermediate_size_mlp": 24}),
    "GraniteMoeForCausalLM": ("GraniteMoeConfig", MOE),
}
"""Models that are stored with one stack of experts: transposed and interleaved, transposed, and under other names."""


@pytest.mark.parametrize("model_class", STACKS)
@pytest.mark.parametrize("undo", [False, True])
def test_an_update_of_one_expert_lands_in_its_part_of_a_stack(model_class: str, undo: bool, tmp_path: Path) -> None:
    config, sizes = STACKS[model_class]
    fused = tmp_path / "fused"
    save_base(model_class, config, sizes, fused, torch.bfloat16)
    split = divided(fused, tmp_path / "split")
    wanted = r"experts\.(0\.(gate|down)|1\.up|2\.(gate|up|down))_proj\.weight"
    shapes = {
        name.removesuffix(".weight"): tensor.shape
        for name, tensor in stored_tensors(split).items()
        if re.search(wanted, name)
    }
    assert len(shapes) == 6
    adapter = save_plain_adapter(tmp_path / "adapter", shapes)  # type: ignore[arg-type]
    loratool.merge([adapter], into=split, out=tmp_path / "parts")
    result = loratool.merge([adapter], into=fused, out=tmp_path / "out", undo=undo)
    assert len(result.plan.targets) == 2
    ours = divided(tmp_path / "out", tmp_path / "ours")
    assert_same_tensors(stored_tensors(ours), stored_tensors(tmp_path / "parts"))
    assert stored_tensors(ours) != stored_tensors(split)
    if undo:
        loratool.unmerge(tmp_path / "out", out=tmp_path / "again")
        assert_same_tensors(stored_tensors(tmp_path / "again"), stored_tensors(fused))


TARGETED: dict[str, tuple[str, dict[str, Any], str]] = {
    "MixtralForCausalLM": ("MixtralConfig", MOE, "mlp"),
    "Qwen2MoeForCausalLM": ("Qwen2MoeConfig", MOE | {"shared_expert_intermediate_size": 20}, "mlp"),
    "Qwen3MoeForCausalLM": ("Qwen3MoeConfig", MOE, "mlp"),
    "GptOssForCausalLM": ("GptOssConfig", MOE, "mlp"),
    "Llama4ForCausalLM": ("Llama4TextConfig", MOE | {"intermediate_size_mlp": 24}, "feed_forward"),
    "OlmoeForCausalLM": ("OlmoeConfig", MOE, "mlp"),
    "GraniteMoeForCausalLM": ("GraniteMoeConfig", MOE, "block_sparse_moe"),
    "PhimoeForCausalLM": ("PhimoeConfig", MOE, "mlp"),
    "Glm4MoeForCausalLM": (
        "Glm4MoeConfig",
        MOE | {"n_routed_experts": 3, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1},
        "mlp",
    ),
    "DeepseekV3ForCausalLM": (
        "DeepseekV3Config",
        MOE
        | {"n_routed_experts": 4, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "kv_lora_rank": 8,
           "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
        "mlp",
    ),
}  # fmt: skip
"""Models with experts, and the module that holds them."""


@pytest.mark.parametrize("model_class", TARGETED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_factors_of_a_stack_of_experts_land_as_peft_merges_them(
    model_class: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    config, sizes, block = TARGETED[model_class]
    base, full = tmp_path / "base", tmp_path / "full"
    save_base(model_class, config, sizes, base, dtype)
    lora = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["q_proj", "q_b_proj"],
        target_parameters=[f"{block}.experts.down_proj", f"{block}.experts.gate_up_proj"],
        rank_pattern={"experts.down_proj": 4},
    )
    adapter = save_peft_adapter(load_base(model_class, base, torch.float32), lora, tmp_path / "adapter")
    assert any(".experts.base_layer.lora_A." in name for name in stored_tensors(adapter))
    loratool.merge([adapter], into=base, out=tmp_path / "out", undo=True)
    # PEFT rounds the change of a stack to a half type before it adds it, so its merge in fp32 is rounded once.
    load_base(model_class, base, torch.float32).save_pretrained(full)
    merge_by_peft(load_base(model_class, full, torch.float32), adapter, tmp_path / "theirs")
    theirs = {name: as_stored(as_torch(each).to(dtype)) for name, each in stored_tensors(tmp_path / "theirs").items()}
    ours = stored_tensors(tmp_path / "out")
    assert_same_tensors(ours, theirs)
    assert sum(ours[name] != each for name, each in stored_tensors(base).items()) >= 3
    loratool.unmerge(tmp_path / "out", out=tmp_path / "again")
    assert_same_tensors(stored_tensors(tmp_path / "again"), stored_tensors(base))


def stacked_adapter(folder: Path, version: str | None, shapes: dict[str, tuple[int, int]], experts: int = 3) -> Path:
    """Write factors of stacks of experts by hand: for each parameter the columns of A and the rows of B."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for level, (columns, rows) in zip(("experts.base_layer", "experts"), shapes.values(), strict=True):
        name = f"{ADAPTER_PREFIX}model.layers.0.mlp.{level}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(experts * 2, columns, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(rows, experts * 2, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    facts = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "target_parameters": [f"mlp.experts.{name}" for name in shapes],
    }
    (folder / "adapter_config.json").write_text(
        json.dumps(facts | ({} if version is None else {"peft_version": version}))
    )
    return folder


SQUARE = MOE | {"intermediate_size": 16, "moe_intermediate_size": 16}


@pytest.mark.parametrize("model_class", ["MixtralForCausalLM", "GptOssForCausalLM"])
@pytest.mark.parametrize("version", ["0.17.1", "0.18.1", "0.19.0", "0.19.1", "0.21.0.dev0"])
def test_the_version_of_peft_decides_about_square_experts(model_class: str, version: str, tmp_path: Path) -> None:
    """Up to 0.18.1 in and out were never swapped, 0.19.0 swapped them in transposed stacks, and later ones in the others."""
    base = tmp_path / "base"
    save_base(model_class, TARGETED[model_class][0], SQUARE, base, torch.float32)
    is_transposed = model_class == "GptOssForCausalLM"
    swapped = {"0.17.1": False, "0.18.1": False, "0.19.0": is_transposed}.get(version, not is_transposed)
    sides = (16, 32) if swapped != is_transposed else (32, 16)
    adapter = stacked_adapter(tmp_path / "adapter", version, {"gate_up_proj": sides, "down_proj": (16, 16)})
    loratool.merge([adapter], into=base, out=tmp_path / "out")
    factors = load_file(adapter / "adapter_model.safetensors")
    expected = load_base(model_class, base, torch.float32)
    experts = expected.model.layers[0].mlp.experts
    for name, level in (("gate_up_proj", "experts.base_layer"), ("down_proj", "experts")):
        a, b = (factors[f"{ADAPTER_PREFIX}model.layers.0.mlp.{level}.lora_{letter}.weight"] for letter in "AB")
        a, b = a.reshape(3, 2, -1), b.reshape(len(b), 2, 3)
        delta = torch.einsum("o r e, e r i -> e o i" if swapped else "o r e, e r i -> e i o", b, a)
        getattr(experts, name).data += delta
    expected.save_pretrained(tmp_path / "theirs")
    assert_same_tensors(stored_tensors(tmp_path / "out"), stored_tensors(tmp_path / "theirs"))


@pytest.mark.parametrize("version", [None, "", "unknown"])
def test_square_experts_of_an_unknown_version_of_peft_are_refused(version: str | None, tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_base("GptOssForCausalLM", "GptOssConfig", SQUARE, base, torch.float32)
    adapter = stacked_adapter(tmp_path / "adapter", version, {"gate_up_proj": (16, 32), "down_proj": (16, 16)})
    with pytest.raises(LoratoolError, match=r"experts\.down_proj.*depends on the version of PEFT.*peft_version"):
        loratool.merge([adapter], into=base, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model_class", ["MixtralForCausalLM", "GptOssForCausalLM"])
@pytest.mark.parametrize(("experts", "message"), [(2, "and the base has more"), (4, "and the base has less")])
def test_a_stack_of_more_or_fewer_experts_is_refused(
    model_class: str, experts: int, message: str, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    save_base(model_class, TARGETED[model_class][0], MOE, base, torch.float32)
    shapes = {"gate_up_proj": (16, 48), "down_proj": (24, 16)}
    adapter = stacked_adapter(tmp_path / "adapter", "0.21.0", shapes, experts)
    with pytest.raises(LoratoolError, match=message):
        loratool.merge([adapter], into=base, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("shapes", "config", "message"),
    [
        ({"gate_up_proj": (16, 48), "down_proj": (25, 16)}, {}, "fits a matrix of shape"),
        ({"gate_up_proj": (17, 48), "down_proj": (24, 16)}, {}, "fits a matrix of shape"),
        ({"gate_up_proj": (16, 48), "down_proj": (24, 16)}, {"r": 4}, "is no multiple of the rank 4"),
        ({"gate_up_proj": (16, 48), "down_proj": (24, 16)}, {"target_parameters": ["experts.down_proj"]},
         "factors for 2 parameters of .* names 1"),
        ({"gate_up_proj": (16, 48), "down_proj": (24, 16)}, {"target_parameters": None}, "names 0"),
        ({"gate_up_proj": (16, 48), "down_proj": (24, 16)}, {"target_parameters": 7}, "must be a list of names"),
        ({"gate_up_proj": (16, 48), "w": (24, 16)}, {}, "in which order"),
    ],
)  # fmt: skip
def test_factors_of_experts_that_contradict_the_base_or_their_configuration_are_refused(
    shapes: dict[str, tuple[int, int]], config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    save_base("Qwen3MoeForCausalLM", "Qwen3MoeConfig", MOE, base, torch.float32)
    adapter = copy_with(stacked_adapter(tmp_path / "one", "0.21.0", shapes), tmp_path / "adapter", **config)
    with pytest.raises(LoratoolError, match=message):
        loratool.merge([adapter], into=base, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_stack_lands_below_a_prefix_that_the_adapter_lacks(tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_base("Qwen3MoeForCausalLM", "Qwen3MoeConfig", MOE, base, torch.float32)
    adapter = stacked_adapter(tmp_path / "adapter", "0.21.0", {"gate_up_proj": (16, 48), "down_proj": (24, 16)})
    loratool.merge([adapter], into=base, out=tmp_path / "out")
    around = "model.language_model."
    rewrite_tensors(base, lambda name: name.replace("model.", around))
    loratool.merge([adapter], into=base, out=tmp_path / "around")
    ours = {name.replace(around, "model."): each for name, each in stored_tensors(tmp_path / "around").items()}
    assert_same_tensors(ours, stored_tensors(tmp_path / "out"))


def test_a_parameter_of_a_linear_layer_is_targeted_as_the_layer_itself(tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_base("Phi3ForCausalLM", "Phi3Config", PHI, base, torch.bfloat16)
    lora = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["o_proj"], target_parameters=["mlp.down_proj.weight"])
    adapter = save_peft_adapter(load_base("Phi3ForCausalLM", base, torch.float32), lora, tmp_path / "adapter")
    loratool.merge([adapter], into=base, out=tmp_path / "out")
    load_base("Phi3ForCausalLM", base, torch.float32).save_pretrained(tmp_path / "full")
    merge_by_peft(load_base("Phi3ForCausalLM", tmp_path / "full", torch.float32), adapter, tmp_path / "theirs")
    theirs = stored_tensors(tmp_path / "theirs").items()
    assert_same_tensors(
        stored_tensors(tmp_path / "out"), {name: as_stored(as_torch(each).bfloat16()) for name, each in theirs}
    )


def test_a_parameter_of_a_transposed_linear_layer_is_refused(tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_base(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2},
        base,
        torch.float32,
    )
    lora = peft.LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=["attn.c_proj.weight"])
    adapter = save_peft_adapter(load_base("GPT2LMHeadModel", base, torch.float32), lora, tmp_path / "adapter")
    with pytest.raises(LoratoolError, match="target_parameters"):
        loratool.merge([adapter], into=base, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_experts_is_written_as_it_was_read_and_has_no_singular_values_to_cut(tmp_path: Path) -> None:
    shapes = {"gate_up_proj": (16, 48), "down_proj": (24, 16)}
    adapter = stacked_adapter(tmp_path / "adapter", "0.21.0", shapes)
    write_peft(read_adapter(adapter), tmp_path / "folder")
    write_single_file(read_adapter(adapter), tmp_path / "one.safetensors")
    expected = stored_tensors(adapter)
    assert_same_tensors(stored_tensors(tmp_path / "folder"), expected)
    assert_same_tensors(stored_in_file(tmp_path / "one.safetensors"), expected)
    with pytest.raises(LoratoolError, match=r"lora r=2 of 3 experts.*not a product of two matrices"):
        loratool.truncate(adapter, rank=1, out=tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
