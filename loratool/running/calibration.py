"""The inputs of a model's layers on a text, used by error-compensated rounding (`loratool.weights.coarse.feedback`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loratool.errors import DataError, LoratoolError, PlacementError, quoted
from loratool.running.data import Data, Document, TokenizedSample, tokenize_data

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MOST_TOKENS: Final = 1024
WINDOW: Final = 64
"""Tokens in a window of plain text. Each window has a first token of its own."""


def calibration_samples(data: Data, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[TokenizedSample]:
    """Return the first samples of a file as tokens, `MOST_TOKENS` in total at most.

    Raises:
        DataError: a sample is longer than `max_length`, or the first sample is longer than `MOST_TOKENS`.
    """
    windows = any(isinstance(sample, Document) for sample in data.samples)
    samples, count = [], 0
    for sample in tokenize_data(data, tokenizer, min(WINDOW, max_length) if windows else max_length):
        count += len(sample.input_ids)
        if count > MOST_TOKENS:
            break
        samples.append(sample)
    if not samples:
        raise DataError(
            f"the first sample of {quoted(data.file)} is longer than the {MOST_TOKENS:,} tokens that a calibration reads; "
            "give shorter ones"
        )
    return samples


def record_inputs(model: PreTrainedModel, modules: Collection[str], samples: Sequence[TokenizedSample], folder: Path, *,
                  device: str, progress: Callable[[int], None]) -> dict[str, Path]:  # fmt: skip
    """Run the model once over all `samples` and save the inputs of `modules`; return a file in `folder` for each module.

    A file holds a NumPy array, (tokens, in_features) fp32. Modules with the same input share one file. `progress` is called
    with 1 after each module.

    The first token of a sample weighs as much as all its other tokens together: its inputs are multiplied by the square
    root of their number. It is an attention sink (Xiao et al. 2023, arXiv:2309.17453), so an error in its keys and values
    reaches every other token.

    Raises:
        PlacementError: the model that transformers loads has no module of that name, or does not run it.
        LoratoolError: the inputs are not finite, or the device has too little memory.
    """
    import torch

    recorder = _Recorder(samples, folder, device)

    def watch(module: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        def record(layer: Any, arguments: tuple[torch.Tensor, ...]) -> None:
            recorder.record(module, arguments[0])
            progress(1)

        return record

    layers = {module: _layer(model, module) for module in sorted(modules)}
    hooks = [layer.register_forward_pre_hook(watch(module)) for module, layer in layers.items()]
    try:
        with torch.inference_mode():
            model(**recorder.batch, use_cache=False, logits_to_keep=1)
    except torch.OutOfMemoryError:
        raise LoratoolError(
            f"{device} has too little memory to run the model on {recorder.tokens:,} tokens; give --calibrate a shorter file"
        ) from None
    finally:
        for hook in hooks:
            hook.remove()
    missing = sorted(layers.keys() - recorder.files.keys())
    if missing:
        raise PlacementError(f"the model does not run {quoted(missing[0])} on a text; merge without --calibrate")
    return recorder.files


def _layer(model: PreTrainedModel, module: str) -> Any:
    try:
        return model.get_submodule(module)
    except AttributeError:
        raise PlacementError(
            f"the model has no module {quoted(module)} once transformers has loaded it; merge without --calibrate"
        ) from None


class _Recorder:
    """All samples as one batch, padded at the end, and the files with the inputs of each module."""

    def __init__(self, samples: Sequence[TokenizedSample], folder: Path, device: str) -> None:
        import torch

        width = max(len(sample.input_ids) for sample in samples)
        ids = [[*sample.input_ids, *[0] * (width - len(sample.input_ids))] for sample in samples]
        mask = [[1] * len(sample.input_ids) + [0] * (width - len(sample.input_ids)) for sample in samples]
        self.batch = {
            "input_ids": torch.tensor(ids, device=device),
            "attention_mask": torch.tensor(mask, device=device),
        }
        self.tokens = sum(len(sample.input_ids) for sample in samples)
        self.files: dict[str, Path] = {}
        self._folder = folder
        self._real = self.batch["attention_mask"].bool().view(-1)
        weights = [[math.sqrt(max(len(sample.input_ids) - 1, 1)), *[1.0] * (width - 1)] for sample in samples]
        self._weights = torch.tensor(weights, device=device).view(-1, 1)[self._real]
        self._latest: tuple[torch.Tensor, Path] | None = None

    def record(self, module: str, inputs: torch.Tensor) -> None:
        """Save the inputs of a module, (samples, width, in_features), without padding."""
        import numpy as np

        if self._latest is None or self._latest[0] is not inputs:
            rows = inputs.reshape(-1, inputs.shape[-1])[self._real].float().mul_(self._weights).cpu()
            if not rows.isfinite().all():
                raise LoratoolError(
                    f"the model's numbers on the calibration text are not finite (before {quoted(module)}); check its weights"
                )
            file = self._folder / f"{len(self.files)}.npy"
            np.save(file, rows.numpy())
            self._latest = inputs, file
        self.files[module] = self._latest[1]
