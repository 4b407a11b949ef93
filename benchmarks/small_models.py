"""Model types of transformers with small sizes, so that a class of any of them can be built with numbers in a second.

A width is divided by the same power of two everywhere, so that what must divide what still does; layers and vocabularies are
cut. The strongest cut with which transformers builds the class is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, Final

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LAYERS: Final = 2
LAYER_COUNTS: Final = {
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_decoder_layers",
    "num_encoder_layers", "depth", "encoder_num_hidden_layers", "decoder_num_hidden_layers",
}  # fmt: skip
FIRST_EXPERTS: Final = {"first_k_dense_replace": 1, "moe_layer_start_index": 1, "encoder_sparse_step": 2}
"""Numbers that put experts into one of the layers that are left."""

EXPERTS: Final = 8
VOCABULARY: Final = 160
WIDTHS: Final = (
    "hidden", "intermediate", "dim", "d_model", "d_ff", "d_kv", "ffn", "width", "channels", "embd", "inner", "_rank", "embed",
    "mlp_size", "bottleneck",
)  # fmt: skip
"""Parts of the names of numbers that are widths."""

NO_WIDTHS: Final = (
    "layer",
    "num_channels",
    "dropout",
    "patch",
    "kernel",
    "ratio",
    "num_heads",
    "head_num",
    "temporal",
    "window",
)
FACTORS: Final = (16, 8, 4, 2, 1)
MOST_PARAMETERS: Final = 30_000_000


class NotBuiltError(Exception):
    """No cut of a model type gives a class that transformers builds and that is small enough."""


def classes() -> Iterator[tuple[str, str]]:
    """Yield each model type and class of transformers' auto mappings once."""
    mappings = (getattr(modeling_auto, name) for name in dir(modeling_auto) if name.startswith("MODEL"))
    found = {
        (model_type, name): None
        for mapping in mappings
        if type(mapping).__name__ == "OrderedDict"
        for model_type, names in mapping.items()
        for name in (names if isinstance(names, tuple | list) else [names])
    }
    yield from sorted(found)


def small_model(model_type: str, class_name: str) -> transformers.PreTrainedModel:
    """Return a model of this class, fp32, with the same random weights each time.

    Raises:
        NotBuiltError: the message says why the strongest cut was not built.
    """
    model_class = getattr(transformers, class_name, None)
    if model_class is None:
        raise NotBuiltError("transformers does not export it")
    reasons = []
    for factor, few_layers in product(FACTORS, (True, False)):
        try:
            config = _config(CONFIG_MAPPING[model_type], factor, few_layers)
            with torch.device("meta"):
                sizes = [each.numel() for each in model_class._from_config(config).parameters()]
            if sum(sizes) > MOST_PARAMETERS:
                raise NotBuiltError(f"{sum(sizes) / 1e6:.0f} M parameters")
            if 0 in sizes:
                raise NotBuiltError("a parameter is empty")
            torch.manual_seed(0)
            return model_class._from_config(_config(CONFIG_MAPPING[model_type], factor, few_layers)).eval()
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")
    raise NotBuiltError(reasons[0])


def _config(config_class: type[Any], factor: int, few_layers: bool) -> Any:
    return config_class(**_cut(config_class(), factor, few_layers))


def _cut(default: Any, factor: int, few_layers: bool, depth: int = 0) -> dict[str, Any]:
    """Return the numbers of a configuration that are to be other than its defaults."""
    inside = {key for key in type(default).sub_configs if hasattr(getattr(default, key, None), "to_dict")}
    changes: dict[str, Any] = {}
    for key, number in default.to_dict().items():
        if key in inside:
            continue
        cut = number if key in LAYER_COUNTS and not few_layers else _cut_number(key, number, factor)
        if cut != number:
            changes[key] = cut
    if few_layers:
        changes |= {key: number for key, number in FIRST_EXPERTS.items() if hasattr(default, key)}
    for key in inside if depth < 3 else ():
        within = getattr(default, key)
        changes[key] = {**_cut(within, factor, few_layers, depth + 1), "model_type": type(within).model_type}
    return changes


def _cut_number(key: str, number: Any, factor: int) -> Any:
    if isinstance(number, list | tuple) and number and all(type(each) is int for each in number):
        return type(number)(_cut_width(each, factor) for each in number) if _is_width(key) else number
    if type(number) is not int:
        return number
    if key in LAYER_COUNTS:
        return min(number, LAYERS)
    if "experts" in key and "per" not in key and "group" not in key:
        return min(number, EXPERTS)
    if "vocab" in key and number > VOCABULARY:
        return VOCABULARY
    if key.endswith(("_token_id", "token_index")) and number >= VOCABULARY:
        return VOCABULARY - 1
    return _cut_width(number, factor) if _is_width(key) else number


def _is_width(key: str) -> bool:
    return any(part in key for part in WIDTHS) and not any(part in key for part in NO_WIDTHS)


def _cut_width(number: int, factor: int) -> int:
    return number // factor if number % factor == 0 and number // factor >= 4 else number
