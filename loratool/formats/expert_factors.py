"""LoRA on parameters instead of modules (PEFT's ``target_parameters``), such as the stack of a layer's experts.

PEFT wraps the module that holds the parameter once for each of its parameters, in the order in which the module has them. The
first one is innermost: with gate_up_proj and down_proj, the tensors ``experts.base_layer.lora_A.weight`` belong to the former and
``experts.lora_A.weight`` to the latter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from loratool.architecture import Role, any_model
from loratool.checkpoint.header import TensorInfo
from loratool.errors import AdapterError, UnsupportedError, quoted
from loratool.formats.adapter import Adapter
from loratool.formats.builder import Factors
from loratool.formats.lora_config import TARGET_PARAMETERS, LoraConfig
from loratool.formats.tensor_keys import BASE_LAYER
from loratool.updates import Update
from loratool.updates.expert_factors import ExpertFactors
from loratool.updates.low_rank import LowRank

ORDER: Final = ("gate_up_proj", "gate_up_proj_bias", "gate_proj", "up_proj", "down_proj", "down_proj_bias")
"""The order in which modules of experts have their parameters."""

INNER: Final = f".{BASE_LAYER}"


def split_parameters(pairs: Factors, lora: LoraConfig, config: Mapping[str, Any],
                     source: str) -> tuple[Factors, dict[str, Update]]:  # fmt: skip
    """Return the factors of modules, and the updates of targeted parameters by the parameters' names.

    Raises:
        UnsupportedError: it cannot be known which parameter some factors belong to.
        AdapterError: the configuration contradicts the tensors.
    """
    levels: dict[str, list[str]] = {}
    for key in pairs:
        levels.setdefault(key.replace(INNER, ""), []).append(key)
    rest, found = dict(pairs), {}
    for module, keys in levels.items():
        names = _parameters_of(module, lora)
        if not names and keys == [module]:
            continue
        innermost_first = sorted(keys, key=len, reverse=True)
        for name, key in zip(_ordered(module, names, len(keys), source), innermost_first, strict=True):
            found[f"{module}.{name}"] = _update(f"{module}.{name}", rest.pop(key), lora, config, source)
    if lora.target_parameters and not found:
        raise AdapterError(
            f"{quoted(source)} lists {TARGET_PARAMETERS} ({quoted(lora.target_parameters[0])}, ...) but holds none of their "
            "tensors; the file is incomplete"
        )
    return rest, found


def wrapping_modules(adapter: Adapter) -> dict[str, str]:
    """Return the module that PEFT makes around each targeted parameter of an adapter, as the names of its tensors have it."""
    lora = adapter.settings
    if not isinstance(lora, LoraConfig) or not lora.target_parameters:
        return {}
    names: dict[str, list[str]] = {}
    for parameter, update in adapter.changes.items():
        module, _, name = parameter.rpartition(".")
        if not update.replaces and name in _parameters_of(module, lora):
            names.setdefault(module, []).append(name)
    return {
        f"{module}.{name}": module + INNER * depth
        for module, found in names.items()
        for depth, name in enumerate(reversed(_ordered(module, found, len(found), adapter.name)))
    }


def _parameters_of(module: str, lora: LoraConfig) -> list[str]:
    """Return the names that targeted parameters may have in `module` (``BaseTuner._inject_parameters``)."""
    found = []
    for target in dict.fromkeys(lora.target_parameters):
        owner, _, name = target.rpartition(".")
        is_here = f".{module}".endswith(f".{owner}") if owner else any_model().role(f"{module}.{name}") is Role.EXPERTS
        found += [name] if is_here else []
    return found


def _ordered(module: str, names: list[str], count: int, source: str) -> list[str]:
    """Return the parameters of a module that is wrapped `count` times, innermost first."""
    if len(names) != count:
        raise AdapterError(
            f"{quoted(source)} holds factors for {count} {'parameters' if count > 1 else 'parameter'} of {quoted(module)}, and "
            f"its configuration names {len(names)} ({TARGET_PARAMETERS}); correct it, or save the adapter again"
        )
    strange = next((name for name in names if name not in ORDER), None)
    if count > 1 and strange is not None:
        raise UnsupportedError(
            f"{quoted(source)} changes {quoted(strange)} and other parameters of {quoted(module)}, and loratool does not know in "
            "which order the module has them; merge it with PEFT"
        )
    return sorted(names, key=ORDER.index) if count > 1 else names


def _update(parameter: str, pair: Mapping[str, TensorInfo], lora: LoraConfig, config: Mapping[str, Any],
            source: str) -> Update:  # fmt: skip
    if pair.keys() != {"A", "B"} or any(len(info.shape) != 2 for info in pair.values()):
        raise AdapterError(
            f"the factors of {quoted(parameter)} in {quoted(source)} must be two matrices, lora_A and lora_B"
        )
    a, b = pair["A"], pair["B"]
    rank, scaling = lora.rank_of(parameter), lora.scaling_of(parameter)
    experts, over = divmod(a.shape[0], rank)
    if over:
        raise AdapterError(
            f"the factors of {quoted(parameter)} in {quoted(source)} have {a.shape[0]} rows, which is no multiple of the rank "
            f"{rank} in its configuration; correct r or rank_pattern"
        )
    if experts == 1:
        return LowRank(a, b, scaling)
    return ExpertFactors(a, b, scaling, experts, _turned(config.get("peft_version")))


def _turned(version: object) -> tuple[bool, bool] | None:
    """Return whether square matrices are the transpose of the product, if the model holds (out, in), and if (in, out).

    PEFT's in_features are the parameter's second dimension and its out_features the third, but from version 0.19.1 on they are
    swapped if the model holds (out, in). Version 0.19.0 swaps them only if it holds (in, out).
    """
    numbers = re.match(r"(\d{1,6})\.(\d{1,6})(?:\.(\d{1,6}))?", version) if isinstance(version, str) else None
    if numbers is None:
        return None
    release = tuple(int(number or 0) for number in numbers.groups())
    if release >= (0, 19, 1):
        return False, False
    return True, release == (0, 19, 0)
