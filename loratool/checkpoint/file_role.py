"""The role of each file in a model's or an adapter's folder, by its name.

The names are those that transformers, diffusers, PEFT, Trainer, DeepSpeed and accelerate look for or write.
`loratool.checkpoint.inheritance` decides by role which files a new model inherits.
"""

from __future__ import annotations

from enum import Enum
from fnmatch import fnmatchcase
from pathlib import PurePath
from typing import Final

from loratool.checkpoint.output_kind import OWN_FILE, UNDO_FOLDER

PICKLE_SUFFIXES: Final = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
WEIGHT_SUFFIXES: Final = PICKLE_SUFFIXES | {".safetensors", ".gguf", ".h5", ".msgpack", ".onnx"}
"""Suffixes of files that hold weights."""


class FileRole(Enum):
    """The role of a file. The value is a noun phrase for messages."""

    OWN = "loratool's own"
    """The manifest and the files of the undo folder."""
    ADAPTER = "an adapter"
    """PEFT's files. transformers loads the adapter on top of any model in the same folder."""
    TRAINED_BESIDE = "weights that were trained with an adapter"
    """Projectors, heads, embeddings and other weights that a program trains with an adapter and saves beside it."""
    TRAINING_STATE = "the state of a training"
    """Optimizers, schedulers and random states, nearly always pickles. They are read to resume a training."""
    MODEL_WEIGHTS = "a model's weights"
    CONVERTED = "another format of the same weights"
    OTHER_WEIGHTS = "weights"
    """Weights under a name that tells nothing else."""
    CONFIGURATION = "configuration"
    TOKENIZER = "a tokenizer"
    CHAT_TEMPLATE = "a chat template"
    CODE = "code"
    """Python files, loaded with ``trust_remote_code``."""
    EDITABLE = "a file for people to edit"
    """Cards, licences, samples, generation settings: nothing that decides what the weights compute."""

    @property
    def is_needed(self) -> bool:
        """Whether a model's weights cannot be used without the file, or compute something else."""
        return self in _NEEDED

    @property
    def is_editable(self) -> bool:
        """Whether a user may freely change the file, since the weights and what they compute stay the same."""
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
"""For each role, patterns of paths relative to the folder. The first match decides. ``*`` matches slashes, too."""

_OF_WEIGHTS: Final = {FileRole.MODEL_WEIGHTS, FileRole.OTHER_WEIGHTS, FileRole.CONVERTED, FileRole.TRAINED_BESIDE}

EDITABLE_CONFIGURATION: Final = frozenset({"generation_config.json"})


def role_of(name: str | PurePath) -> FileRole:
    """Return the role of the file `name`, a path relative to the folder of a model or an adapter."""
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
    """Return whether a file, by its name, holds weights that a program may load as the folder's model."""
    return role_of(name) in _OF_WEIGHTS and PurePath(name).suffix.lower() in WEIGHT_SUFFIXES


def may_be_loaded(name: str | PurePath) -> bool:
    """Return whether a program that loads the folder may load the file as weights, apply it to them, or run it."""
    return role_of(name) in {FileRole.ADAPTER, FileRole.CODE} or holds_weights(name)
