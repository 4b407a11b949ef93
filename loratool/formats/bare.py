"""LoRA factors without a PEFT configuration: one is made of their ranks and of the alpha that is stated or given."""

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
from loratool.formats.tensor_keys import alpha_tensors, pair_factors

SIXTEEN_BITS: Final = ("F16", "BF16")


def bare_config(files: AdapterFiles, given: Alpha | None, *,
                absent_is_rank: bool = False) -> tuple[dict[str, Any], tuple[str, ...]]:  # fmt: skip
    """Return a PEFT configuration that gives each module its rank and its alpha, and notes on where the alpha came from.

    With `absent_is_rank`, a file that states no alpha means each module's rank by it.

    Raises:
        UnsupportedError, AdapterError: the tensors are no LoRA's, or alpha is not stated, or twice and differently.
    """
    ranks = {module: a.shape[0] for module, (a, _) in pair_factors(files.tensors, files.source).items()}
    stated, use_rslora = stated_alphas(files, ranks)
    beside = config_statement(files, ranks)
    if beside is not None:
        stated, use_rslora = [beside, *stated], LoraConfig.parse(files.config, files.config_source).use_rslora
    alphas, notes = settled(ranks, stated, given, files.source, absent_is_rank=absent_is_rank, unstated=unstated(files))
    modules = {module: (rank, alphas[module]) for module, rank in ranks.items()}
    targets = sorted({target_of(module) for module in modules})
    return lora_config(modules, {"target_modules": targets}, use_rslora=use_rslora), notes


def unstated(files: AdapterFiles) -> str:
    """Why a file states no alpha, for messages: PEFT keeps it in a file of its own, which may be missing."""
    is_peft = files.file.name in (WEIGHTS_NAME, INDEX_NAME) and CONFIG_NAME not in files.beside
    return f" (there is no {CONFIG_NAME} beside it)" if is_peft else ""


def stated_alphas(files: AdapterFiles, ranks: Mapping[str, int]) -> tuple[list[Statement], bool]:
    """What tensors and metadata state of the alphas of modules with these ranks, and whether metadata say that it is rsLoRA.

    Raises:
        UnsupportedError, AdapterError: a statement cannot be read, or speaks of a module that has no factors.
    """
    configured, use_rslora = statements(files.metadata, ranks, files.source)
    return [
        *tensor_statements(files, ranks), *configured, *metadata_statements(files.metadata, ranks)
    ], use_rslora  # fmt: skip


def config_statement(files: AdapterFiles, ranks: Mapping[str, int]) -> Statement | None:
    """What a PEFT configuration states that lies beside tensors in another format; None where there is none that states alpha.

    Raises:
        UnsupportedError, AdapterError: it asks for what is not computed, or has a pattern that fits no module.
    """
    if files.config.get("lora_alpha") is None or "r" not in files.config:
        return None
    lora = LoraConfig.parse(files.config, files.config_source)
    refuse_variants(files.config, quoted(files.config_source))
    alphas = {module: float(lora.alpha_of(module)) for module in ranks}
    lost = set(lora.alpha_pattern.values()) - set(alphas.values())
    if lost:
        raise AdapterError(
            f"alpha_pattern in {quoted(files.config_source)} gives some module the alpha {min(lost):g}, and fits none in "
            f"{quoted(files.source)}; save the adapter again"
        )
    return Statement(CONFIGURATION, alphas)


def described_alpha(files: AdapterFiles, ranks: Mapping[str, int]) -> float | None:
    """The alpha that metadata or a configuration state for most modules, in a format that is not read; None where none does."""
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
    """What the tensors ``<module>.alpha`` state; 0 means the rank, as the program that writes them takes it."""
    return [
        Statement(f"the tensor {quoted(info.name)}", {module: _alpha(info, module, ranks)}, info.dtype in SIXTEEN_BITS)
        for module, info in sorted(alpha_tensors(files.tensors).items())
    ]


def _alpha(info: TensorInfo, module: str, ranks: Mapping[str, int]) -> float:
    if module not in ranks:
        raise AdapterError(f"{quoted(info.name)} in {quoted(info.file)} is the alpha of a module that has no factors")
    return read_scalar(info) or float(ranks[module])
