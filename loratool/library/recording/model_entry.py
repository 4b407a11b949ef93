"""The catalogue's facts about a model, and the entry of a model that was made from another."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from loratool.checkpoint.dtypes import title as dtype_title
from loratool.checkpoint.header import TensorInfo
from loratool.checkpoint.model import Checkpoint
from registry import BaseRecord, ModelFacts, Registry


def facts_of_model(checkpoint: Checkpoint) -> ModelFacts:
    """Return the catalogue's facts about a model."""
    return _facts(checkpoint, size_bytes=checkpoint.nbytes, dtype=_main_dtype(checkpoint))


def add_variant(catalogue: Registry, name: str, path: Path, original: Checkpoint, *, fingerprint: str,
                variant_of: str | None, size_bytes: int, dtype: str) -> BaseRecord:  # fmt: skip
    """Catalogue the model at `path`, which was made from `original` and is stored differently, as a variant of `variant_of`.

    If `name` is the entry of the former model at `path`, the entry is updated.

    Raises:
        registry.RegistryError: another model has the name, or the catalogue cannot be written.
    """
    before = catalogue.bases.get(name)
    if before is not None and before.path == path.absolute():
        catalogue.bases.update(name, fingerprint=fingerprint)
    return catalogue.bases.add(
        name,
        str(path.absolute()),
        path=path.absolute(),
        fingerprint=fingerprint,
        variant_of=variant_of,
        facts=_facts(original, size_bytes=size_bytes, dtype=dtype),
    )


def _facts(checkpoint: Checkpoint, *, size_bytes: int, dtype: str | None) -> ModelFacts:
    config = checkpoint.config
    architectures = config.get("architectures")
    return ModelFacts(
        architecture=str(architectures[0]) if isinstance(architectures, list) and architectures else None,
        model_type=str(config["model_type"]) if "model_type" in config else None,
        parameter_count=sum(_elements(info) for info in checkpoint.tensors.values()),
        size_bytes=size_bytes,
        dtype=dtype,
    )


def _elements(info: TensorInfo) -> int:
    count = 1
    for side in info.shape:
        count *= side
    return count


def _main_dtype(checkpoint: Checkpoint) -> str | None:
    """Return the dtype of most of the model's bytes."""
    sizes: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        sizes[info.dtype] += info.nbytes
    return dtype_title(sizes.most_common(1)[0][0]) if sizes else None
