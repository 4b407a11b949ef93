"""A machine whose BLAS and mathematical library give other last bits, to show what does not depend on them."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.overrides import TorchFunctionMode

from loratool.checkpoint.model import Checkpoint
from loratool.formats.read import read_adapter
from loratool.merging.loaded_target import LoadedTarget
from loratool.merging.plan import Target, WeightedAdapter, plan_merge


class OtherMachine(TorchFunctionMode):
    """Changes the last bits of sums of products and of elementary functions, and the order of equal numbers.

    Products in fp64 keep their bits: those of whole numbers below 2**53 are exact on every machine.
    """

    SUMS: ClassVar = frozenset({
        "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "addmm_", "einsum", "conv1d", "conv2d", "conv3d", "sum",
        "mean", "norm", "vector_norm", "linalg_vector_norm",
    })  # fmt: skip
    FUNCTIONS: ClassVar = frozenset({
        "exp", "log", "sin", "cos", "softmax", "pow", "rsqrt", "linalg_solve", "linalg_inv", "fft_ifft2", "fft_ifft", "fft_fft",
    })  # fmt: skip

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name == "topk":  # of equal numbers, the last ones come first
            numbers, count = args[0], (*args[1:], kwargs.get("k"))[0]
            found = numbers.flip(-1).sort(dim=-1, descending=True, stable=True)
            return torch.return_types.topk(
                (found.values[..., :count], numbers.shape[-1] - 1 - found.indices[..., :count])
            )
        result = func(*args, **kwargs)
        if not isinstance(result, torch.Tensor):
            return result
        if name in self.FUNCTIONS or (name in self.SUMS and result.dtype == torch.float32):
            numbers = torch.view_as_real(result) if result.is_complex() else result
            numbers.copy_(numbers.nextafter(torch.tensor(torch.inf, dtype=numbers.dtype)))
        return result


def assert_taken_out_alike(adapter: Path, base: Path) -> None:
    """Check that each update of an adapter is reverted to the same bits on this machine and on the other one."""
    plan = plan_merge([WeightedAdapter(read_adapter(adapter))], Checkpoint.open(base))
    for target in plan.targets:
        here, there = (_reverted(target, machine) for machine in (nullcontext(), OtherMachine()))
        assert torch.equal(here, there), target.name


def _reverted(target: Target, machine: Any) -> torch.Tensor:
    size = target.weight.rows, target.weight.columns
    block = torch.randn(size, generator=torch.Generator().manual_seed(2))
    with machine:
        for update in LoadedTarget.of(target, "cpu").updates:
            update.revert(block, range(size[0]), torch.empty(size), b"")
    return block
