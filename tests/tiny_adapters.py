"""Random LoRA adapters saved by PEFT itself, PEFT's own merge of them, and adapters written by hand."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import (
    ARCHITECTURES,
    DTYPES,
    StoredTensor,
    TinyModels,
    as_stored,
    as_torch,
    load,
    stored_tensors,
)

ADAPTER_PREFIX = "base_model.model."


class TinyAdapters:
    """PEFT adapters under one folder, built when first asked for, and PEFT's merges of them."""

    def __init__(self, root: Path, models: TinyModels) -> None:
        self._root = root
        self._models = models
        self._known: dict[str, Path] = {}

    def folder(self, architecture: str, *, seed: int = 1, factors: str = "fp32", auto: Any = None, **lora: Any) -> Path:
        """Return a PEFT adapter directory with random non-zero factors stored as `factors`.

        `lora` goes to `peft.LoraConfig`; without `target_modules` those of the architecture are taken.
        """
        key = json.dumps([architecture, seed, factors, str(auto), lora], sort_keys=True)
        if key not in self._known:
            base = self._models.folder(architecture, "fp32")
            folder = self._root / f"{architecture}-{len(self._known)}"
            config = peft.LoraConfig(
                **(
                    {
                        "r": 4,
                        "lora_alpha": 8,
                        "target_modules": list(ARCHITECTURES[architecture].target_modules),
                    }
                    | lora
                )
            )
            model = load(base, architecture, auto=auto)
            # Else PEFT stores the weight of a targeted head beside its factors.
            save_peft_adapter(model, config, folder, seed=seed, factors=factors, save_embedding_layers=False)
            self._known[key] = folder
        return self._known[key]

    def merged_by_peft(
        self, architecture: str, dtype: str, adapter: Path, *, auto: Any = None
    ) -> dict[str, StoredTensor]:
        """Return what PEFT's `merge_and_unload` and `save_pretrained` store for the base of this type."""
        folder = self._root / f"merged-{adapter.name}-{dtype}-{getattr(auto, '__name__', '')}"
        if not folder.exists():
            merge_by_peft(load(self._models.folder(architecture, dtype), architecture, auto=auto), adapter, folder)
        return stored_tensors(folder)


def save_peft_adapter(
    model: Any, config: peft.PeftConfig, folder: Path, *, seed: int = 1, factors: str = "fp32", **save: Any
) -> Path:
    """Wrap the model by PEFT, fill what is trained with random numbers, and save the adapter.

    The update is of the order of a trained one: smaller than the weights, larger than their last bits.
    """
    generator = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, config)
        for name, parameter in sorted(wrapped.named_parameters()):
            if parameter.requires_grad or "lora_" in name:
                spread = 0.2 if "lora_A" in name else 0.05
                random = torch.randn(parameter.shape, generator=generator) * spread
                parameter.data = random.to(DTYPES[factors])
        wrapped.save_pretrained(folder, **save)
    return folder


def save_peft_adalora(
    model: Any,
    folder: Path,
    *,
    kept: Mapping[str, Sequence[bool]] | None = None,
    seed: int = 1,
    factors: str = "fp32",
    **adalora: Any,
) -> Path:
    """Write an AdaLoRA as PEFT saves it after training: `kept` masks the components of the modules that it names."""
    facts = {"init_r": 4, "target_r": 2, "lora_alpha": 7, "total_step": 10, "target_modules": ["q_proj", "v_proj"]}
    config = peft.AdaLoraConfig(**(facts | adalora))
    if kept is not None:
        config.rank_pattern = {f"{module}.lora_E.default": list(mask) for module, mask in kept.items()}
    return save_peft_adapter(model, config, folder, seed=seed, factors=factors)


def merge_by_peft(
    model: Any, adapter: Path, out: Path | None = None, *, weight: float | None = None, **loading: Any
) -> dict[str, StoredTensor]:
    """Merge by PEFT, save to `out` if given, and return the merged model's state as stored tensors.

    A weight multiplies each layer's scaling, as PEFT's `set_scale` does.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.PeftModel.from_pretrained(model, adapter, **loading)
        if weight is not None:
            for module in wrapped.modules():
                if isinstance(module, peft.tuners.lora.LoraLayer):
                    module.scaling["default"] *= weight
        merged = wrapped.merge_and_unload()
        if out is not None:
            merged.save_pretrained(out)
            return stored_tensors(out)
    return {name: as_stored(tensor) for name, tensor in merged.state_dict().items()}


def merged_once_rounded(
    base: Mapping[str, StoredTensor],
    adapters: Sequence[tuple[Path, float]],
    *,
    fan_in_fan_out: bool = False,
    rename: Callable[[str], str] = lambda name: name,
) -> dict[str, StoredTensor]:
    """Return the base with each adapter added in fp32, in the order given, rounded once to the stored type.

    Each term is product, times scaling, plus weight, as in PEFT. Knows `r`, `lora_alpha`, `use_rslora`.
    """
    exact: dict[str, torch.Tensor] = {}
    for adapter, weight in adapters:
        config = json.loads((adapter / "adapter_config.json").read_text())
        scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
        factors = load_file(adapter / "adapter_model.safetensors")
        for key, factor_a in factors.items():
            if not key.endswith(".lora_A.weight"):
                continue
            factor_b = factors[key.replace(".lora_A.", ".lora_B.")]
            name = rename(key.removeprefix(ADAPTER_PREFIX).removesuffix(".lora_A.weight") + ".weight")
            product = factor_b.float() @ factor_a.float()
            delta = (product.T if fan_in_fan_out else product) * (scaling * weight)
            exact[name] = exact.get(name, as_torch(base[name]).float()) + delta
    assert exact, "the oracle found no module to change"
    rounded = {name: as_stored(tensor.to(as_torch(base[name]).dtype)) for name, tensor in exact.items()}
    return dict(base) | rounded


def save_plain_adapter(
    folder: Path, shapes: Mapping[str, tuple[int, int]], *, r: int = 4, seed: int = 1, **config: Any
) -> Path:
    """Write a PEFT directory for modules named here, `(out_features, in_features)` each, without a model."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (rows, columns) in shapes.items():
        tensors[f"{ADAPTER_PREFIX}{module}.lora_A.weight"] = torch.randn(r, columns, generator=generator) * 0.2
        tensors[f"{ADAPTER_PREFIX}{module}.lora_B.weight"] = torch.randn(rows, r, generator=generator) * 0.05
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    targets = sorted({module.rpartition(".")[2] for module in shapes})
    facts = peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets).to_dict() | config
    facts |= {"target_modules": targets} if "target_modules" not in config else {}
    (folder / "adapter_config.json").write_text(json.dumps(facts, indent=2, sort_keys=True, default=str))
    return folder


def copy_with(source: Path, folder: Path, rename: Callable[[str], str] = lambda key: key, **config: Any) -> Path:
    """Copy a PEFT directory, with other module names or other entries in its config."""
    shutil.copytree(source, folder)
    path = folder / "adapter_model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({rename(key): tensor for key, tensor in load_file(path).items()}, path, metadata)
    facts = json.loads((folder / "adapter_config.json").read_text()) | config
    (folder / "adapter_config.json").write_text(json.dumps(facts, indent=2, sort_keys=True))
    return folder


def save_single_file(source: Path, path: Path) -> Path:
    """Write a PEFT directory as one safetensors file, its config under `adapter_config` in the metadata."""
    config = (source / "adapter_config.json").read_text()
    save_file(load_file(source / "adapter_model.safetensors"), path, {"format": "pt", "adapter_config": config})
    return path


def as_peft_folder(adapter: Path, folder: Path) -> Path:
    """Return a PEFT directory for a directory or a single file."""
    if adapter.is_dir() and (adapter / "adapter_config.json").exists():
        return adapter
    (file,) = [adapter] if adapter.is_file() else [*adapter.glob("*.safetensors"), *adapter.glob("*.st")]
    folder.mkdir(parents=True)
    with safe_open(file, framework="pt") as opened:
        (folder / "adapter_config.json").write_text(opened.metadata()["adapter_config"])
    shutil.copyfile(file, folder / "adapter_model.safetensors")
    return folder


def save_kohya_dylora(
    path: Path, shapes: Mapping[str, tuple[int, ...]], *, r: int, alpha: float, seed: int = 1, prefix: str = "lora_te_"
) -> Path:
    """Write a DyLoRA as kohya's sd-scripts do, for modules named here, `(out_features, in_features)` each."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (rows, columns) in shapes.items():
        flat = prefix + module.replace(".", "_")
        tensors[f"{flat}.lora_down.weight"] = torch.randn(r, columns, generator=generator) * 0.2
        tensors[f"{flat}.lora_up.weight"] = torch.randn(rows, r, generator=generator) * 0.05
        tensors[f"{flat}.alpha"] = torch.tensor(alpha)
    metadata = {
        "ss_network_module": "networks.dylora",
        "ss_network_dim": str(r),
        "ss_network_alpha": str(alpha),
        "ss_network_args": '{"unit": "1"}',
        "ss_sd_model_name": "model.safetensors",
    }
    save_file(tensors, path, metadata)
    return path
