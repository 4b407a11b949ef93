"""kohya's layout of LoRA and DyLoRA (kohya-ss/sd-scripts, ``networks/lora.py`` and ``networks/dylora.py``).

Each module has ``<module>.lora_down.weight`` (r, in), ``<module>.lora_up.weight`` (out, r) and ``<module>.alpha``, one
number; the module's name has ``_`` for every dot of its path, behind ``lora_unet_``, ``lora_te_`` or the like. The file's
metadata say what trained it: ``ss_network_module`` is ``networks.dylora`` for a DyLoRA.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from typing import Any, Final

from loratool.checkpoint.header import Header, TensorInfo
from loratool.errors import AdapterError, UnsupportedError, quoted
from loratool.formats.adapter import Adapter
from loratool.formats.dylora import KIND
from loratool.formats.lora_config import LoraConfig, lora_config
from loratool.formats.scalar import read_scalar
from loratool.updates.low_rank import LARGEST_SCALING, LowRank

NETWORK_KEY: Final = "ss_network_module"
DYLORA_NETWORK: Final = "networks.dylora"
_TENSOR: Final = re.compile(r"(?P<module>[^.]+)\.(?:(?P<factor>lora_down|lora_up)\.weight|(?P<alpha>alpha))")
_COMPONENT: Final = re.compile(r".+\.lora_[AB]\.\d+")


def is_kohya(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether the tensors have kohya's names."""
    return any(name.endswith((".lora_down.weight", ".lora_up.weight")) for name in tensors)


def read_kohya(header: Header) -> tuple[dict[str, LowRank], dict[str, Any], dict[str, Any]]:
    """The update of each module, a PEFT configuration that says the same, and loratool's facts.

    Raises:
        UnsupportedError: it has convolutions, or tensors of another method.
        AdapterError: a tensor is missing, does not fit its partner, or the layers of a DyLoRA have several ranks.
    """
    source = str(header.file)
    updates, modules = {}, {}
    for module, tensors in _modules(header.tensors, source).items():
        a, b = tensors["lora_down"], tensors["lora_up"]
        rank = a.shape[0]
        # kohya takes the rank for an alpha that is missing or 0.
        alpha = (read_scalar(tensors["alpha"]) if "alpha" in tensors else 0.0) or float(rank)
        if abs(alpha) > LARGEST_SCALING:
            raise AdapterError(
                f"{quoted(tensors['alpha'].name)} in {quoted(source)} is {alpha:g}, which no fp32 number is"
            )
        updates[module] = LowRank(a, b, alpha / rank)
        modules[module] = rank, alpha
    config = lora_config(modules, {"target_modules": list(modules)})
    if header.metadata.get(NETWORK_KEY) != DYLORA_NETWORK:
        return updates, config, {}
    ranks = {rank: module for module, (rank, _) in modules.items()}
    if len(ranks) > 1:
        (least, one), (most, other) = min(ranks.items()), max(ranks.items())
        raise AdapterError(
            f"{quoted(source)} mixes layers: {quoted(one)} has rank {least} and {quoted(other)} rank {most}, where a DyLoRA "
            "has one rank; is it put together from several files?"
        )
    return updates, config, {"kind": KIND, "scaling": "kohya"}


def kohya_notes(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """A note on a DyLoRA that was trained several ranks at a time (``unit``): a rank between them never was."""
    arguments = re.search(r'"unit":\s*"?(\d{1,9})\b', metadata.get("ss_network_args", ""))
    unit = int(arguments[1]) if arguments else 1
    if metadata.get(NETWORK_KEY) != DYLORA_NETWORK or unit <= 1:
        return ()
    return (f"it was trained {unit} ranks at a time, so cut it to a multiple of {unit}; no other rank was trained",)


def kohya_tensors(adapter: Adapter) -> dict[str, TensorInfo | bytes]:
    """The tensors of an adapter under kohya's names; alpha as the bytes of one fp32 number."""
    tensors: dict[str, TensorInfo | bytes] = {}
    lora = LoraConfig.parse(adapter.config, str(adapter.file))
    for module, update in sorted(adapter.updates.items()):
        tensors[f"{module}.alpha"] = struct.pack("<f", lora.alpha_of(module))
        tensors[f"{module}.lora_down.weight"] = update.factors["A"]
        tensors[f"{module}.lora_up.weight"] = update.factors["B"]
    return tensors


def kohya_metadata(adapter: Adapter) -> dict[str, str]:
    """The metadata of the file that the adapter came from, with its present rank and alpha."""
    kept = {key: value for key, value in (adapter.kohya or {}).items() if key.startswith("ss_") or key == "format"}
    network = {NETWORK_KEY: DYLORA_NETWORK if adapter.kind == KIND else "networks.lora"}
    return kept | network | {"ss_network_dim": str(adapter.config["r"]), "ss_network_alpha": f"{adapter.alpha:.9g}"}


def _modules(tensors: Mapping[str, TensorInfo], source: str) -> dict[str, dict[str, TensorInfo]]:
    """The tensors of each module, in the order of the modules' names."""
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, info in sorted(tensors.items()):
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise _other_tensor(name, source)
        found.setdefault(match["module"], {})[match["factor"] or "alpha"] = info
    for module, parts in found.items():
        _refuse_unfit(module, parts, source)
    return found


def _refuse_unfit(module: str, parts: Mapping[str, TensorInfo], source: str) -> None:
    missing = [name for name in ("lora_down", "lora_up") if name not in parts]
    if missing:
        raise AdapterError(f"{quoted(module)} in {quoted(source)} has no {missing[0]}; the file is incomplete")
    down, up = parts["lora_down"].shape, parts["lora_up"].shape
    if len(down) == 4 or len(up) == 4:
        raise UnsupportedError(
            f"{quoted(source)} mixes convolutions with linear layers: {quoted(parts['lora_down'].name)} has shape "
            f"{list(down)}; loratool reads linear layers only"
        )
    if len(down) != 2 or len(up) != 2 or 0 in down or 0 in up or down[0] != up[1]:
        raise AdapterError(
            f"the factors of {quoted(module)} in {quoted(source)} do not fit together: "
            f"lora_down is {list(down)} and lora_up is {list(up)}"
        )


def _other_tensor(name: str, source: str) -> AdapterError:
    if _COMPONENT.fullmatch(name):
        return AdapterError(
            f"{quoted(name)} in {quoted(source)} is a single component, as a DyLoRA has them while it is trained; "
            "save the network with kohya's own state_dict, which stacks them"
        )
    return UnsupportedError(
        f"{quoted(name)} in {quoted(source)}, a file in the kohya format, is no lora_down, lora_up or alpha; "
        "loratool reads kohya's LoRA and DyLoRA of linear layers only"
    )
