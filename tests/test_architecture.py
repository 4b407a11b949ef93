"""What is known of models, against the models that transformers builds."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from model_facts import ModelFacts, built
from tiny_models import as_torch, stored_tensors

from loratool.architecture import Role, Spelling, architecture_of, quantizable_weights
from loratool.architecture.tables import FOLDER, family_named, family_of
from loratool.errors import LoratoolError

SMALL_TEXT = {"num_hidden_layers": 2}
LLAMA = {"model_type": "llama", **SMALL_TEXT}
CLIP = {"model_type": "clip_vision_model", "num_hidden_layers": 2}
SIGLIP = {"model_type": "siglip_vision_model", "num_hidden_layers": 2}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("LlamaConfig", SMALL_TEXT),
    "LlamaForSequenceClassification": ("LlamaConfig", SMALL_TEXT),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", SMALL_TEXT),
    "Phi3ForCausalLM": ("Phi3Config", SMALL_TEXT),
    "GPT2LMHeadModel": ("GPT2Config", {"n_layer": 2}),
    "ImageGPTForCausalImageModeling": ("ImageGPTConfig", {"n_layer": 2}),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", SMALL_TEXT),
    "GPTJForCausalLM": ("GPTJConfig", {"n_layer": 2}),
    "OPTForCausalLM": ("OPTConfig", SMALL_TEXT),
    "BloomForCausalLM": ("BloomConfig", {"n_layer": 2}),
    "FalconForCausalLM": ("FalconConfig", SMALL_TEXT),
    "MptForCausalLM": ("MptConfig", {"n_layers": 2}),
    "BertForMaskedLM": ("BertConfig", SMALL_TEXT),
    "RobertaForTokenClassification": ("RobertaConfig", SMALL_TEXT),
    "DistilBertForMaskedLM": ("DistilBertConfig", {"n_layers": 2}),
    "DebertaV2ForMaskedLM": ("DebertaV2Config", SMALL_TEXT),
    "ElectraForMaskedLM": ("ElectraConfig", SMALL_TEXT),
    "AlbertForMaskedLM": ("AlbertConfig", SMALL_TEXT),
    "ModernBertForMaskedLM": ("ModernBertConfig", SMALL_TEXT),
    "XLMWithLMHeadModel": ("XLMConfig", {"n_layers": 2}),
    "T5ForConditionalGeneration": ("T5Config", {"num_layers": 2}),
    "MT5EncoderModel": ("MT5Config", {"num_layers": 2}),
    "BartForConditionalGeneration": ("BartConfig", {"encoder_layers": 2, "decoder_layers": 2}),
    "WhisperForConditionalGeneration": ("WhisperConfig", {"encoder_layers": 2, "decoder_layers": 2}),
    "ViTForImageClassification": ("ViTConfig", SMALL_TEXT),
    "DeiTModel": ("DeiTConfig", SMALL_TEXT),
    "Dinov2Model": ("Dinov2Config", {"num_hidden_layers": 2, "use_swiglu_ffn": True}),
    "SwinForImageClassification": ("SwinConfig", {"depths": [1, 1], "num_heads": [2, 2]}),
    "BeitForImageClassification": ("BeitConfig", SMALL_TEXT),
    "SegformerForSemanticSegmentation": ("SegformerConfig", {}),
    "CLIPModel": ("CLIPConfig", {"text_config": SMALL_TEXT, "vision_config": SMALL_TEXT}),
    "SiglipVisionModel": ("SiglipVisionConfig", SMALL_TEXT),
    "LlavaForConditionalGeneration": ("LlavaConfig", {"text_config": LLAMA, "vision_config": CLIP}),
    "Gemma3ForConditionalGeneration": (
        "Gemma3Config",
        {"text_config": {"model_type": "gemma3_text", **SMALL_TEXT}, "vision_config": SIGLIP},
    ),
    "Qwen2VLForConditionalGeneration": ("Qwen2VLConfig", {"text_config": SMALL_TEXT, "vision_config": {"depth": 2}}),
    "InternVLForConditionalGeneration": (
        "InternVLConfig",
        {"text_config": {"model_type": "qwen2", **SMALL_TEXT}, "vision_config": SMALL_TEXT},
    ),
    "MixtralForCausalLM": ("MixtralConfig", SMALL_TEXT),
    "Qwen2MoeForCausalLM": ("Qwen2MoeConfig", SMALL_TEXT),
    "Qwen3MoeForCausalLM": ("Qwen3MoeConfig", SMALL_TEXT),
    "Qwen3NextForCausalLM": ("Qwen3NextConfig", SMALL_TEXT),
    "Qwen3VLMoeForConditionalGeneration": (
        "Qwen3VLMoeConfig",
        {"text_config": SMALL_TEXT | {"tie_word_embeddings": False}, "vision_config": {"depth": 2}},
    ),
    "DeepseekV2ForCausalLM": ("DeepseekV2Config", SMALL_TEXT | {"first_k_dense_replace": 1}),
    "DeepseekV3ForCausalLM": ("DeepseekV3Config", SMALL_TEXT | {"first_k_dense_replace": 1}),
    "GptOssForCausalLM": ("GptOssConfig", SMALL_TEXT),
    "Llama4ForCausalLM": ("Llama4TextConfig", SMALL_TEXT),
    "Glm4MoeForCausalLM": ("Glm4MoeConfig", SMALL_TEXT | {"first_k_dense_replace": 1}),
    "OlmoeForCausalLM": ("OlmoeConfig", SMALL_TEXT),
    "PhimoeForCausalLM": ("PhimoeConfig", SMALL_TEXT),
    "GraniteMoeForCausalLM": ("GraniteMoeConfig", SMALL_TEXT),
    "NemotronHForCausalLM": ("NemotronHConfig", {}),
    "NomicBertForMaskedLM": ("NomicBertConfig", SMALL_TEXT),
}


@pytest.mark.parametrize("name", MODELS)
def test_roles_orientation_names_experts_and_ties_are_those_of_the_model(name: str) -> None:
    config, changes = MODELS[name]
    model = built(getattr(transformers, name), getattr(transformers, config)(**changes))
    assert ModelFacts.of(model).differences() == {}


DEEP = {"num_hidden_layers": 1}
QUANTIZED: dict[str, tuple[str, dict[str, Any]]] = {
    "AfmoeForCausalLM": ("AfmoeConfig", {"num_hidden_layers": 3}),
    "Aimv2Model": ("Aimv2Config", {"text_config": DEEP, "vision_config": DEEP}),
    "AltCLIPModel": ("AltCLIPConfig", {"text_config": DEEP, "vision_config": DEEP}),
    "AXK2ForCausalLM": ("AXK2Config", SMALL_TEXT),
    "Blip2ForConditionalGeneration": (
        "Blip2Config",
        {"text_config": {"model_type": "opt", **DEEP}, "vision_config": DEEP, "qformer_config": DEEP},
    ),
    "CanineForSequenceClassification": ("CanineConfig", DEEP),
    "ChineseCLIPModel": ("ChineseCLIPConfig", {"text_config": DEEP, "vision_config": DEEP}),
    "CLIPSegModel": ("CLIPSegConfig", {"text_config": DEEP, "vision_config": DEEP}),
    "CTRLForSequenceClassification": ("CTRLConfig", {"n_layer": 1}),
    "CohereForCausalLM": ("CohereConfig", DEEP),
    "DeepseekV32ForCausalLM": ("DeepseekV32Config", DEEP),
    "DeepseekV4ForCausalLM": ("DeepseekV4Config", {"num_hidden_layers": 3}),
    "DFineForObjectDetection": ("DFineConfig", {}),
    "DiaForConditionalGeneration": ("DiaConfig", {"encoder_config": DEEP, "decoder_config": DEEP}),
    "FSMTForConditionalGeneration": ("FSMTConfig", {"encoder_layers": 1, "decoder_layers": 1}),
    "FalconForSequenceClassification": ("FalconConfig", DEEP),
    "FlavaForPreTraining": ("FlavaConfig", {}),
    "FuyuForCausalLM": ("FuyuConfig", {"text_config": {"model_type": "persimmon", **DEEP}}),
    "GPTBigCodeForCausalLM": ("GPTBigCodeConfig", {"n_layer": 1}),
    "Gemma3nForCausalLM": (
        "Gemma3nTextConfig",
        {"num_hidden_layers": 1, "num_kv_shared_layers": 0, "layer_types": None},
    ),
    "GlmMoeDsaForCausalLM": ("GlmMoeDsaConfig", DEEP),
    "HubertForCTC": ("HubertConfig", DEEP),
    "IBertForMaskedLM": ("IBertConfig", DEEP),
    "JetMoeForCausalLM": ("JetMoeConfig", DEEP),
    "LiltForTokenClassification": ("LiltConfig", DEEP),
    "LongcatFlashForCausalLM": ("LongcatFlashConfig", {"num_layers": 1}),
    "MarkupLMForQuestionAnswering": ("MarkupLMConfig", DEEP),
    "MetaClip2Model": ("MetaClip2Config", {"text_config": DEEP, "vision_config": DEEP}),
    "MobileBertForMaskedLM": ("MobileBertConfig", DEEP),
    "MobileBertForPreTraining": ("MobileBertConfig", DEEP),
    "MusicgenForConditionalGeneration": (
        "MusicgenConfig",
        {
            "text_encoder": {"model_type": "t5", "num_layers": 1},
            "audio_encoder": {"model_type": "encodec"},
            "decoder": {"model_type": "musicgen_decoder", "num_hidden_layers": 1},
        },
    ),
    "NllbMoeForConditionalGeneration": ("NllbMoeConfig", {"encoder_layers": 4, "decoder_layers": 4, "num_experts": 2}),
    "OPTForSequenceClassification": ("OPTConfig", DEEP),
    "OlmoModel": ("OlmoConfig", SMALL_TEXT),
    "OpenAIGPTLMHeadModel": ("OpenAIGPTConfig", {"n_layer": 1}),
    "Owlv2Model": ("Owlv2Config", {"text_config": DEEP, "vision_config": DEEP}),
    "OwlViTForObjectDetection": ("OwlViTConfig", {"text_config": DEEP, "vision_config": DEEP}),
    "PegasusXForConditionalGeneration": ("PegasusXConfig", {"encoder_layers": 1, "decoder_layers": 1}),
    "Phi4MultimodalForCausalLM": ("Phi4MultimodalConfig", DEEP),
    "Pix2StructForConditionalGeneration": (
        "Pix2StructConfig",
        {"text_config": {"num_layers": 1}, "vision_config": DEEP},
    ),
    "Pop2PianoForConditionalGeneration": ("Pop2PianoConfig", {"num_layers": 1}),
    "ProphetNetForConditionalGeneration": (
        "ProphetNetConfig",
        {"num_encoder_layers": 1, "num_decoder_layers": 1},
    ),
    "Qwen2_5OmniForConditionalGeneration": ("Qwen2_5OmniConfig", {}),
    "SiglipModel": ("SiglipConfig", {"text_config": DEEP, "vision_config": DEEP}),
    "Siglip2VisionModel": ("Siglip2VisionConfig", DEEP),
    "SwiftFormerForImageClassification": ("SwiftFormerConfig", {}),
    "SwitchTransformersForConditionalGeneration": ("SwitchTransformersConfig", {"num_layers": 2, "num_experts": 2}),
    "T5ForConditionalGeneration": ("T5Config", {"num_layers": 1}),
    "TapasForQuestionAnswering": ("TapasConfig", DEEP),
    "UdopForConditionalGeneration": ("UdopConfig", {"num_layers": 1}),
    "VoxtralModel": ("VoxtralConfig", {"text_config": LLAMA, "audio_config": DEEP}),
    "VoxtralForConditionalGeneration": ("VoxtralConfig", {"text_config": LLAMA, "audio_config": DEEP}),
    "VoxtralRealtimeForConditionalGeneration": ("VoxtralRealtimeConfig", {}),
    "Wav2Vec2ForXVector": ("Wav2Vec2Config", DEEP),
    "XCLIPModel": ("XCLIPConfig", {"text_config": DEEP, "vision_config": DEEP}),
    "ZambaForCausalLM": ("ZambaConfig", {}),
    "Zamba2ForCausalLM": ("Zamba2Config", {}),
    "ZayaForCausalLM": ("ZayaConfig", SMALL_TEXT),
}
"""More models whose quantized modules are told by a row of their own, or by a rule of which each is the example."""


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_modules_in_4_bits_are_those_that_transformers_chooses(name: str) -> None:
    config, changes = QUANTIZED[name]
    model = built(getattr(transformers, name), getattr(transformers, config)(**changes))
    assert set(ModelFacts.of(model).quantization()) == set()


def test_only_one_of_a_list_of_modules_comes_last() -> None:
    names = [f"altup_unembed_projections.{number}.weight" for number in range(11)]
    tensors = {name: SimpleNamespace(shape=(4, 4)) for name in names}
    assert set(names) - set(quantizable_weights(architecture_of({"model_type": "gemma3n_text"}, tensors))) == {
        names[10]
    }


SIZES = {"vocab_size": 24, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
EXPERTS = SIZES | {
    "head_dim": 4,
    "intermediate_size": 6,
    "moe_intermediate_size": 6,
    "num_experts": 3,
    "num_experts_per_tok": 1,
}
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "MixtralForCausalLM": ("MixtralConfig", EXPERTS | {"num_local_experts": 3}),
    "PhimoeForCausalLM": ("PhimoeConfig", EXPERTS | {"num_local_experts": 3}),
    "Qwen3MoeForCausalLM": ("Qwen3MoeConfig", EXPERTS),
    "GptOssForCausalLM": ("GptOssConfig", EXPERTS | {"num_local_experts": 3}),
    "GraniteMoeForCausalLM": ("GraniteMoeConfig", EXPERTS | {"num_local_experts": 3}),
    "Llama4ForCausalLM": ("Llama4TextConfig", EXPERTS | {"num_local_experts": 3, "intermediate_size_mlp": 6}),
    "Qwen3VLMoeForConditionalGeneration": (
        "Qwen3VLMoeConfig",
        {"text_config": EXPERTS, "vision_config": {"depth": 1, "hidden_size": 8, "num_heads": 2, "intermediate_size": 6,
                                                   "out_hidden_size": 8, "deepstack_visual_indexes": [0]}},
    ),
    "NomicBertModel": ("NomicBertConfig", SIZES | {"intermediate_size": 6}),
    "Dinov2Model": ("Dinov2Config", {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
                                     "use_swiglu_ffn": True}),
    "GPT2LMHeadModel": ("GPT2Config", {"vocab_size": 24, "n_embd": 8, "n_layer": 1, "n_head": 2}),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", SIZES | {"intermediate_size": 6}),
    "ViTForImageClassification": ("ViTConfig", {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
                                                "intermediate_size": 6}),
}  # fmt: skip


@pytest.mark.parametrize("name", TINY)
def test_every_matrix_in_memory_is_where_the_tables_say_on_disk_and_the_reverse(name: str, tmp_path: Path) -> None:
    config, changes = TINY[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    stored = {name: as_torch(tensor) for name, tensor in stored_tensors(tmp_path).items()}
    architecture = architecture_of(json.loads((tmp_path / "config.json").read_text()), stored)
    parameters = dict(model.named_parameters())
    on_disk = {name: architecture.on_disk(name, tuple(tensor.shape)) for name, tensor in parameters.items()}
    in_memory = {name: architecture.in_memory(name) for name in stored}
    assert {place.name for places in on_disk.values() for place in places} == stored.keys()
    assert {place.name for places in in_memory.values() for place in places} == parameters.keys()
    for own, others, asked in ((parameters, stored, on_disk), (stored, parameters, in_memory)):
        for name, place in ((name, place) for name, places in asked.items() for place in places):
            assert torch.equal(viewed(own[name], place.own), viewed(others[place.name], place.view)), (name, place)


def viewed(tensor: torch.Tensor, view: Any) -> torch.Tensor:
    """Return the matrix, or the vector, that a view of a parameter means."""
    part = tensor if view.expert is None else tensor[view.expert]
    return part[:, view.outputs].T if view.transposed and part.dim() == 2 else part[view.outputs]


TRANSFORMERS_4 = {
    "vit": ("vit.encoder.layer.3.attention.attention.query.weight", "vit.layers.3.attention.q_proj.weight"),
    "swin": (
        "swin.encoder.layers.0.blocks.1.attention.self.key.weight",
        "swin.encoder.layers.0.blocks.1.attention.k_proj.weight",
    ),
    "segformer": (
        "segformer.encoder.block.1.0.attention.self.query.weight",
        "segformer.stages.1.blocks.0.attention.q_proj.weight",
    ),
    "mixtral": (
        "model.layers.1.block_sparse_moe.experts.2.w3.weight",
        "model.layers.1.mlp.experts.2.up_proj.weight",
    ),
    "phimoe": ("model.layers.1.block_sparse_moe.gate.weight", "model.layers.1.mlp.router.weight"),
    "granitemoe": (
        "model.layers.1.block_sparse_moe.input_linear.weight",
        "model.layers.1.block_sparse_moe.experts.gate_up_proj",
    ),
    "gpt_neox": ("embed_out.weight", "lm_head.weight"),
    "bert": ("bert.embeddings.LayerNorm.gamma", "bert.embeddings.LayerNorm.weight"),
    "clip_vision_model": ("vision_model.encoder.layers.0.mlp.fc1.weight", "encoder.layers.0.mlp.fc1.weight"),
}
"""A name that transformers 4.57 has in memory, or an older program, and the one that transformers 5 has."""


@pytest.mark.parametrize("model_type", TRANSFORMERS_4)
def test_names_of_transformers_4_become_those_of_transformers_5_and_back(model_type: str) -> None:
    old, new = TRANSFORMERS_4[model_type]
    architecture = architecture_of({"model_type": model_type})
    assert architecture.canonical(old) == new
    assert architecture.canonical(new) == new
    if not old.endswith(".gamma"):
        assert architecture.spelled(new, Spelling.TRANSFORMERS_4) == old
        assert architecture.spelled(new, Spelling.STORED) == old
    assert architecture.spelled(new, Spelling.TRANSFORMERS_5) == new


def test_a_text_model_and_a_tower_inside_another_model_go_by_their_own_tables() -> None:
    config = {
        "model_type": "llava",
        "text_config": {"model_type": "mixtral"},
        "vision_config": {"model_type": "siglip_vision_model"},
    }
    architecture = architecture_of(config)
    expert = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    memory = "model.language_model.layers.1.mlp.experts.2.gate_proj.weight"
    assert architecture.canonical(f"language_model.{expert}") == memory
    assert architecture.spelled(memory, Spelling.STORED) == f"language_model.{expert}"
    assert architecture.spelled(memory, Spelling.TRANSFORMERS_4) == (
        "model.language_model.layers.1.block_sparse_moe.experts.2.w1.weight"
    )
    tower = architecture.canonical("vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight")
    assert tower == "model.vision_tower.encoder.layers.0.mlp.fc1.weight"


def shapes(**tensors: tuple[int, ...]) -> dict[str, Any]:
    return {name.replace("__", "."): SimpleNamespace(shape=shape) for name, shape in tensors.items()}


@pytest.mark.parametrize(
    "config", [{}, {"model_type": "of the future"}, {"model_type": 7}, {"model_type": None, "text_config": 3}]
)
def test_a_model_that_no_table_knows_goes_by_the_generic_one(config: dict[str, Any]) -> None:
    tensors = shapes(
        model__embed_tokens__weight=(9, 4), model__layers__0__attn__qkv__weight=(12, 4), model__layers__0__attn__qkv__bias=(12,),
        model__layers__0__norm__weight=(4,), conv__weight=(3, 2, 5), lm_head__weight=(9, 4), model__alpha=(3,),
        model__position_embeddings__weight=(7, 4), score__weight=(2, 4), model__layers__0__experts__2__w1__weight=(6, 4),
    )  # fmt: skip
    architecture = architecture_of(config, tensors)
    roles = ["tokens", "linear", "linear", "norm", "convolution", "head", "other", "embedding", "classifier", "experts"]
    assert [architecture.role(name).value for name in tensors] == roles
    assert all(architecture.canonical(name) == name for name in tensors)
    assert architecture.transposed("model.layers.0.attn.qkv.weight") is None
    assert architecture.transposed("model.embed_tokens.weight") is True
    assert architecture.role("model.layers.0.mlp.up_proj.weight") is Role.LINEAR
    assert architecture_of(config, shapes(time_embed__weight=(8, 4))).role("time_embed.weight") is Role.EMBEDDING
    with_bias = architecture_of(config, shapes(time_embed__weight=(8, 4), time_embed__bias=(8,)))
    assert with_bias.role("time_embed.weight") is Role.LINEAR


def test_weights_are_found_by_their_role_under_every_spelling() -> None:
    names = [
        "model.embed_tokens.weight",
        "model.layers.0.norm.weight",
        "embed_out.weight",
        "model.emb.3.weight",
        "lm_head.bias",
    ]
    for model_type in ("gpt_neox", "vit", "markuplm", ""):
        architecture = architecture_of(
            {"model_type": model_type}, {name: SimpleNamespace(shape=(4, 4)) for name in names}
        )
        for role in Role:
            expected = tuple(name for name in names if name.endswith(".weight") and architecture.role(name) is role)
            assert architecture.weights(role) == expected


def test_a_packed_parameter_with_other_rows_than_its_parts_is_one_matrix() -> None:
    phi = architecture_of({"model_type": "phi3", "num_attention_heads": 4, "num_key_value_heads": 2})
    name = "model.layers.0.self_attn.qkv_proj.weight"
    assert [(each.name.split(".")[-2], each.view.outputs) for each in phi.matrices(name, (16, 8))] == [
        ("q_proj", slice(0, 8)), ("k_proj", slice(8, 12)), ("v_proj", slice(12, 16)),
    ]  # fmt: skip
    assert [each.name for each in phi.matrices(name, (15, 8))] == [name]
    for config in (
        {"model_type": "phi3"},
        {"model_type": "phi3", "num_attention_heads": "4", "num_key_value_heads": -1},
    ):
        assert len(architecture_of(config).matrices(name, (15, 8))) in (1, 3)


@pytest.mark.parametrize(("sizes", "stored_as_in_out"), [((2, 8, 12), True), ((2, 12, 8), False), ((2, 8, 8), True)])
def test_experts_lie_as_their_shape_says_and_else_as_the_program_stores_them(
    sizes: tuple[int, ...], stored_as_in_out: bool
) -> None:
    qwen = architecture_of({"model_type": "qwen3_vl_moe_text", "hidden_size": 8})
    matrices = qwen.matrices("model.layers.0.mlp.experts.gate_up_proj", sizes, Spelling.STORED)
    half = (sizes[2] if stored_as_in_out else sizes[1]) // 2
    assert {(each.view.transposed, each.view.outputs.stop) for each in matrices} == {
        (stored_as_in_out, half), (stored_as_in_out, 2 * half),
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", ["", ".", "a..b", "#.weight", "model.layers.#.x", "9" * 5000, "x." * 5000, "²", "model.١.x", "*"]
)
def test_odd_names_are_answered_and_keep_themselves(name: str) -> None:
    for model_type in ("vit", "mixtral", "llava", "gpt2", ""):
        architecture = architecture_of({"model_type": model_type}, {name: SimpleNamespace(shape=(2, 2))})
        assert architecture.canonical(name) == name
        assert isinstance(architecture.role(name), Role)
        assert architecture.tied(name) == ()
        assert len(architecture.matrices(name)) == 1


@pytest.mark.parametrize("shape", [(1 << 60, 0, 0), (0, 6, 8), (3, 0, 8), (3, 7, 8), (3,), (), (2, 3, 4, 5)])
@pytest.mark.parametrize("number", ["9" * 9, "9" * 10, "9" * 5000, "007", "-1", "1e3"])
def test_odd_shapes_and_numbers_of_experts_are_answered_at_once(shape: tuple[int, ...], number: str) -> None:
    stack, expert = "model.layers.0.mlp.experts.gate_up_proj", f"model.layers.0.mlp.experts.{number}.gate_proj.weight"
    tensors = {stack: SimpleNamespace(shape=shape), expert: SimpleNamespace(shape=shape)}
    for model_type in ("mixtral", "gpt_oss", "qwen3_vl_moe_text", ""):
        architecture = architecture_of({"model_type": model_type, "hidden_size": 8}, tensors)
        for name in tensors:
            assert len(architecture.matrices(name)) <= 6
            assert len(architecture.in_memory(name)) <= 6
            assert len(architecture.on_disk(name, (3, 6, 8))) <= 6


# The tables themselves


def test_each_model_type_has_one_table_and_every_table_can_be_read() -> None:
    seen: dict[str, str] = {}
    for file in FOLDER.glob("*.json"):
        family = family_named(file.stem)
        for model_type in json.loads(file.read_text()).get("models", ()):
            assert seen.setdefault(model_type, file.stem) == file.stem
            assert family_of(model_type) is family


WRONG: dict[str, tuple[Any, str]] = {
    "unknown key": ({"modles": ["x"]}, "modles"),
    "no list": ({"models": "x"}, "list"),
    "no texts": ({"models": [3]}, "texts"),
    "no role": ({"roles": {"linaer": ["x"]}}, "linaer"),
    "bad pattern": ({"roles": {"linear": ["a..b"]}}, "component"),
    "expression": ({"roles": {"linear": ["(a+)+b"]}}, "component"),
    "two stars": ({"roles": {"linear": ["a*b*c"]}}, "component"),
    "long pattern": ({"roles": {"linear": ["x" * 300]}}, "200"),
    "lost number": ({"since_5": {"a.#": "b"}}, "#"),
    "starred name": ({"stored": {"a*": "b"}}, "*"),
    "removed middle": ({"stored": {"a": ""}}, "prefix"),
    "no text": ({"stored": {"a": 3}}, "text"),
    "parts unlike": ({"packed": [{"parameter": "a", "parts": ["a.#.b", "a.c"]}]}, "#"),
    "no parts": ({"packed": [{"parameter": "a", "parts": []}]}, "parts"),
    "sizes": ({"packed": [{"parameter": "a", "parts": ["b", "c"], "sizes": ["n"]}]}, "size"),
    "spelling": (
        {"packed": [{"parameter": "a", "parts": ["b", "c"], "packed_in": ["transformers 6"]}]},
        "transformers 5",
    ),
    "one tied": ({"tied": [{"parameters": ["a"]}]}, "two"),
    "quantization": ({"quantization": {"first": ["x"]}}, "first"),
    "flag": ({"tie_word_embeddings": "yes"}, "true or false"),
    "layers like none": ({"layers": {"like": "mine"}}, "gpt_neox"),
    "layers with a list": ({"layers": {"like": "llama", "norms": [2]}}, "whole number"),
    "layers with more": ({"layers": {"like": "llama", "heads": 2}}, "heads"),
    "like nothing": ({"like": ["nothing"]}, "nothing"),
    "like itself": ({"like": ["mine"]}, "itself"),
    "list": ([], "object"),
    "many": ({"models": [str(n) for n in range(3000)]}, "2000"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_table_is_refused_in_one_sentence_that_names_it(case: str, tmp_path: Path) -> None:
    content, word = WRONG[case]
    folder = tmp_path / "tables"
    folder.mkdir()
    (folder / "mine.json").write_text(json.dumps(content))
    with pytest.raises(LoratoolError, match=r"mine\.json") as raised:
        family_named("mine", folder)
    assert word in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000, b'{"models": [], "models": []}', b" " * (1 << 17)])
def test_a_file_that_is_no_table_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_bytes(content)
    with pytest.raises(LoratoolError, match=r"mine\.json"):
        family_named("mine", tmp_path)


def test_two_tables_about_one_model_are_refused(tmp_path: Path) -> None:
    for name in ("mine", "yours"):
        (tmp_path / f"{name}.json").write_text('{"models": ["llama"]}')
    with pytest.raises(LoratoolError, match="both about 'llama'"):
        family_of("llama", tmp_path)
