"""Adapters at work in tiny models, and the same ones in PEFT."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from four_bit_models import save_by_transformers
from tiny_models import VOCABULARY, TinyModels, load

from loratool.formats.adapter import Adapter
from loratool.formats.adapter_draft import Draft
from loratool.formats.write import write_peft
from loratool.running.model import load_config, load_model
from loratool.training.methods import Adaptation

NF4 = "llama-nf4"


def tiny(models: TinyModels, architecture: str, dtype: str = "fp32") -> Any:
    """A tiny model to train; ``llama-nf4`` is the Llama in 4 bits, computing in fp32."""
    if architecture == NF4:
        folder = models.folder("llama", "bf16").parent / "llama-trained-in-nf4"
        if not folder.exists():
            save_by_transformers(models.folder("llama", "bf16"), folder, "llama", "bf16")
        return load_model(folder, load_config(folder), "cpu")
    return load(models.folder(architecture, dtype), architecture)


def batch(seed: int = 5, samples: int = 3, tokens: int = 10) -> dict[str, torch.Tensor]:
    """Random tokens that are their own labels."""
    ids = torch.randint(0, VOCABULARY, (samples, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def randomize(adaptation: Adaptation, seed: int = 7) -> None:
    """Fill all factors with random numbers, of the order of trained ones, so that none of them is zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, factor in adaptation.parameters().items():
        spread = {"A": 0.2, "B": 0.05, "E": 0.5}[name[-1]]
        factor.data.copy_(torch.randn(factor.shape, generator=generator) * spread)


def written(adaptation: Adaptation, folder: Path) -> Path:
    """The PEFT folder of an adapter at work."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with Draft(folder.parent) as draft:
        adapter: Adapter = adaptation.adapter(draft, "tiny", {"base_model_name_or_path": "tiny"})
        write_peft(adapter, folder)
    return folder


def in_peft(model: Any, folder: Path, *, trained: bool = True) -> peft.PeftModel:
    """The adapter in `folder` as PEFT puts it beside a model."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return peft.PeftModel.from_pretrained(model, folder, is_trainable=trained)


def peft_name(name: str, method: str) -> str:
    """What PEFT calls the factor ``<module>.A``."""
    module, letter = name.rsplit(".", 1)
    return f"base_model.model.{module}.lora_{letter}.default" + ("" if method == "adalora" else ".weight")
