"""LoRA factors without a PEFT configuration: one is made from their ranks and the stated or given alpha."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

from loratool.checkpoint.header import TensorInfo
from loratool.errors import AdapterError, quoted
from loratool.formats.adapter import target_of
from loratool.formats.adapter_files import AdapterFiles
from loratool.formats.adapter_names import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME
from loratool.formats.alpha import CONFIGURATION, Alpha, Statement, metadata_statements, settled
from loratool.formats.lora_config import LoraConfig, lora_config
from loratool.formats.metadata_config import refuse_variants, statements
from loratool.formats.scalar import read_scalar
from loratool.formats.tensor_keys import alpha_tensors, pair_factors, rank_of

SIXTEEN_BITS: Final = ("F16", "BF16")


def bare_config(files: AdapterFiles, given: Alpha | None, *,
                absent_is_rank: bool = False) -> tuple[dict[str, Any], tuple[str, ...]]:  # fmt: skip
    """Return a PEFT configuration with each module's rank and alpha, and notes on the source of alpha.

    With `absent_is_rank`, alpha is each module's rank if the file states none.

    Raises:
        UnsupportedError, AdapterError: the tensors are not a LoRA's, or alpha is missing or contradictory.
    """
    ranks = {module: rank_of(pair) for module, pair in pair_factors(files.tensors, files.source).items()}
    stated, use_rslora = stated_alphas(files, ranks)
    beside = config_statement(files, ranks)
    if beside is not None:
        statement, lora = beside
        stated, use_rslora = [statement, *stated], lora.use_rslora
    alphas, notes = settled(ranks, stated, given, files.source, absent_is_rank=absent_is_rank, unstated=unstated(files))
    modules = {module: (rank, alphas[module]) for module, rank in ranks.items()}
    targets = sorted({target_of(module) for module in modules})
    return lora_config(modules, {"target_modules": targets}, use_rslora=use_rslora), notes


def unstated(files: AdapterFiles) -> str:
    """Return why a file states no alpha, for messages: PEFT stores it in a separate file, which may be missing."""
    is_peft = files.file.name in (WEIGHTS_NAME, INDEX_NAME) and CONFIG_NAME not in files.beside
    return f" (there is no {CONFIG_NAME} beside it)" if is_peft else ""


def stated_alphas(files: AdapterFiles, ranks: Mapping[str, int]) -> tuple[list[Statement], bool]:
    """Return what tensors and metadata state about the alphas of modules with these ranks, and whether it is an rsLoRA.

    Raises:
        UnsupportedError, AdapterError: a statement is invalid, or concerns a module without factors.
    """
    configured, use_rslora = statements(files.metadata, ranks, files.source)
    return [
        *tensor_statements(files, ranks), *configured, *metadata_statements(files.metadata, ranks)
    ], use_rslora  # fmt: skip


def config_statement(files: AdapterFiles, ranks: Mapping[str, int]) -> tuple[Statement, LoraConfig] | None:
    """Return the alphas that a PEFT configuration beside tensors in another format states, and the configuration, parsed.

    None if it is absent or states no alpha.

    Raises:
        UnsupportedError, AdapterError: it asks for an uncomputed feature, or has a pattern that matches no module.
    """
    if files.config.get("lora_alpha") is None or "r" not in files.config:
        return None
    lora = LoraConfig.parse(files.config, files.config_source)
    refuse_variants(files.config, quoted(files.config_source))
    alphas = {module: float(lora.alpha_of(module)) for module in ranks}
    lost = set(lora.alpha_pattern.values()) - set(alphas.values())
    if lost:
        raise AdapterError(
            f"alpha_pattern in {quoted(files.config_source)} gives some module the alpha {min(lost):g}, but matches none in "
            f"{quoted(files.source)}; save the adapter again"
        )
    return Statement(CONFIGURATION, alphas), lora


def described_alpha(files: AdapterFiles, ranks: Mapping[str, int]) -> float | None:
    """Return the alpha stated for most modules by metadata or a configuration, in a format that is not read; None if none is."""
    modules = ranks or {"": 1}
    try:
        configured, _ = statements(files.metadata, ranks, files.source)
    except AdapterError:
        configured = []
    numbers = [
        alpha for each in (*configured, *metadata_statements(files.metadata, modules)) for alpha in each.alphas.values()
    ]
    return Counter(numbers).most_common(1)[0][0] if numbers else None


def tensor_statements(files: AdapterFiles, ranks: Mapping[str, int]) -> list[Statement]:
    """Return what the tensors ``<module>.alpha`` state; 0 means the rank, as in the program that writes them."""
    return [
        Statement(f"the tensor {quoted(info.name)}", {module: _alpha(info, module, ranks)}, info.dtype in SIXTEEN_BITS)
        for module, info in sorted(alpha_tensors(files.tensors).items())
    ]


def _alpha(info: TensorInfo, module: str, ranks: Mapping[str, int]) -> float:
    if module not in ranks:
        raise AdapterError(f"{quoted(info.name)} in {quoted(info.file)} is the alpha of a module without factors")
    return read_scalar(info) or float(ranks[module])
