"""LyCORIS' files (LyCORIS 4.1): LoHa, LoKr, GLoRA, IA3, OFT, DoRA and full differences with flattened module names.

LoHa and LoKr are read. Their parts have the names that PEFT gives them, and each module has its ``alpha``, a number. LyCORIS
ignores alpha where both factors of a LoKr are whole: its scaling is then 1.

Plain LoRA layers are written like kohya's, so a file with only those is in kohya's format.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from loratool.architecture import module_of
from loratool.checkpoint.header import TensorInfo
from loratool.errors import UnsupportedError, quoted
from loratool.formats.adapter import Adapter, Layout
from loratool.formats.adapter_files import AdapterFiles
from loratool.formats.adapter_format import AdapterFormat, Description
from loratool.formats.alpha import Alpha, settled
from loratool.formats.bare import tensor_statements
from loratool.formats.builders import BUILDERS
from loratool.formats.describe import kind_of, parts_of, ranks_of
from loratool.formats.kinds import LORA, NOT_YET, Kind, kind_named
from loratool.formats.kohya import ALPHA, describe_kohya, kohya_notes, read_kohya
from loratool.formats.rank_config import RankConfig
from loratool.formats.tensor_keys import PREFIX as PEFT_PREFIX

_NAME: Final = re.compile(
    r"(?P<module>[^.]+)\.(?P<part>lora_(?:down|up|mid)\.weight|lora_t[12]|alpha|weight|scalar|bias|rescale"
    r"|(?:hada|lokr|oft)_\w+|dora_scale|diff|diff_b|[wb]_norm|on_input|[ab][12]\.weight|bm\.weight"
    r"|(?:q|p|lambda)_layer(?:\.\w+)?)"
)
_SIGNS: Final = (
    "hada_", "lokr_", "oft_", "diff", "w_norm", "b_norm", "on_input", "dora_scale", "lora_mid", "a1.", "a2.", "b1.", "b2.",
    "q_layer", "p_layer", "lambda_layer",
)  # fmt: skip
"""Parts that kohya's own networks do not have."""

PREFIX: Final = "lycoris_"
BLOCKS: Final = ".oft_blocks"
BLOCK_DIMENSIONS: Final = 3
"""Number of axes of OFT's blocks (blocks, n, n); BOFT has one more, for its factors."""


def split(name: str) -> tuple[str, str] | None:
    match = _NAME.fullmatch(name)
    return (match["module"], match["part"]) if match else None


def _claims(files: AdapterFiles) -> bool:
    found = [where for name in files.tensors if (where := split(name)) is not None]
    return any(part.startswith(_SIGNS) or module.startswith(PREFIX) for module, part in found)


def _describe(files: AdapterFiles) -> Description:
    found = describe_kohya(files, split)
    butterfly = found.kind == "oft" and any(
        name.endswith(BLOCKS) and len(info.shape) > BLOCK_DIMENSIONS for name, info in files.tensors.items()
    )
    kind = "boft" if butterfly else found.kind
    readable = kind == LORA or kind_named(kind).in_lycoris
    return replace(found, kind=kind, why_not=found.why_not or (None if readable else WHY_NOT))


def read_lycoris(files: AdapterFiles, given: Alpha | None) -> Adapter:
    """Read a LoRA, or a kind whose tensors PEFT names alike (LoHa, LoKr). A missing alpha is the rank.

    Raises:
        UnsupportedError: it is of another kind, or holds other tensors beside.
        AdapterError: it is damaged, or its stated alphas contradict each other or `given`.
    """
    modules = parts_of(files.tensors, split)
    row = kind_named(kind_of(modules) or LORA)
    if row.name == LORA:
        return read_kohya(files, given)
    if not row.in_lycoris:
        raise UnsupportedError(f"{quoted(files.source)} is {row.title} in the LyCORIS format: {row.why_not or WHY_NOT}")
    own = {name: info for name, info in files.tensors.items() if _is_part(name, row)}
    other = next((name for name in files.tensors if name not in own and not name.endswith(f".{ALPHA}")), None)
    if other is not None:
        raise UnsupportedError(f"{quoted(files.source)} holds {quoted(other)} beside its {row.title}: {NOT_YET}")
    shown = ranks_of(modules, row.name)
    whole = {module: _whole_rank(parts) for module, parts in modules.items() if module not in shown}
    stated = [each for each in tensor_statements(files, shown | whole) if each.alphas.keys() <= shown.keys()]
    alphas, notes = settled(shown, stated, given, files.source, absent_is_rank=True) if shown else ({}, ())
    ranks = shown | whole
    alphas |= {module: float(rank) for module, rank in whole.items()}
    config = _config(row, ranks, alphas)
    adapter = BUILDERS[row.name].read(replace(files, tensors=own, config=config), None)
    return replace(
        adapter,
        notes=(*kohya_notes(files.metadata), *notes, *adapter.notes),
        layout=Layout(NAME, TITLE, files.metadata),
    )


def _is_part(name: str, row: Kind) -> bool:
    found = split(name)
    return found is not None and found[1].startswith(row.parts)


def _whole_rank(parts: Mapping[str, TensorInfo]) -> int:
    """Return a rank for a module whose factors are all whole: LyCORIS then ignores alpha, and PEFT needs some rank."""
    return max((max(info.shape[:2]) for info in parts.values() if len(info.shape) > 1), default=1)


def _config(row: Kind, ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """Return a configuration of PEFT that gives each module its rank and alpha."""
    r, alpha = max((rank, alphas[module]) for module, rank in ranks.items())
    keys = {module: f"^{re.escape(module)}" for module in sorted(ranks)}
    return {
        "peft_type": row.peft_type,
        "r": r,
        row.alpha_key: alpha,
        "rank_pattern": {key: ranks[module] for module, key in keys.items() if ranks[module] != r},
        "alpha_pattern": {key: alphas[module] for module, key in keys.items() if alphas[module] != alpha},
        "target_modules": sorted(ranks),
    }


def write_lycoris(adapter: Adapter) -> tuple[dict[str, TensorInfo | bytes], dict[str, str]]:
    """Return the tensors of an adapter under LyCORIS' names, with alpha as the bytes of one fp32 number, and its metadata."""
    settings, key = adapter.settings, BUILDERS[adapter.kind].key
    assert isinstance(settings, RankConfig)
    tensors: dict[str, TensorInfo | bytes] = {}
    for name, update in sorted(adapter.changes.items()):
        module = module_of(name)
        tensors[f"{module}.{ALPHA}"] = struct.pack("<f", settings.alpha_of(module))
        tensors |= {key(module, letter).removeprefix(PEFT_PREFIX): info for letter, info in update.tensors.items()}
    return tensors, dict(adapter.layout.metadata) if adapter.layout else {}


NAME: Final = "lycoris"
TITLE: Final = "LyCORIS"
WHY_NOT: Final = (
    "loratool does not read it in this layout yet; merge it with the program that trained it, or save it in PEFT's"
)
FORMAT: Final = AdapterFormat(NAME, TITLE, _claims, split, _describe, read_lycoris, write=write_lycoris)
