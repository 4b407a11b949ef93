"""kohya's layout of LoRA and DyLoRA (kohya-ss/sd-scripts, ``networks/lora.py`` and ``networks/dylora.py``).

Each module has ``<module>.lora_down.weight`` (r, in), ``<module>.lora_up.weight`` (out, r) and ``<module>.alpha``, one
number. Module names have ``_`` for every dot, after ``lora_unet_``, ``lora_te_`` or a similar prefix. The metadata name the
trainer's module: ``ss_network_module`` is ``networks.dylora`` for a DyLoRA.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from loratool.checkpoint.header import TensorInfo
from loratool.errors import AdapterError, UnsupportedError, quoted
from loratool.formats.adapter import Adapter, Layout, of_weights
from loratool.formats.adapter_files import AdapterFiles
from loratool.formats.adapter_format import AdapterFormat, Description
from loratool.formats.alpha import Alpha, Statement, agree, metadata_statements, settled
from loratool.formats.bare import config_statement, tensor_statements
from loratool.formats.describe import Split, kind_of, parts_of, ranks_of
from loratool.formats.kinds import LORA, NESTED_LORA, NOT_YET, kind_named
from loratool.formats.lora import lora_settings
from loratool.formats.lora_config import LoraConfig, lora_config
from loratool.formats.lora_product import product_of
from loratool.formats.metadata_config import statements
from loratool.formats.scalar import read_scalar
from loratool.formats.tensor_keys import KERNELS

NAME: Final = "kohya"
TITLE: Final = "kohya"
NETWORK_KEY: Final = "ss_network_module"
DYLORA_NETWORK: Final = "networks.dylora"
MATRIX: Final = 2
"""The number of dimensions of a linear layer's factor."""

_TENSOR: Final = re.compile(r"(?P<module>[^.]+)\.(?:(?P<factor>lora_down|lora_up)\.weight|(?P<alpha>alpha))")
ALPHA: Final = "alpha"
_NAME: Final = re.compile(r"(?P<module>[^.]+)\.(?P<part>lora_(?:down|up)\.weight|lora_[AB]\.\d+|alpha)")
_COMPONENT: Final = re.compile(r".+\.lora_[AB]\.\d+")


def _claims(files: AdapterFiles) -> bool:
    return any((found := split_kohya(name)) is not None and found[1] != ALPHA for name in files.tensors)


def split_kohya(name: str) -> tuple[str, str] | None:
    """Split a tensor's name into the module, a word without dots, and the part, ``lora_down.weight`` or similar."""
    match = _NAME.fullmatch(name)
    return (match["module"], match["part"]) if match else None


def describe_kohya(files: AdapterFiles, split: Split = split_kohya) -> Description:
    """Return what kohya's names and metadata (``ss_*``, ``modelspec.*``) describe; other trainers write the same metadata."""
    modules = parts_of(files.tensors, split)
    kind = kind_of(modules) or LORA
    if kind == LORA and _is_dylora(files):
        kind = NESTED_LORA
    ranks = ranks_of(modules, kind)
    stated = [read_scalar(parts[ALPHA]) or ranks[module] for module, parts in modules.items()
              if ALPHA in parts and module in ranks]  # fmt: skip
    stated = stated or [each.alphas[""] for each in metadata_statements(files.metadata, [""])]
    return Description(
        kind=kind,
        ranks=ranks,
        alpha=Counter(stated).most_common(1)[0][0] if stated else None,
        modules=tuple(modules),
        family=files.metadata.get("ss_base_model_version") or files.metadata.get("modelspec.architecture"),
        why_not=kind_named(kind).why_not,
        notes=kohya_notes(files.metadata),
    )


def read_kohya(files: AdapterFiles, given: Alpha | None) -> Adapter:
    """Read a LoRA or DyLoRA of linear layers and convolutions (LoCon).

    Raises:
        UnsupportedError: it has tensors of another method.
        AdapterError: a tensor is missing or does not fit its partner; the layers of a DyLoRA have several ranks; or the
          stated alphas contradict each other or `given`.
    """
    source = files.source
    pairs = {
        module: (parts["lora_down"], parts["lora_up"]) for module, parts in _modules(files.tensors, source).items()
    }
    ranks = {module: down.shape[0] for module, (down, _) in pairs.items()}
    stated = tensor_statements(files, ranks)
    if not stated or not _is_varied(files.metadata):
        stated = [*stated, *_of_metadata(files, ranks, stated)]
    stated += _of_configurations(files, ranks)
    alphas, notes = settled(ranks, stated, given, source, absent_is_rank=True)
    config = lora_config(
        {module: (rank, alphas[module]) for module, rank in ranks.items()}, {"target_modules": list(ranks)}
    )
    facts = dict(files.facts)
    if _is_dylora(files):
        _refuse_several_ranks(ranks, source)
        facts |= {"kind": NESTED_LORA, "scaling": "kohya"}
    return Adapter(
        files.name,
        files.file,
        files.sha256(),
        NESTED_LORA if facts.get("kind") == NESTED_LORA else LORA,
        of_weights(
            {
                module: product_of({"A": down, "B": up}, alphas[module] / ranks[module])
                for module, (down, up) in pairs.items()
            }
        ),
        config,
        LoraConfig.parse(config, source),
        facts,
        notes=(*kohya_notes(files.metadata), *notes),
        layout=Layout(NAME, TITLE, files.metadata),
    )


def _of_metadata(files: AdapterFiles, ranks: Mapping[str, int], of_tensors: Sequence[Statement]) -> list[Statement]:
    """Return what ``ss_network_alpha`` and similar keys state; it need not hold for all modules, so one that has it suffices."""
    found = []
    for statement in metadata_statements(files.metadata, ranks):
        by_metadata = {module: alpha or float(ranks[module]) for module, alpha in statement.alphas.items()}
        agreed = [m for each in of_tensors for m, alpha in each.alphas.items() if agree(by_metadata[m], alpha, each)]
        if not agreed:
            found.append(Statement(statement.place, by_metadata))
    return found


def _of_configurations(files: AdapterFiles, ranks: Mapping[str, int]) -> list[Statement]:
    """Return what a PEFT configuration in the metadata or beside the file states."""
    configured, use_rslora = statements(files.metadata, ranks, files.source)
    if use_rslora or files.config.get("use_rslora"):
        raise UnsupportedError(
            f"{quoted(files.source)} says use_rslora, which kohya's format does not have, so its scaling is ambiguous; save it "
            "again in PEFT's format"
        )
    beside = config_statement(files, ranks)
    return configured if beside is None else [beside[0], *configured]


def _is_varied(metadata: Mapping[str, Any]) -> bool:
    """Return whether some modules (convolutions, blocks) were trained with another alpha, or LyCORIS folded alpha in."""
    return "alpha" in str(metadata.get("ss_network_args")) or "lycoris" in str(metadata.get(NETWORK_KEY))


def _is_dylora(files: AdapterFiles) -> bool:
    return files.metadata.get(NETWORK_KEY) == DYLORA_NETWORK


def _refuse_several_ranks(ranks: Mapping[str, int], source: str) -> None:
    modules = {rank: module for module, rank in ranks.items()}
    if len(modules) > 1:
        (least, one), (most, other) = min(modules.items()), max(modules.items())
        raise AdapterError(
            f"{quoted(source)} mixes layers: {quoted(one)} has rank {least} and {quoted(other)} rank {most}, where a DyLoRA "
            "has one rank; is it put together from several files?"
        )


def kohya_notes(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Return a note on a DyLoRA that was trained several ranks at a time (``unit``); ranks between multiples were not trained."""
    arguments = re.search(r'"unit":\s*"?(\d{1,9})\b', metadata.get("ss_network_args", ""))
    unit = int(arguments[1]) if arguments else 1
    if metadata.get(NETWORK_KEY) != DYLORA_NETWORK or unit <= 1:
        return ()
    return (f"it was trained {unit} ranks at a time, so cut it to a multiple of {unit}; no other rank was trained",)


def write_kohya(adapter: Adapter) -> tuple[dict[str, TensorInfo | bytes], dict[str, str]]:
    """Return the tensors of an adapter under kohya's names, with alpha as the bytes of one fp32 number, and the original file's
    metadata with the current rank and alpha."""
    tensors: dict[str, TensorInfo | bytes] = {}
    settings = lora_settings(adapter)
    for module, update in sorted(adapter.ranked.items()):
        tensors[f"{module}.alpha"] = struct.pack("<f", settings.alpha_of(module))
        tensors[f"{module}.lora_down.weight"] = update.tensors["A"]
        tensors[f"{module}.lora_up.weight"] = update.tensors["B"]
    metadata = {} if adapter.layout is None else adapter.layout.metadata
    kept = {key: value for key, value in metadata.items() if key.startswith("ss_") or key == "format"}
    network = {NETWORK_KEY: DYLORA_NETWORK if adapter.kind == NESTED_LORA else "networks.lora"}
    of_all = {"ss_network_dim": str(adapter.config["r"]), "ss_network_alpha": f"{adapter.alpha:.9g}"}
    return tensors, kept | network | of_all


def _modules(tensors: Mapping[str, TensorInfo], source: str) -> dict[str, dict[str, TensorInfo]]:
    """Return the tensors of each module, sorted by module name."""
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
    are_kernels = len(down) == len(up) and len(down) in (MATRIX, *KERNELS) and all(side == 1 for side in up[MATRIX:])
    if not are_kernels or 0 in down or 0 in up or down[0] != up[1]:
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
        f"{quoted(source)} is in kohya's format and holds {quoted(name)} beside its LoRA: {NOT_YET}"
    )


FORMAT: Final = AdapterFormat(NAME, TITLE, _claims, split_kohya, describe_kohya, read_kohya, write=write_kohya)
