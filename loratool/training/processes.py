"""The processes that train one adapter together: one alone, or those that ``accelerate launch`` or ``torchrun`` started.

accelerate joins them. Each holds the adapter whole, goes through its share of every step's samples, and gets the sum of all
gradients, so that all make the same step. The base, which is frozen, is held whole by each too (data parallel, DDP), or
with FSDP2 spread over them, as accelerate was told to.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

from loratool.errors import UnsupportedError
from loratool.running.data import IGNORED, TokenizedSample
from loratool.training.batches import Row

if TYPE_CHECKING:
    import torch

Module = TypeVar("Module", bound="torch.nn.Module")

BLANK: Final = Row((TokenizedSample(0, (0, 0), (IGNORED, IGNORED)),))
"""A row of which nothing counts, for a process that has no share of a small step."""


def launched() -> bool:
    """Whether this process is one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Whether this process is the one that prints, writes and catalogues."""
    return int(os.environ.get("RANK", "0")) == 0


def _asked_to_spread() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


class Processes:
    """This process and those beside it.

    Attributes:
        rank, count: its number, from 0, and how many there are.
        device: ``cpu`` or ``cuda:N``.
        spread: whether FSDP2 spreads the base over them.
    """

    def __init__(self, device: str) -> None:
        self.rank, self.count, self.device, self.spread = 0, 1, device, False
        self._accelerator: Any = None

    @classmethod
    def joined(cls, device: str) -> Processes:
        """This process among those that it was launched with; `device` is where one alone computes.

        Raises:
            UnsupportedError: they were launched for another way of training than DDP or FSDP2.
        """
        alone = cls(device)
        if not launched():
            return alone
        from accelerate import Accelerator
        from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

        accelerator = Accelerator(cpu=device == "cpu")
        if accelerator.distributed_type == DistributedType.MULTI_CPU and _asked_to_spread():
            # accelerate takes note of FSDP on GPUs only; what it does then works on a CPU as well.
            accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
            accelerator.state.distributed_type = DistributedType.FSDP
        way = accelerator.distributed_type
        data_parallel = (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
        if not (way in data_parallel or (way == DistributedType.FSDP and accelerator.is_fsdp2)):
            raise UnsupportedError(
                f"loratool trains on several processes by DDP and FSDP2, and was launched for {way.value}; "
                "launch it with --multi_gpu, --cpu, or --use_fsdp --fsdp_version 2"
            )
        alone.rank, alone.count = accelerator.process_index, accelerator.num_processes
        alone.device = "cpu" if accelerator.device.type == "cpu" else f"cuda:{accelerator.local_process_index}"
        alone.spread = way == DistributedType.FSDP
        alone._accelerator = accelerator
        return alone

    def refuse_to_spread(self, *, quantized: bool) -> None:
        """Raise UnsupportedError for a model that FSDP2 does not spread: one in 4 bits."""
        if quantized and self.spread:
            raise UnsupportedError("FSDP2 does not spread a 4-bit base; launch without --use_fsdp")

    def prepare(self, model: Module, optimizer: torch.optim.Optimizer,
                trained: Mapping[str, torch.nn.Parameter]) -> Module:  # fmt: skip
        """Spread the model over the processes if it is to be; all but the `trained` parameters."""
        if not self.spread:
            return model
        import torch

        plugin = self._accelerator.state.fsdp_plugin
        plugin.ignored_modules = [torch.nn.ParameterList(trained.values())]
        plugin.cpu_ram_efficient_loading = False
        prepared: Module
        prepared, _ = self._accelerator.prepare(model, optimizer)
        return prepared

    def share(self, rows: Sequence[Row], passes: int) -> list[Sequence[Row]]:
        """This process's part of a step's rows for each of its passes, none of them empty."""
        parts = [rows[number :: passes * self.count] for number in range(self.rank, passes * self.count, self.count)]
        return [part or (BLANK,) for part in parts] if self.count > 1 else [part for part in parts if part]

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Put in the place of each fp32 tensor its sum over all processes."""
        if self.count == 1:
            return
        import torch

        together = self._accelerator.reduce(torch.cat([tensor.reshape(-1) for tensor in tensors]), "sum")
        for tensor, summed in zip(tensors, together.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(summed.view_as(tensor))

    def wait(self) -> None:
        """Until all processes are here."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()
