"""Merges whose output is stored otherwise than its base: quantized, dequantized, or into the base's NF4 image."""

from __future__ import annotations

import json
import math
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
import transformers
from click.testing import CliRunner
from four_bit_models import (
    coded,
    decoded_by_bitsandbytes,
    four_bit_names,
    save_by_transformers,
    without_padding,
)
from safetensors.torch import load_file, save_file
from tiny_adapters import TinyAdapters, save_plain_adapter
from tiny_models import (
    DTYPES,
    Layout,
    TinyModels,
    as_stored,
    as_torch,
    assert_same_tensors,
    digest,
    load,
    save_plain_model,
    stored_tensors,
)

import loratool
from loratool.cli import cli
from loratool.errors import CheckpointError, LoratoolError, NotFoundError, RestoreError, VerificationError
from loratool.updates.low_rank import LowRank

NF4 = "nf4"
WAYS: dict[str, dict[str, Any]] = {
    "quantize": {"quantize": NF4},
    "base-as": {"base_as": NF4},
    "dequantize": {"dequantize": True},
}


@pytest.fixture(scope="session")
def quantized(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """NF4 models as transformers quantizes and saves them, of tiny models; without double quantization on request."""
    root = tmp_path_factory.mktemp("quantized")

    def build(architecture: str, dtype: str, *, double_quant: bool = True) -> Path:
        folder = root / f"{architecture}-{dtype}-{double_quant}"
        if not folder.exists():
            source = tiny_models.folder(architecture, dtype)
            save_by_transformers(source, folder, architecture, dtype, double_quant=double_quant)
        return folder

    return build


@pytest.fixture
def base_for(tiny_models: TinyModels, quantized: Callable[..., Path]) -> Callable[..., Path]:
    """The base that a way starts from: dense, or for dequantizing NF4."""

    def build(way: str, architecture: str = "llama", dtype: str = "bf16") -> Path:
        return quantized(architecture, dtype) if way == "dequantize" else tiny_models.folder(architecture, dtype)

    return build


def delta(adapter: Path, name: str) -> torch.Tensor:
    """What the adapter adds to a matrix, fp32, as PEFT computes it."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    factors = load_file(adapter / "adapter_model.safetensors")
    key = "base_model.model." + name.removesuffix(".weight")
    product = factors[f"{key}.lora_B.weight"].float() @ factors[f"{key}.lora_A.weight"].float()
    return product * (config["lora_alpha"] / config["r"])


@pytest.fixture
def one_thread() -> Iterator[None]:
    """How torch rounds the mean of many scales, and the last bits of a product, depend on the number of its threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --dequantize


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("llama", "bf16"), ("llama", "fp16"), ("llama-many-blocks", "fp32"), ("llama-odd", "fp32"), ("gpt2", "bf16")],
)
def test_dequantizing_is_what_bitsandbytes_decodes_plus_the_update_rounded_once(
    quantized: Callable[..., Path], tiny_adapters: TinyAdapters, tmp_path: Path,
    architecture: str, dtype: str, double_quant: bool
) -> None:  # fmt: skip
    base, adapter = quantized(architecture, dtype, double_quant=double_quant), tiny_adapters.folder(architecture)
    result = loratool.merge(adapter, base, out=tmp_path / "out", dequantize=True)
    before = stored_tensors(base)
    decoded = decoded_by_bitsandbytes(base)
    expected = {name: part for name, part in before.items() if ".weight." not in name and name not in decoded}
    for name, matrix in decoded.items():
        merged = (matrix.float() + delta(adapter, name)).to(DTYPES[dtype])
        expected[name] = as_stored(merged.T if architecture == "gpt2" else merged)
    assert_same_tensors(stored_tensors(result.out), expected)
    assert {target.name for target in result.plan.targets} == decoded.keys()


def test_a_dequantized_model_says_nothing_of_quantization_and_transformers_loads_it_densely(
    quantized: Callable[..., Path], tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    base = quantized("llama", "bf16")
    out = loratool.merge(tiny_adapters.folder("llama"), base, out=tmp_path / "out", dequantize=True).out
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, out))
    del before["quantization_config"]
    assert list(after.items()) == list(before.items())
    model = load(out, "llama")
    assert not getattr(model, "is_loaded_in_4bit", False)
    stored = stored_tensors(out)
    assert all(torch.equal(parameter, as_torch(stored[name])) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_model_that_is_partly_dense_is_dequantized_and_merged_into_everywhere(tmp_path: Path, kind: str) -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)).bfloat16() * 0.05
    codes, state = bnb.quantize_4bit(weight, quant_type=kind, compress_statistics=True)
    parts = {f"a.up_proj.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    base = save_plain_model(
        tmp_path / "base",
        {"a.up_proj.weight": codes, "b.up_proj.weight": weight, "norm.weight": weight[0].clone()} | parts,
    )
    adapter = save_plain_adapter(tmp_path / "adapter", {"a.up_proj": (64, 128), "b.up_proj": (64, 128)})
    out = loratool.merge(adapter, base, out=tmp_path / "out", dequantize=True).out
    decoded = bnb.dequantize_4bit(codes, state).float()
    expected = {
        "a.up_proj.weight": (decoded + delta(adapter, "a.up_proj.weight")).bfloat16(),
        "b.up_proj.weight": (weight.float() + delta(adapter, "b.up_proj.weight")).bfloat16(),
        "norm.weight": weight[0],
    }
    assert_same_tensors(stored_tensors(out), {name: as_stored(tensor) for name, tensor in expected.items()})


# --quantize nf4


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("llama", "bf16"), ("llama-odd", "fp32"), ("llama-many-blocks", "bf16"), ("gpt2", "fp32"), ("bert", "fp16")],
)
@pytest.mark.usefixtures("one_thread")
def test_quantizing_a_merge_is_quantizing_the_fp32_sums_under_the_scales_of_bitsandbytes(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path, architecture: str, dtype: str
) -> None:
    """And the codes are those that are nearest to the sums under these scales, as float64 tells."""
    base, adapter = tiny_models.folder(architecture, dtype), tiny_adapters.folder(architecture)
    result = loratool.merge(adapter, base, out=tmp_path / "out", quantize=NF4)
    theirs = without_padding(stored_tensors(save_by_transformers(base, tmp_path / "theirs", architecture, dtype)))
    tensors = stored_tensors(result.out)
    ours, targets = without_padding(tensors), {target.name for target in result.plan.targets}
    assert ours.keys() == theirs.keys()
    assert {name.split(".weight")[0] for name in ours if ours[name] != theirs[name]} <= {
        name.removesuffix(".weight") for name in targets
    }
    for name in targets & set(four_bit_names(tensors)):
        before = as_torch(stored_tensors(base)[name]).float()
        weight = (before.T if architecture == "gpt2" else before) + delta(adapter, name)
        _, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        assert tensors[f"{name}.absmax"].data == state.absmax.numpy().tobytes(), name
        assert tensors[f"{name}.nested_absmax"] == as_stored(state.state2.absmax), name
        assert coded(tensors, name).off_by(weight).max() < 1e-5, name
        state_of = f"{name}.quant_state.bitsandbytes__nf4"
        offset = ours[state_of]["nested_offset"]
        assert offset == pytest.approx(float(state.offset), rel=1e-7)
        assert ours[state_of] == theirs[state_of] | {"nested_offset": offset}


@pytest.mark.parametrize("way", ["quantize", "base-as"])
def test_an_nf4_output_loads_as_a_4_bit_model_without_further_words(
    base_for: Callable[..., Path], tiny_adapters: TinyAdapters, tmp_path: Path, way: str
) -> None:
    out = loratool.merge(tiny_adapters.folder("llama"), base_for(way), out=tmp_path / "out", **WAYS[way]).out
    model = load(out, "llama")
    assert model.is_loaded_in_4bit
    stored = stored_tensors(out)
    for name in four_bit_names(stored):
        assert model.get_parameter(name).data.numpy().tobytes() == stored[name].data


def test_an_adapter_on_what_stays_dense_is_merged_there(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models.folder("llama", "fp32")
    shapes = {"lm_head": (131, 64), "model.layers.0.self_attn.q_proj": (64, 64)}
    adapter = save_plain_adapter(tmp_path / "adapter", shapes)
    expected = as_torch(stored_tensors(base)["lm_head.weight"]) + delta(adapter, "lm_head.weight")
    for way in ("quantize", "base-as"):
        out = loratool.merge(adapter, base, out=tmp_path / way, **WAYS[way]).out
        assert stored_tensors(out)["lm_head.weight"] == as_stored(expected)
        assert loratool.verify(out).replayed == "base"


@pytest.mark.parametrize(
    ("dtype", "fill", "beyond"),
    [(torch.float16, 65504, 60), (torch.bfloat16, 3.38e38, 2e36), (torch.float32, 3.38e38, 1e37)],
)
def test_a_sum_that_the_quantized_matrix_could_not_decode_to_is_refused(
    tmp_path: Path, dtype: torch.dtype, fill: float, beyond: float
) -> None:
    """It decodes to the base's dtype, though the sums are quantized as they are in fp32."""
    shape = (64, 64)
    base = save_plain_model(tmp_path / "base", {"model.layers.0.q_proj.weight": torch.full(shape, fill, dtype=dtype)})
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    adapter = save_plain_adapter(tmp_path / "adapter", {"model.layers.0.q_proj": shape})
    weight = beyond / float(delta(adapter, "model.layers.0.q_proj.weight").max())
    with pytest.raises(LoratoolError, match=r"q_proj.*cannot hold"):
        loratool.merge([(adapter, weight)], base, out=tmp_path / "out", quantize=NF4)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (torch.full((64, 64), math.inf), "NaN or infinity"),  # and not what the merge gives
        (torch.eye(64) * math.nan, "NaN or infinity"),
        (torch.eye(64).repeat(16, 1) * (torch.arange(1024) < 515)[:, None] * 65472, "scales in 8 bits are beyond"),
    ],
)
@pytest.mark.parametrize("way", ["quantize", "base-as", None])
def test_a_base_that_has_no_nf4_image_is_refused(
    tmp_path: Path, numbers: torch.Tensor, message: str, way: str | None
) -> None:
    base = save_plain_model(tmp_path / "base", {"model.layers.0.q_proj.weight": numbers.half()})
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    adapter = save_plain_adapter(tmp_path / "adapter", {"model.layers.0.q_proj": (len(numbers), 64)})
    with pytest.raises(LoratoolError, match=message):
        if way is None:
            loratool.quantize(base, out=tmp_path / "out")
        else:
            loratool.merge([(adapter, 1e-3)], base, out=tmp_path / "out", **WAYS[way])
    assert not (tmp_path / "out").exists()


def test_scales_whose_sum_is_beyond_fp32_are_refused(tmp_path: Path) -> None:
    numbers = torch.full((64, 256), 3.3e38, dtype=torch.bfloat16)
    base = save_plain_model(tmp_path / "base", {"model.layers.0.q_proj.weight": numbers})
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(LoratoolError, match="scales in 8 bits are beyond"):
        loratool.quantize(base, out=tmp_path / "out")
    assert loratool.quantize(base, out=tmp_path / "out", double_quant=False).out.exists()


@pytest.mark.parametrize("way", ["quantize", "base-as"])
@pytest.mark.parametrize(
    ("architecture", "target", "saved", "name"),
    [
        ("llama", "v_proj", "k_proj", "model.layers.0.self_attn.k_proj.weight"),
        ("gpt2", "c_attn", "c_fc", "transformer.h.0.mlp.c_fc.weight"),
        ("gpt2", "c_fc", "attn.c_proj", "transformer.h.0.attn.c_proj.weight"),  # square
    ],
)
def test_a_matrix_that_the_adapter_holds_whole_is_quantized_as_it_is(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path,
    architecture: str, target: str, saved: str, name: str, way: str
) -> None:  # fmt: skip
    base = tiny_models.folder(architecture, "bf16")
    options = {"fan_in_fan_out": True} if architecture == "gpt2" else {}
    adapter = tiny_adapters.folder(architecture, target_modules=[target], modules_to_save=[saved], **options)
    factors = load_file(adapter / "adapter_model.safetensors")
    (held,) = (tensor for key, tensor in factors.items() if key.endswith(name))
    out = loratool.merge(adapter, base, out=tmp_path / "out", **WAYS[way]).out
    tensors = stored_tensors(out)
    assert not torch.equal(held.float(), as_torch(stored_tensors(base)[name]).float())
    whole = held.float().T if architecture == "gpt2" else held.float()
    assert coded(tensors, name).off_by(whole).max() < 1e-5
    assert loratool.verify(out).replayed == "base"


@pytest.mark.parametrize("way", WAYS)
def test_a_norm_that_the_adapter_holds_whole_keeps_its_shape(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path, way: str
) -> None:
    base = tiny_models.folder("llama", "bf16")
    adapter = tiny_adapters.folder("llama", target_modules=["q_proj"], modules_to_save=["model.norm"])
    if way == "dequantize":
        base = loratool.quantize(base, out=tmp_path / "image").out
    out = loratool.merge(adapter, base, out=tmp_path / "out", **WAYS[way]).out
    (held,) = (each for key, each in load_file(adapter / "adapter_model.safetensors").items() if "norm" in key)
    stored = as_torch(stored_tensors(out)["model.norm.weight"])
    assert stored.shape == held.shape == (64,)
    assert torch.equal(stored, held.to(stored.dtype))
    transformers.AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize("architecture", ["llama-many-blocks", "llama-odd"])
def test_what_survives_quantizing_is_measured_beside_the_image_under_the_same_scales(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path, architecture: str
) -> None:
    base, adapter = tiny_models.folder(architecture, "fp32"), tiny_adapters.folder(architecture)
    result = loratool.merge(adapter, base, out=tmp_path / "out", quantize=NF4)
    before, after = stored_tensors(base), stored_tensors(result.out)
    for name, delivery in result.deliveries.items():
        matrix, added = coded(after, name), delta(adapter, name).double().numpy()
        image = matrix.nearest(as_torch(before[name]))
        change = (matrix.units - image) * matrix.scales
        assert delivery.share == pytest.approx((change * added).sum() / (added * added).sum(), rel=1e-3)
        noise = (((change - added) ** 2).sum() / ((image * matrix.scales) ** 2).sum()) ** 0.5
        assert delivery.noise == pytest.approx(noise, rel=1e-3)
        assert delivery.changed == pytest.approx((matrix.units != image).mean(), abs=1e-4)
    assert set(result.deliveries) == {target.name for target in result.plan.targets}
    assert result.delivery is not None
    assert 0.97 < result.delivery.share < 1.03


# --base-as nf4


@pytest.mark.parametrize("layout", ["single", "sharded"])
@pytest.mark.parametrize(
    ("architecture", "dtype"), [("llama", "bf16"), ("llama-odd", "fp32"), ("llama-many-blocks", "bf16"), ("gpt2", "fp16")]
)  # fmt: skip
def test_merging_into_the_image_is_quantizing_and_then_merging(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path,
    architecture: str, dtype: str, layout: Layout
) -> None:  # fmt: skip
    base, adapter = tiny_models.folder(architecture, dtype, layout), tiny_adapters.folder(architecture)
    at_once = loratool.merge(adapter, base, out=tmp_path / "at-once", base_as=NF4)
    image = loratool.quantize(base, out=tmp_path / "image").out
    in_turn = loratool.merge(adapter, image, out=tmp_path / "in-turn")
    assert stored_tensors(at_once.out) == stored_tensors(in_turn.out)
    assert at_once.output_fingerprint == in_turn.output_fingerprint
    assert at_once.deliveries == in_turn.deliveries
    ours, theirs = ((folder / "config.json").read_bytes() for folder in (at_once.out, in_turn.out))
    assert ours == theirs


def test_an_update_that_depends_on_w_is_merged_into_the_image_too(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dense matrix, which `quantize` merges into, is another W."""
    base, adapter = tiny_models.folder("llama", "bf16"), tiny_adapters.folder("llama")
    monkeypatch.setattr(LowRank, "needs_weight", property(lambda update: True))
    at_once = loratool.merge(adapter, base, out=tmp_path / "at-once", base_as=NF4)
    in_turn = loratool.merge(adapter, loratool.quantize(base, out=tmp_path / "image").out, out=tmp_path / "in-turn")
    assert stored_tensors(at_once.out) == stored_tensors(in_turn.out)
    dense = loratool.merge(adapter, base, out=tmp_path / "dense", quantize=NF4)
    assert at_once.output_fingerprint != dense.output_fingerprint


# What holds of all three


class Counted:
    """What a command says that it begins, and how much of it it says is done."""

    def __init__(self) -> None:
        self.begun: list[tuple[str, int]] = []
        self.done = 0
        self._lock = threading.Lock()

    def begin(self, label: str, total: int) -> None:
        self.begun.append((label, total))

    def advance(self, count: int) -> None:
        with self._lock:
            self.done += count


@pytest.mark.parametrize("way", WAYS)
def test_progress_ends_where_it_says(
    base_for: Callable[..., Path], tiny_adapters: TinyAdapters, tmp_path: Path, way: str
) -> None:
    base, merging, verifying = base_for(way), Counted(), Counted()
    loratool.merge(tiny_adapters.folder("llama"), base, out=tmp_path / "out", progress=merging, **WAYS[way])
    loratool.verify(tmp_path / "out", progress=verifying)
    for counted in (merging, verifying):
        assert counted.done == pytest.approx(sum(total for _, total in counted.begun), rel=0.03), counted.begun


@pytest.mark.parametrize("way", WAYS)
def test_equal_merges_give_equal_bytes(
    base_for: Callable[..., Path], tiny_adapters: TinyAdapters, tmp_path: Path, way: str
) -> None:
    base, adapter = base_for(way, "llama-many-blocks"), tiny_adapters.folder("llama-many-blocks")
    one, other = (loratool.merge(adapter, base, out=tmp_path / name, **WAYS[way]).out for name in ("one", "other"))
    assert digest(one) == digest(other)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("way", WAYS)
def test_verify_replays_it_from_its_base(
    base_for: Callable[..., Path], tiny_adapters: TinyAdapters, tmp_path: Path, way: str, architecture: str
) -> None:
    base = shutil.copytree(base_for(way, architecture), tmp_path / "base")
    adapter = tiny_adapters.folder(architecture)
    result = loratool.merge([(adapter, 0.5)], base, out=tmp_path / "out", **WAYS[way])
    before = digest(tmp_path)
    verified = loratool.verify(result.out)
    assert (verified.replayed, verified.fingerprint) == ("base", result.output_fingerprint)
    assert digest(tmp_path) == before
    shutil.rmtree(base)
    assert loratool.verify(result.out).replayed == ""


@pytest.mark.parametrize("way", WAYS)
def test_verify_finds_a_tensor_that_the_merge_would_not_give(
    base_for: Callable[..., Path], tiny_adapters: TinyAdapters, tmp_path: Path, way: str
) -> None:
    """The record is forged with the bytes, so that only the replay can tell."""
    base, adapter = base_for(way), tiny_adapters.folder("llama")
    out = loratool.merge(adapter, base, out=tmp_path / "out", **WAYS[way]).out
    other = loratool.merge([(adapter, 2.0)], base, out=tmp_path / "other", **WAYS[way]).out
    forged = json.loads((other / "loratool.json").read_text())
    forged["adapters"][0]["weight"] = 1.0
    shutil.copyfile(other / "model.safetensors", out / "model.safetensors")
    (out / "loratool.json").write_text(json.dumps(forged))
    with pytest.raises(VerificationError, match="replayed, gives other bytes"):
        loratool.verify(out)


def test_verify_replays_a_quantization(tiny_models: TinyModels, tmp_path: Path) -> None:
    out = loratool.quantize(tiny_models.folder("llama"), out=tmp_path / "out", blocksize=128, double_quant=False).out
    assert loratool.verify(out).replayed == "base"
    with pytest.raises(NotFoundError, match="does not describe a merge"):
        loratool.unmerge(out, out=tmp_path / "back")
    tensors = load_file(out / "model.safetensors")
    name = four_bit_names(stored_tensors(out))[0]
    tensors[name][0] ^= 1
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerificationError, match=name):
        loratool.verify(out)


@pytest.mark.parametrize("way", WAYS)
def test_unmerge_gives_the_base_back_file_by_file(
    base_for: Callable[..., Path], tiny_adapters: TinyAdapters, tmp_path: Path, way: str
) -> None:
    base = shutil.copytree(base_for(way), tmp_path / "base")
    (base / "notes").mkdir()
    (base / "notes" / "a.txt").write_text("kept")
    out = loratool.merge(tiny_adapters.folder("llama"), base, out=tmp_path / "out", **WAYS[way]).out
    result = loratool.unmerge(out, out=tmp_path / "back")
    assert (result.method, result.inexact) == ("base", ())
    assert digest(tmp_path / "back") == digest(base)


@pytest.mark.parametrize("way", WAYS)
def test_unmerge_gives_back_a_base_that_was_merged_into_before(
    base_for: Callable[..., Path], tiny_adapters: TinyAdapters, tmp_path: Path, way: str
) -> None:
    first = loratool.merge(tiny_adapters.folder("llama"), base_for(way), out=tmp_path / "first", undo=True).out
    out = loratool.merge(tiny_adapters.folder("llama", seed=2), first, out=tmp_path / "out", **WAYS[way]).out
    assert not (out / "loratool-undo").exists()
    loratool.unmerge(out, out=tmp_path / "back")
    assert digest(tmp_path / "back") == digest(first)
    loratool.unmerge(tmp_path / "back", out=tmp_path / "base")
    assert digest(tmp_path / "base") == digest(base_for(way))


@pytest.mark.parametrize("way", WAYS)
def test_without_its_base_unmerge_refuses_and_says_why(
    base_for: Callable[..., Path], tiny_adapters: TinyAdapters, tmp_path: Path, way: str
) -> None:
    base = shutil.copytree(base_for(way), tmp_path / "base")
    out = loratool.merge(tiny_adapters.folder("llama"), base, out=tmp_path / "out", **WAYS[way]).out
    for option in ("in_place", "approximate"):
        with pytest.raises(RestoreError, match="--" + option.replace("_", "-")):
            loratool.unmerge(out, **{option: True})
    shutil.rmtree(base)
    with pytest.raises(RestoreError, match="stored differently than its base 'base'"):
        loratool.unmerge(out, out=tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("way", WAYS)
def test_another_merge_into_it_is_taken_out_alone(
    base_for: Callable[..., Path], tiny_adapters: TinyAdapters, tmp_path: Path, way: str
) -> None:
    first = loratool.merge(tiny_adapters.folder("llama"), base_for(way), out=tmp_path / "first", **WAYS[way]).out
    second = loratool.merge(tiny_adapters.folder("llama", seed=2), first, out=tmp_path / "second", undo=True).out
    loratool.unmerge(second, out=tmp_path / "back")
    assert digest(tmp_path / "back") == digest(first)


def test_an_adapter_of_the_dense_base_fits_its_catalogued_image_and_the_other_way_round(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_models.folder("llama"), tmp_path / "base")
    loratool.base_add("tiny", base)
    loratool.quantize("tiny")
    loratool.add(tiny_adapters.folder("llama"), name="of-dense", base="tiny")
    loratool.add(tiny_adapters.folder("llama", seed=2), name="of-image", base="tiny-nf4")
    results = [
        loratool.merge("of-dense", "tiny-nf4", dequantize=True),
        loratool.merge("of-image", "tiny", quantize=NF4),
        loratool.merge("of-image", "tiny", base_as=NF4, out=tmp_path / "as"),
    ]
    assert [result.out.name for result in results] == ["tiny-nf4-of-dense-dense", "tiny-of-image-nf4", "as"]
    (merge,) = loratool.show("of-dense").merges
    assert (merge.options or {})["dequantize"] == "true"


@pytest.mark.parametrize("way", WAYS)
def test_a_dry_run_says_what_would_be_stored_and_writes_nothing(
    base_for: Callable[..., Path], tiny_adapters: TinyAdapters, tmp_path: Path, way: str
) -> None:
    adapter = tiny_adapters.folder("llama")
    planned = loratool.merge(adapter, base_for(way), out=tmp_path / "out", dry_run=True, **WAYS[way])
    assert list(tmp_path.iterdir()) == []
    done = loratool.merge(adapter, base_for(way), out=tmp_path / "out", **WAYS[way])
    size = sum(len(part.data) for part in stored_tensors(done.out).values())
    assert planned.to_json()["output_size_bytes"] == done.to_json()["output_size_bytes"] == size
    option = way.replace("-", "_")
    assert planned.to_json()[option] == WAYS[way][option]


@pytest.mark.parametrize("way", WAYS)
def test_it_is_refused_in_place_with_an_undo_file_and_with_another_of_its_kind(
    base_for: Callable[..., Path], tiny_adapters: TinyAdapters, tmp_path: Path, way: str
) -> None:
    base, adapter = shutil.copytree(base_for(way), tmp_path / "base"), tiny_adapters.folder("llama")
    before = digest(base)
    others = [options for name, options in WAYS.items() if name != way]
    for options in ({"in_place": True}, {"undo": True}, *others):
        with pytest.raises(LoratoolError, match="--"):
            loratool.merge(adapter, base, **WAYS[way], **options)
    assert digest(base) == before
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_base_of_the_wrong_storage_is_refused(
    tiny_models: TinyModels, quantized: Callable[..., Path], tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    dense, nf4, adapter = tiny_models.folder("llama"), quantized("llama", "bf16"), tiny_adapters.folder("llama")
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (dense, WAYS["dequantize"], "has no quantized matrices"),
        (nf4, WAYS["quantize"], "is already quantized"),
        (nf4, WAYS["base-as"], "is already quantized"),
        (dense, {"quantize": "fp4"}, "quantizes only to nf4"),
        (dense, {"base_as": "int8"}, "quantizes only to nf4"),
    ]
    for base, options, message in cases:
        with pytest.raises(LoratoolError, match=message):
            loratool.merge(adapter, base, out=tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["absmax", "quant_state.bitsandbytes__nf4", ""])
def test_a_part_that_is_missing_is_named_before_anything_is_written(tmp_path: Path, missing: str) -> None:
    codes, state = bnb.quantize_4bit(torch.ones(64, 128), quant_type="nf4", compress_statistics=False)
    tensors = {"m.weight": codes} | {f"m.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    del tensors[f"m.weight.{missing}".removesuffix(".")]
    base = save_plain_model(tmp_path / "base", tensors | {"b.weight": torch.ones(64, 128)})
    adapter = save_plain_adapter(tmp_path / "adapter", {"b": (64, 128)})
    with pytest.raises(CheckpointError, match="missing"):
        loratool.merge(adapter, base, out=tmp_path / "out", dequantize=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"quantize": "nf4", "blocksize": "0", "double_quant": "true"},
        {"quantize": "nf4", "blocksize": "many", "double_quant": "true"},
        {"base_as": "nf4"},
    ],
)
def test_a_forged_record_of_the_storage_is_refused(
    base_for: Callable[..., Path], tiny_adapters: TinyAdapters, tmp_path: Path, options: dict[str, str]
) -> None:
    out = loratool.merge(tiny_adapters.folder("llama"), base_for("quantize"), out=tmp_path / "out", quantize=NF4).out
    manifest = json.loads((out / "loratool.json").read_text())
    (out / "loratool.json").write_text(json.dumps(manifest | {"options": {"device": "cpu"} | options}))
    with pytest.raises(LoratoolError, match="does not record the model's storage"):
        loratool.verify(out)


def test_the_command_line_tells_the_sizes_and_refuses_contradictions(
    base_for: Callable[..., Path], tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    words = ["merge", str(tiny_adapters.folder("llama")), "--into", str(base_for("quantize"))]
    out = ["--out", str(tmp_path / "out")]
    runner = CliRunner()
    planned = runner.invoke(cli, [*words, *out, "--quantize", "nf4", "--dry-run"])
    assert "bf16 to nf4" in planned.stdout
    done = runner.invoke(cli, [*words, *out, "--quantize", "nf4"])
    assert "as nf4" in done.stdout
    for more in (["--dequantize"], ["--base-as", "nf4"], ["--in-place"]):
        assert runner.invoke(cli, [*words, "--quantize", "nf4", *more]).exit_code == 2
    restored = runner.invoke(cli, ["unmerge", str(tmp_path / "out"), "--out", str(tmp_path / "back"), "--json"])
    assert json.loads(restored.stdout)["method"] == "base"


def test_figures_of_an_update_too_large_to_be_squared_are_numbers(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    base, adapter = tiny_models.folder("llama", "fp32"), tiny_adapters.folder("llama")
    result = loratool.merge([(adapter, 1e37)], base, out=tmp_path / "out", quantize=NF4, allow_no_op=True)
    assert json.dumps(result.to_json(), allow_nan=False)
    assert not any("catalogue" in note for note in result.notes)
    assert loratool.verify(result.out).replayed == "base"
