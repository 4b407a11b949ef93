"""The builder of a kind whose tensors stand alone behind each module's name, as PEFT saves most kinds.

The kind's file gives the names of the tensors, the parser of its settings, and the update of one module. Reading, checking and
naming them are the same for all such kinds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final, Generic

from loratool.checkpoint.header import TensorInfo
from loratool.errors import AdapterError, quoted
from loratool.formats.adapter import Adapter
from loratool.formats.adapter_files import AdapterFiles
from loratool.formats.adapter_names import CONFIG_NAME
from loratool.formats.alpha import CONFIGURATION, Alpha, Statement, settled
from loratool.formats.builder import Builder, Factors, Settings
from loratool.formats.kinds import KINDS
from loratool.formats.lora import adapter_of
from loratool.formats.module_targets import ModuleTargets
from loratool.formats.rank_config import RankConfig
from loratool.formats.tensor_keys import PREFIX, refuse_other_features
from loratool.updates import Update

SHARED_PREFIX: Final = "base_model."
WEIGHT: Final = ".weight"

Parts = Mapping[str, TensorInfo]
"""The tensors of one module by their letters, with those that all modules share."""


class UnfitError(Exception):
    """The tensors of a module do not fit together or to the settings; the text says what is wrong with the module."""


class MissingError(UnfitError):
    """A module lacks a tensor; the text is its letter."""


@dataclass(frozen=True)
class ModuleParts(Generic[Settings]):
    """How a kind is read and written.

    Attributes:
        kind: the row's name in `formats.kinds`.
        letters: the letter of each tensor, by what PEFT calls it behind the module's name.
        shared: the same for tensors that all modules share, by what PEFT calls them behind ``base_model.``.
        leaf: the parameter of a module that is updated: ``weight`` or ``bias``.
        parse: parses and checks a configuration; the file's name is for messages.
        update: returns the update of a module, from its tensors and the settings. Raises UnfitError.
        bias: returns the update of a module's bias that comes with that of its weight, or None.
    """

    kind: str
    letters: Mapping[str, str]
    parse: Callable[[Mapping[str, Any], str], Settings]
    update: Callable[[str, Parts, Settings], Update]
    shared: Mapping[str, str] | None = None
    bias: Callable[[Update], Update | None] | None = None
    leaf: str = "weight"

    def builder(self) -> Builder[Settings]:
        """Return the builder for `formats.builders`."""
        return Builder(self.read, self.parse, self.updates, self.key)

    def read(self, files: AdapterFiles, given: Alpha | None) -> Adapter:
        """Read an adapter.

        Raises:
            UnsupportedError: it uses a feature that loratool does not compute.
            AdapterError: it is damaged or incomplete, or has no configuration.
        """
        title = KINDS[self.kind].title
        if not files.config:
            raise AdapterError(
                f"{quoted(files.source)} holds {title} tensors and no configuration; put its {CONFIG_NAME} beside it"
            )
        settings = self.parse(files.config, files.config_source)
        factors = self.collected(files)
        for module in factors:
            if module and not settings.targets(module):
                raise AdapterError(
                    f"{quoted(files.source)} holds tensors for {quoted(module)}, which its configuration does not target, so "
                    "PEFT would ignore them; correct target_modules, exclude_modules or layers_to_transform"
                )
        notes = _check_alpha(given, factors, settings, files.source, title)
        updates = self.updates(factors, settings)
        adapter = adapter_of(files, self.kind, files.config, settings, updates, notes)
        weights = {f"{module}.{self.leaf}": update for module, update in updates.items()}
        return replace(adapter, changes={**weights, **self._biases(updates)})

    def updates(self, factors: Factors, settings: Settings) -> dict[str, Update]:
        """Return the update of each module; raise AdapterError if its tensors do not fit."""
        shared = factors.get("", {})
        found = {}
        for module, parts in factors.items():
            if not module:
                continue
            source = next(iter(parts.values())).file
            try:
                found[module] = self.update(module, {**parts, **shared}, settings)
            except MissingError as error:
                name = self.key("", str(error)).removeprefix(PREFIX).removeprefix(".")
                raise AdapterError(
                    f"{quoted(module)} in {quoted(source)} has no {name}; the file is incomplete"
                ) from None
            except UnfitError as error:
                raise AdapterError(f"{quoted(module)} in {quoted(source)} {error}; save it again") from None
        return found

    def _biases(self, updates: Mapping[str, Update]) -> dict[str, Update]:
        found = {f"{module}.bias": self.bias(update) for module, update in updates.items()} if self.bias else {}
        return {name: update for name, update in found.items() if update is not None}

    def key(self, module: str, letter: str) -> str:
        """Return PEFT's name of a module's tensor, or of one that all modules share."""
        for name, each in (self.shared or {}).items():
            if each == letter:
                return f"{SHARED_PREFIX}{name}"
        return f"{PREFIX}{module}.{next(name for name, each in self.letters.items() if each == letter)}"

    def collected(self, files: AdapterFiles) -> dict[str, dict[str, TensorInfo]]:
        """Return the tensors of each module by letter, sorted by module; the shared ones have the module ``""``.

        Raises:
            UnsupportedError: a tensor is another method's.
            AdapterError: a tensor is there twice, or empty; there are several adapters, or none.
        """
        found: dict[str, dict[str, TensorInfo]] = {}
        adapters = set()
        refuse_other_features(
            files.tensors, files.source, KINDS[self.kind].title, lambda name: self._place(name) is not None
        )
        for name, info in sorted(files.tensors.items()):
            place = self._place(name)
            if place is None:
                continue
            module, letter, adapter = place
            if 0 in info.shape:
                raise AdapterError(
                    f"{quoted(name)} in {quoted(files.source)} is empty (shape {list(info.shape)}); was it saved from a sharded "
                    "run without gathering?"
                )
            if letter in found.setdefault(module, {}):
                raise AdapterError(f"{quoted(files.source)} holds {quoted(letter)} of {quoted(module)} twice")
            found[module][letter] = info
            adapters.add(adapter)
        if len(adapters) > 1:
            raise AdapterError(
                f"{quoted(files.source)} holds several adapters ({len(adapters)}); save each to a file of its own"
            )
        if not found.keys() - {""}:
            raise AdapterError(
                f"{quoted(files.source)} holds no {KINDS[self.kind].title} tensors of a module; is it an adapter?"
            )
        return dict(sorted(found.items()))

    def _place(self, name: str) -> tuple[str, str, str | None] | None:
        """Return the module, the letter and the adapter's name that a tensor's name shows; None for other tensors."""
        for pattern, letter in self._patterns:
            match = pattern.fullmatch(name)
            if match is not None:
                found = match.groupdict()
                return found.get("module") or "", letter, found["adapter"]
        return None

    @cached_property
    def _patterns(self) -> tuple[tuple[re.Pattern[str], str], ...]:
        own = [(rf"(?:{re.escape(PREFIX)})?(?P<module>.+)\.", name, letter) for name, letter in self.letters.items()]
        shared = [(rf"(?:{re.escape(SHARED_PREFIX)})?", name, letter) for name, letter in (self.shared or {}).items()]
        return tuple((re.compile(before + _with_adapter(name)), letter) for before, name, letter in shared + own)


def _with_adapter(name: str) -> str:
    """Return a pattern of a tensor's name behind the module's, in which the adapter's own name may stand."""
    end = WEIGHT if name.endswith(WEIGHT) else ""
    return rf"{re.escape(name.removesuffix(end))}(?:\.(?P<adapter>(?!weight$)[^.]+))?{re.escape(end)}"


def _check_alpha(
    given: Alpha | None, factors: Factors, settings: ModuleTargets, source: str, title: str
) -> tuple[str, ...]:
    """Return notes on alpha; raise AdapterError if the user gives another alpha than the configuration, or it has none."""
    if not isinstance(settings, RankConfig):
        if given is not None:
            raise AdapterError(f"{quoted(source)} is {title}, which has no alpha; leave --alpha out")
        return ()
    ranks = {module: settings.rank_of(module) for module in factors if module}
    alphas = {module: float(settings.alpha_of(module)) for module in ranks}
    return settled(ranks, [Statement(CONFIGURATION, alphas)], given, source)[1]


def letter_of(parts: Parts, letter: str, axes: int | None = None) -> TensorInfo:
    """Return a tensor that a module must have, with that number of axes.

    Raises:
        UnfitError: it is missing, or has another number of axes.
    """
    info = parts.get(letter)
    if info is None:
        raise MissingError(letter)
    if axes is not None and len(info.shape) != axes:
        raise UnfitError(f"has {quoted(info.name)} of shape {list(info.shape)}, which must have {axes} axes")
    return info


def refuse_shape(info: TensorInfo, expected: tuple[int, ...]) -> None:
    """Raise UnfitError if a tensor has another shape than the others and the settings require."""
    if info.shape != expected:
        raise UnfitError(f"has {quoted(info.name)} of shape {list(info.shape)}, which must be {list(expected)}")


def refuse_rank(rank: int, expected: int, where: str = "") -> None:
    """Raise UnfitError if the tensors have another rank than the configuration says; `where` names a part of them."""
    if rank != expected:
        raise UnfitError(f"has rank {rank}{where} and the configuration says {expected}")
