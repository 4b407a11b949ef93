"""LoRA and DoRA on convolutions and embeddings, and DoRA on Conv1D: PEFT's bytes, and taken out bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from four_bit_models import decoded_by_bitsandbytes
from safetensors.torch import load_file, save_file
from tiny_adapters import ADAPTER_PREFIX, TinyAdapters, merge_by_peft, save_peft_adapter
from tiny_models import (
    DTYPES,
    StoredTensor,
    TinyModels,
    as_stored,
    as_torch,
    assert_same_tensors,
    load,
    save_plain_model,
    stored_tensors,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

import loratool
from loratool.errors import PlacementError, UnsupportedError
from loratool.formats.read import read_adapter
from loratool.formats.write import write_single_file

WEIGHTS = "adapter_model.safetensors"
PARTS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
LAYERS = ("wave", "image", "point", "volume", "embed_tokens", "conv1d", "linear")


class Net(nn.Module):
    """A layer of each kind, none of which is ever called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wave = nn.Conv1d(6, 80, 3)
        self.image = nn.Conv2d(5, 140, 3)
        self.point = nn.Conv2d(48, 72, 1)
        self.volume = nn.Conv3d(4, 70, (2, 3, 1))
        self.embed_tokens = nn.Embedding(331, 48)
        self.conv1d = Conv1D(144, 48)
        self.linear = nn.Linear(48, 100)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Convolve as PEFT does on a usual machine: on one thread torch takes another kernel for small ones."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=DTYPES)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_base(tmp_path / "base", request.param)


def save_base(folder: Path, dtype: str) -> Path:
    return save_plain_model(folder, {name: part.to(DTYPES[dtype]) for name, part in Net().state_dict().items()})


def save_adapter(folder: Path, layers: tuple[str, ...] = LAYERS, **options: Any) -> Path:
    """Save a LoRA, or a DoRA with magnitudes some hundredths off the norms, as PEFT does."""
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=list(layers), **options)
    save_peft_adapter(Net(), config, folder, save_embedding_layers=False)
    tensors, generator = load_file(folder / WEIGHTS), torch.Generator().manual_seed(3)
    for name, magnitudes in sorted(tensors.items()):
        if "magnitude" in name:
            size = 0.5 + torch.rand(magnitudes.shape, generator=generator)
            tensors[name] = size * (magnitudes.numel() ** 0.5)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def by_peft(base: Path, *adapters: Path, weight: float | None = None) -> dict[str, StoredTensor]:
    """Return PEFT's merge into the base in fp32, rounded once."""
    stored = stored_tensors(base)
    net = Net()
    net.load_state_dict({name: as_torch(tensor).float() for name, tensor in stored.items()})
    merged = merge_several(net, adapters) if adapters[1:] else merge_by_peft(net, adapters[0], weight=weight)
    return {name: rounded(as_torch(tensor), stored[name]) for name, tensor in merged.items()}


def merge_several(net: nn.Module, adapters: tuple[Path, ...]) -> dict[str, StoredTensor]:
    """Merge one after another by PEFT, which takes the earlier ones out again to find a DoRA's norms, and is off by that.

    Here it finds the base's own weights instead.
    """
    weights = {name: part.detach().clone() for name, part in net.named_parameters()}
    wrapped = peft.PeftModel.from_pretrained(net, adapters[0], adapter_name="0")
    for number, adapter in enumerate(adapters[1:], start=1):
        wrapped.load_adapter(adapter, adapter_name=str(number))
    for layer in LAYERS:
        of_base = weights[f"{layer}.weight"]
        module = wrapped.get_submodule(f"base_model.model.{layer}")
        module._unmerged_base_weight = lambda safe_merge=False, of_base=of_base: nullcontext(of_base)
    merged = wrapped.merge_and_unload(adapter_names=[str(number) for number in range(len(adapters))])
    return {name: as_stored(tensor) for name, tensor in merged.state_dict().items()}


def rounded(tensor: torch.Tensor, like: StoredTensor) -> StoredTensor:
    return as_stored(tensor.to(as_torch(like).dtype))


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
def test_every_kind_of_layer_has_pefts_bytes_and_is_taken_out_bit_for_bit(
    options: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "adapter", **options)
    merged = loratool.merge(adapter, base, out=tmp_path / "merged", undo=True).out
    before, after = stored_tensors(base), stored_tensors(merged)
    assert_same_tensors(after, by_peft(base, adapter))
    assert {name for name in before if before[name].data != after[name].data} == {f"{layer}.weight" for layer in LAYERS}
    loratool.verify(merged)
    assert_same_tensors(stored_tensors(loratool.unmerge(merged, out=tmp_path / "back").out), before)


@pytest.mark.parametrize("weight", [0.6, -1.5])
def test_a_weight_on_a_dora_is_pefts_scale_layer(weight: float, tmp_path: Path) -> None:
    base, adapter = save_base(tmp_path / "base", "fp32"), save_adapter(tmp_path / "adapter", use_dora=True)
    merged = loratool.merge([(adapter, weight)], base, out=tmp_path / "merged", undo=True).out
    assert_same_tensors(stored_tensors(merged), by_peft(base, adapter, weight=weight))
    assert_same_tensors(stored_tensors(loratool.unmerge(merged, out=tmp_path / "back").out), stored_tensors(base))


@pytest.mark.parametrize("kinds", ["dora lora", "lora dora", "dora dora", "lora dora lora"])
def test_doras_beside_other_updates_apply_in_order_with_norms_of_the_base(
    kinds: str, base: Path, tmp_path: Path
) -> None:
    adapters = tuple(
        _numbered(tmp_path / f"{number}-{kind}", number, kind) for number, kind in enumerate(kinds.split())
    )
    merged = loratool.merge(list(adapters), base, out=tmp_path / "merged", undo=True).out
    assert_same_tensors(stored_tensors(merged), by_peft(base, *adapters))
    assert_same_tensors(stored_tensors(loratool.unmerge(merged, out=tmp_path / "back").out), stored_tensors(base))


def _numbered(folder: Path, number: int, kind: str) -> Path:
    """An adapter that differs from those of other numbers."""
    save_adapter(folder, use_dora=kind == "dora")
    tensors = load_file(folder / WEIGHTS)
    save_file({name: tensor * (1 + number) for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    return folder


# Whole models


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dora_on_conv1d_of_gpt2_has_pefts_bytes(
    dtype: str, tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    base, adapter = tiny_models.folder("gpt2", dtype), tiny_adapters.folder("gpt2", use_dora=True, fan_in_fan_out=True)
    merged = loratool.merge(adapter, base, out=tmp_path / "merged", undo=True).out
    after = stored_tensors(merged)
    peft_merged = {
        name.removeprefix("transformer."): tensor
        for name, tensor in merge_by_peft(load(base, "gpt2").float(), adapter).items()
    }
    wrong = [
        name
        for name, tensor in after.items()
        if name in peft_merged and as_stored(as_torch(peft_merged[name]).to(as_torch(tensor).dtype)).data != tensor.data
    ]
    assert not wrong
    assert_same_tensors(stored_tensors(loratool.unmerge(merged, out=tmp_path / "back").out), stored_tensors(base))


@pytest.mark.parametrize("way", ["into codes", "quantize", "base_as", "dequantize"])
def test_a_dora_on_conv1d_is_carried_by_every_change_of_storage(
    way: str, tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    dense, adapter = (
        tiny_models.folder("gpt2", "fp32"),
        tiny_adapters.folder("gpt2", use_dora=True, fan_in_fan_out=True),
    )
    magnitudes = shutil.copytree(adapter, tmp_path / "adapter") / WEIGHTS
    tensors = load_file(magnitudes)
    save_file(
        {name: each * (1.03 if "magnitude" in name else 0.3) for name, each in tensors.items()},
        magnitudes,
        {"format": "pt"},
    )
    quantized = loratool.quantize(dense, out=tmp_path / "nf4").out
    options: dict[str, dict[str, Any]] = {
        "into codes": {"undo": True},
        "quantize": {"quantize": "nf4"},
        "base_as": {"base_as": "nf4"},
        "dequantize": {"dequantize": True},
    }
    base = quantized if way in ("into codes", "dequantize") else dense
    merged = loratool.merge(tmp_path / "adapter", base, out=tmp_path / "merged", **options[way]).out
    name = next(name for name in stored_tensors(dense) if name.endswith("h.1.attn.c_attn.weight"))
    module = name.removeprefix("transformer.").removesuffix(".weight")
    before = (
        as_torch(stored_tensors(dense)[name]).T
        if way == "quantize"
        else decoded_by_bitsandbytes(quantized)[name].float()
    )
    after = (
        as_torch(stored_tensors(merged)[name]).T
        if way == "dequantize"
        else decoded_by_bitsandbytes(merged)[name].float()
    )
    a, b, m = (tensors[f"{ADAPTER_PREFIX}transformer.{module}.{part}"] for part in PARTS)
    total = before + 2 * 0.09 * b @ a
    expected = total * (1.03 * m / total.norm(dim=1))[:, None]
    if way == "dequantize":
        torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-6)
    else:
        delta = (expected - before).double()
        share = float(((after - before) * delta).sum() / delta.square().sum())
        assert share == pytest.approx(1, abs=0.2)
    if way == "into codes":
        assert_same_tensors(
            stored_tensors(loratool.unmerge(merged, out=tmp_path / "back").out), stored_tensors(quantized)
        )


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_an_embedding_that_peft_saved_with_its_own_copy_has_pefts_bytes(
    options: dict[str, Any], tiny_models: TinyModels, tmp_path: Path
) -> None:
    base = tiny_models.folder("llama", "fp32")
    config = peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], **options)
    adapter = save_peft_adapter(load(base, "llama"), config, tmp_path / "adapter")
    assert any("embed_tokens.base_layer" in name for name in load_file(adapter / WEIGHTS))
    merged = loratool.merge(adapter, base, out=tmp_path / "merged", undo=True).out
    assert_same_tensors(stored_tensors(merged), merge_by_peft(load(base, "llama"), adapter, tmp_path / "peft"))
    assert_same_tensors(stored_tensors(loratool.unmerge(merged, out=tmp_path / "back").out), stored_tensors(base))


def test_lora_on_a_tied_embedding_needs_untie(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models.folder("qwen2", "bf16")
    config = peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"])
    adapter = save_peft_adapter(load(base, "qwen2"), config, tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(PlacementError, match=r"embed_tokens.*ties to its output head.*--untie"):
        loratool.merge(adapter, base, out=tmp_path / "merged")
    merged = loratool.merge(adapter, base, out=tmp_path / "merged", untie=True).out
    before, after = stored_tensors(base), stored_tensors(merged)
    tensors, name = load_file(adapter / WEIGHTS), "model.embed_tokens.weight"
    a, b = (tensors[f"{ADAPTER_PREFIX}model.embed_tokens.lora_embedding_{letter}"] for letter in "AB")
    expected = as_torch(before[name]).float() + (b @ a).T * 2
    assert torch.equal(as_torch(after[name]), expected.bfloat16())
    assert after["lm_head.weight"].data == before[name].data


@pytest.mark.parametrize(
    ("layer", "change", "message"),
    [
        ("image", lambda a, b: (a[:, :4], b), r"image.*\[140, 4, 3, 3\].*\[140, 5, 3, 3\]"),
        ("wave", lambda a, b: (a[..., :2], b), r"wave.*\[80, 6, 2\].*\[80, 6, 3\]"),
        ("image", lambda a, b: (a[..., 0], b[..., 0]), r"image.*\[140, 5, 3\].*\[140, 5, 3, 3\]"),
        ("embed_tokens", lambda a, b: (a[:, :330], b), r"embed_tokens.*\[48, 330\].*\[48, 331\]"),
    ],
)
def test_factors_of_another_layers_shape_are_refused(
    layer: str,
    change: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    message: str,
    tmp_path: Path,
) -> None:
    """A convolution in groups, among others: its kernel has fewer inputs than the factor, and PEFT cannot merge it."""
    adapter = save_adapter(tmp_path / "adapter", (layer,))
    factors = load_file(adapter / WEIGHTS)
    changed = change(*(factors[name] for name in sorted(factors)))
    save_file({name: part.contiguous() for name, part in zip(sorted(factors), changed, strict=True)}, adapter / WEIGHTS)
    with pytest.raises(PlacementError, match=message):
        loratool.merge(adapter, save_base(tmp_path / "base", "bf16"), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_of_all_layers_are_written_and_read_alike(tmp_path: Path) -> None:
    for options in ({}, {"use_dora": True}):
        adapter = read_adapter(save_adapter(tmp_path / f"adapter{len(options)}", **options))
        write_single_file(adapter, tmp_path / f"again{len(options)}.st")
        again = read_adapter(tmp_path / f"again{len(options)}.st")
        assert {info.name for info in again.tensors} == {info.name for info in adapter.tensors}
        assert again.changes.keys() == adapter.changes.keys()
        assert [again.changes[name].shape for name in again.changes] == [
            each.shape for each in adapter.changes.values()
        ]


@pytest.mark.parametrize("layer", ["image", "embed_tokens"])
def test_ranks_of_other_layers_than_linear_ones_are_not_cut(layer: str, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", (layer, "linear"))
    (adapter / "loratool.json").write_text(json.dumps({"kind": "dylora", "scaling": "paper"}))
    base = save_base(tmp_path / "base", "bf16")
    message = rf"'{layer}'.*'lora r=4 of an? \w+', which is not a product of two matrices"
    with pytest.raises(UnsupportedError, match=message):
        loratool.merge(f"{adapter}@rank=2", base, out=tmp_path / "out")
    with pytest.raises(UnsupportedError, match=message):
        loratool.truncate(adapter, rank=2, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    loratool.merge(adapter, base, out=tmp_path / "out")


@pytest.mark.parametrize("dtype", DTYPES)
def test_kohyas_locon_has_the_bytes_of_the_same_factors_in_peft(dtype: str, tmp_path: Path) -> None:
    layers = ("wave", "image", "point", "volume", "linear")
    base, adapter = save_base(tmp_path / "base", dtype), save_adapter(tmp_path / "adapter", layers)
    tensors = {f"lora_unet_{layer}.alpha": torch.tensor(6.0) for layer in layers}
    for name, factor in load_file(adapter / WEIGHTS).items():
        layer, _, part = name.removeprefix(ADAPTER_PREFIX).partition(".")
        tensors[f"lora_unet_{layer}.lora_{'down' if 'A' in part else 'up'}.weight"] = factor
    save_file(tensors, tmp_path / "locon.safetensors", {"ss_network_module": "lycoris.kohya"})
    record = loratool.add(tmp_path / "locon.safetensors").record
    assert (record.format, record.kind, record.rank, record.alpha) == ("kohya", "lora", 4, 6.0)
    merged = loratool.merge(tmp_path / "locon.safetensors", base, out=tmp_path / "merged", undo=True).out
    assert_same_tensors(stored_tensors(merged), by_peft(base, adapter))
    assert_same_tensors(stored_tensors(loratool.unmerge(merged, out=tmp_path / "back").out), stored_tensors(base))
