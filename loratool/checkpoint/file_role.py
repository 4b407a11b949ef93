"""What each file in a model's or an adapter's folder is to the programs that load the folder, told by its name.

The names are those that transformers, diffusers, PEFT, Trainer, DeepSpeed and accelerate look for or write. What a role
means for a model that is made of another one, `loratool.checkpoint.inheritance` says.
"""

from __future__ import annotations

from enum import Enum
from fnmatch import fnmatchcase
from pathlib import PurePath
from typing import Final

from loratool.checkpoint.output_kind import OWN_FILE, UNDO_FOLDER

PICKLE_SUFFIXES: Final = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
WEIGHT_SUFFIXES: Final = PICKLE_SUFFIXES | {".safetensors", ".gguf", ".h5", ".msgpack", ".onnx"}
"""What files of weights end with."""


class FileRole(Enum):
    """What a file is. The value is what to call it in a sentence."""

    OWN = "loratool's own"
    """The manifest, and what the undo folder holds."""
    ADAPTER = "an adapter"
    """PEFT's files: transformers puts the adapter on top of whatever model lies beside them."""
    TRAINED_BESIDE = "weights that were trained with an adapter"
    """Projectors, heads, embeddings and whatever else a program trains with an adapter and saves beside it."""
    TRAINING_STATE = "the state of a training"
    """Optimizers, schedulers, random states: read when a training goes on, and nearly always pickles."""
    MODEL_WEIGHTS = "a model's weights"
    CONVERTED = "another format of the same weights"
    OTHER_WEIGHTS = "weights"
    """Weights under a name that says no more."""
    CONFIGURATION = "configuration"
    TOKENIZER = "a tokenizer"
    CHAT_TEMPLATE = "a chat template"
    CODE = "code"
    """Loaded with ``trust_remote_code``."""
    EDITABLE = "a file for people to edit"
    """Cards, licences, samples, how to generate: nothing that decides what the weights compute."""

    @property
    def is_needed(self) -> bool:
        """Whether a model's weights cannot be used, or not in the same way, without the file."""
        return self in _NEEDED

    @property
    def is_editable(self) -> bool:
        """Whether a user may change the file as they like: the weights stay what they are, and compute the same."""
        return self in _EDITABLE


_NEEDED: Final = {FileRole.CONFIGURATION, FileRole.TOKENIZER, FileRole.CHAT_TEMPLATE, FileRole.CODE}
_EDITABLE: Final = {FileRole.EDITABLE, FileRole.CHAT_TEMPLATE, FileRole.TRAINING_STATE}

NAMES: Final[tuple[tuple[FileRole, str], ...]] = (
    (FileRole.OWN, f"{OWN_FILE} {UNDO_FOLDER}/*"),
    (FileRole.ADAPTER, "adapter_config.json adapter_model.* adapter_model-*"),
    (
        FileRole.TRAINING_STATE,
        "optimizer* scheduler.* rng_state* random_states* training_args.bin trainer_state.json scaler* zero_to_fp32.py "
        "*_optim_states.pt *_model_states.pt *.distcp pytorch_model_fsdp* sampler* dataloader* custom_checkpoint_* "
        "global_step*/* latest checkpoint-*/*",
    ),
    (
        FileRole.TRAINED_BESIDE,
        "head_config.json pytorch_model_head.bin non_lora_trainables.* non_lora_state_dict.* trainable_params.* "
        "*projector.bin *projector.pt *projector.pth *projector.safetensors *_head.bin *_head.pt *_head.pth "
        "*_head.safetensors *embeddings.bin *embeddings.pt *embeddings.safetensors *_emb.safetensors *_embeds.bin "
        "*_embeds.safetensors *_Dense/*.bin *_Dense/*.safetensors vit.safetensors",
    ),
    (
        FileRole.MODEL_WEIGHTS,
        "model.safetensors model-*.safetensors model.*.safetensors pytorch_model.bin pytorch_model-*.bin "
        "pytorch_model.*.bin consolidated.* tf_model.h5 flax_model.msgpack *diffusion_pytorch_model*.safetensors "
        "*.safetensors.index.json *.bin.index.json",
    ),
    (
        FileRole.CONVERTED,
        "*.gguf *.onnx ggml-* pytorch_lora_weights.* adapters.safetensors pytorch_adapter.bin",
    ),
    (
        FileRole.CHAT_TEMPLATE,
        "chat_template.jinja chat_template.json additional_chat_templates/*",
    ),
    (
        FileRole.TOKENIZER,
        "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab*.json vocab*.txt vocab.bpe "
        "merges.txt encoder.json bpe.codes *.model tokenizer.model* *.tiktoken *.spm tekken.json tokenizer*/*",
    ),
    (
        FileRole.CONFIGURATION,
        "config.json */config.json configuration.json model_index.json *_config.json */*_config.json modules.json params.json",
    ),
)
"""For each role, patterns of names below the folder; the first that fits decides. ``*`` stands for slashes as well."""

_OF_WEIGHTS: Final = {FileRole.MODEL_WEIGHTS, FileRole.OTHER_WEIGHTS, FileRole.CONVERTED, FileRole.TRAINED_BESIDE}

EDITABLE_CONFIGURATION: Final = frozenset({"generation_config.json"})


def role_of(name: str | PurePath) -> FileRole:
    """The role of the file `name`, relative to the folder of a model or an adapter."""
    text = PurePath(name).as_posix()
    if text in EDITABLE_CONFIGURATION:
        return FileRole.EDITABLE
    for role, patterns in NAMES:
        if any(fnmatchcase(text, pattern) for pattern in patterns.split()):
            return role
    suffix = PurePath(text).suffix.lower()
    if suffix == ".py":
        return FileRole.CODE
    return FileRole.OTHER_WEIGHTS if suffix in WEIGHT_SUFFIXES else FileRole.EDITABLE


def holds_weights(name: str | PurePath) -> bool:
    """Whether a file, by its name, holds weights that a program may take for those of the model in its folder."""
    return role_of(name) in _OF_WEIGHTS and PurePath(name).suffix.lower() in WEIGHT_SUFFIXES


def may_be_loaded(name: str | PurePath) -> bool:
    """Whether a program that loads the folder may take the file for weights, put it on top of them, or run it."""
    return role_of(name) in {FileRole.ADAPTER, FileRole.CODE} or holds_weights(name)
