"""Trained biases and norms in a file of their own, under the model's names (BitFit: Ben Zaken et al. 2021, arXiv:2106.10199).

Programs save them as the part of the state dict that was trained. There is no configuration: each tensor replaces the base's
tensor of that name. A classifier's weight may stand beside its bias. A file with any other matrix is not such an adapter but a
model, or a part of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from loratool.architecture import Role, any_model
from loratool.checkpoint.file_role import FileRole, role_of
from loratool.checkpoint.header import TensorInfo
from loratool.errors import AdapterError, quoted
from loratool.formats.adapter import Adapter, Layout
from loratool.formats.adapter_files import AdapterFiles
from loratool.formats.adapter_format import AdapterFormat, Description
from loratool.formats.adapter_names import index_of_shard
from loratool.formats.alpha import Alpha
from loratool.formats.builder import Builder, Factors
from loratool.formats.kinds import KINDS
from loratool.formats.lora import adapter_of
from loratool.formats.module_targets import ModuleTargets
from loratool.formats.tensor_keys import PREFIX
from loratool.updates import Update
from loratool.updates.replacement import Replacement

NAME: Final = "bitfit"
LEAVES: Final = ("weight", "bias")
FLOATS: Final = ("F32", "F16", "BF16")


def _split(name: str) -> tuple[str, str] | None:
    module, _, leaf = name.rpartition(".")
    return (module, leaf) if module and leaf in LEAVES and not name.startswith(PREFIX) else None


def _claims(files: AdapterFiles) -> bool:
    """Return whether a file that is not named as a model's holds vectors, and beside them at most a classifier's weight."""
    if files.config or files.container != "safetensors" or _is_of_model(files.file.name):
        return False
    vectors = [name for name, info in files.tensors.items() if len(info.shape) == 1]
    return bool(vectors) and all(
        _split(name) is not None and (len(info.shape) == 1 or _is_classifier(name, files.tensors))
        for name, info in files.tensors.items()
    )


def _is_of_model(file: str) -> bool:
    return role_of(file) is FileRole.MODEL_WEIGHTS or index_of_shard(file) is not None


def _is_classifier(name: str, tensors: Mapping[str, TensorInfo]) -> bool:
    module = name.rpartition(".")[0]
    return len(tensors[name].shape) == 2 and f"{module}.bias" in tensors and any_model().role(name) is Role.CLASSIFIER


def _describe(files: AdapterFiles) -> Description:
    modules = {name.rpartition(".")[0]: None for name in sorted(files.tensors)}
    return Description(NAME, {}, None, tuple(modules))


def read(files: AdapterFiles, given: Alpha | None) -> Adapter:
    """Read the tensors that replace the base's.

    Raises:
        AdapterError: a tensor is empty or of another dtype, or the user gives an alpha.
    """
    source = quoted(files.source)
    if given is not None:
        raise AdapterError(f"{source} is {KINDS[NAME].title}, which has no alpha; leave --alpha out")
    for name, info in sorted(files.tensors.items()):
        if 0 in info.shape:
            raise AdapterError(
                f"{quoted(name)} in {source} is empty (shape {list(info.shape)}); was it saved from a sharded run without "
                "gathering?"
            )
        if info.dtype not in FLOATS:
            raise AdapterError(f"{quoted(name)} in {source} is {info.dtype}; save it as fp32, fp16 or bf16")
    changes = {name: Replacement(info, NAME) for name, info in sorted(files.tensors.items())}
    count = f"{len(changes)} tensors" if len(changes) > 1 else "1 tensor"
    note = f"it holds {count} whole ({quoted(next(iter(changes)))}, ...), which replace the base's own"
    settings = ModuleTargets.parse({}, files.source)
    layout = Layout(FORMAT.name, FORMAT.title, {})
    return replace(adapter_of(files, NAME, {}, settings, {}, (note,)), changes=changes, layout=layout)


def _updates(factors: Factors, settings: ModuleTargets) -> dict[str, Update]:
    """Return the updates of weights."""
    return {module: Replacement(parts["weight"], NAME) for module, parts in factors.items() if "weight" in parts}


def _key(module: str, leaf: str) -> str:
    return f"{module}.{leaf}"


def _write(adapter: Adapter) -> tuple[Mapping[str, TensorInfo | bytes], dict[str, str]]:
    tensors = {name: info for name, update in sorted(adapter.changes.items()) for info in update.tensors.values()}
    return tensors, {"format": "pt"}


BUILDER: Final = Builder(read, ModuleTargets.parse, _updates, _key)
FORMAT: Final = AdapterFormat(
    "own_names",
    "model's own names",
    _claims,
    _split,
    _describe,
    read,
    write=_write,
    has_names_of_base=True,
    stands_alone=True,
)
