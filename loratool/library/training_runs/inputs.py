"""Inputs of a training run: its base, its samples, and the complete recipe from the user's choices."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loratool.checkpoint.fingerprint import fingerprint, tensor_digests
from loratool.checkpoint.model import Checkpoint
from loratool.errors import CheckpointError, DataError, LoratoolError, UnsupportedError, WrongBaseError, quoted
from loratool.library.places.home_folder import digest_cache
from loratool.library.places.user_path import HUB_ID
from loratool.library.reporting.progress import Progress
from loratool.library.resolving.resolve import ResolvedBase, resolve_base
from loratool.library.resolving.resolve_data import resolve_data
from loratool.merging.arithmetic import choose_device
from loratool.running.data import TokenizedSample
from loratool.running.model import load_config, load_model, quiet_libraries
from loratool.running.model_tokens import checked_max_length, tokenized_for
from loratool.training.batches import packs_cleanly, plan_epoch, split_validation
from loratool.training.options import DEFAULT_LR, METHODS
from loratool.training.processes import Processes
from loratool.training.recipe import (
    BATCH_OF_FEW,
    BATCH_OF_MANY,
    EVALUATIONS,
    FEW_SAMPLES,
    LEAST_EPOCHS,
    LEAST_STEPS,
    MOST_WARMUP,
    Choices,
    Recipe,
    default_validation,
    method_options,
)
from loratool.weights.storages import QUANTIZED_TO
from registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from loratool.training.loop import Training

PACKED_LENGTH: Final = 1024
"""Default length of a packed row in tokens, if no sample is longer."""

UNLIMITED: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class TrainingInputs:
    """A checked base, tokenized samples, and the recipe.

    Attributes:
        samples: samples to train on.
        held_out: samples to validate with.
        is_quantized: whether the base itself is an NF4 checkpoint.
    """

    base: ResolvedBase
    config: PreTrainedConfig
    samples: Sequence[TokenizedSample]
    held_out: Sequence[TokenizedSample]
    recipe: Recipe
    processes: Processes
    is_quantized: bool
    notes: tuple[str, ...]

    @property
    def reference(self) -> str:
        """Reference to the base that is valid in any folder: its catalogued name, or an absolute path."""
        return self.base.record.name if self.base.record else str(self.base.path.absolute())

    @property
    def hub_id_or_name(self) -> str:
        """Name of the base for an adapter's configuration: its Hub id if it came from there, else its name."""
        source = self.base.record.source if self.base.record else ""
        return source if HUB_ID.fullmatch(source) else self.base.name


def read_inputs(base: str, data: str, choices: Choices, device: str, catalogue: Registry,
                watcher: Progress) -> TrainingInputs:  # fmt: skip
    """Check the base, read and tokenize the samples, and settle the recipe.

    Raises:
        LoratoolError, registry.RegistryError: the message says what is wrong with them.
    """
    content = resolve_data(data)
    found = resolve_base(base, catalogue)
    if not found.path.is_dir():
        raise CheckpointError(f"{quoted(found.path)} is a single file; give the model's folder, with its tokenizer")
    digest = _checked_fingerprint(found, watcher)
    truncate, plain = choices.get("truncate", False), choices.get("plain", False)
    with quiet_libraries():
        processes = Processes.joined(choose_device(device))
        config = load_config(found.path)
        context = checked_max_length(choices.get("max_length"), config, UNLIMITED)
        samples = tokenized_for(content, found.path, config, context, plain=plain, truncate=truncate)
    is_quantized = getattr(config, "quantization_config", None) is not None
    named = {"base": found.name, "base_fingerprint": digest, "data": content.file.name}
    train, held_out = split_validation(samples, _held_out(choices, len(samples), data), choices.get("seed", 0))
    recipe = _recipe(
        named, samples, train, choices, context, is_quantized=is_quantized, on_cuda=processes.device != "cpu"
    )
    notes = tuple(_notes(samples, choices, context, is_quantized=is_quantized))
    return TrainingInputs(found, config, train, held_out, recipe, processes, is_quantized, notes)


def _recipe(named: Mapping[str, str], samples: Sequence[TokenizedSample], train: Sequence[TokenizedSample],
            choices: Choices, context: int, *, is_quantized: bool, on_cuda: bool) -> Recipe:  # fmt: skip
    """Return the complete recipe: the choices, and defaults that suit the samples, the method and the device.

    Args:
        named: base and data, by their names in the recipe.
        train: the samples that are not held out.
        context: largest number of tokens of a sample.

    Raises:
        LoratoolError: choices contradict each other.
    """
    adapter = method_options(choices)
    held_out, seed = len(samples) - len(train), choices.get("seed", 0)
    batch_size, accumulate = _batch(choices, len(train))
    pack = choices.get("pack", False)
    length = _packed_length(train, context) if pack and "max_length" not in choices else context
    steps = _steps(choices, train, batch_size, length if pack else None, seed)
    return Recipe(
        **named,
        data_sha256=_sha256(samples),
        samples=len(samples),
        adapter=adapter,
        targets=_targets(choices),
        quantize=None if is_quantized else choices.get("quantize"),
        steps=steps,
        batch_size=batch_size,
        accumulate=accumulate,
        lr=choices.get("lr", DEFAULT_LR),
        schedule=choices.get("schedule", "cosine"),
        warmup=choices.get("warmup", min(MOST_WARMUP, steps // 10)),
        weight_decay=choices.get("weight_decay", 0.0),
        clip=choices.get("clip", 1.0),
        precision=choices.get("precision", "bf16" if on_cuda else "fp32"),
        gradient_checkpointing=choices.get(
            "gradient_checkpointing", on_cuda and (is_quantized or "quantize" in choices)
        ),
        seed=seed,
        max_length=length,
        truncate=choices.get("truncate", False),
        plain=choices.get("plain", False),
        pack=pack,
        validation=held_out,
        eval_every=choices.get("eval_every", math.ceil(steps / EVALUATIONS)),
        keep=_kept(choices, held_out),
    )


def _notes(samples: Sequence[TokenizedSample], choices: Choices, context: int, *, is_quantized: bool) -> Iterator[str]:
    """Yield notes on the inputs for the user."""
    if is_quantized and "quantize" in choices:
        yield f"the base is in {QUANTIZED_TO.upper()} already, so --quantize changes nothing"
    cut = sum(sample.truncated for sample in samples)
    if cut:
        were = "was" if cut == 1 else "were"
        yield f"{cut:,} of {len(samples):,} samples {were} cut to {context:,} tokens"


def prepare(inputs: TrainingInputs, watcher: Progress) -> Training:
    """Load the model, attach the recipe's adapter to it, and make the optimizer.

    Raises:
        LoratoolError: the model cannot be loaded, or a target is not one of its modules.
    """
    from loratool.training.loop import Training
    from loratool.training.methods import attach
    from loratool.training.optimizer import make_optimizer

    recipe, processes = inputs.recipe, inputs.processes
    quantized = inputs.is_quantized or recipe.quantize is not None
    processes.refuse_to_spread(quantized=quantized)
    with quiet_libraries():
        watcher.begin("loading the model", 1)
        model = load_model(inputs.base.path, inputs.config, processes.device, quantize=recipe.quantize is not None)
        if recipe.pack and not packs_cleanly(model):
            raise UnsupportedError(
                f"packed samples would see each other in {type(model).__name__} models; leave --pack out"
            )
        targets = recipe.targets if isinstance(recipe.targets, str) else list(recipe.targets)
        adaptation = attach(model, recipe.adapter, targets=targets, seed=recipe.seed, total_steps=recipe.steps)
        if recipe.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[no-untyped-call]
        parameters = adaptation.parameters()
        optimizer = make_optimizer(parameters, recipe, paged=quantized and processes.device != "cpu")
        processes.prepare(model, optimizer, parameters)
    return Training(recipe, model, adaptation, optimizer, processes, inputs.samples, inputs.held_out)


def _checked_fingerprint(base: ResolvedBase, watcher: Progress) -> str:
    """Return the fingerprint of the base.

    Raises:
        WrongBaseError: the base has changed since it was catalogued.
    """
    checkpoint = Checkpoint.open(base.path)  # raises if it is damaged, incomplete or a pickle
    watcher.begin("fingerprinting the base", checkpoint.nbytes)
    found = fingerprint(checkpoint.tensors, tensor_digests(checkpoint, digest_cache(), progress=watcher.advance))
    if base.record is not None and base.record.fingerprint not in (None, found):
        raise WrongBaseError(
            f"the files of base {quoted(base.name)} are not those that were catalogued; see 'loratool base verify "
            f"{base.name}'"
        )
    return found


def _held_out(choices: Choices, samples: int, data: str) -> int:
    """Return the number of held-out samples.

    Raises:
        DataError: no sample would be left to train on.
    """
    count = choices.get("validation", default_validation(samples))
    if count >= samples:
        raise DataError(
            f"--validation {count:,} leaves none of the samples of {quoted(data)} ({samples:,}) to train on; hold out fewer"
        )
    return count


def _batch(choices: Choices, samples: int) -> tuple[int, int]:
    """Return the number of samples per step, and the number of passes per step.

    Raises:
        LoratoolError: there are more passes than samples.
    """
    usual = BATCH_OF_FEW if samples < FEW_SAMPLES else BATCH_OF_MANY
    batch_size, accumulate = choices.get("batch_size", usual), choices.get("accumulate", 1)
    if accumulate > batch_size:
        raise LoratoolError(
            f"a step of {batch_size} samples cannot go in {accumulate} passes; give a smaller --accumulate or a larger "
            "--batch-size"
        )
    return batch_size, accumulate


def _packed_length(samples: Sequence[TokenizedSample], context: int) -> int:
    return min(context, max(PACKED_LENGTH, *(len(sample.input_ids) for sample in samples)))


def _steps(
    choices: Choices, samples: Sequence[TokenizedSample], batch_size: int, row_length: int | None, seed: int
) -> int:
    """Return the given number of steps, or that of the epochs; by default at least `LEAST_STEPS` and `LEAST_EPOCHS`."""
    steps, epochs = choices.get("steps"), choices.get("epochs")
    if steps is not None:
        return steps
    if epochs is not None and row_length is None:  # only with packing do epochs differ in length
        return epochs * len(plan_epoch(samples, batch_size=batch_size, row_length=None, seed=seed, epoch=0))
    planned = 0
    epoch = 0
    while epoch < (epochs or LEAST_EPOCHS) or (epochs is None and planned < LEAST_STEPS):
        planned += len(plan_epoch(samples, batch_size=batch_size, row_length=row_length, seed=seed, epoch=epoch))
        epoch += 1
    return planned


def _targets(choices: Choices) -> str | tuple[str, ...]:
    targets = choices.get("targets", "all-linear")
    return targets if isinstance(targets, str) else tuple(targets)


def _kept(choices: Choices, held_out: int) -> str:
    """Return ``best`` if samples are held out. AdaLoRA is above its budget until near the end, so its ``last`` is kept."""
    only_last = METHODS[choices["method"]].only_last
    asked = choices.get("keep", "best" if held_out and only_last is None else "last")
    if asked == "best" and only_last is not None:
        raise LoratoolError(f"{only_last}; give --keep last")
    if asked == "best" and not held_out:
        raise LoratoolError("--keep best needs samples to validate with; give --validation N, or --keep last")
    return asked


def _sha256(samples: Sequence[TokenizedSample]) -> str:
    """Return the sha256 of the tokens and labels of all samples, in order."""
    digest = hashlib.sha256()
    for sample in samples:
        for numbers in (sample.input_ids, sample.labels):
            digest.update(len(numbers).to_bytes(8, "little"))
            digest.update(array("q", numbers).tobytes())
    return digest.hexdigest()
