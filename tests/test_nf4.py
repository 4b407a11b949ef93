"""4-bit checkpoints: read as bitsandbytes reads them, merged into, and taken out of again."""

from __future__ import annotations

import gc
import itertools
import json
import math
import os
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
import transformers
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny_adapters import TinyAdapters, save_plain_adapter
from tiny_models import DTYPES, TinyModels, digest, load, save_plain_model, stored_tensors

import loratool
from loratool.checkpoint.blocks import row_blocks
from loratool.checkpoint.model import Checkpoint
from loratool.cli import cli
from loratool.errors import CheckpointError, LoratoolError, NoChangeError, UnsupportedError, VerificationError
from loratool.merging.delivery import DeliveryCount
from loratool.merging.workers import cpu_workers
from loratool.weights.coarse.output_feedback import OutputFeedback
from loratool.weights.coarse.short_steps import MOST_ROWS
from loratool.weights.code_moves import Moves
from loratool.weights.four_bit import SHORT_RULES, FourBitWeight
from loratool.weights.rounding import Rounding, noise_of, philox
from loratool.weights.storages import stored_weight
from loratool.weights.stored import StoredWeight

SHAPES = [(64, 128), (100, 192), (130, 96), (33, 100), (7, 5), (1, 64)]
"""Rows and columns; the last ones are no multiples of a block."""


def quantized(
    shape: tuple[int, int], kind: str, dtype: str, *, nested: bool, blocksize: int
) -> dict[str, torch.Tensor]:
    """The tensors that bitsandbytes saves for a random matrix ``m.weight``."""
    generator = torch.Generator().manual_seed(shape[0] * blocksize)
    weight = (torch.randn(shape, generator=generator) * 0.05).to(DTYPES[dtype])
    weight.view(-1)[: blocksize // 2] *= 20  # one block unlike the others
    codes, state = bnb.quantize_4bit(weight, blocksize=blocksize, compress_statistics=nested, quant_type=kind)
    return {"m.weight": codes} | {f"m.weight.{key}": value for key, value in state.as_dict(packed=True).items()}


def by_bitsandbytes(tensors: dict[str, torch.Tensor], name: str = "m.weight") -> torch.Tensor:
    """What bitsandbytes decodes a matrix to, in the dtype of its state.

    Its kernel for CPUs takes the scale of the wrong block where a row is no whole number of blocks, which its plain
    implementation, and its kernel for CUDA, do not.
    """
    own = {key: value for key, value in tensors.items() if key.startswith(name + ".")}
    state = bnb.QuantState.from_dict(own, device=torch.device("cpu"))
    if state.shape[1] % state.blocksize == 0:
        return bnb.dequantize_4bit(tensors[name], state)
    scales = state.absmax
    if state.nested:
        scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    values = bnb.get_4bit_type(state.quant_type, device="cpu")
    return _dequantize_4bit_compute(tensors[name].view(-1), scales, values, state.blocksize, state.shape, state.dtype)


def parts_of(weight: StoredWeight, rows: range) -> tuple[torch.Tensor, ...]:
    parts = []
    for info, start, stop in weight.extents(rows):
        with open(info.file, "rb") as stream:
            stream.seek(start)
            parts.append(torch.frombuffer(bytearray(stream.read(stop - start)), dtype=torch.uint8))
    return tuple(parts)


def decoded(weight: StoredWeight, block_bytes: int = 1 << 22) -> torch.Tensor:
    out = torch.empty(weight.shape)
    codec = weight.load("cpu")
    for rows in row_blocks(weight.shape[0], weight.shape[1] * 4, block_bytes):
        codec.decode(rows, parts_of(weight, rows), out[rows.start : rows.stop])
    return out


def matrix(folder: Path, name: str = "m.weight") -> StoredWeight:
    weight = stored_weight(Checkpoint.open(folder), name)
    assert weight is not None
    return weight


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("blocksize", "nested"), itertools.product([64, 128, 256, 4096], [False, True]))
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_decoding_has_the_bits_of_bitsandbytes(
    tmp_path: Path, kind: str, blocksize: int, nested: bool, dtype: str
) -> None:
    for number, shape in enumerate(SHAPES):
        tensors = quantized(shape, kind, dtype, nested=nested, blocksize=blocksize)
        weight = matrix(save_plain_model(tmp_path / str(number), tensors))
        assert (weight.storage, weight.shape) == (kind, shape)
        expected = by_bitsandbytes(tensors).float()
        for block_bytes in (1 << 22, 1 << 12):
            found = decoded(weight, block_bytes)
            assert torch.equal(found.view(torch.int32), expected.view(torch.int32)), shape


def moved(weight: StoredWeight, delta: torch.Tensor, seed: int) -> torch.Tensor:
    """What the matrix decodes to after `delta` is added."""
    codec, rows = weight.load("cpu"), range(weight.shape[0])
    parts = parts_of(weight, rows)
    block = torch.empty(weight.shape)
    codec.decode(rows, parts, block)
    codec.encode(rows, delta.clone(), parts, Rounding(seed))
    codec.decode(rows, parts, block)
    return block


class Steps:
    """A random matrix in 4 bits, and how far each of its codes has to go when `delta` is added."""

    def __init__(self, folder: Path, kind: str, spread: float, shape: tuple[int, int] = (32, 128)) -> None:
        tensors = quantized(shape, kind, "fp32", nested=True, blocksize=64)
        self.weight = matrix(save_plain_model(folder, tensors))
        self.before = by_bitsandbytes(tensors).double()
        self.delta = torch.randn(shape, generator=torch.Generator().manual_seed(5)).double() * spread
        self.scale = self.before.view(-1, 64).abs().amax(1).repeat_interleave(64).view(shape)
        values = bnb.get_4bit_type(kind, device="cpu").double().unique()
        place = torch.bucketize((self.before / self.scale).contiguous(), (values[:-1] + values[1:]) / 2)
        beside = place + self.delta.sign().long()
        self.outside = (beside < 0) | (beside >= len(values))
        self.step = (values[beside.clamp(0, len(values) - 1)] - values[place]).abs() * self.scale

    def runs(self, count: int) -> torch.Tensor:
        """What is added to the weights under so many seeds."""
        return torch.stack(
            [moved(self.weight, self.delta.float(), seed).double() - self.before for seed in range(count)]
        )

    def check_expected(self, expected: torch.Tensor, runs: torch.Tensor) -> None:
        """The mean of the runs is the expected change, as closely as so many runs of independent chances can tell."""
        inside = (expected.abs() < self.step) & (expected != 0) & ~self.outside
        spread = (expected.abs() * (self.step - expected.abs()) / len(runs)).sqrt()
        error = ((runs.mean(0) - expected) / spread)[inside]
        assert inside.double().mean() > 0.1
        assert error.square().mean().item() == pytest.approx(1, abs=0.2)
        assert error.mean().abs() < 0.1


@pytest.mark.parametrize(("kind", "spread"), [("fp4", 0.002), ("nf4", 0.012)])
def test_the_weight_to_expect_is_the_exact_one(tmp_path: Path, kind: str, spread: float) -> None:
    steps = Steps(tmp_path / "m", kind, spread)
    steps.check_expected(steps.delta, steps.runs(400))


@pytest.mark.parametrize("spread", [0.0002, 0.0008, 0.0025])
def test_codes_with_short_steps_carry_small_updates_for_the_others(tmp_path: Path, spread: float) -> None:
    steps = Steps(tmp_path / "m", "nf4", spread)
    largest = (steps.delta / steps.scale).abs().amax(1).sort().values
    usual = largest[math.ceil(MOST_ROWS * len(largest)) - 1]
    short = next(rule.short for rule in SHORT_RULES["nf4"] if usual <= rule.largest)
    middle = steps.scale[:, ::64].median(1, keepdim=True).values
    chosen = (steps.step <= short * middle) & ~steps.outside
    expected = torch.where(chosen, steps.delta * 32 / chosen.sum(0).clamp(min=1), 0.0)
    runs = steps.runs(400)
    assert (runs[:, ~chosen] == 0).all()
    steps.check_expected(expected, runs)


@pytest.mark.parametrize("shape", [(64, 128), (37, 96), (33, 31)])
@pytest.mark.parametrize(("kind", "spread"), [("fp4", 0.003), ("nf4", 0.02)])
def test_every_code_goes_where_its_chance_leads_it(
    tmp_path: Path, kind: str, spread: float, shape: tuple[int, int]
) -> None:
    """As numpy says in float64, for changes so large that every code takes part; a tie in a thousand is left open."""
    tensors = quantized(shape, kind, "fp32", nested=False, blocksize=64)
    weight, rows = matrix(save_plain_model(tmp_path / "m", tensors)), range(shape[0])
    before = by_bitsandbytes(tensors).double().numpy().ravel()
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * spread
    after = moved(weight, delta, 11).double().numpy().ravel()
    scale = np.repeat(tensors["m.weight.absmax"].double().numpy(), 64)[: before.size]
    values = np.unique(bnb.get_4bit_type(kind, device="cpu").double().numpy())
    wanted = np.clip((before + delta.double().numpy().ravel()) / scale, -1, 1)
    below = np.clip(np.searchsorted(values, wanted, side="right") - 1, 0, len(values) - 2)
    odds = (wanted - values[below]) / (values[below + 1] - values[below])
    noise = noise_of(Rounding(11).words(rows, before.size, torch.device("cpu"))).double().numpy()
    expected = values[below + (odds > noise)] * scale
    clear = np.abs(odds - noise) > 1e-3
    assert clear.mean() > 0.99
    np.testing.assert_allclose(after[clear], expected[clear], rtol=1e-5, atol=1e-7)
    assert (after != before).mean() > 0.05


def test_short_steps_make_less_noise_and_keep_the_update(tmp_path: Path) -> None:
    steps = Steps(tmp_path / "m", "nf4", 0.0002, (256, 1024))
    runs = steps.runs(4)
    noise = (runs - steps.delta).square().sum((1, 2)).mean()
    everywhere = (steps.delta.abs() * (steps.step - steps.delta.abs()))[~steps.outside].sum()
    assert noise < 0.75 * everywhere
    share = (runs * steps.delta).sum((1, 2)) / steps.delta.square().sum()
    assert share.mean().item() == pytest.approx(1, abs=0.1)


def with_zero_blocks(
    folder: Path, kind: str, of_all: float, *, nested: bool, small: float = 0.0
) -> tuple[StoredWeight, torch.Tensor]:
    """A random matrix, (256, 1024), as pruned models have them, and which of its blocks are zero, or as `small` as nothing."""
    generator = torch.Generator().manual_seed(8)
    blocks = torch.randn(256 * 16, 64, generator=generator) * 0.05
    zeros = torch.rand(len(blocks), generator=generator) < of_all
    blocks[zeros] *= small
    codes, state = bnb.quantize_4bit(blocks.view(256, 1024), blocksize=64, compress_statistics=nested, quant_type=kind)
    parts = {f"m.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    return matrix(save_plain_model(folder, {"m.weight": codes, **parts})), zeros


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("of_all", [0.25, 0.75])
def test_an_update_is_carried_where_blocks_are_all_zeros(tmp_path: Path, of_all: float, nested: bool) -> None:
    """These stay as they are, and in the others the update is there, however many there are."""
    weight, zeros = with_zero_blocks(tmp_path / "m", "nf4", of_all, nested=nested)
    delta = torch.randn(256, 1024, generator=torch.Generator().manual_seed(9)) * 2e-4
    change = (torch.stack([moved(weight, delta, seed) for seed in range(8)]).mean(0) - decoded(weight)).view(-1, 64)
    assert (change[zeros] == 0).all()
    there = delta.view(-1, 64)[~zeros]
    assert float((change[~zeros] * there).sum() / there.square().sum()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("small", [0.0, 1e-37, 1e-35])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_scales_that_nothing_can_be_divided_by_do_no_harm(tmp_path: Path, kind: str, small: float) -> None:
    """Not even where the least of all words, which says to go down whatever the odds, meets the first rows of a matrix."""
    weight, zeros = with_zero_blocks(tmp_path / "m", kind, 0.5, nested=False, small=small)
    codec, rows, first = weight.load("cpu"), range(256), zeros[: 16 * 16]
    b, a = (torch.randn(shape, generator=torch.Generator().manual_seed(4)) for shape in ((256, 4), (4, 1024)))

    def meets_the_least_word(seed: int) -> bool:
        words = Rounding(seed).words(rows, 256 * 1024, torch.device("cpu")).view(-1, 64)
        return bool((words[: len(first)][first] == -(2**15)).any())

    seeds = [seed for seed in range(100) if meets_the_least_word(seed)][:4]
    assert len(seeds) == 4
    for seed in seeds:
        parts, after = parts_of(weight, rows), torch.empty(weight.shape)
        codec.encode(rows, b @ a * 1e-4, parts, Rounding(seed, outputs=OutputFeedback(b)))
        codec.decode(rows, parts, after)
        assert ((after - decoded(weight)).view(-1, 64)[zeros].abs() <= small).all()


@pytest.mark.parametrize("change", ["odd rows", "every 16th row", "rows 8 to 15 of 16"])
def test_how_many_codes_take_part_does_not_depend_on_how_rows_alternate(tmp_path: Path, change: str) -> None:
    """As the rows of attention heads do: the noise is that of as large a change in all rows."""
    weight = matrix(save_plain_model(tmp_path / "m", quantized((1024, 512), "nf4", "fp32", nested=False, blocksize=64)))
    row = torch.arange(1024)
    there = {"odd rows": row % 2 == 1, "every 16th row": row % 16 != 0, "rows 8 to 15 of 16": row % 16 >= 8}[change]
    delta, noise = torch.randn(1024, 512, generator=torch.Generator().manual_seed(2)) * 5e-3, []
    for some in (delta, delta * there[:, None]):
        error = moved(weight, some, 1) - decoded(weight) - some
        noise.append(float(error.square().sum() / some.square().sum()))
    assert noise[1] < 1.2 * noise[0]


def test_a_weight_that_nothing_is_added_to_keeps_its_codes(tmp_path: Path) -> None:
    for kind, dtype in itertools.product(["nf4", "fp4"], ["bf16", "fp16", "fp32"]):
        tensors = quantized((64, 128), kind, dtype, nested=True, blocksize=64)
        weight = matrix(save_plain_model(tmp_path / kind / dtype, tensors))
        assert torch.equal(moved(weight, torch.zeros(64, 128), 1), decoded(weight))


def test_a_code_at_the_end_of_its_scale_stays_there(tmp_path: Path) -> None:
    weight = matrix(save_plain_model(tmp_path / "m", quantized((64, 128), "nf4", "fp32", nested=False, blocksize=64)))
    before = decoded(weight)
    ends = before.view(-1, 64).abs().amax(1).repeat_interleave(64).view(before.shape)
    assert torch.equal(moved(weight, ends * 3, 1), ends)
    assert torch.equal(moved(weight, ends * -3, 1), -ends)


Quantize = Callable[..., Path]


@pytest.fixture(scope="session")
def four_bit(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Quantize:
    """Tiny models as transformers quantizes and saves them."""
    root = tmp_path_factory.mktemp("four-bit")

    def build(architecture: str = "llama-many-blocks", dtype: str = "bf16", shard: str = "5GB", **options: Any) -> Path:
        folder = root / "-".join([architecture, dtype, shard, *(f"{k}={v}" for k, v in options.items())])
        if not folder.exists():
            config = transformers.BitsAndBytesConfig(
                **({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True} | options)
            )
            source = tiny_models.folder(architecture, dtype)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                source, dtype=DTYPES[dtype], quantization_config=config
            )
            model.save_pretrained(folder, max_shard_size=shard)
            shutil.copy(source / "tokenizer.json", folder)
        return folder

    return build


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


CASES: list[dict[str, Any]] = [
    {},
    {"dtype": "fp16", "bnb_4bit_use_double_quant": False},
    {"dtype": "fp32", "shard": "100KB"},
    {"bnb_4bit_quant_type": "fp4"},
    {"architecture": "llama", "llm_int8_skip_modules": ["v_proj", "lm_head"]},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_a_merge_moves_codes_and_nothing_else_and_transformers_loads_it(
    four_bit: Quantize, tiny_adapters: TinyAdapters, tmp_path: Path, options: dict[str, Any]
) -> None:
    base = four_bit(**options)
    architecture = options.get("architecture", "llama-many-blocks")
    result = loratool.merge(tiny_adapters.folder(architecture), base, out=tmp_path / "merged")
    before, after = stored_tensors(base), stored_tensors(tmp_path / "merged")
    changed = {name for name in before if before[name] != after[name]}
    assert before.keys() == after.keys()
    assert changed == {target.name for target in result.plan.targets}
    assert (base / "config.json").read_bytes() == (tmp_path / "merged" / "config.json").read_bytes()
    model = load(tmp_path / "merged", architecture)
    assert model.is_loaded_in_4bit
    stored = tensors_in(tmp_path / "merged")
    for target in result.plan.targets:
        parameter = model.get_parameter(target.name)
        if target.weight.takes == "change":
            assert torch.equal(
                bnb.dequantize_4bit(parameter.data, parameter.quant_state), by_bitsandbytes(stored, target.name)
            )
        else:
            assert torch.equal(parameter.data, stored[target.name])


def test_what_survived_is_what_numpy_says(four_bit: Quantize, tiny_adapters: TinyAdapters, tmp_path: Path) -> None:
    base, adapter = four_bit(), tiny_adapters.folder("llama-many-blocks")
    result = loratool.merge(adapter, base, out=tmp_path / "merged")
    before, after = tensors_in(base), tensors_in(tmp_path / "merged")
    factors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    sums = np.zeros(4)
    for target in result.plan.targets:
        key = "base_model.model." + target.name.removesuffix(".weight")
        a, b = (factors[f"{key}.lora_{letter}.weight"].double().numpy() for letter in "AB")
        delta = b @ a * config["lora_alpha"] / config["r"]
        old, new = (by_bitsandbytes(tensors, target.name).double().numpy() for tensors in (before, after))
        change = new - old
        each = np.array([(change * delta).sum(), (delta**2).sum(), ((change - delta) ** 2).sum(), (old**2).sum()])
        delivery = result.deliveries[target.name]
        assert delivery.share == pytest.approx(each[0] / each[1], rel=1e-3)
        assert delivery.noise == pytest.approx(np.sqrt(each[2] / each[3]), rel=1e-3)
        assert delivery.changed == pytest.approx((old != new).mean(), abs=1e-6)
        sums += each
    assert result.delivery is not None
    assert result.delivery.share == pytest.approx(sums[0] / sums[1], rel=1e-3)


def test_what_survived_of_an_update_that_codes_carry_exactly(tmp_path: Path) -> None:
    """Each row one number, and its codes go to the other end of the scale: nothing is left out, and there is no noise."""
    generator = torch.Generator().manual_seed(3)
    column, row = torch.randn(64, 1, generator=generator), torch.ones(1, 128)
    codes, state = bnb.quantize_4bit(column @ row, blocksize=64, compress_statistics=False, quant_type="nf4")
    parts = {f"m.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    base = save_plain_model(tmp_path / "base", {"m.weight": codes, **parts})
    adapter = save_plain_adapter(tmp_path / "adapter", {"m": (64, 128)}, r=1, lora_alpha=1)
    factors = load_file(adapter / "adapter_model.safetensors")
    ends = {key: -2 * column if "lora_B" in key else row for key in factors}
    save_file(ends, adapter / "adapter_model.safetensors")
    delivery = loratool.merge(adapter, base, out=tmp_path / "merged").delivery
    assert delivery is not None
    assert delivery.share == pytest.approx(1, abs=1e-6)
    assert delivery.noise < 1e-3


def test_what_survives_whole_has_no_noise_whichever_way_its_sums_are_rounded() -> None:
    for seed in range(20):
        delta = torch.randn(64, 1000, generator=torch.Generator().manual_seed(seed))
        count = DeliveryCount()
        count.add_moves(delta, Moves(torch.arange(delta.numel()), delta.view(-1).clone(), float(delta.numel()), b""))
        assert count.delivery().share == pytest.approx(1, abs=1e-6)
        assert count.delivery().noise < 1e-3


def test_equal_merges_give_equal_bytes(four_bit: Quantize, tiny_adapters: TinyAdapters, tmp_path: Path) -> None:
    for out in ("a", "b"):
        loratool.merge(tiny_adapters.folder("llama-many-blocks"), four_bit(), out=tmp_path / out, undo=True)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_matrices_are_not_in_memory_any_longer_than_they_are_worked_on(
    four_bit: Quantize, tiny_adapters: TinyAdapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: weakref.WeakSet[object] = weakref.WeakSet()
    most, load = 0, FourBitWeight.load

    def counted(weight: FourBitWeight, device: str) -> object:
        nonlocal most
        codec = load(weight, device)
        loaded.add(codec)
        gc.collect()
        most = max(most, len(loaded))
        return codec

    monkeypatch.setattr(FourBitWeight, "load", counted)
    result = loratool.merge(tiny_adapters.folder("llama-many-blocks"), four_bit(), out=tmp_path / "merged", undo=True)
    workers = cpu_workers(computing=True)
    assert len(result.plan.targets) > 2 * workers
    assert most <= 2 * workers


@pytest.mark.parametrize("options", CASES, ids=str)
def test_a_merge_is_taken_out_bit_for_bit_with_the_base_gone(
    four_bit: Quantize, tiny_adapters: TinyAdapters, tmp_path: Path, options: dict[str, Any]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(four_bit(**options), base)
    expected = digest(base)
    adapter = tiny_adapters.folder(options.get("architecture", "llama-many-blocks"))
    loratool.merge(adapter, base, out=tmp_path / "merged", undo=True)
    shutil.rmtree(base)
    result = loratool.unmerge(tmp_path / "merged", out=tmp_path / "back")
    assert result.method == "undo"
    assert digest(tmp_path / "back") == expected


def test_the_undo_file_is_small(tmp_path: Path) -> None:
    """Only those codes are listed that cannot be told from the others."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(512, 1024, generator=generator, dtype=torch.float32).bfloat16() * 0.05
    codes, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    tensors = {"m.weight": codes} | {f"m.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    base = save_plain_model(tmp_path / "base", tensors)
    adapter = save_plain_adapter(tmp_path / "adapter", {"m": (512, 1024)}, r=8, lora_alpha=1)
    result = loratool.merge(adapter, base, out=tmp_path / "merged", undo=True)
    assert result.delivery is not None
    assert result.undo_file is not None
    assert 0.03 < result.delivery.changed < 0.3
    assert result.undo_file.stat().st_size < 0.3 * result.delivery.changed * codes.numel()


def test_a_merge_in_place_is_taken_out_in_place(
    four_bit: Quantize, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(four_bit(shard="100KB"), model)
    expected = digest(model)
    loratool.merge(tiny_adapters.folder("llama-many-blocks"), model, in_place=True)
    assert digest(model) != expected
    loratool.unmerge(model, in_place=True)
    assert digest(model) == expected


def test_a_merge_is_taken_out_from_the_base(four_bit: Quantize, tiny_adapters: TinyAdapters, tmp_path: Path) -> None:
    base = four_bit()
    loratool.base_add("base", base)
    loratool.merge(tiny_adapters.folder("llama-many-blocks"), "base", out=tmp_path / "merged")
    assert loratool.unmerge(tmp_path / "merged", out=tmp_path / "back").method == "base"
    assert digest(tmp_path / "back") == digest(base)


def test_verify_replays_a_merge_and_finds_a_moved_code(
    four_bit: Quantize, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    merged = tmp_path / "merged"
    loratool.merge(tiny_adapters.folder("llama-many-blocks"), four_bit(), out=merged, undo=True)
    result = loratool.verify(merged)
    assert result.replayed == "base"
    assert result.delivery is not None
    file = merged / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if name.endswith("q_proj.weight"))
    tensors[name][0] ^= 1
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(VerificationError, match="q_proj"):
        loratool.verify(merged)


def test_a_merge_that_loses_its_update_is_warned_of(four_bit: Quantize, tmp_path: Path) -> None:
    """Every block's largest weight cannot grow: an update of the size of the weights themselves is cut off."""
    base = four_bit()
    shape = matrix(base, "model.layers.0.mlp.up_proj.weight").shape
    adapter = save_plain_adapter(tmp_path / "huge", {"model.layers.0.mlp.up_proj": shape}, lora_alpha=4000)
    with pytest.raises(
        NoChangeError, match=r"of the update would be left in the nf4 weights.*--quantize nf4.*--calibrate"
    ):
        loratool.merge(adapter, base, out=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    result = loratool.merge(adapter, base, out=tmp_path / "merged", allow_no_op=True)
    assert result.delivery is not None
    assert result.delivery.share < 0.5
    assert any("of the update is left" in note for note in result.notes)


def test_merge_show_and_verify_say_what_was_delivered(
    four_bit: Quantize, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    loratool.add(tiny_adapters.folder("llama-many-blocks"), name="pirate")
    result = loratool.merge("pirate", four_bit(), out=tmp_path / "merged")
    assert result.delivery is not None
    assert loratool.show("pirate").to_json()["merges"][0]["delivery"] == result.delivery.to_json()
    share = f"{result.delivery.share:.1%} of the update"
    both = f"delivered {share}; {result.delivery.changed:.1%} of elements changed"
    noisy = f"{both}; noise {result.delivery.noise:.1%} of the weights"
    again = ["merge", "pirate", "--into", str(four_bit()), "--out", str(tmp_path / "again")]
    for words, expected in (
        (["show", "pirate"], both),
        (["verify", str(tmp_path / "merged")], both),
        (["verify", str(tmp_path / "merged"), "--verbose"], noisy),
        (again, both),
        ([*again, "--force", "--verbose"], noisy),
    ):
        printed = CliRunner().invoke(cli, words)
        assert expected in " ".join(printed.output.split()), printed.output


Damage = Callable[[dict[str, torch.Tensor]], object]


def without_absmax(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["m.weight.absmax"]


def cut_codes(tensors: dict[str, torch.Tensor]) -> None:
    tensors["m.weight"] = tensors["m.weight"][:-1]


def state_of(tensors: dict[str, torch.Tensor], text: bytes) -> None:
    tensors["m.weight.quant_state.bitsandbytes__nf4"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)


def changed_state(**changes: Any) -> Damage:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        state = json.loads(bytes(tensors["m.weight.quant_state.bitsandbytes__nf4"].tolist()))
        state_of(tensors, json.dumps(state | changes).encode())

    return damage


def set_part(part: str, value: torch.Tensor) -> Damage:
    return lambda tensors: tensors.update({f"m.weight.{part}": value})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors: state_of(tensors, b"not json"), "not valid JSON"),
        (lambda tensors: state_of(tensors, b"[1, 2]"), "not valid JSON"),
        (lambda tensors: state_of(tensors, b"{}"), "is damaged"),
        (lambda tensors: state_of(tensors, b"\xff" * 70_000), "not a quant_state"),
        (changed_state(blocksize=0), "is damaged"),
        (changed_state(blocksize="64"), "is damaged"),
        (changed_state(blocksize=128), "absmax"),
        (changed_state(shape=[64, 64]), "absmax"),
        (changed_state(shape=[-64, -128]), "is damaged"),
        (changed_state(shape=[64, 128, 1]), "is damaged"),
        (changed_state(dtype="float8"), "is damaged"),
        (changed_state(nested_offset=float("nan")), "not valid JSON"),
        (changed_state(nested_offset="1"), "is damaged"),
        (changed_state(quant_type="fp4"), "is damaged"),
        (without_absmax, "'absmax' is missing"),
        (cut_codes, "asks for U8 of 4096"),
        (set_part("nested_absmax", torch.tensor([float("nan")])), "NaN or infinity"),
        (set_part("nested_quant_map", torch.zeros(3)), "asks for F32"),
        (set_part("quant_map", torch.zeros(16)), "does not hold the values of nf4"),
    ],
)
def test_a_damaged_matrix_is_refused_and_nothing_is_written(tmp_path: Path, damage: Damage, message: str) -> None:
    tensors = quantized((64, 128), "nf4", "bf16", nested=True, blocksize=64)
    damage(tensors)
    base = save_plain_model(tmp_path / "base", tensors)
    adapter = save_plain_adapter(tmp_path / "adapter", {"m": (64, 128)})
    with pytest.raises(CheckpointError, match=message):
        loratool.merge(adapter, base, out=tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]


@pytest.mark.parametrize(
    ("config", "extra", "name"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, {}, "gptq"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, {}, "awq"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, {}, "8-bit"),
        ({}, {"m.SCB": torch.ones(64)}, "8-bit"),
        ({}, {"m.qweight": torch.ones(64, 16, dtype=torch.int32)}, "GPTQ or AWQ"),
        ({}, {"m.weight_packed": torch.ones(64, 16, dtype=torch.int32)}, "compressed-tensors"),
    ],
)
def test_another_storage_is_refused_by_its_name(
    tmp_path: Path, config: dict[str, Any], extra: dict[str, torch.Tensor], name: str
) -> None:
    base = save_plain_model(tmp_path / "base", {"m.weight": torch.ones(64, 128)} | extra, **config)
    adapter = save_plain_adapter(tmp_path / "adapter", {"m": (64, 128)})
    with pytest.raises(UnsupportedError, match=name):
        loratool.merge(adapter, base, out=tmp_path / "out")


def test_an_adapter_of_another_shape_is_refused(tmp_path: Path) -> None:
    base = save_plain_model(tmp_path / "base", quantized((64, 128), "nf4", "bf16", nested=True, blocksize=64))
    adapter = save_plain_adapter(tmp_path / "adapter", {"m": (128, 64)})
    with pytest.raises(LoratoolError, match=r"\[128, 64\].*\[64, 128\]"):
        loratool.merge(adapter, base, out=tmp_path / "out")


def test_seeds_that_differ_in_their_last_bit_give_other_chances() -> None:
    one, other = (Rounding(2**64 - 1 - bit).words(range(1), 64, torch.device("cpu")) for bit in (0, 1))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("key", [(0, 0), (1, 64), (2**64 - 1, 4096), (0x9E3779B97F4A7C15, 12_345)])
def test_chance_on_a_device_is_numpys(key: tuple[int, int]) -> None:
    expected = np.random.Philox(key=np.array(key, np.uint64)).random_raw(4 * 1000)
    found = philox(key, 1000, torch.device("cpu")).numpy().view(np.uint64)
    assert np.array_equal(found, expected)
