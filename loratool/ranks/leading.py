"""An adapter cut to its leading components: what it is worth at a smaller rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from loratool.errors import UnsupportedError, quoted
from loratool.formats.adapter import Adapter
from loratool.formats.draft import Draft
from loratool.ranks.factored_svd import factored_svd
from loratool.updates.low_rank import LowRank, read_factor

if TYPE_CHECKING:
    import torch

DYLORA: Final = "dylora"


def leading(adapter: Adapter, rank: int, draft: Draft) -> Adapter:
    """The adapter at `rank`, in fp32, its factors kept in `draft`; a module of a smaller rank is left whole.

    A DyLoRA is trained at every rank: its first `rank` components, scaled by ``alpha / rank`` (Valipour et al. 2023,
    arXiv:2210.07558, equation 7). Of any other LoRA the best approximation of that rank, by its singular values.

    Raises:
        UnsupportedError: a module's update is no product of two factors.
        AdapterError: a factor holds NaN or infinity.
    """
    nested = adapter.facts.get("kind", adapter.kind) == DYLORA
    for module, update in adapter.updates.items():
        if not isinstance(update, LowRank):
            raise UnsupportedError(
                f"{quoted(module)} of {quoted(adapter.name)} is {quoted(update.kind)}, which loratool cannot cut to a rank yet"
            )
        a, b = read_factor(update.a), read_factor(update.b)
        if nested:
            draft.put(module, a[:rank], b[:, :rank])
        else:
            draft.put(module, *_best(a, b, update.scaling, rank))
    return draft.adapter(adapter.name, _config(adapter.config, rank, nested=nested), adapter.facts)


def _best(a: torch.Tensor, b: torch.Tensor, scaling: float, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (min(rank, r), in) and B (out, min(rank, r)), fp32, whose product is closest to ``scaling * B A``."""
    if rank >= len(a):
        return a, (scaling * b.double()).float()
    u, s, v = factored_svd(b, a)
    best_a, best_b = a.new_zeros(rank, a.shape[1]), b.new_zeros(b.shape[0], rank)
    kept = min(rank, len(s))  # fewer where the matrix is smaller than its factors' rank
    best_a[:kept], best_b[:, :kept] = v[:kept], scaling * u[:, :kept] * s[:kept]
    return best_a, best_b


def _config(config: Mapping[str, Any], rank: int, *, nested: bool) -> dict[str, Any]:
    """Ranks of `rank` at most. The alphas stay, or where the factors hold the scaling they make it 1."""
    r = min(rank, config["r"])
    pattern = {modules: min(rank, each) for modules, each in (config.get("rank_pattern") or {}).items()}
    cut = {**config, "r": r, "rank_pattern": pattern}
    return cut if nested else {**cut, "lora_alpha": r, "alpha_pattern": pattern, "use_rslora": False}
