"""WaveFT (arXiv:2505.12532) in PEFT's names (PEFT 0.21, ``peft.WaveFTConfig``): one vector of coefficients for each module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from loratool.errors import UnsupportedError, quoted
from loratool.formats.config_reader import ConfigReader
from loratool.formats.fourierft import FrequencyConfig, frequency_fields
from loratool.formats.module_parts import ModuleParts, Parts, UnfitError, letter_of
from loratool.updates import Update
from loratool.updates.waveft import WaveFt

NAME: Final = "waveft"
HAAR: Final = ("db1", "haar")


@dataclass(frozen=True, slots=True, kw_only=True)
class WaveFtConfig(FrequencyConfig):
    """Beside targets and places: whether coefficients are transformed, and whether each module has a number of its own."""

    transforms: bool
    proportional: bool

    @classmethod
    def parse(cls, config: Mapping[str, Any], source: str) -> Self:
        """Check a configuration.

        Raises:
            UnsupportedError: it uses another wavelet than Haar's.
            AdapterError: a value is missing or impossible.
        """
        read = ConfigReader(config, source)
        transforms = config.get("use_idwt") is None or read.flag("use_idwt")
        wavelet = config.get("wavelet_family") or HAAR[0]
        if transforms and wavelet not in HAAR:
            raise UnsupportedError(
                f"{quoted(source)} is a WaveFT with the wavelet {quoted(wavelet, 40)}; loratool computes Haar's (db1) only: "
                "merge it with PEFT"
            )
        fields = frequency_fields(config, source, NAME)
        return cls(**fields, transforms=transforms, proportional=read.flag("proportional_parameters"))


def waveft_update(module: str, parts: Parts, config: WaveFtConfig) -> Update:
    """Return the update of a module.

    Raises:
        UnfitError: its coefficients are missing or not as many as the configuration says.
    """
    c = letter_of(parts, "c", axes=1)
    if not config.proportional and c.shape[0] not in config.counts:
        raise UnfitError(
            f"has {c.shape[0]} coefficients, and the configuration says {quoted(sorted(config.counts), 60)}"
        )
    return WaveFt(parts, config.scaling, config.seed, transforms=config.transforms)


BUILDER: Final = ModuleParts(NAME, {"waveft_spectrum": "c"}, WaveFtConfig.parse, waveft_update).builder()
