"""Which embeddings are output heads as well, against what transformers ties when it loads the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from loratool.checkpoint.model import Checkpoint
from loratool.merging.ties import is_tied_embedding, tied

SMALL: dict[str, Any] = {
    "vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip


def mamba(**ties: bool) -> transformers.PreTrainedConfig:
    return transformers.MambaConfig(vocab_size=48, hidden_size=16, num_hidden_layers=1, state_size=4, **ties)


def whisper(**ties: bool) -> transformers.PreTrainedConfig:
    sizes = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    ffn = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return transformers.WhisperConfig(vocab_size=48, d_model=16, **sizes, **ffn, **tokens, **ties)


def bart(**ties: bool) -> transformers.PreTrainedConfig:
    sizes = {
        f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads", "ffn_dim")
    }
    return transformers.BartConfig(vocab_size=48, d_model=16, **sizes, **ties)


def llava(**ties: bool) -> transformers.PreTrainedConfig:
    text = {"model_type": "llama", **SMALL, **ties}
    return transformers.LlavaConfig(text_config=text, vision_config={"model_type": "clip_vision_model", **VISION})


def llama(**ties: bool) -> transformers.PreTrainedConfig:
    return transformers.LlamaConfig(**SMALL, **ties)


def roberta(**ties: bool) -> transformers.PreTrainedConfig:
    return transformers.XLMRobertaConfig(**SMALL, **ties)


MODELS = {
    "mamba": (mamba, transformers.AutoModelForCausalLM),
    "whisper": (whisper, transformers.AutoModelForSpeechSeq2Seq),
    "bart": (bart, transformers.AutoModelForSeq2SeqLM),
    "llava": (llava, transformers.AutoModelForImageTextToText),
    "llama": (llama, transformers.AutoModelForCausalLM),
    "classifier": (llama, transformers.AutoModelForSequenceClassification),
    "xlm-classifier": (roberta, transformers.AutoModelForTokenClassification),
    "xlm": (roberta, transformers.AutoModelForMaskedLM),
}


@pytest.mark.parametrize("said", [True, None, False])
@pytest.mark.parametrize("model", MODELS)
def test_an_embedding_is_tied_where_transformers_ties_it(model: str, said: bool | None, tmp_path: Path) -> None:
    config, auto = MODELS[model]
    torch.manual_seed(0)
    auto.from_config(config(**({} if said is None else {"tie_word_embeddings": said}))).save_pretrained(tmp_path)
    if said is None:  # as in many a config.json on the Hub
        content = json.loads((tmp_path / "config.json").read_text())
        for part in (content, content.get("text_config", {})):
            part.pop("tie_word_embeddings", None)
        (tmp_path / "config.json").write_text(json.dumps(content))
    loaded = auto.from_pretrained(tmp_path)
    embedding, head = loaded.get_input_embeddings().weight, loaded.get_output_embeddings()
    base = Checkpoint.open(tmp_path)
    name = next(name for name, info in base.tensors.items() if list(info.shape) == list(embedding.shape))
    assert is_tied_embedding(name, base) == (head is not None and head.weight is embedding)


@pytest.mark.parametrize(("whole", "text"), [(False, True), (True, False), (False, False)])
def test_a_head_that_is_stored_is_tied_where_the_model_or_its_text_model_says_so(
    whole: bool, text: bool, tmp_path: Path
) -> None:
    config = llava(tie_word_embeddings=False)
    config.tie_word_embeddings = False
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": whole}
    content["text_config"]["tie_word_embeddings"] = text
    (tmp_path / "config.json").write_text(json.dumps(content))
    base = Checkpoint.open(tmp_path)
    (head,) = (name for name in base.tensors if "lm_head" in name)
    assert bool(tied([head], base)) == (whole or text)


def test_a_matrix_that_is_no_head_is_not_tied_for_its_shape_alone(tmp_path: Path) -> None:
    wide = transformers.LlamaConfig(**SMALL | {"vocab_size": 24}, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(wide).save_pretrained(tmp_path)
    base = Checkpoint.open(tmp_path)
    assert base.tensors["model.layers.0.mlp.up_proj.weight"].shape == base.tensors["model.embed_tokens.weight"].shape
    assert tied(["model.layers.0.mlp.up_proj.weight"], base) == {}
