"""The builder of each kind of adapter that loratool computes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from loratool.formats import (
    adalora,
    bdlora,
    beft,
    bitfit,
    boft,
    c3a,
    delora,
    dora,
    fourierft,
    glora,
    gralora,
    hira,
    hra,
    ia3,
    ln_tuning,
    loha,
    lokr,
    lora,
    miss,
    oft,
    pvera,
    randlora,
    road,
    shira,
    supertuning,
    tinylora,
    trainable_tokens,
    unilora,
    vblora,
    vera,
    waveft,
)
from loratool.formats.builder import Builder
from loratool.formats.kinds import LORA, RECORDED

BUILDERS: Final[Mapping[str, Builder[Any]]] = MappingProxyType({
    LORA: lora.BUILDER,
    **{kind.name: lora.BUILDER for kind in RECORDED},
    adalora.NAME: adalora.BUILDER,
    bdlora.NAME: bdlora.BUILDER,
    dora.NAME: dora.BUILDER,
    delora.NAME: delora.BUILDER,
    loha.NAME: loha.BUILDER,
    lokr.NAME: lokr.BUILDER,
    ia3.NAME: ia3.BUILDER,
    ln_tuning.NAME: ln_tuning.BUILDER,
    beft.NAME: beft.BUILDER,
    bitfit.NAME: bitfit.BUILDER,
    trainable_tokens.NAME: trainable_tokens.BUILDER,
    oft.NAME: oft.BUILDER,
    boft.NAME: boft.BUILDER,
    hra.NAME: hra.BUILDER,
    hira.NAME: hira.BUILDER,
    c3a.NAME: c3a.BUILDER,
    fourierft.NAME: fourierft.BUILDER,
    road.NAME: road.BUILDER,
    glora.NAME: glora.BUILDER,
    supertuning.NAME: supertuning.BUILDER,
    waveft.NAME: waveft.BUILDER,
    miss.NAME: miss.BUILDER,
    shira.NAME: shira.BUILDER,
    vera.NAME: vera.BUILDER,
    tinylora.NAME: tinylora.BUILDER,
    unilora.NAME: unilora.BUILDER,
    randlora.NAME: randlora.BUILDER,
    gralora.NAME: gralora.BUILDER,
    pvera.NAME: pvera.BUILDER,
    vblora.NAME: vblora.BUILDER,
})  # fmt: skip
"""The builder of every computed kind in `formats.kinds`, by name."""
