"""The formats that loratool knows, in the order in which they may claim a file: most specific first."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from loratool.errors import AdapterError, quoted
from loratool.formats import (
    adapterhub,
    bfl_control,
    bitfit,
    diffusers,
    diffusers_old,
    dotted,
    gguf,
    kohya,
    loralib,
    lycoris,
    mlx,
    onetrainer,
    peft,
    torchtune,
    xlabs,
)
from loratool.formats.adapter_files import AdapterFiles
from loratool.formats.adapter_format import AdapterFormat

FORMATS: Final[tuple[AdapterFormat, ...]] = (
    gguf.FORMAT,
    mlx.FORMAT,
    adapterhub.FORMAT,
    torchtune.FORMAT,
    xlabs.FORMAT,
    bfl_control.FORMAT,
    diffusers_old.FORMAT,
    onetrainer.FORMAT,
    lycoris.FORMAT,
    kohya.FORMAT,
    dotted.COMFYUI,
    diffusers.FORMAT,
    loralib.FORMAT,
    dotted.DOTTED,
    peft.FORMAT,
    bitfit.FORMAT,
)

OWN: Final = peft.FORMAT
"""The default format for writing adapters."""

_BY_NAME: Final = {row.name: row for row in FORMATS}


def format_of(files: AdapterFiles) -> AdapterFormat:
    """Return the format of an adapter's files.

    Raises:
        AdapterError: no format claims them, or the tensors are in two formats.
    """
    found = _claimant(files)
    if found is None:
        shown = next(iter(sorted(files.tensors)), None)
        what = (
            "holds no LoRA tensors"
            if shown is None
            else f"holds no adapter's tensors that loratool knows ({quoted(shown)}, ...)"
        )
        raise AdapterError(f"{quoted(files.source)} {what}; is it an adapter?")
    rest = {name: info for name, info in files.tensors.items() if found.split(name) is None}
    other = _claimant(replace(files, tensors=rest, config={}, metadata={}, container="safetensors")) if rest else None
    if other is not None and other is not found and not other.stands_alone:
        raise AdapterError(
            f"{quoted(files.source)} mixes two formats: some of its tensors are in the {found.title} format, others in the "
            f"{other.title} format ({quoted(next(iter(sorted(rest))))}); give each adapter a file of its own"
        )
    return found


def format_named(name: str) -> AdapterFormat:
    """Return the format with that word; raises KeyError if there is none."""
    return _BY_NAME[name]


def _claimant(files: AdapterFiles) -> AdapterFormat | None:
    return next((row for row in FORMATS if row.claims(files)), None)
