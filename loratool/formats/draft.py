"""A new adapter whose factors are computed one after the other, so that memory does not grow with it."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from loratool.checkpoint.blocks import write_exactly
from loratool.checkpoint.header import TensorInfo
from loratool.errors import OutputError, quoted
from loratool.formats.adapter import Adapter
from loratool.formats.lora_config import LoraConfig
from loratool.updates.low_rank import LowRank

if TYPE_CHECKING:
    import torch


class Draft:
    """Takes the factors of a LoRA, in any order and from several threads, and gives the `Adapter` that they make.

    They are kept in a file in `folder` (that of the output) that has no name, so nothing is left of it whatever
    happens. The adapter can be written (`formats.write`) while the draft is open.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._factors: dict[str, tuple[TensorInfo, TensorInfo]] = {}
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
        """Keep the factors of `module`: A (r, in_features) and B (out_features, r), fp32, fp16 or bf16.

        Raises:
            OutputError: the disk is full.
        """
        self._factors[module] = self._keep(a), self._keep(b)

    def adapter(self, name: str, config: Mapping[str, Any], facts: Mapping[str, Any]) -> Adapter:
        """The adapter of all modules that were put, under a PEFT LoRA configuration that fits them."""
        lora = LoraConfig.parse(config, name)
        updates = {module: LowRank(a, b, lora.scaling_of(module)) for module, (a, b) in sorted(self._factors.items())}
        return Adapter(name, self._path, "", "lora", updates, config, facts, lora.fan_in_fan_out)

    @property
    def _path(self) -> Path:
        return Path(f"/proc/self/fd/{self._file.fileno()}")

    def _keep(self, factor: torch.Tensor) -> TensorInfo:
        import torch

        dtype = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[factor.dtype]
        content: Any = factor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        with self._lock:
            start, self._size = self._size, self._size + len(content)
        write_exactly(self._file.fileno(), memoryview(content), start)
        return TensorInfo("", dtype, tuple(factor.shape), self._path, start, start + len(content))
