"""AdaLoRA's files: as PEFT saves them, and state dicts of the authors' own implementation.

PEFT (``peft.AdaLoraConfig``, PEFT 0.21) names the tensors ``base_model.model.<module>.lora_A``, ``lora_E`` and ``lora_B``.
It saves only the remaining components; ``rank_pattern`` marks them among the original `init_r` with true.
The reference implementation (github.com/QingruZhang/AdaLoRA) saves the same tensors and ``ranknum``, the rank at the start of
training, but no alpha.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final

from loratool.checkpoint.header import TensorInfo
from loratool.errors import AdapterError, UnsupportedError, quoted
from loratool.formats.adapter import Adapter
from loratool.formats.adapter_files import AdapterFiles
from loratool.formats.alpha import CONFIGURATION, Alpha, Statement, metadata_statements, settled
from loratool.formats.bare import unstated
from loratool.formats.builder import Builder, Factors
from loratool.formats.config_reader import ConfigReader
from loratool.formats.kinds import KINDS, VARIANTS
from loratool.formats.lora import adapter_of
from loratool.formats.lora_config import LoraConfig
from loratool.formats.metadata_config import whole_statements
from loratool.formats.scalar import read_scalar
from loratool.formats.tensor_keys import PREFIX, refuse_other_features
from loratool.updates import Update
from loratool.updates.singular import SingularValue

NAME: Final = "adalora"
PEFT_TYPE: Final = KINDS[NAME].peft_type

IMPORTANCE: Final = "importance"
"""Key of an AdaLoRA's training scores in loratool's facts: for each module a list with one number for each triplet."""

_TENSOR: Final = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.(?:lora_(?P<factor>[AEB])|(?P<ranknum>ranknum))(?:\.(?P<adapter>[^.]+))?"
)


def singular_key(module: str, factor: str) -> str:
    """Return PEFT's name of factor ``A``, ``E`` or ``B`` of `module`."""
    return f"{PREFIX}{module}.lora_{factor}"


def pattern_key(module: str) -> str:
    """Return PEFT's name of `module` in ``rank_pattern``."""
    return f"{module}.lora_E"


_NOT_IN_ADALORA: Final = {"peft_type": "LORA", "r": 1, "rank_pattern": None, "alpha_pattern": None, "use_rslora": False}
"""LoRA's keys that PEFT ignores in an AdaLoRA, with values that avoid its warnings."""

ALL: Final = "every module"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaLoraConfig(LoraConfig):
    """The part of an AdaLoRA configuration that affects numbers, and its targets.

    `kept` marks, for each pruned module, which of its original `init_r` components remain.
    """

    init_r: int
    kept: Mapping[str, tuple[bool, ...]]

    @classmethod
    def parse(cls, config: Mapping[str, Any], source: str) -> AdaLoraConfig:
        """Check a configuration.

        Raises:
            UnsupportedError: it asks for a feature that loratool does not compute.
            AdapterError: a value is missing or impossible.
        """
        read = ConfigReader(config, source)
        init_r = read.positive_int("init_r")
        patterns = read.mapping("rank_pattern")
        for variant in VARIANTS:
            if variant.setting and config.get(variant.setting):
                raise UnsupportedError(
                    f"{quoted(source)} is an AdaLoRA that asks for {variant.title} ({variant.setting}), which PEFT supports only "
                    "for LoRA; train it again without that, or as a LoRA"
                )
        own = {key: value for key, value in config.items() if key not in KINDS[NAME].keys}
        lora = LoraConfig.parse(own | _NOT_IN_ADALORA, source)
        return cls(
            **{each.name: getattr(lora, each.name) for each in fields(lora)},
            init_r=init_r,
            kept={_module_of(key): _mask(key, value, init_r, source) for key, value in patterns},
        )

    def rank_of(self, module: str) -> int:
        """Return how many components of `module` remain according to the configuration."""
        return sum(self.kept[module]) if module in self.kept else self.init_r

    def alpha_of(self, module: str) -> float:
        """Return the factor of the product; PEFT uses the rank if alpha is not positive."""
        return self.alpha if self.alpha > 0 else float(self.rank_of(module))


def read_adalora(files: AdapterFiles, given: Alpha | None) -> Adapter:
    """Read an AdaLoRA.

    Raises:
        UnsupportedError: it uses a feature that loratool does not compute.
        AdapterError: it is damaged or incomplete, or does not state its alpha.
    """
    source = files.source
    stated = [*metadata_statements(files.metadata, [ALL]), *whole_statements(files.metadata, ALL, source)]
    if not files.config:  # check its alpha before its ranks
        settled({ALL: 1}, stated, given, source, unstated=unstated(files))
    config = files.config or bare_adalora_config(files.tensors, source)
    adalora = AdaLoraConfig.parse({"lora_alpha": 1, **config}, files.config_source)
    if files.config.get("lora_alpha") is not None:
        stated = [Statement(CONFIGURATION, {ALL: adalora.alpha}), *stated]
    alphas, notes = settled({ALL: adalora.init_r}, stated, given, source, unstated=unstated(files))
    if not files.config or not stated or alphas[ALL] != config["lora_alpha"]:
        config = {**config, "lora_alpha": alphas[ALL]}
        adalora = replace(adalora, alpha=alphas[ALL])
    triplets = _triplets(files.tensors, source)
    for module, triplet in triplets.items():
        _refuse_other(module, triplet, adalora, source)
    missing = sorted(adalora.kept.keys() - triplets.keys())
    if missing:
        raise AdapterError(
            f"rank_pattern in {quoted(source)} names {quoted(missing[0])}, for which it holds no tensors; save it again"
        )
    return adapter_of(files, NAME, config, adalora, singular_updates(triplets, adalora), notes)


def singular_updates(triplets: Factors, config: AdaLoraConfig) -> dict[str, Update]:
    """Return the update of each module."""
    return {
        module: SingularValue(each["A"], each["E"], each["B"], config.alpha_of(module), config.init_r)
        for module, each in triplets.items()
    }


def _refuse_other(module: str, triplet: Mapping[str, TensorInfo], config: AdaLoraConfig, source: str) -> None:
    """Raise AdapterError if the configuration contradicts the tensors of a module."""
    if not config.targets(module):
        raise AdapterError(
            f"{quoted(source)} holds tensors for {quoted(module)}, which its configuration does not target, so PEFT "
            "would ignore them; correct target_modules, exclude_modules or layers_to_transform"
        )
    rank = triplet["A"].shape[0]
    if rank != config.rank_of(module):
        raise AdapterError(
            f"{quoted(module)} in {quoted(source)} has rank {rank} and its configuration says "
            f"{config.rank_of(module)}; correct init_r or rank_pattern"
        )
    if "ranknum" in triplet and read_scalar(triplet["ranknum"]) != config.init_r:
        raise AdapterError(
            f"{quoted(triplet['ranknum'].name)} in {quoted(source)} is {read_scalar(triplet['ranknum']):g} and its "
            f"configuration says init_r {config.init_r}, by which the update is divided; correct one of them"
        )


def bare_adalora_config(tensors: Mapping[str, TensorInfo], source: str) -> dict[str, Any]:
    """Return a PEFT configuration for tensors that have none, with a placeholder alpha of 1 to be replaced.

    Raises:
        UnsupportedError, AdapterError: a tensor is missing or not AdaLoRA's, or training began with several ranks.
    """
    triplets = _triplets(tensors, source)
    ranks = {
        module: read_scalar(triplet["ranknum"]) if "ranknum" in triplet else float(triplet["A"].shape[0])
        for module, triplet in triplets.items()
    }
    init_r = max(ranks.values())
    widest = max(max(triplet[letter].shape) for triplet in triplets.values() for letter in "AB")
    if init_r > widest:
        raise AdapterError(f"{quoted(source)} says ranknum {init_r:g}, which is not a rank; save it again")
    if init_r < 1 or init_r != int(init_r) or any(rank != init_r for rank in ranks.values()):
        raise AdapterError(
            f"the modules of {quoted(source)} began with ranks {min(ranks.values()):g} to {init_r:g}, but AdaLoRA has one "
            "initial rank for all; give it a PEFT configuration"
        )
    held = {module: triplet["A"].shape[0] for module, triplet in triplets.items()}
    return adalora_config(
        alpha=1.0,
        init_r=int(init_r),
        target_modules=sorted({module.rsplit(".", 1)[-1] for module in triplets}),
        kept={m: [True] * rank + [False] * (int(init_r) - rank) for m, rank in held.items() if rank != init_r},
    )


def adalora_config(
    *, alpha: float, init_r: int, target_modules: Sequence[str], kept: Mapping[str, Sequence[bool]]
) -> dict[str, Any]:
    """Return a configuration that PEFT loads. PEFT requires a schedule; this one is for no training."""
    return {
        "peft_type": PEFT_TYPE,
        "init_r": init_r,
        "target_r": init_r,
        "lora_alpha": alpha,
        "total_step": 1,
        "target_modules": list(target_modules),
        "rank_pattern": {pattern_key(module): list(mask) for module, mask in sorted(kept.items())} or None,
        "inference_mode": True,
    }


def _triplets(tensors: Mapping[str, TensorInfo], source: str) -> dict[str, dict[str, TensorInfo]]:
    """Return the tensors A, E, B and, if present, ranknum of each module, sorted by module name."""
    found: dict[str, dict[str, TensorInfo]] = {}
    adapters = set()
    refuse_other_features(tensors, source, "AdaLoRA", lambda name: _TENSOR.fullmatch(name) is not None)
    for name, info in sorted(tensors.items()):
        match = _TENSOR.fullmatch(name)
        if match is None:
            continue
        if match["adapter"] == "weight":
            raise AdapterError(
                f"{quoted(name)} in {quoted(source)} is not an AdaLoRA tensor; their names end in lora_A, lora_E and lora_B"
            )
        letter = match["factor"] or "ranknum"
        triplet = found.setdefault(match["module"], {})
        if letter in triplet:
            raise AdapterError(f"{quoted(source)} holds {letter} of {quoted(match['module'])} twice")
        triplet[letter] = info
        adapters.add(match["adapter"])
    if len(adapters) > 1:
        raise AdapterError(f"{quoted(source)} holds several adapters ({len(adapters)}); save one to a file")
    if not found:
        raise AdapterError(f"{quoted(source)} holds no AdaLoRA tensors; is it an adapter?")
    for module, triplet in found.items():
        _refuse_unfit(module, triplet, source)
    return dict(sorted(found.items()))


def _refuse_unfit(module: str, triplet: Mapping[str, TensorInfo], source: str) -> None:
    missing = [letter for letter in "AEB" if letter not in triplet]
    if missing:
        raise AdapterError(f"{quoted(module)} in {quoted(source)} has no lora_{missing[0]}; the file is incomplete")
    a, e, b = (triplet[letter].shape for letter in "AEB")
    fits = len(a) == len(b) == 2 and a[1] > 0 and b[0] > 0 and e == (a[0], 1) and b[1] == a[0]
    if not fits:
        raise AdapterError(
            f"the factors of {quoted(module)} in {quoted(source)} do not fit together: lora_A is {list(a)}, lora_E is "
            f"{list(e)} and lora_B is {list(b)}; was it saved from a sharded run without gathering, or for a convolution?"
        )


def _module_of(key: str) -> str:
    """Return ``model.layers.0.q_proj`` for ``model.layers.0.q_proj.lora_E``, with or without an adapter's name at the end."""
    return re.sub(r"\.lora_E(\.[^.]+)?$", "", key.removeprefix(PREFIX))


def _mask(key: str, value: object, init_r: int, source: str) -> tuple[bool, ...]:
    if not isinstance(value, list) or len(value) != init_r or not all(isinstance(item, bool) for item in value):
        raise AdapterError(
            f"rank_pattern of {quoted(key)} in {quoted(source)} must be a list of {init_r} values, true or false, one for "
            "each component at the start of training"
        )
    return tuple(value)


BUILDER: Final = Builder(read_adalora, AdaLoraConfig.parse, singular_updates, singular_key)
