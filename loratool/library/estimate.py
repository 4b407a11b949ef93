"""`loratool.estimate`: parameters and memory that training an adapter takes."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast, get_args

from loratool.architecture import Architecture, Role, architecture_of, module_of
from loratool.checkpoint.header import header_bytes
from loratool.checkpoint.json_text import read_json_object
from loratool.checkpoint.model import Checkpoint, has_file
from loratool.errors import CheckpointError, LoratoolError, NotFoundError, nearest, quoted
from loratool.estimating.known_shapes import KNOWN
from loratool.estimating.memory import (
    DTYPES,
    MOMENTS,
    Attention,
    Memory,
    Optimizer,
    Step,
    adapter_memory,
    adapter_parameters,
    full_memory,
)
from loratool.estimating.shape import LARGEST, Linear, ModelShape, read_shape
from loratool.formats.builders import BUILDERS
from loratool.formats.module_targets import ALL_LINEAR, ModuleTargets
from loratool.library.places.user_path import HUB_ID, exists, taken_for_hub_id, user_path
from loratool.library.recording.opening import open_registry
from loratool.library.resolving.resolve import resolve_base
from loratool.training.options import METHODS, method_with
from loratool.training.recipe import BATCH_OF_FEW
from loratool.weights.storages import QUANTIZED_TO
from registry import is_name

DEFAULT_LENGTH: Final = 512
MOST_TOKENS: Final = 1 << 40
_PRECISIONS: Final = ("bf16", "fp32")
_PREFIX: Final = "base_model.model."
_STORED: Final = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}


@dataclass(frozen=True, slots=True)
class Way:
    """One way to train: ``full``, or the method with the base in 16 bits or in NF4.

    Attributes:
        name: of the way.
        trainable: number of trained parameters.
        memory: memory without gradient checkpointing.
        checkpointed: memory with gradient checkpointing.
    """

    name: str
    trainable: int
    memory: Memory
    checkpointed: Memory


@dataclass(frozen=True, slots=True)
class EstimateResult:
    """Parameters and memory of a training. Sizes are in bytes.

    Attributes:
        model: name of the model.
        model_type: its type in transformers.
        parameters: number of the model's parameters.
        rank: rank of each module; for DyLoRA the largest, for AdaLoRA the final average.
        initial_rank: AdaLoRA's initial rank; for other methods `rank`.
        target_modules: last components of the adapted modules' names.
        adapted_modules: number of adapted modules.
        trainable_parameters: number of the adapter's parameters during training.
        adapter_file: size of the adapter's file.
        ways: full fine-tuning, the method, and the method on a base in NF4.
    """

    model: str
    model_type: str
    parameters: int
    method: str
    rank: int
    initial_rank: int
    target_modules: tuple[str, ...]
    adapted_modules: int
    trainable_parameters: int
    adapter_file: int
    adapter_dtype: str
    batch_size: int
    length: int
    precision: str
    optimizer: str
    attention: str
    ways: tuple[Way, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the result for ``--json``."""
        return {
            "model": self.model,
            "model_type": self.model_type,
            "parameters": self.parameters,
            "method": self.method,
            "rank": self.rank,
            "initial_rank": self.initial_rank,
            "target_modules": list(self.target_modules),
            "adapted_modules": self.adapted_modules,
            "trainable_parameters": self.trainable_parameters,
            "adapter_file_bytes": self.adapter_file,
            "adapter_dtype": self.adapter_dtype,
            "batch_size": self.batch_size,
            "max_length": self.length,
            "precision": self.precision,
            "optimizer": self.optimizer,
            "attention": self.attention,
            "memory": {
                way.name: {
                    "trainable_parameters": way.trainable,
                    **_figures(way.memory),
                    "with_gradient_checkpointing": _figures(way.checkpointed),
                }
                for way in self.ways
            },
            "notes": list(self.notes),
        }


def estimate(base: str | os.PathLike[str], *, method: str = "lora", rank: int = 8, initial_rank: int | None = None,
             targets: str | Sequence[str] | None = None, batch_size: int = BATCH_OF_FEW, max_length: int | None = None,
             optimizer: str = "adamw", precision: str = "bf16", adapter_dtype: str = "fp32", attention: str = "sdpa",
             registry: str | None = None) -> EstimateResult:  # fmt: skip
    """Estimate parameters and memory for training an adapter of `base`, compared with full fine-tuning and a base in NF4.

    Only the configuration is read, and the headers of the weights if they are on this disk. Nothing else is downloaded.

    Args:
        base: a catalogued name, a folder, a ``config.json``, a Hub id, or the name of a known shape such as ``gpt3-175b``.
        method: ``lora``, ``dylora`` or ``adalora``.
        rank: rank of each module; for DyLoRA the largest, for AdaLoRA the final average.
        initial_rank: AdaLoRA's initial rank; by default a quarter more than `rank`.
        targets: names of modules, separated by commas or as a list, or a pattern; by default ``all-linear``.
        batch_size: number of rows computed at once.
        max_length: tokens per row; by default 512, or the model's context if that is shorter.
        optimizer: ``adamw``, ``adamw-8bit``, ``adamw-paged`` or ``sgd``.
        precision: dtype of the weights and of the computation: ``bf16`` or ``fp32``.
        adapter_dtype: dtype in which the adapter is trained and saved: ``fp32``, ``bf16`` or ``fp16``.
        attention: ``sdpa`` or ``eager``.
        registry: SQLAlchemy URL of the catalogue, instead of the one in the home folder.

    Raises:
        LoratoolError, registry.RegistryError: the message says what is wrong.
    """
    _check_word("--method", method, tuple(METHODS))
    _check_word("--optimizer", optimizer, tuple(MOMENTS))
    _check_word("--precision", precision, _PRECISIONS)
    _check_word("--adapter-dtype", adapter_dtype, tuple(DTYPES))
    _check_word("--attention", attention, get_args(Attention))
    begun = _initial_rank(method, rank, initial_rank)
    shape, name, notes = _shape(os.fspath(base), registry)
    modules = _modules(shape, targets, name)
    step = Step(
        batch_size=_checked("--batch-size", batch_size),
        length=_length(max_length, shape),
        compute=DTYPES[precision],
        attention=cast(Attention, attention),
    )
    if step.tokens > MOST_TOKENS:
        raise LoratoolError(f"a batch of {step.tokens:,} tokens is too large to count; give a smaller --batch-size")
    return EstimateResult(
        model=name,
        model_type=shape.model_type,
        parameters=shape.parameters,
        method=method,
        rank=rank,
        initial_rank=begun,
        target_modules=tuple(dict.fromkeys(module.rpartition(".")[2] for module in modules)),
        adapted_modules=len(modules),
        trainable_parameters=adapter_parameters(shape, modules, begun, METHODS[method]),
        adapter_file=_file_size(shape, modules, rank, method, adapter_dtype),
        adapter_dtype=adapter_dtype,
        batch_size=batch_size,
        length=step.length,
        precision=precision,
        optimizer=optimizer,
        attention=attention,
        ways=_ways(shape, step, modules, begun, method, cast(Optimizer, optimizer), adapter_dtype),
        notes=notes,
    )


def _ways(shape: ModelShape, step: Step, modules: Sequence[str], rank: int, method: str, optimizer: Optimizer,
          adapter_dtype: str) -> tuple[Way, ...]:  # fmt: skip
    adapter = adapter_parameters(shape, modules, rank, METHODS[method])
    checkpointing = Step(step.batch_size, step.length, step.compute, step.attention, checkpointing=True)

    def beside(step: Step, *, quantized: bool) -> Memory:
        return adapter_memory(
            shape,
            step,
            optimizer,
            modules,
            rank,
            method=METHODS[method],
            adapter_dtype=adapter_dtype,
            quantized=quantized,
        )

    return (
        Way(
            "full", shape.parameters, full_memory(shape, step, optimizer), full_memory(shape, checkpointing, optimizer)
        ),
        Way(method, adapter, beside(step, quantized=False), beside(checkpointing, quantized=False)),
        Way(f"{method}-{QUANTIZED_TO}", adapter, beside(step, quantized=True), beside(checkpointing, quantized=True)),
    )


def _figures(memory: Memory) -> dict[str, int]:
    return {
        "weight_bytes": memory.weights,
        "gradient_bytes": memory.gradients,
        "optimizer_bytes": memory.optimizer,
        "activation_bytes": memory.activations,
        "total_bytes": memory.total,
    }


def _shape(text: str, registry: str | None) -> tuple[ModelShape, str, tuple[str, ...]]:
    """Return the shape of the model, its name, and notes."""
    path = user_path(text)
    is_here = bool(text) and exists(path)
    if is_here and has_file(path) and path.suffix == ".json":
        return read_shape(_read_json(path), text), text, ()
    with open_registry(registry, read_only=True) as catalogue:
        is_catalogued = is_name(text) and catalogue.bases.get(text) is not None
        if not is_here and not is_catalogued:
            if text in KNOWN:
                return read_shape(KNOWN[text], text), text, ()
            if HUB_ID.fullmatch(text) and not text.startswith((".", "~", "/")):
                from loratool.hub.address import HubAddress
                from loratool.hub.bases import fetch_config

                with taken_for_hub_id(text):
                    config = fetch_config(HubAddress.parse(text), f"loratool estimate {text}")
                return read_shape(_read_json(config), text), text, ()
            near = nearest(text, [*KNOWN, *(record.name for record in catalogue.bases.list())])
            raise NotFoundError(
                f"there is no model {quoted(text)}: neither a catalogued name, nor a folder, nor a Hub id, nor a known shape"
                f"{'; the nearest are ' if near else '; known shapes are '}{', '.join(map(quoted, near or KNOWN))}"
            )
        base = resolve_base(text, catalogue)
    if not base.path.is_dir():
        raise CheckpointError(f"{quoted(base.path)} is a single file; give the model's folder, with its config.json")
    return _of_folder(base.path, base.name)


def _of_folder(folder: Path, name: str) -> tuple[ModelShape, str, tuple[str, ...]]:
    config = _read_json(folder / "config.json")
    try:
        tensors = Checkpoint.open(folder).tensors
    except LoratoolError as error:
        if any(folder.glob("*.safetensors")):
            note = f"its weights cannot be read, so only its configuration was used ({error})"
            return read_shape(config, name), name, (note,)
        return read_shape(config, name), name, ()
    if "quantization_config" in config:
        return (
            read_shape(config, name),
            name,
            ("the base is stored in 4 bits; the figures are for the model that it was made from",),
        )
    architecture = architecture_of(config, tensors)
    linears = {module_of(weight): _linear(weight, architecture) for weight in architecture.weights(Role.LINEAR)}
    parameters = sum(math.prod(info.shape) for info in tensors.values())
    shape, notes = _shape_of_any(config, name)
    if not linears:
        raise CheckpointError(f"{quoted(folder)} has no linear modules with a weight; there is nothing to adapt")
    return shape.stored_as(linears, parameters), name, notes


def _shape_of_any(config: Mapping[str, Any], name: str) -> tuple[ModelShape, tuple[str, ...]]:
    """Return the shape, and a note if an unknown model type is treated as a Llama."""
    try:
        return read_shape(config, name), ()
    except LoratoolError as error:
        try:
            shape = read_shape({**config, "model_type": "llama"}, name)
        except LoratoolError:
            raise error from None
        note = f"the layers of type {quoted(config.get('model_type'))} are not known; their activations are a Llama's"
        return shape, (note,)


def _linear(weight: str, architecture: Architecture) -> Linear:
    first, second = architecture.tensors[weight].shape
    return Linear(first, second) if architecture.is_conv1d(weight) else Linear(second, first)


def _read_json(file: Path) -> Mapping[str, Any]:
    if not has_file(file):
        raise CheckpointError(f"there is no {quoted(file)}; give a model's folder with its config.json")
    return read_json_object(file)


def _modules(shape: ModelShape, targets: str | Sequence[str] | None, name: str) -> tuple[str, ...]:
    """Return the modules that get an adapter, chosen as by ``loratool train``."""
    if targets is None or targets == ALL_LINEAR:
        return tuple(shape.linears)
    is_pattern = isinstance(targets, str) and any(sign in targets for sign in "*+?()[]{}|^$\\")
    names = targets.replace(",", " ").split() if isinstance(targets, str) else list(targets)
    if not names:
        raise LoratoolError("no target is named; give the names of modules, or all-linear")
    for wanted in [targets] if is_pattern else [[each] for each in names]:
        if not _matched(shape, wanted):
            ends = dict.fromkeys(module.rpartition(".")[2] for module in shape.linears)
            shown = wanted if isinstance(wanted, str) else wanted[0]
            raise NotFoundError(
                f"no linear module of {quoted(name)} is called {quoted(shown)}; its modules are "
                f"{', '.join(quoted(end) for end in list(ends)[:12])}"
            )
    return tuple(_matched(shape, targets if is_pattern else names))


def _matched(shape: ModelShape, targets: object) -> list[str]:
    config = ModuleTargets.parse({"target_modules": targets}, "--targets")
    return [module for module in shape.linears if config.targets(module)]


def _file_size(shape: ModelShape, modules: Sequence[str], rank: int, method: str, dtype: str) -> int:
    """Return the size of the safetensors file in PEFT's layout; for AdaLoRA with the average rank in each module."""
    stored = _STORED[dtype]
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for module in modules:
        linear = shape.linears[module]
        factors = METHODS[method].factor_shapes(rank, linear.out_features, linear.in_features)
        tensors |= {BUILDERS[method].key(module, letter): (stored, each) for letter, each in factors.items()}
    numbers = adapter_parameters(shape, modules, rank, METHODS[method])
    return len(header_bytes(tensors, {"format": "pt"})) + numbers * DTYPES[dtype]


def _initial_rank(method: str, rank: int, asked: int | None) -> int:
    _checked("--rank", rank)
    owner: Any = method_with("initial_rank")
    if method == owner.method:
        return int(owner(rank=rank, initial_rank=None if asked is None else _checked("--initial-rank", asked)).init_r)
    if asked is not None:
        raise LoratoolError(
            f"--initial-rank is {owner.title}'s; leave it out, or give --method {owner.method}, not {method}"
        )
    return rank


def _length(asked: int | None, shape: ModelShape) -> int:
    if asked is None:
        return min(DEFAULT_LENGTH, shape.context or DEFAULT_LENGTH)
    length = _checked("--max-length", asked)
    if shape.context is not None and length > shape.context:
        raise LoratoolError(
            f"the model reads {shape.context:,} tokens at most; give a --max-length up to that, not {length:,}"
        )
    return length


def _checked(option: str, value: int) -> int:
    if not 1 <= value <= LARGEST:
        raise LoratoolError(f"{option} is {value} and must be a whole number of 1 to {LARGEST:,}")
    return value


def _check_word(option: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise LoratoolError(f"{option} is {quoted(value, 40)} and must be {', '.join(choices[:-1])} or {choices[-1]}")
