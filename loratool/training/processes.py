"""The processes that train one adapter together: a single one, or those that ``accelerate launch`` or ``torchrun`` started.

accelerate connects them. Each holds the whole adapter, computes its share of every step's samples, and receives the sum of
all gradients, so that all make the same step. Each also holds the whole frozen base (data parallel, DDP), or FSDP2 shards
the base over them; accelerate's launch options choose which.
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
"""A row in which no token counts, for a process that has no share of a small step."""


def launched() -> bool:
    """Return whether this process is one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Return whether this process is the one that prints, writes and catalogues."""
    return int(os.environ.get("RANK", "0")) == 0


def _asked_to_spread() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


class Processes:
    """This process and the others of the same run.

    Attributes:
        rank: the number of this process, from 0.
        count: the number of processes.
        device: ``cpu`` or ``cuda:N``.
        spread: whether FSDP2 shards the base over the processes.
    """

    def __init__(self, device: str) -> None:
        self.rank, self.count, self.device, self.spread = 0, 1, device, False
        self._accelerator: Any = None

    @classmethod
    def joined(cls, device: str) -> Processes:
        """Connect this process with those it was launched with. `device` is the device of a single process.

        Raises:
            UnsupportedError: they were launched for something other than DDP or FSDP2.
        """
        alone = cls(device)
        if not launched():
            return alone
        from accelerate import Accelerator
        from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

        accelerator = Accelerator(cpu=device == "cpu")
        if accelerator.distributed_type == DistributedType.MULTI_CPU and _asked_to_spread():
            # accelerate sets FSDP up only on GPUs, although it works on a CPU as well.
            accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
            accelerator.state.distributed_type = DistributedType.FSDP
        way = accelerator.distributed_type
        data_parallel = (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
        if not (way in data_parallel or (way == DistributedType.FSDP and accelerator.is_fsdp2)):
            raise UnsupportedError(
                f"loratool trains on several processes only by DDP and FSDP2, but was launched for {way.value}; "
                "launch it with --multi_gpu, --cpu, or --use_fsdp --fsdp_version 2"
            )
        alone.rank, alone.count = accelerator.process_index, accelerator.num_processes
        alone.device = "cpu" if accelerator.device.type == "cpu" else f"cuda:{accelerator.local_process_index}"
        alone.spread = way == DistributedType.FSDP
        alone._accelerator = accelerator
        return alone

    def refuse_to_spread(self, *, quantized: bool) -> None:
        """Raise UnsupportedError if FSDP2 is to shard a 4-bit model, which it cannot."""
        if quantized and self.spread:
            raise UnsupportedError("FSDP2 cannot shard a 4-bit base; launch without --use_fsdp")

    def prepare(self, model: Module, optimizer: torch.optim.Optimizer,
                trained: Mapping[str, torch.nn.Parameter]) -> Module:  # fmt: skip
        """Return the model with its parameters, except the `trained` ones, sharded over the processes if FSDP2 is used."""
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
        """Return this process's rows of a step for each of its passes. No pass is empty."""
        parts = [rows[number :: passes * self.count] for number in range(self.rank, passes * self.count, self.count)]
        return [part or (BLANK,) for part in parts] if self.count > 1 else [part for part in parts if part]

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each fp32 tensor in place by its sum over all processes."""
        if self.count == 1:
            return
        import torch

        together = self._accelerator.reduce(torch.cat([tensor.reshape(-1) for tensor in tensors]), "sum")
        for tensor, summed in zip(tensors, together.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(summed.view_as(tensor))

    def wait(self) -> None:
        """Wait until all processes have called this."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()
