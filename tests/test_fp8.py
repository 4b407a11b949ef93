"""FP8 checkpoints: read as their own libraries read them, merged into, and taken out of again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.compressors import FloatQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file
from test_nf4 import decoded, matrix, parts_of
from tiny_adapters import save_plain_adapter
from tiny_models import DTYPES, as_torch, digest, load, save_plain_model, stored_tensors

import loratool
from loratool.errors import CheckpointError, LoratoolError, UnsupportedError
from loratool.weights.fp8 import E4M3
from loratool.weights.rounding import Rounding

FP8 = torch.float8_e4m3fn
SHAPES = [(256, 128), (192, 320), (576, 100), (7, 5)]
"""The last tiles of most of them are ragged."""

Tensors = dict[str, torch.Tensor]


def random_weight(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])) * 0.05).to(dtype)


def spread(scales: torch.Tensor, tile: tuple[int, int], shape: tuple[int, int]) -> torch.Tensor:
    """The scale of every element."""
    return scales.repeat_interleave(tile[0], 0).repeat_interleave(tile[1], 1)[: shape[0], : shape[1]]


def quantized(
    weight: torch.Tensor, tile: tuple[int, int], scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 codes, and the scales of tiles of so many rows and columns."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % tile[1], 0, -rows % tile[0]))
    largest = padded.view(padded.shape[0] // tile[0], tile[0], -1, tile[1]).abs().amax((1, 3))
    scales = (largest / 448).to(scale_dtype)
    if scale_dtype is torch.float8_e8m0fnu:
        scales = torch.exp2(torch.log2(largest / 448).ceil()).to(scale_dtype)
    codes = (weight.float() / spread(scales.float(), tile, weight.shape)).clamp(-448, 448).to(FP8)
    return codes, scales


def fine_grained(folder: Path, shape: tuple[int, int], tile: tuple[int, int] | None, scale_dtype: torch.dtype,
                 scale_shape: tuple[int, ...] | None = None, **config: Any) -> tuple[Path, Tensors]:  # fmt: skip
    codes, scales = quantized(random_weight(shape, torch.float32), tile or shape, scale_dtype)
    scales = scales if scale_shape is None else scales.view(scale_shape)
    quantization = {"quant_method": "fp8", "weight_block_size": None if tile is None else list(tile)}
    tensors = {"m.weight": codes, "m.weight_scale_inv": scales}
    return save_plain_model(folder, tensors, quantization_config=quantization, **config), tensors


STRATEGIES: dict[str, dict[str, Any]] = {
    "tensor": {"strategy": "tensor"},
    "channel": {"strategy": "channel"},
    "block": {"strategy": "block", "block_structure": [128, 128]},
}


def compressed(folder: Path, shape: tuple[int, int], strategy: str, dtype: str) -> tuple[Path, torch.Tensor]:
    """A matrix that compressed-tensors compresses, and what it decompresses that to."""
    arguments = {"num_bits": 8, "type": "float", "symmetric": True} | STRATEGIES[strategy]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
    weight = random_weight(shape, DTYPES[dtype])
    tile = {"tensor": shape, "channel": (1, shape[1]), "block": (128, 128)}[strategy]
    _, scales = quantized(weight, tile, DTYPES[dtype])
    scales = scales.view(1) if strategy == "tensor" else scales
    state = FloatQuantizationCompressor.compress({"weight": weight, "weight_scale": scales}, scheme)
    group = {"targets": ["Linear"], "weights": arguments, "input_activations": arguments}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
    }
    tensors = {f"m.{name}": tensor for name, tensor in state.items()}
    expected = FloatQuantizationCompressor.decompress(dict(state), scheme)["weight"]
    return save_plain_model(folder, tensors, quantization_config=quantization), expected


# Reading


def test_levels_are_torchs() -> None:
    expected = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    torch.testing.assert_close(torch.tensor(E4M3.values), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decoding_has_the_bits_of_compressed_tensors(
    tmp_path: Path, shape: tuple[int, int], strategy: str, dtype: str
) -> None:
    folder, expected = compressed(tmp_path / "m", shape, strategy, dtype)
    weight = matrix(folder)
    assert (weight.storage, weight.shape, weight.dtype.title) == ("fp8", shape, dtype)
    assert torch.equal(decoded(weight), expected.float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tile", "scale_shape"), [((128, 128), None), ((64, 32), None), (None, ()), (None, (1,)), (None, (1, 1))]
)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decoding_is_one_product_in_fp32_rounded_to_the_models_dtype(
    tmp_path: Path, shape: tuple[int, int], scale_dtype: torch.dtype, tile: tuple[int, int] | None,
    scale_shape: tuple[int, ...] | None, dtype: str
) -> None:  # fmt: skip
    stated = str(DTYPES[dtype]).removeprefix("torch.")
    folder, tensors = fine_grained(tmp_path / "m", shape, tile, scale_dtype, scale_shape, torch_dtype=stated)
    each = spread(
        tensors["m.weight_scale_inv"].float().view(-1, -(-shape[1] // (tile or shape)[1])), tile or shape, shape
    )
    expected = (tensors["m.weight"].float() * each).to(DTYPES[dtype]).float()
    for block_bytes in (1 << 22, 1 << 12):
        assert torch.equal(decoded(matrix(folder), block_bytes), expected)


@pytest.fixture(scope="session")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A small Llama in fine-grained FP8, its head, embeddings and norms dense, as DeepSeek and Qwen release theirs."""
    root = tmp_path_factory.mktemp("fp8")

    def build(dtype: str = "bf16") -> Path:
        folder = root / dtype
        if not folder.exists():
            torch.manual_seed(0)
            config = transformers.LlamaConfig(
                vocab_size=131, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=False,
            )  # fmt: skip
            model = transformers.LlamaForCausalLM(config).to(DTYPES[dtype])
            tensors: Tensors = {}
            for name, tensor in model.state_dict().items():
                if "_proj" in name:
                    tensors[name], tensors[f"{name}_scale_inv"] = quantized(tensor, (128, 128), torch.float32)
                else:
                    tensors[name] = tensor
            facts = config.to_dict() | {
                "architectures": ["LlamaForCausalLM"],
                "torch_dtype": str(DTYPES[dtype]).removeprefix("torch."),
                "quantization_config": {
                    "quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3",
                },
            }  # fmt: skip
            save_plain_model(folder, tensors, **{key: value for key, value in facts.items() if key != "model_type"})
        return folder

    return build


def adapter_for(folder: Path, out: Path, *, strength: float = 0.02) -> Path:
    """A LoRA on every FP8 matrix of a model, whose update is about 3% of the weights."""
    names = [name for name in stored_tensors(folder) if name.endswith("_proj.weight")]
    shapes = {name.removesuffix(".weight"): stored_tensors(folder)[name].shape for name in names}
    return save_plain_adapter(out, shapes, r=4, lora_alpha=strength * 4)  # type: ignore[arg-type]


def test_a_dequantized_model_is_what_transformers_reads(fp8: Callable[..., Path], tmp_path: Path) -> None:
    adapter = adapter_for(fp8(), tmp_path / "adapter", strength=0)
    out = loratool.merge(adapter, fp8(), out=tmp_path / "out", dequantize=True, allow_no_op=True).out
    theirs = load(fp8(), "llama", auto=transformers.AutoModelForCausalLM).state_dict()
    ours = stored_tensors(out)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(as_torch(ours[name]), theirs[name]) for name in theirs)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


# Merging


def deltas(adapter: Path) -> dict[str, torch.Tensor]:
    factors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    modules = {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for key in factors if "lora_A" in key
    }
    return {
        f"{m}.weight": factors[f"base_model.model.{m}.lora_B.weight"]
        @ factors[f"base_model.model.{m}.lora_A.weight"]
        * (config["lora_alpha"] / config["r"])
        for m in modules
    }


def test_a_merge_keeps_the_scales_and_delivers_the_update(fp8: Callable[..., Path], tmp_path: Path) -> None:
    base, adapter = fp8(), adapter_for(fp8(), tmp_path / "adapter")
    result = loratool.merge(adapter, base, out=tmp_path / "out", undo=True)
    before, after = stored_tensors(base), stored_tensors(result.out)
    assert {name for name in before if before[name] != after[name]} == {target.name for target in result.plan.targets}
    assert (base / "config.json").read_bytes() == (result.out / "config.json").read_bytes()
    sums = torch.zeros(2, dtype=torch.float64)
    for name, delta in deltas(adapter).items():
        old, new = (decoded(matrix(folder, name)).double() for folder in (base, result.out))
        sums += torch.stack([((new - old) * delta).sum(), (delta.double() ** 2).sum()])
    assert float(sums[0] / sums[1]) == pytest.approx(1, abs=0.03)
    assert result.delivery is not None
    assert result.delivery.share == pytest.approx(float(sums[0] / sums[1]), abs=1e-3)
    assert (
        load(result.out, "llama", auto=transformers.AutoModelForCausalLM)(torch.arange(9)[None]).logits.isfinite().all()
    )


def test_a_merge_is_taken_out_bit_for_bit_with_the_base_gone(fp8: Callable[..., Path], tmp_path: Path) -> None:
    base = shutil.copytree(fp8(), tmp_path / "base")
    expected, adapter = digest(base), adapter_for(base, tmp_path / "adapter")
    result = loratool.merge(adapter, base, out=tmp_path / "out", undo=True)
    assert loratool.verify(result.out).replayed == "base"
    assert result.undo_file is not None
    assert result.undo_file.stat().st_size < 0.12 * result.plan.touched_bytes
    shutil.rmtree(base)
    assert loratool.unmerge(result.out, out=tmp_path / "back").method == "undo"
    assert digest(tmp_path / "back") == expected


def test_in_place_and_from_the_base(fp8: Callable[..., Path], tmp_path: Path) -> None:
    base, model = fp8(), shutil.copytree(fp8(), tmp_path / "model")
    adapter, expected = adapter_for(base, tmp_path / "adapter"), digest(base)
    loratool.merge(adapter, model, in_place=True)
    assert digest(model) != expected
    loratool.unmerge(model, in_place=True)
    assert digest(model) == expected
    loratool.base_add("tiny", base)
    merged = loratool.merge(adapter, "tiny", out=tmp_path / "out")
    assert loratool.unmerge(merged.out, out=tmp_path / "back").method == "base"
    assert digest(tmp_path / "back") == expected


def test_equal_merges_give_equal_bytes(fp8: Callable[..., Path], tmp_path: Path) -> None:
    adapter = adapter_for(fp8(), tmp_path / "adapter")
    one, other = (loratool.merge(adapter, fp8(), out=tmp_path / name, undo=True).out for name in ("one", "other"))
    assert digest(one) == digest(other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantizing_on_the_way_is_the_decoded_number_plus_the_update_rounded_once(
    fp8: Callable[..., Path], tmp_path: Path, dtype: str
) -> None:
    base, adapter = fp8(dtype), adapter_for(fp8(dtype), tmp_path / "adapter")
    out = stored_tensors(loratool.merge(adapter, base, out=tmp_path / "out", dequantize=True).out)
    for name, delta in deltas(adapter).items():
        expected = (decoded(matrix(base, name)) + delta).to(DTYPES[dtype])
        assert torch.equal(as_torch(out[name]), expected), name
    assert not [name for name in out if "scale" in name]


def test_dense_modules_of_an_fp8_model_are_merged_into_densely(fp8: Callable[..., Path], tmp_path: Path) -> None:
    adapter = save_plain_adapter(tmp_path / "adapter", {"lm_head": (131, 128)})
    result = loratool.merge(adapter, fp8(), out=tmp_path / "out")
    before, after = stored_tensors(fp8()), stored_tensors(result.out)
    assert [name for name in before if before[name] != after[name]] == ["lm_head.weight"]
    assert set(result.deliveries) == {"lm_head.weight"}


def test_no_code_becomes_nan_and_zeros_keep_their_sign(tmp_path: Path) -> None:
    codes, scales = quantized(random_weight((256, 256), torch.float32), (128, 128), torch.float32)
    raw = codes.view(torch.uint8)
    raw[::5] = 0x80
    raw[1::5] = 0x7E
    raw[2::5] = 0xFE
    scales[0, 1] = 0
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    folder = save_plain_model(
        tmp_path / "m", {"m.weight": codes, "m.weight_scale_inv": scales}, quantization_config=quantization
    )
    weight, rows = matrix(folder), range(256)
    (part,) = parts_of(weight, rows)
    change = torch.randn(256, 256, generator=torch.Generator().manual_seed(1)) * 0.05
    change[:, ::2] = 0
    weight.load("cpu").encode(rows, change.clone(), (part,), Rounding(1))
    after = part.view(256, 256)
    assert not ((after & 0x7F) == 0x7F).any()
    assert torch.equal(after[:, ::2], raw[:, ::2])
    assert torch.equal(after[:128, 128:], raw[:128, 128:])  # nothing can be added to a tile of scale 0
    assert (after != raw).float().mean() > 0.2


# What is refused


def damaged(**changes: torch.Tensor | None) -> Callable[[Tensors], Mapping[str, torch.Tensor]]:
    def damage(tensors: Tensors) -> Mapping[str, torch.Tensor]:
        names = {name: f"m.{name}" for name in changes}
        return tensors | {names[name]: tensor for name, tensor in changes.items() if tensor is not None}

    return damage


NAN = torch.tensor([[float("nan"), 1.0]])


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (damaged(weight_scale_inv=torch.ones(3, 1)), CheckpointError, r"\[3, 1\], which fits no tiles of 'm.weight'"),
        (damaged(weight_scale_inv=torch.ones(128)), CheckpointError, "fits no tiles"),
        (damaged(weight_scale_inv=NAN), CheckpointError, "NaN or infinity"),
        (
            damaged(weight_scale=torch.ones(1)),
            CheckpointError,
            "scales in both 'm.weight_scale_inv' and 'm.weight_scale'",
        ),
        (damaged(weight_scale_inv=torch.ones(1, 2, dtype=torch.int32)), UnsupportedError, "stored as F8_E4M3"),
        (damaged(weight=torch.full((128, 256), float("nan")).to(FP8)), CheckpointError, "'m.weight'.* holds NaN"),
        (lambda tensors: {"m.weight": tensors["m.weight"]}, UnsupportedError, r"stored as F8_E4M3 \[128, 256\]"),
    ],
)
def test_a_damaged_matrix_is_refused_and_nothing_is_written(
    tmp_path: Path, damage: Callable[[Tensors], Tensors], error: type[LoratoolError], message: str
) -> None:
    codes, scales = quantized(random_weight((128, 256), torch.float32), (128, 128), torch.float32)
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    tensors = damage({"m.weight": codes, "m.weight_scale_inv": scales})
    base = save_plain_model(tmp_path / "base", tensors, quantization_config=quantization)
    adapter = save_plain_adapter(tmp_path / "adapter", {"m": (128, 256)})
    with pytest.raises(error, match=message):
        loratool.merge(adapter, base, out=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {}},
        {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": 3},
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        {"quant_method": "fbgemm_fp8"},
    ],
    ids=str,
)
def test_another_configuration_is_refused_by_its_name(tmp_path: Path, quantization: dict[str, Any]) -> None:
    codes, scales = quantized(random_weight((128, 128), torch.float32), (128, 128), torch.float32)
    tensors = {"m.weight": codes, "m.weight_scale": scales}
    base = save_plain_model(tmp_path / "base", tensors, quantization_config=quantization)
    adapter = save_plain_adapter(tmp_path / "adapter", {"m": (128, 128)})
    with pytest.raises(UnsupportedError, match=quantization["quant_method"]):
        loratool.merge(adapter, base, out=tmp_path / "out")


def test_an_fp8_model_is_not_quantized_again(fp8: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="is already quantized"):
        loratool.quantize(fp8(), out=tmp_path / "out")
