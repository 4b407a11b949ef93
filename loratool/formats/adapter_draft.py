"""A new adapter whose factors are computed one by one, so that memory use does not grow with its size."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from loratool.checkpoint.blocks import write_exactly
from loratool.checkpoint.dtypes import DTYPES, of_torch
from loratool.checkpoint.header import TensorInfo
from loratool.errors import OutputError, quoted
from loratool.formats.adapter import Adapter, of_weights
from loratool.formats.builders import BUILDERS
from loratool.formats.kinds import OF_PEFT

if TYPE_CHECKING:
    import torch


class Draft:
    """Collects the factors of an adapter, in any order and from several threads, and makes an `Adapter` of them.

    They are kept in an unnamed file in `folder` (the output's), so nothing remains of it even after a crash. The adapter
    can be written (`formats.write`) while the draft is open.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._factors: dict[str, dict[str, TensorInfo]] = {}
        self._size = 0

    def __enter__(self) -> Self:
        try:
            self._file = tempfile.TemporaryFile(dir=self.folder)
        except OSError as error:
            raise OutputError(
                f"cannot write to {quoted(self.folder)}: {error.strerror}; choose another --out"
            ) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def put(self, module: str, a: torch.Tensor, b: torch.Tensor) -> None:
        """Store the factors of `module`: A (r, in_features) and B (out_features, r), fp32, fp16 or bf16.

        Raises:
            OutputError: the disk is full.
        """
        self.put_factors(module, {"A": a, "B": b})

    def put_factors(self, module: str, factors: Mapping[str, torch.Tensor]) -> None:
        """Store the factors of `module` by their letters, fp32, fp16 or bf16.

        Raises:
            OutputError: the disk is full.
        """
        self._factors[module] = {letter: self._keep(factor) for letter, factor in factors.items()}

    def put_components(self, module: str, factors: Mapping[str, TensorInfo], kept: Sequence[int]) -> None:
        """Store some components of factors in a file, bit for bit: rows of A and E, columns of B.

        Raises:
            OutputError: the disk is full.
        """
        self._factors[module] = {
            letter: self._keep_components(info, kept, axis=1 if letter == "B" else 0)
            for letter, info in factors.items()
        }

    def adapter(self, name: str, config: Mapping[str, Any], facts: Mapping[str, Any]) -> Adapter:
        """Return the adapter of all stored modules, with the given PEFT configuration, which must fit them."""
        kind = OF_PEFT[config["peft_type"]].name
        builder = BUILDERS[kind]
        settings = builder.parse(config, name)
        updates = builder.updates(dict(sorted(self._factors.items())), settings)
        return Adapter(name, self._path, "", kind, of_weights(updates), config, settings, facts)

    @property
    def _path(self) -> Path:
        return Path(f"/proc/self/fd/{self._file.fileno()}")

    def _keep(self, factor: torch.Tensor) -> TensorInfo:
        import torch

        dtype = of_torch(str(factor.dtype).removeprefix("torch.")).name
        content: Any = factor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        return self._keep_bytes(dtype, tuple(factor.shape), memoryview(content))

    def _keep_components(self, info: TensorInfo, kept: Sequence[int], *, axis: int) -> TensorInfo:
        import numpy as np

        rows, columns = info.shape
        element = DTYPES[info.dtype].nbytes
        with open(info.file, "rb") as stream:
            stream.seek(info.start)
            whole = np.frombuffer(stream.read(info.nbytes), np.uint8).reshape(rows, columns, element)
        chosen = np.ascontiguousarray(whole.take(kept, axis))
        return self._keep_bytes(info.dtype, chosen.shape[:2], memoryview(chosen.tobytes()))

    def _keep_bytes(self, dtype: str, shape: tuple[int, ...], content: memoryview) -> TensorInfo:
        with self._lock:
            start, self._size = self._size, self._size + len(content)
        write_exactly(self._file.fileno(), content, start)
        return TensorInfo("", dtype, shape, self._path, start, start + len(content))
