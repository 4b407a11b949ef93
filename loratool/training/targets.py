"""The modules of a model that get an adapter, chosen by the rules of PEFT's ``target_modules``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from loratool.errors import LoratoolError, NotFoundError, UnsupportedError, nearest, quoted
from loratool.formats.module_targets import ALL_LINEAR, ModuleTargets

if TYPE_CHECKING:
    from torch.nn import Module

SOURCE: Final = "targets"
_NAMES: Final = re.compile(r"[\w.\-]+(\s*,\s*[\w.\-]+)*,?")


@dataclass(frozen=True, slots=True)
class Targets:
    """The modules of a model that get an adapter.

    Attributes:
        modules: the modules by name, in the model's order.
        names: the ``target_modules`` by which PEFT finds exactly these modules.
        fan_in_fan_out: whether one of them is a Conv1D, whose weight is (in_features, out_features).
    """

    modules: Mapping[str, Module]
    names: tuple[str, ...]
    fan_in_fan_out: bool


def choose_targets(model: Module, targets: str | Sequence[str] | None = None) -> Targets:
    """Return the modules that `targets` names.

    Args:
        targets: one of three.
            - Names as a list, or as one string separated by commas. Each is the path of a module or the end of one, such as
              ``q_proj`` or ``self_attn.q_proj``.
            - A regular expression that matches whole paths. A string is one if it has a character that no name has.
            - ``all-linear``, the default: all linear layers except the output head.

    Raises:
        NotFoundError: a name or the pattern matches no module.
        UnsupportedError: a matched module is not a linear layer, is in 8 bits, or shares its weight with another module.
        AdapterError: the pattern is invalid or takes too long.
        LoratoolError: the model already has an adapter.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    _refuse_adapted(modules)
    if targets is None or targets == ALL_LINEAR:
        head = _output_head(model)
        chosen = {name: module for name, module in modules.items() if is_linear(module) and module is not head}
        if not chosen:
            raise NotFoundError(
                f"{type(model).__name__} has no linear layer except its head; name its modules with --targets"
            )
    else:
        chosen = _meant(model, modules, targets)
    for name, module in chosen.items():
        if not is_linear(module):
            raise UnsupportedError(
                f"{quoted(name)} is a {type(module).__name__}, but adapters go only on linear layers (Linear, Conv1D, "
                "Linear4bit); change --targets"
            )
        _refuse_shared(name, module, modules)
    return Targets(chosen, _names(chosen, modules), any(is_conv1d(module) for module in chosen.values()))


def is_linear(module: Module) -> bool:
    """Return whether the module can get an adapter: nn.Linear, transformers' Conv1D, or bitsandbytes' Linear4bit."""
    from torch import nn

    # nn.MultiheadAttention reads the weight of its own subclass of Linear and never calls it.
    unfit = {"Linear8bitLt", "NonDynamicallyQuantizableLinear"}
    return is_conv1d(module) or (isinstance(module, nn.Linear) and type(module).__name__ not in unfit)


def is_conv1d(module: Module) -> bool:
    """Return whether the module is transformers' Conv1D, which keeps its weight as (in_features, out_features).

    The class is the only source for a module in memory, which need not belong to a model that `loratool.architecture` knows; that
    is asked about tensors on disk. The class's name decides, so transformers need not be installed.
    """
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def _refuse_adapted(modules: Mapping[str, Module]) -> None:
    """Raise LoratoolError if a layer already has factors, loratool's or PEFT's."""
    adapted = next((name for name, module in modules.items() if hasattr(module, "lora_A")), None)
    if adapted is not None:
        raise LoratoolError(f"{quoted(adapted)} already has an adapter; detach or merge it before adding another")


def _refuse_shared(name: str, module: Module, modules: Mapping[str, Module]) -> None:
    """Raise UnsupportedError if another module shares the weight, like a tied output head: a merge would change both."""
    weight = module.get_parameter("weight")
    other = next((path for path, each in modules.items() if path != name and _own(each) is weight), None)
    if other is not None:
        raise UnsupportedError(
            f"{quoted(name)} shares its weight with {quoted(other)}, which a merge would change as well; leave it out of "
            "--targets"
        )


def _own(module: Module) -> object:
    return module._parameters.get("weight")


def _output_head(model: Any) -> Module | None:
    find = getattr(model, "get_output_embeddings", None)
    head: Module | None = find() if find is not None else None
    return head


def _meant(model: Module, modules: Mapping[str, Module], targets: str | Sequence[str]) -> dict[str, Module]:
    if isinstance(targets, str) and not _NAMES.fullmatch(targets.strip()):
        found = _matched(modules, targets)
        if not found:
            raise NotFoundError(
                f"no module of {type(model).__name__} matches the pattern {quoted(targets)}; a pattern must match a whole name, "
                f"such as {_examples(modules)}"
            )
        return found
    names = targets.replace(",", " ").split() if isinstance(targets, str) else list(targets)
    if not names:
        raise LoratoolError("no target is named; give the names of modules, or all-linear")
    for name in names:
        if not _matched(modules, [name]):
            raise NotFoundError(_no_such_module(model, modules, name))
    return _matched(modules, names)


def _matched(modules: Mapping[str, Module], targets: str | Sequence[str]) -> dict[str, Module]:
    meaning = targets if isinstance(targets, str) else list(targets)
    config = ModuleTargets.parse({"target_modules": meaning}, SOURCE)
    return {name: module for name, module in modules.items() if config.targets(name)}


def _no_such_module(model: Module, modules: Mapping[str, Module], name: str) -> str:
    linear = [path for path, module in modules.items() if is_linear(module)]
    ends = dict.fromkeys(path.rsplit(".", 1)[-1] for path in linear)
    alike = nearest(name, linear if "." in name else ends) or list(ends)[:7]
    return (
        f"no module of {type(model).__name__} is called {quoted(name)}; the nearest are "
        f"{', '.join(quoted(candidate) for candidate in alike)}"
    )


def _examples(modules: Mapping[str, Module]) -> str:
    linear = [path for path, module in modules.items() if is_linear(module)]
    return quoted(linear[0]) if linear else "none: it has no linear layer"


def _names(chosen: Mapping[str, Module], modules: Mapping[str, Module]) -> tuple[str, ...]:
    """Return the last components of the names if they match exactly the chosen modules, or else the whole names."""
    ends = sorted({name.rsplit(".", 1)[-1] for name in chosen})
    return tuple(ends) if _matched(modules, ends).keys() == chosen.keys() else tuple(sorted(chosen))
