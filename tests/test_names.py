"""Which base tensor an adapter's module lands on: exact names, known prefixes, never a guess."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_adapters import copy_with, merge_by_peft, merged_once_rounded, save_peft_adapter, save_plain_adapter
from tiny_models import (
    Layout,
    as_torch,
    assert_same_tensors,
    digest,
    load,
    rewrite_tensors,
    save_plain_model,
    stored_tensors,
)

import loratool
from loratool.errors import LoratoolError

if TYPE_CHECKING:
    from tiny_adapters import TinyAdapters
    from tiny_models import TinyModels


def with_names(base: Path, copy: Path, rename: Callable[[str], str]) -> Path:
    """Copy a model under other tensor names."""
    shutil.copytree(base, copy)
    rewrite_tensors(copy, rename)
    return copy


def plain_base(folder: Path, modules: Iterable[str], shape: tuple[int, int] = (24, 16)) -> Path:
    """A model that has a weight for each module."""
    generator = torch.Generator().manual_seed(9)
    return save_plain_model(
        folder, {f"{module}.weight": torch.randn(shape, generator=generator).bfloat16() for module in modules}
    )


def expect_landing(adapter: Path, base: Path, out: Path, rename: Callable[[str], str] = lambda name: name) -> None:
    """Merge; exactly the tensors that `rename` makes of the adapter's names change, by the right amount."""
    loratool.merge([adapter], into=base, out=out)
    expected = merged_once_rounded(stored_tensors(base), [(adapter, 1.0)], rename=rename)
    assert_same_tensors(stored_tensors(out), expected)


def refusal(adapter: Path, base: Path, folder: Path) -> str:
    """Return the message with which the merge is refused; nothing may be written or changed."""
    before = digest(base)
    folder.mkdir()
    with pytest.raises(LoratoolError) as raised:
        loratool.merge([adapter], into=base, out=folder / "out")
    assert list(folder.iterdir()) == []
    assert digest(base) == before
    return str(raised.value)


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_bert_adapter_trained_without_head_lands_below_the_prefix_bert(
    layout: Layout, tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    base = tiny_models.folder("bert", "bf16", layout)
    adapter = tiny_adapters.folder("bert", r=5, lora_alpha=7, auto=transformers.AutoModel)
    loratool.merge([adapter], into=base, out=tmp_path / "out")
    headless = tiny_adapters.merged_by_peft("bert", "bf16", adapter, auto=transformers.AutoModel)
    theirs = {f"bert.{name}": tensor for name, tensor in headless.items()}
    assert_same_tensors(stored_tensors(tmp_path / "out"), stored_tensors(base) | theirs)


def test_bert_adapter_trained_with_head_lands_in_a_checkpoint_without_prefix(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    adapter = tiny_adapters.folder("bert", target_modules=["query", "attention.output.dense"])
    base = tiny_models.folder("bert-headless", "bf16")
    expect_landing(adapter, base, tmp_path / "out", lambda name: name.removeprefix("bert."))


def test_gpt2_adapter_trained_without_head_lands_below_the_prefix_transformer(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    base = tiny_models.folder("gpt2", "bf16")
    adapter = tiny_adapters.folder("gpt2", r=5, lora_alpha=7, auto=transformers.AutoModel)
    loratool.merge([adapter], into=base, out=tmp_path / "out")
    headless = tiny_adapters.merged_by_peft("gpt2", "bf16", adapter, auto=transformers.AutoModel)
    theirs = {f"transformer.{name}": tensor for name, tensor in headless.items()}
    assert_same_tensors(stored_tensors(tmp_path / "out"), stored_tensors(base) | theirs)


def test_patterns_match_the_adapters_own_names_and_not_the_checkpoints(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    base = tiny_models.folder("gpt2-without-prefix", "fp32")
    adapter = tiny_adapters.folder(
        "gpt2-without-prefix",
        r=4,
        alpha_pattern={"^transformer.h.0.attn.c_attn": 3, "^h.1.attn.c_attn": 5},
        rank_pattern={"^transformer.h.1.mlp.c_fc": 7},
    )
    loratool.merge([adapter], into=base, out=tmp_path / "out")
    peft = tiny_adapters.merged_by_peft("gpt2-without-prefix", "fp32", adapter)
    theirs = {name.removeprefix("transformer."): tensor for name, tensor in peft.items()}
    assert_same_tensors(stored_tensors(tmp_path / "out"), stored_tensors(base) | theirs)


def test_old_opt_checkpoint_without_the_prefix_model(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    base = with_names(
        tiny_models.folder("opt", "bf16", "sharded"),
        tmp_path / "base",
        lambda name: name.removeprefix("model."),
    )
    expect_landing(tiny_adapters.folder("opt"), base, tmp_path / "out", lambda name: name.removeprefix("model."))


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_adapter_of_the_language_model_lands_in_the_checkpoint_around_it(
    prefix: str, tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    def around(name: str) -> str:
        return re.sub(r"^model\.", prefix, name)

    base = with_names(tiny_models.folder("llama", "bf16", "sharded"), tmp_path / "base", around)
    expect_landing(tiny_adapters.folder("llama"), base, tmp_path / "out", around)


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_adapter_of_the_whole_lands_in_the_language_model_alone(
    prefix: str, tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    adapter = copy_with(
        tiny_adapters.folder("llama"),
        tmp_path / "adapter",
        lambda key: key.replace(".model.model.", f".model.{prefix}"),
    )
    expect_landing(adapter, tiny_models.folder("llama"), tmp_path / "out", lambda name: name.replace(prefix, "model."))


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "qkv", "lm_head"]], ids=str)
def test_an_adapter_of_language_and_vision_lands_in_a_checkpoint_with_other_names_for_both(
    targets: Any, tmp_path: Path
) -> None:
    text = {"vocab_size": 131, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}  # fmt: skip
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    transformers.Qwen2VLForConditionalGeneration(config).bfloat16().save_pretrained(tmp_path / "base")

    def load_base(dtype: torch.dtype) -> Any:
        return transformers.Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "base", dtype=dtype)

    lora = peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets, modules_to_save=["ln_q"])
    adapter = save_peft_adapter(load_base(torch.float32), lora, tmp_path / "adapter", save_embedding_layers=False)
    assert any("model.language_model.layers" in key for key in stored_tensors(adapter))
    assert not any("language_model" in name or "model.visual" in name for name in stored_tensors(tmp_path / "base"))
    result = loratool.merge([adapter], into=tmp_path / "base", out=tmp_path / "out")
    assert sum("matched by that exchange of prefixes" in note for note in result.notes) == 2
    assert not any("without holding tensors" in note for note in result.notes)
    merge_by_peft(load_base(torch.bfloat16), adapter, tmp_path / "theirs")
    assert_same_tensors(stored_tensors(tmp_path / "out"), stored_tensors(tmp_path / "theirs"))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": r".*language_model.*\.(q|v)_proj", "modules_to_save": ["multi_modal_projector"]},
        {"target_modules": r".*language_model.*\.(q|v)_proj|.*multi_modal_projector.linear_\d|lm_head"},
        {"target_modules": "all-linear", "modules_to_save": ["lm_head"]},
    ],
    ids=["a projector replaced", "a projector and a head updated", "a head replaced"],
)
def test_an_adapter_of_language_and_projector_lands(options: dict[str, Any], tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = transformers.LlamaConfig(vocab_size=131, **(sizes | {"hidden_size": 64}))
    vision = transformers.CLIPVisionConfig(image_size=16, patch_size=8, projection_dim=32, **sizes)
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(text_config=text, vision_config=vision))
    model.bfloat16().save_pretrained(tmp_path / "base")

    def load_base(dtype: torch.dtype) -> Any:
        return transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "base", dtype=dtype)

    lora = peft.LoraConfig(r=2, lora_alpha=3, **options)
    adapter = save_peft_adapter(load_base(torch.float32), lora, tmp_path / "adapter", save_embedding_layers=False)
    assert not any(name.startswith(("model.multi", "lm_head")) for name in stored_tensors(tmp_path / "base"))
    result = loratool.merge([adapter], into=tmp_path / "base", out=tmp_path / "out")
    assert not any("without holding tensors" in note for note in result.notes)
    merge_by_peft(load_base(torch.bfloat16), adapter, tmp_path / "theirs")
    assert_same_tensors(stored_tensors(tmp_path / "out"), stored_tensors(tmp_path / "theirs"))


@pytest.mark.parametrize(
    "modules",
    [
        ["model.language_model.layers.0.up_proj", "model.vision_tower.layers.0.q_proj"],
        ["model.layers.0.up_proj", "model.vision_tower.layers.0.q_proj"],
        ["model.encoder.layers.0.q_proj", "model.decoder.layers.1.q_proj"],
    ],
    ids=["language and vision", "language by its own name, and vision", "different layers"],
)
def test_two_stacks_never_land_in_one(modules: list[str], tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base", [f"model.layers.{n}.{leaf}" for n in (0, 1) for leaf in ("up_proj", "q_proj")])
    adapter = save_plain_adapter(tmp_path / "adapter", dict.fromkeys(modules, (24, 16)))
    assert "different stacks of layers" in refusal(adapter, base, tmp_path / "work")


@pytest.mark.parametrize(
    ("adapters", "stored"),
    [
        (["layers.0.q", "layers.1.q"], ["layers.0.q", "text.layers.0.q", "text.layers.1.q"]),
        (["roberta.layer.0.q"], ["bert.layer.0.q"]),
        (["decoder.layers.0.q"], ["encoder.layers.0.q"]),
        (["model.layers.0.q"], ["encoder.layers.0.q"]),
        (["model.layers.0.q"], ["model.blocks.0.q"]),
        (["model.layers.0.q"], ["model.layers.1.q"]),
        (["layers.0.q"], ["tower.0.layers.0.q"]),
        (["layers.0.q"], ["mylayers.0.q"]),
        (["layers.0.q", "merger"], ["layers.0.q", "mymerger"]),
        (["layers.0.q", "audio_projector.linear"], ["layers.0.q", "vision_projector.linear"]),
        (["layer.0.dense", "pooler.dense"], ["layer.0.dense", "cls.transform.dense"]),
        (["layer.0.dense", "classifier.dense"], ["layer.0.dense", "lm_head.dense"]),
        (["m.proj.out", "m.proj.0"], ["x.out", "x.0"]),
        (["m.proj.0", "m.proj.out"], ["x.out", "x.0"]),
    ],
    ids=str,
)
def test_a_name_never_takes_the_place_of_another(adapters: list[str], stored: list[str], tmp_path: Path) -> None:
    adapter = save_plain_adapter(tmp_path / "adapter", dict.fromkeys(adapters, (24, 16)))
    message = refusal(adapter, plain_base(tmp_path / "base", stored), tmp_path / "work")
    assert re.search("land on no tensor|is one stack of layers", message)


@pytest.mark.parametrize(
    ("module", "stored"),
    [
        ("transformer.h.0.q", "model.h.0.q"),
        ("model.visual.blocks.0.q", "model.vision_tower.blocks.0.q"),
        ("model.language_model.layers.0.q", "language_model.model.layers.0.q"),
        ("llm.layers.0.q", "text_model.layers.0.q"),
        ("a.b.layers.0.q", "layers.0.q"),
        ("layers.0.q", "a.b.layers.0.q"),
    ],
)
def test_a_name_may_be_dropped_added_moved_and_be_another_of_the_same_part(
    module: str, stored: str, tmp_path: Path
) -> None:
    base = plain_base(tmp_path / "base", [stored])
    adapter = save_plain_adapter(tmp_path / "adapter", {module: (24, 16)})
    expect_landing(adapter, base, tmp_path / "out", lambda name: name.replace(module, stored))


@pytest.mark.parametrize(
    ("module", "replaced", "stored"),
    [
        ("layers.0.q", "layers.0.norm1.weight", ["text.layers.0.q", "vision.layers.0.norm1"]),
        ("layers.0.q", "layers.0.norm1.weight", ["layers.0.q", "vision.layers.0.norm1"]),
        ("encoder.layers.0.q", "model.layers.0.norm.weight", ["model.encoder.layers.0.q", "model.layers.0.norm", "x"]),
        ("model.layers.0.q", "a.b.layers.0.norm.weight", ["model.layers.0.q", "c.layers.0.norm"]),
        ("text.layers.0.q", "a.b.layers.0.norm.weight", ["text.layers.0.q", "layers.0.norm"]),
        ("layers.0.q", "model.proj.bias_of_it", ["layers.0.q", "other.bias_of_it"]),
        ("layers.0.q", "model.proj.linear.weight", ["layers.0.q", "other.linear"]),
    ],
    ids=["of a stack that landed", "of a stack by its own name", "of a stack in the first's place", "of no stack there",
         "of too little that is kept", "no weight", "of another part"],
)  # fmt: skip
def test_a_replaced_tensor_stays_with_its_part(module: str, replaced: str, stored: list[str], tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base", stored)
    adapter = save_plain_adapter(tmp_path / "adapter", {module: (24, 16)}, modules_to_save=[replaced.split(".")[-2]])
    file = adapter / "adapter_model.safetensors"
    save_file(load_file(file) | {f"base_model.model.{replaced}": torch.ones(24, 16)}, file)
    if replaced.startswith("model.layers"):
        loratool.merge([adapter], into=base, out=tmp_path / "out")  # exact, in a stack of its own
        return
    assert "which the base lacks" in refusal(adapter, base, tmp_path / "work")


STACKS = ["model.layers.0.q_proj", "visual.blocks.0.q_proj"]
OF_BOTH = {"model.language_model.layers.0.q_proj": (24, 16), "model.visual.blocks.0.q_proj": (24, 16)}


def test_what_is_in_no_stack_goes_by_an_exchange_of_one(tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base", [*STACKS, "visual.merger", "other.merger"])
    adapter = save_plain_adapter(tmp_path / "adapter", OF_BOTH | {"model.visual.merger": (24, 16)})
    names = {"model.language_model.": "model.", "model.visual.": "visual."}
    expect_landing(
        adapter, base, tmp_path / "out", lambda name: re.sub("|".join(names), lambda old: names[old[0]], name)
    )


@pytest.mark.parametrize(
    ("stored", "more"),
    [
        (["model.layers.0.q_proj", "model.blocks.0.q_proj"], {"model.visual.merger": (24, 16)}),
        (["model.layers.0.q_proj"], {}),
        (["visual.blocks.0.q_proj"], {}),
        (["model.layers.0.q_proj", "image.blocks.0.q_proj", "audio.blocks.0.q_proj"], {}),
        (STACKS, {"model.audio.layers.0.q_proj": (24, 16)}),
        (STACKS, {"model.visual.blocks.1.q_proj": (24, 16)}),
        ([*STACKS, "model.merger", "visual.merger"], {"merger": (24, 16)}),
        ([*STACKS, "visual.merger"], {"model.audio.merger": (24, 16)}),
        ([*STACKS, "visual.in.merger", "audio.in.merger"], {"model.in.merger": (24, 16)}),
        ([*STACKS, "visual.0.merger"], {"merger": (24, 16)}),
    ],
    ids=["a loose one nowhere", "no vision", "no language", "two towers", "a third stack into the first",
         "one layer more", "a loose one in two places", "a loose one of another part", "a loose one in two parts",
         "a loose one in a layer"],
)  # fmt: skip
def test_stacks_that_do_not_each_land_in_one_place_are_refused(
    stored: list[str], more: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    base = plain_base(tmp_path / "base", stored)
    adapter = save_plain_adapter(tmp_path / "adapter", OF_BOTH | more)
    assert re.search("land on|could land", refusal(adapter, base, tmp_path / "work"))


def test_a_name_that_fits_exactly_is_taken_although_a_prefixed_one_exists(tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base", ["layers.0.q_proj", "model.layers.0.q_proj", "other.layers.0.q_proj"])
    expect_landing(save_plain_adapter(tmp_path / "adapter", {"layers.0.q_proj": (24, 16)}), base, tmp_path / "out")


def test_two_places_that_fit_alike_are_refused_and_both_named(tmp_path: Path) -> None:
    towers = [f"{tower}.encoder.layers.0.q_proj" for tower in ("text_model", "vision_model")]
    base = plain_base(tmp_path / "base", towers)
    adapter = save_plain_adapter(tmp_path / "adapter", {"encoder.layers.0.q_proj": (24, 16)})
    message = refusal(adapter, base, tmp_path / "work")
    assert "text_model" in message
    assert "vision_model" in message


def test_an_adapter_that_lands_nowhere_is_refused_with_the_nearest_names(tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base", [f"model.layers.{n}.self_attn.{p}_proj" for n in range(3) for p in "qkvo"])
    adapter = save_plain_adapter(tmp_path / "adapter", {"model.layers.1.self_attn.query_proj": (24, 16)})
    message = refusal(adapter, base, tmp_path / "work")
    assert "model.layers.1.self_attn.query_proj" in message
    assert "model.layers.1.self_attn.q_proj" in message


def test_an_adapter_for_another_architecture_is_refused(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    assert "c_attn" in refusal(tiny_adapters.folder("gpt2"), tiny_models.folder("llama"), tmp_path / "work")


def test_one_module_that_lands_nowhere_is_enough_to_refuse(tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base", ["model.layers.0.q_proj", "model.layers.1.q_proj"])
    adapter = save_plain_adapter(tmp_path / "adapter", {f"model.layers.{n}.q_proj": (24, 16) for n in range(3)})
    assert "model.layers.2.q_proj" in refusal(adapter, base, tmp_path / "work")


@pytest.mark.parametrize(
    ("there", "wanted"),
    [
        ("model.layers.0.self_attn.o_proj", "model.layers.0.self_attn.proj"),
        ("model.layers.11.self_attn.q_proj", "1.self_attn.q_proj"),
        ("model.layers.1.self_attn.q_proj", "model.layers.11.self_attn.q_proj"),
        ("model.layers.0.q_proj", "model.layers.0.Q_proj"),
        ("model.layers.0.q_proj", "model.layers.0.q_proj_"),
    ],
)
def test_names_are_matched_by_whole_parts(there: str, wanted: str, tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base", [there])
    assert wanted in refusal(save_plain_adapter(tmp_path / "adapter", {wanted: (24, 16)}), base, tmp_path / "work")


@pytest.mark.parametrize("shape", [(16, 24), (24, 15), (48, 16)])
def test_a_shape_that_does_not_fit_is_refused_with_both_shapes(shape: tuple[int, int], tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base", ["model.layers.0.q_proj"])
    adapter = save_plain_adapter(tmp_path / "adapter", {"model.layers.0.q_proj": shape})
    message = refusal(adapter, base, tmp_path / "work")
    assert "model.layers.0.q_proj" in message
    assert all(str(side) in message for side in (24, 16))


def test_a_module_whose_tensor_is_a_vector_is_refused(tmp_path: Path) -> None:
    base = save_plain_model(
        tmp_path / "base", {"model.norm.weight": torch.ones(16), "model.x.weight": torch.ones(4, 4)}
    )
    adapter = save_plain_adapter(tmp_path / "adapter", {"model.norm": (16, 16)})
    assert "model.norm" in refusal(adapter, base, tmp_path / "work")


def test_a_head_that_is_tied_and_not_stored_is_refused(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    """PEFT would add the update to the shared tensor and so change the input embeddings too."""
    base = tiny_models.folder("llama-tied", "bf16")
    adapter = tiny_adapters.folder("llama-tied", target_modules=["lm_head", "q_proj"])
    shared = merge_by_peft(load(base, "llama-tied"), adapter)["model.embed_tokens.weight"]
    assert shared != stored_tensors(base)["model.embed_tokens.weight"]
    assert "lm_head" in refusal(adapter, base, tmp_path / "work")


@pytest.mark.parametrize(
    ("head", "advice", "of_whole"),
    [
        ("embed_out", "is it the right base", "is it the right base"),
        ("norm", "--untie", "set tie_word_embeddings to False"),
    ],
)
def test_a_head_is_said_to_be_tied_only_where_the_base_has_none(
    head: str, advice: str, of_whole: str, tmp_path: Path
) -> None:
    base = plain_base(tmp_path / "base", ["layers.0.q", head])
    adapter = save_plain_adapter(tmp_path / "adapter", {"layers.0.q": (24, 16), "lm_head": (24, 16)})
    assert advice in refusal(adapter, base, tmp_path / "work")
    replacing = save_plain_adapter(tmp_path / "replacing", {"layers.0.q": (24, 16)}, modules_to_save=["lm_head"])
    file = replacing / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.lm_head.weight": torch.ones(24, 16)}, file)
    assert of_whole in refusal(replacing, base, tmp_path / "work again")


def test_a_head_that_is_tied_and_stored_again_is_refused(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    """A change of one copy alone would untie the two, or be lost when the model is loaded."""
    base = with_names(tiny_models.folder("llama-tied", "bf16"), tmp_path / "base", lambda name: name)
    embeddings = as_torch(stored_tensors(base)["model.embed_tokens.weight"])
    rewrite_tensors(base, extra={"lm_head.weight": embeddings})
    adapter = tiny_adapters.folder("llama-tied", target_modules=["lm_head", "q_proj"])
    assert "lm_head" in refusal(adapter, base, tmp_path / "work")


def test_names_from_a_file_are_printed_without_control_characters(tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base", ["model.layers.0.q_proj"])
    adapter = save_plain_adapter(tmp_path / "adapter", {"model.layers.0.\x1b[31mred\x07\u202e_proj": (24, 16)})
    message = refusal(adapter, base, tmp_path / "work")
    assert "red" in message
    assert not any(ord(character) < 32 and character != "\n" for character in message)
    assert "\u202e" not in message
