"""Updates of a part of a stored parameter: an expert, one of several fused matrices, every other row, a transpose."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from four_bit_models import decoded_by_bitsandbytes
from safetensors.torch import load_file, save_file
from synthetic_storages import Stored, Synthetic, synthetic
from tiny_adapters import save_plain_adapter
from tiny_models import assert_same_tensors, save_plain_model, stored_tensors

import loratool
from loratool.architecture import WHOLE, View
from loratool.checkpoint.dtypes import DTYPES
from loratool.checkpoint.header import TensorInfo
from loratool.checkpoint.model import Checkpoint
from loratool.formats.read import read_adapter
from loratool.merging.apply import BaseIdentity, apply_conversion
from loratool.merging.arithmetic import ApproximateUnmerge, ExactUnmerge, Merge
from loratool.merging.conversion_plan import StorageChange, plan_conversion
from loratool.merging.plan import PlannedUpdate, Target, WeightedAdapter, plan_merge
from loratool.updates.dora import LoadedDora
from loratool.updates.low_rank import LoadedLowRank
from loratool.weights.dense import DenseWeight
from loratool.weights.nf4 import Nf4Layout, Nf4Options

OUT, IN, RANK, SCALING = 80, 48, 3, 0.7
DENSE = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}

PARTS: dict[str, tuple[tuple[int, ...], tuple[View, ...]]] = {
    "an expert": ((3, OUT, IN), (View(1),)),
    "all experts": ((3, OUT, IN), tuple(map(View, range(3)))),
    "gate and up of experts": ((2, 2 * OUT, IN), (View(1, slice(OUT, 2 * OUT)), View(0, slice(OUT)))),
    "transposed experts": ((3, IN, OUT), (View(2, transposed=True), View(0, transposed=True))),
    "interleaved transposed experts": (
        (3, IN, 2 * OUT),
        (View(2, slice(0, None, 2), transposed=True), View(2, slice(1, None, 2), transposed=True)),
    ),
    "one of three fused": ((3 * OUT, IN), (View(outputs=slice(OUT, 2 * OUT)),)),
    "two of three fused": ((3 * OUT, IN), (View(outputs=slice(2 * OUT, 3 * OUT)), View(outputs=slice(OUT)))),
    "fused and transposed": ((IN, 3 * OUT), (View(outputs=slice(OUT, 2 * OUT), transposed=True),)),
    "interleaved": ((2 * OUT, IN), (View(outputs=slice(1, None, 2)), View(outputs=slice(0, None, 2)))),
    "interleaved experts": ((2, 2 * OUT, IN), (View(1, slice(1, None, 2)),)),
    "the same part twice": ((3 * OUT, IN), (View(outputs=slice(OUT, 2 * OUT)), View(outputs=slice(OUT, 2 * OUT)))),
    "a part and the whole": ((2 * OUT, IN), (View(outputs=slice(OUT)), WHOLE)),
}


class InBlocks(DenseWeight):
    """A dense parameter that is cut into blocks as small as they get."""

    __slots__ = ()

    @property
    def block_bytes(self) -> int:
        return 1


@dataclass(frozen=True)
class Product:
    """``0.7 * B A``, and with m of DoRA the magnitudes of its outputs."""

    a: torch.Tensor
    b: torch.Tensor
    m: torch.Tensor | None = None
    replaces: ClassVar[bool] = False
    scalable: ClassVar[bool] = True

    @property
    def needs_weight(self) -> bool:
        return self.m is not None

    def load(self, *, transposed: bool, weight: float, device: str) -> Any:
        product = LoadedLowRank(self.a.to(device), self.b.to(device), SCALING, transposed)
        return product if self.m is None else LoadedDora(product, self.m.to(device), transposed)

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """W' of a matrix W (out, in)."""
        total = weight + (self.b @ self.a) * SCALING
        return total if self.m is None else total * (self.m / torch.linalg.vector_norm(total, dim=1))[:, None]


@dataclass(frozen=True)
class Undirected:
    """An update that does not say in which directions it changes outputs, so that no errors are compensated."""

    of: Product
    needs_weight = False
    replaces = False
    scalable = True

    def load(self, **options: Any) -> Any:
        product = self.of.load(**options)
        return UndirectedProduct(product.a, product.b, product.scaling, product.transposed)


class UndirectedProduct(LoadedLowRank):
    outputs = inputs = None  # type: ignore[assignment]


def seen(parameter: torch.Tensor, view: View) -> torch.Tensor:
    """The part of a parameter as an update sees it, sharing its memory."""
    matrix = parameter if view.expert is None else parameter[view.expert]
    return (matrix.T if view.transposed else matrix)[view.outputs]


def random_updates(
    shape: tuple[int, ...], views: Sequence[View], *, dora: bool = False, size: float = 0.05
) -> list[Product]:
    generator, found = torch.Generator().manual_seed(5), []
    for view in views:
        outputs, inputs = seen(torch.empty(shape), view).shape
        a, b = (torch.randn(sides, generator=generator) for sides in ((RANK, inputs), (outputs, RANK)))
        m = 0.5 + torch.rand(outputs, generator=generator) if dora else None
        found.append(Product(a, b * size, m))
    return found


def target_of(weight: Any, updates: Sequence[Any], views: Sequence[View]) -> Target:
    planned = (PlannedUpdate(0, "w", each, 1.0, view) for each, view in zip(updates, views, strict=True))
    return Target(weight, tuple(planned), seed=3)


def change_all(change: Any, weight: Any, raw: torch.Tensor) -> None:
    """Change the bytes of a parameter whose tensor begins at byte 0 of `raw`."""
    if change.measures:
        for rows in change.blocks():
            ((_, start, stop),) = weight.extents(rows)
            change.measure(rows, (raw[start:stop],))
    for rows in change.blocks():
        ((_, start, stop),) = weight.extents(rows)
        change.change(rows, (raw[start:stop],))


def merge_and_take_out(target: Target, raw: torch.Tensor, device: str = "cpu") -> torch.Tensor:
    """Return the merged bytes, after they gave the original ones back by their undo."""
    frames: list[tuple[range, bytes]] = []
    merged = raw.clone()
    change_all(Merge(target, device, lambda rows, packed: frames.append((rows, packed))), target.weight, merged)
    back = merged.clone()
    change_all(ExactUnmerge(target, device, iter(frames)), target.weight, back)
    assert torch.equal(back, raw)
    return merged


def dense_of(parameter: torch.Tensor, dtype: str) -> tuple[InBlocks, torch.Tensor]:
    """Return a parameter as a checkpoint would store it, and its bytes."""
    raw = parameter.contiguous().view(-1).view(torch.uint8).clone()
    return InBlocks(TensorInfo("w", DENSE[dtype], tuple(parameter.shape), Path("w"), 0, len(raw))), raw


@pytest.mark.parametrize("dtype", DENSE)
@pytest.mark.parametrize("name", PARTS)
def test_a_part_of_a_dense_parameter_gets_the_bits_of_a_matrix_of_its_own(name: str, dtype: str) -> None:
    shape, views = PARTS[name]
    parameter = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(DTYPES[DENSE[dtype]].as_torch())
    updates = random_updates(shape, views)
    expected = parameter.float().clone()
    for update, view in zip(updates, views, strict=True):
        seen(expected, view).copy_(update.of(seen(expected, view)))
    weight, raw = dense_of(parameter, dtype)
    merged = merge_and_take_out(target_of(weight, updates, views), raw)
    assert torch.equal(merged.view(parameter.dtype).view(shape), expected.to(parameter.dtype))


@pytest.mark.parametrize(
    "name", [name for name in PARTS if name not in ("the same part twice", "a part and the whole")]
)
def test_an_update_that_depends_on_w_sees_its_part_alone(name: str) -> None:
    shape, views = PARTS[name]
    parameter = torch.randn(shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    updates = random_updates(shape, views, dora=True)
    expected = parameter.float().clone()
    for update, view in zip(updates, views, strict=True):
        seen(expected, view).copy_(update.of(seen(expected, view)))
    weight, raw = dense_of(parameter, "bf16")
    merged = merge_and_take_out(target_of(weight, updates, views), raw)
    assert torch.equal(merged.view(parameter.dtype).view(shape), expected.to(parameter.dtype))


@pytest.mark.parametrize("name", PARTS)
def test_an_approximate_unmerge_of_a_part_is_off_by_a_rounding(name: str) -> None:
    shape, views = PARTS[name]
    parameter = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    target = target_of(*_first(dense_of(parameter, "fp32")), random_updates(shape, views), views)
    raw = dense_of(parameter, "fp32")[1]
    change_all(Merge(target, "cpu"), target.weight, raw)
    assert not torch.allclose(raw.view(torch.float32).view(shape), parameter, atol=1e-3)
    change_all(ApproximateUnmerge(target, "cpu"), target.weight, raw)
    torch.testing.assert_close(raw.view(torch.float32).view(shape), parameter, rtol=0, atol=2e-6)


def _first(pair: tuple[Any, Any]) -> tuple[Any]:
    return pair[:1]


def test_numbers_that_no_update_touches_keep_every_bit() -> None:
    """Of fp32 a signaling NaN, an odd infinity and -0 stay, which arithmetic would change or refuse."""
    odd = torch.tensor([0x7F800001, -0x80000000, 0x7F800000, -1], dtype=torch.int64).to(torch.int32)
    parameter = torch.randn(3, OUT, IN, generator=torch.Generator().manual_seed(2))
    parameter[1].view(torch.int32)[5, :4] = odd
    weight, raw = dense_of(parameter, "fp32")
    views = (View(0), View(2))
    merged = merge_and_take_out(target_of(weight, random_updates((3, OUT, IN), views), views), raw)
    assert torch.equal(merged.view(torch.int32).view(3, OUT, IN)[1], parameter[1].view(torch.int32))


@pytest.mark.parametrize("height", [64, 200])
def test_blocks_of_a_part_have_the_bits_of_the_whole_matrix(height: int) -> None:
    """Of a wide matrix, where a BLAS sums the products of a few rows in another order than those of many."""
    inputs, rank = 2048, 128
    generator = torch.Generator().manual_seed(1)
    parameter = torch.randn(3 * height, inputs, generator=generator)
    views = (View(outputs=slice(height, 2 * height)),)
    a, b = torch.randn(rank, inputs, generator=generator), torch.randn(height, rank, generator=generator)
    update = Product(a, b)
    weight, raw = dense_of(parameter, "fp32")
    merged = merge_and_take_out(target_of(weight, [update], views), raw).view(torch.float32).view(parameter.shape)
    assert torch.equal(merged[height : 2 * height], update.of(parameter[height : 2 * height]))


# Coarse storages


COARSE = {
    "int4": {"levels": "int4", "tiles": "groups", "spread": 0.6},
    "e4m3": {"levels": "e4m3", "tiles": "ragged grid", "signed": False},
    "int4 turned": {"levels": "int4", "tiles": "index", "turned": True, "zeros": True, "spread": 0.6},
}


class StoredStack(Stored):
    """A synthetic parameter that is a stack of matrices, one under the other."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (3, self.rows // 3, self.columns)


def share_of(found: torch.Tensor, before: torch.Tensor, expected: torch.Tensor) -> float:
    delta = (expected - before).double()
    return float(((found - before).double() * delta).sum() / delta.square().sum())


@pytest.mark.parametrize("dora", [False, True], ids=["adds", "depends on W"])
@pytest.mark.parametrize(
    ("storage", "view"),
    [
        ("int4", View(outputs=slice(192, 384))),
        ("int4", View(outputs=slice(1, None, 2))),
        ("int4", View(1)),
        ("e4m3", View(outputs=slice(192, 384))),
        ("e4m3", View(2)),
        ("int4 turned", View(outputs=slice(192, 384))),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.expert}-{value.outputs.start}-{value.outputs.step}",
)
def test_a_part_of_a_coarse_parameter_carries_its_change_and_no_other_code_moves(
    storage: str, view: View, dora: bool
) -> None:
    outputs, inputs = 576, 160
    options = COARSE[storage]
    rows, columns = (inputs, outputs) if options.get("turned") else (outputs, inputs)
    made = synthetic(**options, rows=rows, columns=columns)  # type: ignore[arg-type]
    weight = Stored(made) if view.expert is None else StoredStack(made)
    before = _parameter(made, None, weight)
    generator = torch.Generator().manual_seed(1)
    height = len(seen(before, view))
    a, b = torch.randn(RANK, inputs, generator=generator), torch.randn(height, RANK, generator=generator)
    b *= 0.08 * made.step() / math.sqrt(RANK)
    m = torch.linalg.vector_norm(seen(before, view), dim=1) * (1 + 0.02 * torch.randn(height, generator=generator))
    update = Product(a, b, m if dora else None)
    target = target_of(weight, [update], [view])
    parts, frames = made.parts(), []
    merge = Merge(target, "cpu", lambda rows, packed: frames.append((rows, packed)))
    assert merge.measures == (dora and made.weight.turned)
    for rows in merge.blocks() if merge.measures else ():
        merge.measure(rows, (parts[0][_bytes(made, rows)],))
    for rows in merge.blocks():
        merge.change(rows, (parts[0][_bytes(made, rows)],))
    after = _parameter(made, parts, weight)
    outside = torch.ones_like(after, dtype=torch.bool)
    seen(outside, view).fill_(False)
    assert torch.equal(after[outside], before[outside])
    assert share_of(seen(after, view), seen(before, view), update.of(seen(before, view))) == pytest.approx(1, abs=0.08)
    unmerge = ExactUnmerge(target, "cpu", iter(frames))
    for rows in unmerge.blocks():
        unmerge.change(rows, (parts[0][_bytes(made, rows)],))
    assert torch.equal(parts[0], made.content)


def _bytes(made: Synthetic, rows: range) -> slice:
    return slice(int(rows.start * made.row_bytes), math.ceil(rows.stop * made.row_bytes))


def _parameter(made: Synthetic, parts: Any, weight: Stored) -> torch.Tensor:
    decoded = made.decoded(parts)
    return decoded.T if made.weight.turned else decoded.view(weight.shape)


@pytest.mark.parametrize("columns", [64, 63], ids=["even", "odd"])
def test_experts_errors_in_nf4_are_compensated_each_within_itself(columns: int) -> None:
    """Of a fused matrix in NF4, each part has the errors in its update's directions as small as a matrix of its own."""
    outputs, generator = 256, torch.Generator().manual_seed(1)
    dense = torch.randn(3 * outputs, columns, generator=generator) * 0.02
    layout = Nf4Layout("w", (3 * outputs, columns), "float32", Nf4Options())
    quantizer = layout.quantizer()
    measured = quantizer.measure(dense.view(-1))
    codes = quantizer.codes(dense.view(-1), measured)
    info = TensorInfo("w", "U8", (len(codes), 1), Path("w"), 0, len(codes))
    image = quantizer.image(quantizer.parts(measured), info)
    views = tuple(View(outputs=slice(start, start + outputs)) for start in (0, 2 * outputs))
    updates = random_updates((3 * outputs, columns), views, size=0.0005)
    target = target_of(image, updates, views)

    def decoded(raw: torch.Tensor) -> torch.Tensor:
        out = torch.empty(3 * outputs, columns)
        image.load("cpu").decode(range(3 * outputs), (raw,), out)
        return out

    before = decoded(codes)
    merged = decoded(merge_and_take_out(target, codes))
    assert torch.equal(merged[outputs : 2 * outputs], before[outputs : 2 * outputs])
    plain = decoded(merge_and_take_out(target_of(image, [Undirected(each) for each in updates], views), codes))
    for update, view in zip(updates, views, strict=True):
        basis, expected = torch.linalg.qr(update.b)[0], update.of(seen(before, view))
        off, off_plain = (float((basis.T @ (seen(each, view) - expected)).square().sum()) for each in (merged, plain))
        assert off < 0.5 * off_plain
        assert share_of(seen(merged, view), seen(before, view), expected) == pytest.approx(1, abs=0.15)


# Changes of storage


def part_of(adapter: Path, folder: Path, rows: slice) -> Path:
    """Return an adapter of some outputs of the modules that `adapter` changes; in its copy the others get no change."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    parts = shutil.copytree(adapter, folder)
    save_file(
        {name: tensor[rows].clone() if "lora_B" in name else tensor for name, tensor in tensors.items()},
        parts / "adapter_model.safetensors",
    )
    for name in tensors:
        if "lora_B" in name:
            outside = torch.ones(len(tensors[name]), dtype=torch.bool)
            outside[rows] = False
            tensors[name][outside] = 0
    save_file(tensors, adapter / "adapter_model.safetensors")
    return parts


def fused_model(folder: Path, module: str, matrix: torch.Tensor, model_type: str) -> Path:
    """Write a model of one matrix (out, in), which a Conv1D's transpose holds in GPT-2."""
    tensors = {
        f"{module}.weight": matrix if model_type == "phi3" else matrix.T,
        f"{module}.bias": torch.zeros(len(matrix)),
    }
    return save_plain_model(folder, tensors, model_type=model_type)


@pytest.mark.parametrize("way", ["quantize", "dequantize"])
@pytest.mark.parametrize("model_type", ["phi3", "gpt2"])
def test_a_change_of_storage_merges_parts_as_it_merges_wholes(way: Any, model_type: str, tmp_path: Path) -> None:
    """An update of a part gives the bytes of one of the whole matrix that is 0 outside the part."""
    module = {"phi3": "model.layers.0.self_attn.qkv_proj", "gpt2": "h.0.attn.c_attn"}[model_type]
    matrix = torch.randn(192, 64, generator=torch.Generator().manual_seed(1)) * 0.02
    base = fused_model(tmp_path / "base", module, matrix, model_type)
    whole = save_plain_adapter(tmp_path / "whole", {module: (192, 64)}, r=RANK)
    parts = part_of(whole, tmp_path / "parts", slice(64, 128))
    change = StorageChange("quantize", Nf4Options())
    if way == "dequantize":
        base, change = loratool.quantize(base, out=tmp_path / "nf4").out, StorageChange("dequantize")
    checkpoint = Checkpoint.open(base)
    merge = plan_merge([WeightedAdapter(read_adapter(whole))], checkpoint)
    (update,) = read_adapter(parts).changes.values()
    (target,) = merge.targets
    (planned,) = target.updates
    planned = replace(planned, update=update, view=replace(planned.view, outputs=slice(64, 128)))
    of_part = replace(merge, targets=(replace(target, updates=(planned,)),))
    for plan, out in ((merge, "of whole"), (of_part, "of part")):
        apply_conversion(plan_conversion(checkpoint, change, plan), tmp_path / out, BaseIdentity("base"))
    expected = stored_tensors(tmp_path / "of whole")
    assert expected != stored_tensors(base)
    assert_same_tensors(stored_tensors(tmp_path / "of part"), expected)


@pytest.mark.parametrize("model_type", ["phi3", "gpt2"])
def test_codes_made_from_a_dense_matrix_carry_the_change_of_a_part(model_type: str, tmp_path: Path) -> None:
    module = {"phi3": "model.layers.0.self_attn.qkv_proj", "gpt2": "h.0.attn.c_attn"}[model_type]
    matrix = torch.randn(768, 64, generator=torch.Generator().manual_seed(1)) * 0.02
    base = fused_model(tmp_path / "base", module, matrix, model_type)
    adapter = save_plain_adapter(tmp_path / "adapter", {module: (256, 64)}, r=RANK)
    whole = save_plain_adapter(tmp_path / "whole", {module: (768, 64)}, r=RANK)
    checkpoint = Checkpoint.open(base)
    merge = plan_merge([WeightedAdapter(read_adapter(whole), 0.01)], checkpoint)
    (update,) = read_adapter(adapter).changes.values()
    (target,) = merge.targets
    planned = replace(target.updates[0], update=update)
    planned = replace(planned, view=replace(planned.view, outputs=slice(256, 512)))
    merge = replace(merge, targets=(replace(target, updates=(planned,)),))
    plan = plan_conversion(checkpoint, StorageChange("base_as", Nf4Options()), merge)
    apply_conversion(plan, tmp_path / "merged", BaseIdentity("base"))
    quantized = loratool.quantize(base, out=tmp_path / "nf4").out
    before, after = (
        decoded_by_bitsandbytes(each)[f"{module}.weight"].float() for each in (quantized, tmp_path / "merged")
    )
    assert torch.equal(before[:256], after[:256])
    assert torch.equal(before[512:], after[512:])
    a, b = (
        load_file(adapter / "adapter_model.safetensors")[f"base_model.model.{module}.lora_{each}.weight"]
        for each in "AB"
    )
    expected = before[256:512] + 0.02 * b @ a
    assert share_of(after[256:512], before[256:512], expected) == pytest.approx(1, abs=0.15)
