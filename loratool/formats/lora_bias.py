"""The biases that a LoRA trains with ``lora_bias``: B has a bias, which is added to the base's, times the scaling."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from loratool.checkpoint.header import TensorInfo
from loratool.errors import AdapterError, quoted
from loratool.formats.adapter import Adapter
from loratool.formats.feature_beside import FeatureBeside
from loratool.formats.lora_config import LORA_BIAS, LoraConfig
from loratool.formats.tensor_keys import PREFIX
from loratool.updates import Update
from loratool.updates.vector import Vector

_BIAS: Final = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_B(?:\.(?P<adapter>[^.]+))?\.bias")


def _changes(biases: Mapping[str, TensorInfo], adapter: Adapter) -> dict[str, Update]:
    """Return the update of each bias.

    Raises:
        AdapterError: the configuration contradicts the tensors, or a vector does not fit its factor.
    """
    asked = bool(adapter.config.get(LORA_BIAS))
    settings, ranked = adapter.settings, adapter.ranked
    if not isinstance(settings, LoraConfig) or (biases and not asked):
        for info in biases.values():
            raise AdapterError(
                f"{quoted(adapter.name)} holds {quoted(info.name)}, which its configuration does not ask for, so PEFT would "
                f"ignore it; set {LORA_BIAS} to true, or save the adapter again"
            )
        return {}
    for module in sorted((ranked.keys() if asked else set()) ^ biases.keys()):
        what = "no lora_B.bias" if module in ranked else "a lora_B.bias and no factors"
        raise AdapterError(
            f"{quoted(module)} in {quoted(adapter.name)}, a LoRA with {LORA_BIAS}, has {what}; the file is incomplete"
        )
    for module, info in biases.items():
        outputs = ranked[module].shape[0]
        if info.shape != (outputs,):
            raise AdapterError(
                f"{quoted(info.name)} in {quoted(adapter.name)} has shape {list(info.shape)} and its factors have {outputs} "
                "outputs; was it saved from a sharded run without gathering?"
            )
    return {f"{module}.bias": Vector(LORA_BIAS, info, settings.scaling_of(module)) for module, info in biases.items()}


FEATURE: Final = FeatureBeside(_BIAS, _changes, lambda module, letter: f"{PREFIX}{module}.lora_B.bias")
