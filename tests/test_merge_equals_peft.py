"""The merged bytes equal PEFT's `merge_and_unload` and `save_pretrained`, or the fp32 sum rounded once."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_adapters import (
    as_peft_folder,
    copy_with,
    merge_by_peft,
    merged_once_rounded,
    save_plain_adapter,
    save_single_file,
)
from tiny_models import (
    ARCHITECTURES,
    DTYPES,
    Layout,
    StoredTensor,
    as_stored,
    assert_same_tensors,
    digest,
    load,
    save_plain_model,
    stored_in_file,
    stored_tensors,
)

import loratool

if TYPE_CHECKING:
    from tiny_adapters import TinyAdapters
    from tiny_models import TinyModels

SHAPES_OF_THE_FIELD = (
    "llama",
    "mistral",
    "qwen2",
    "gemma",
    "gpt2",
    "gpt2-without-prefix",
    "gpt2-untied",
    "opt",
    "gpt_neox",
    "bert",
    "bert-headless",
)
PIRATE = Path(__file__).parents[1] / "examples" / "pirate"


def in_the_bases_names(
    merged: Mapping[str, StoredTensor], base: Mapping[str, StoredTensor], architecture: str
) -> dict[str, StoredTensor]:
    """Return PEFT's tensors under the names of the base, with those it does not load as they are."""
    prefix = ARCHITECTURES[architecture].prefix_dropped
    renamed = {name.removeprefix(prefix): tensor for name, tensor in merged.items()}
    assert set(renamed) <= set(base)
    return dict(base) | renamed


def expect_pefts_bytes(
    models: TinyModels,
    adapters: TinyAdapters,
    adapter: Path,
    out: Path,
    *,
    architecture: str = "llama",
    dtype: str = "bf16",
    layout: Layout = "single",
) -> None:
    """Merge into the tiny model and compare every tensor with PEFT's; the merge must have changed some."""
    base = models.folder(architecture, dtype, layout)
    loratool.merge([adapter], into=base, out=out)
    before, after = stored_tensors(base), stored_tensors(out)
    theirs = adapters.merged_by_peft(architecture, dtype, adapter)
    assert_same_tensors(after, in_the_bases_names(theirs, before, architecture))
    assert any(after[name].data != before[name].data for name in before)


@pytest.mark.parametrize("layout", ["single", "sharded"])
@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("architecture", SHAPES_OF_THE_FIELD)
def test_every_architecture_type_and_layout_equals_peft(
    architecture: str,
    dtype: str,
    layout: Layout,
    tiny_models: TinyModels,
    tiny_adapters: TinyAdapters,
    tmp_path: Path,
) -> None:
    adapter = tiny_adapters.folder(architecture, r=5, lora_alpha=7)
    expect_pefts_bytes(
        tiny_models,
        tiny_adapters,
        adapter,
        tmp_path / "out",
        architecture=architecture,
        dtype=dtype,
        layout=layout,
    )


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("r", "alpha", "rslora"),
    [
        (1, 1, False),
        (3, 1, False),
        (6, 32, False),
        (8, 12, True),
        (10, 7, True),
        (64, 100, False),
        (256, 48, True),
    ],
)
def test_any_scaling_and_rank_equals_peft(
    r: int,
    alpha: int,
    rslora: bool,
    dtype: str,
    tiny_models: TinyModels,
    tiny_adapters: TinyAdapters,
    tmp_path: Path,
) -> None:
    adapter = tiny_adapters.folder("llama", r=r, lora_alpha=alpha, use_rslora=rslora)
    expect_pefts_bytes(tiny_models, tiny_adapters, adapter, tmp_path / "out", dtype=dtype)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("r", [5, 64])
def test_odd_shapes_equal_peft(
    r: int, dtype: str, tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    adapter = tiny_adapters.folder("llama-odd", r=r, lora_alpha=3)
    expect_pefts_bytes(
        tiny_models,
        tiny_adapters,
        adapter,
        tmp_path / "out",
        architecture="llama-odd",
        dtype=dtype,
        layout="sharded",
    )


@pytest.mark.parametrize(
    ("architecture", "dtype", "r"),
    [
        ("llama-many-blocks", "bf16", 16),
        ("llama-many-blocks", "fp32", 64),
        ("llama-many-blocks", "fp32", 256),
        ("llama-many-blocks", "fp16", 33),
        ("gpt2-many-blocks", "bf16", 16),
        ("gpt2-many-blocks", "fp32", 64),
    ],
)
def test_matrices_of_many_row_blocks_equal_peft(
    architecture: str,
    dtype: str,
    r: int,
    tiny_models: TinyModels,
    tiny_adapters: TinyAdapters,
    tmp_path: Path,
) -> None:
    adapter = tiny_adapters.folder(architecture, r=r, lora_alpha=19)
    expect_pefts_bytes(tiny_models, tiny_adapters, adapter, tmp_path / "out", architecture=architecture, dtype=dtype)


def test_matrices_of_a_few_odd_elements_are_summed_as_a_new_product_is(tmp_path: Path) -> None:
    """A BLAS sums the last elements of a row in another order where the product does not begin where new memory does."""
    generator = torch.Generator().manual_seed(8)
    shapes = {
        f"model.layers.{layer}.mlp.up_proj": shape for layer, shape in enumerate([(7, 5), (1, 130), (33, 5), (3, 770)])
    }
    weights = {f"{module}.weight": torch.randn(shape, generator=generator) for module, shape in shapes.items()}
    base = save_plain_model(tmp_path / "base", weights)
    for r in (8, 33):
        adapter = save_plain_adapter(tmp_path / f"adapter-{r}", shapes, r=r, lora_alpha=10_000)
        out = loratool.merge([adapter], into=base, out=tmp_path / f"out-{r}").out
        assert_same_tensors(stored_tensors(out), merged_once_rounded(stored_tensors(base), [(adapter, 1.0)]))


@pytest.mark.parametrize("r", [5, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_a_last_block_of_a_few_rows_is_summed_like_the_rest(
    fan_in_fan_out: bool, dtype: torch.dtype, r: int, tmp_path: Path
) -> None:
    """A BLAS takes another kernel for a few rows or columns, with another last bit.

    Rows are 4 or 2 KiB, and a row, two or more remain after blocks of any power of two up to 1024 rows.
    """
    generator = torch.Generator().manual_seed(6)
    heights = [1, 2, 3, 5, 1025, 1026, 1027, 1031, 1035] if not fan_in_fan_out else [1025, 1026, 1031, 1035]
    modules = {f"transformer.h.{layer}.mlp.c_fc": height for layer, height in enumerate(heights)}
    weights = {
        f"{module}.weight": torch.randn(height, 1024, generator=generator).to(dtype)
        for module, height in modules.items()
    }
    if fan_in_fan_out:  # a Conv1D always has a bias, and by it is told from a Linear of the transposed shape
        weights |= {f"{module}.bias": torch.zeros(1024, dtype=dtype) for module in modules}
    model_type = "gpt2" if fan_in_fan_out else "llama"
    base = save_plain_model(tmp_path / "base", weights, model_type=model_type)
    shapes = {module: (1024, height) if fan_in_fan_out else (height, 1024) for module, height in modules.items()}
    adapter = save_plain_adapter(tmp_path / "adapter", shapes, r=r, lora_alpha=7, fan_in_fan_out=fan_in_fan_out)
    loratool.merge([adapter], into=base, out=tmp_path / "out")
    expected = merged_once_rounded(stored_tensors(base), [(adapter, 1.0)], fan_in_fan_out=fan_in_fan_out)
    assert_same_tensors(stored_tensors(tmp_path / "out"), expected)


PATTERNS: dict[str, dict[str, Any]] = {
    "rank_pattern by name": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 9}},
    "alpha_pattern from the start": {"alpha_pattern": {"^model.layers.0.self_attn.v_proj": 3}},
    "alpha_pattern as regex": {"alpha_pattern": {r"layers\.1\..*_proj": 5, r"[qk]_proj": 11}},
    "alpha_pattern that matches nothing": {"alpha_pattern": {"proj": 5, "model.layers.0": 7, "q_pro.": 3}},
    "rank and alpha patterns": {"rank_pattern": {"o_proj": 7}, "alpha_pattern": {"o_proj": 3, "up_proj": 5}},
    "patterns with rslora": {
        "use_rslora": True,
        "rank_pattern": {"k_proj": 3},
        "alpha_pattern": {"v_proj": 5},
    },
    "patterns that overlap": {"alpha_pattern": {"q_proj": 3, "layers.0.self_attn.q_proj": 11, ".*q_proj": 23}},
    "target_modules as regex": {"target_modules": r".*layers\.1\.mlp\.(up|down)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "exclude_modules as list": {"target_modules": "all-linear", "exclude_modules": ["down_proj", "q_proj"]},
    "exclude_modules as regex": {"target_modules": "all-linear", "exclude_modules": r".*layers\.0\..*"},
    "layers_to_transform": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "layers_to_transform as number": {"layers_to_transform": 0},
    "layers_pattern as list": {"layers_to_transform": [0], "layers_pattern": ["h", "layers"]},
    "target_modules by path": {"target_modules": ["layers.0.self_attn.q_proj", "mlp.up_proj"]},
    "the untied head": {"target_modules": ["lm_head", "q_proj"]},
    "dropout and task type": {"lora_dropout": 0.25, "task_type": "CAUSAL_LM"},
}


@pytest.mark.parametrize("options", PATTERNS.values(), ids=PATTERNS.keys())
def test_every_option_that_changes_numbers_equals_peft(
    options: dict[str, Any], tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    adapter = tiny_adapters.folder("llama", **({"r": 4, "lora_alpha": 6} | options))
    expect_pefts_bytes(tiny_models, tiny_adapters, adapter, tmp_path / "out", layout="sharded")


@pytest.mark.parametrize("first", ["q_proj", "layers.0.self_attn.q_proj"])
def test_of_overlapping_patterns_the_first_in_the_file_counts(
    first: str, tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    written = copy_with(tiny_adapters.folder("llama"), tmp_path / f"first-{first}")
    facts = json.loads((written / "adapter_config.json").read_text())
    patterns = {"q_proj": 3, "layers.0.self_attn.q_proj": 29}
    facts["alpha_pattern"] = {first: patterns[first]} | patterns
    (written / "adapter_config.json").write_text(json.dumps(facts))
    expect_pefts_bytes(tiny_models, tiny_adapters, written, tmp_path / "out", dtype="fp32")


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
def test_an_initialisation_that_leaves_the_base_alone_changes_nothing(
    init: bool | str, tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    adapter = copy_with(tiny_adapters.folder("llama"), tmp_path / f"init-{init}", init_lora_weights=init)
    expect_pefts_bytes(tiny_models, tiny_adapters, adapter, tmp_path / "out")


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize(
    ("architecture", "targets"),
    [
        ("gpt2", ["c_attn", "c_proj", "c_fc"]),
        ("gpt2", ["attn.c_proj"]),
        ("gpt2-untied", ["attn.c_proj", "lm_head"]),
        ("llama", ["o_proj"]),
        ("llama", ["q_proj", "k_proj"]),
    ],
)
def test_the_layout_of_the_weight_decides_and_not_a_wrong_fan_in_fan_out(
    architecture: str,
    targets: list[str],
    flag: bool,
    tiny_models: TinyModels,
    tiny_adapters: TinyAdapters,
    tmp_path: Path,
) -> None:
    """PEFT corrects the flag layer by layer, so files exist with either; a square weight does not tell."""
    right = tiny_adapters.folder(architecture, target_modules=targets)
    adapter = copy_with(right, tmp_path / f"{architecture}-{'-'.join(targets)}-{flag}", fan_in_fan_out=flag)
    expect_pefts_bytes(tiny_models, tiny_adapters, adapter, tmp_path / "out", architecture=architecture)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("weight", [0.5, 0.3, -1.0, 1.7])
def test_a_weight_multiplies_the_scaling_as_in_peft(
    weight: float, dtype: str, tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    base = tiny_models.folder("llama", dtype)
    adapter = tiny_adapters.folder("llama", r=6, lora_alpha=5)
    loratool.merge([(adapter, weight)], into=base, out=tmp_path / "out")
    theirs = merge_by_peft(load(base, "llama"), adapter, tmp_path / "peft", weight=weight)
    assert_same_tensors(stored_tensors(tmp_path / "out"), theirs)


def three_adapters(adapters: TinyAdapters, architecture: str = "llama") -> list[tuple[Path, float]]:
    """Adapters of unlike ranks and scalings whose targets overlap in part."""
    return [
        (adapters.folder(architecture, seed=1, r=4, lora_alpha=6), 0.7),
        (
            adapters.folder(architecture, seed=2, r=7, lora_alpha=5, target_modules=["q_proj", "down_proj"]),
            -0.45,
        ),
        (adapters.folder(architecture, seed=3, r=3, lora_alpha=1, use_rslora=True), 1.0),
    ]


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_several_adapters_are_added_in_fp32_and_rounded_once(
    dtype: str, tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    base = tiny_models.folder("llama", dtype, "sharded")
    weighted = three_adapters(tiny_adapters)
    loratool.merge(weighted, into=base, out=tmp_path / "out")
    assert_same_tensors(stored_tensors(tmp_path / "out"), merged_once_rounded(stored_tensors(base), weighted))


def test_several_adapters_on_conv1d_are_added_in_fp32_and_rounded_once(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    base = tiny_models.folder("gpt2", "bf16")
    weighted = [
        (tiny_adapters.folder("gpt2", seed=1), 0.6),
        (tiny_adapters.folder("gpt2", seed=2, r=9), -0.3),
    ]
    loratool.merge(weighted, into=base, out=tmp_path / "out")
    expected = merged_once_rounded(stored_tensors(base), weighted, fan_in_fan_out=True)
    assert_same_tensors(stored_tensors(tmp_path / "out"), expected)


def test_two_adapters_into_fp32_equal_pefts_merge_of_both_in_that_order(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    base = tiny_models.folder("llama", "fp32")
    first, second = tiny_adapters.folder("llama", seed=1, r=5), tiny_adapters.folder("llama", seed=2, r=11)
    loratool.merge([first, second], into=base, out=tmp_path / "out")
    wrapped = peft.PeftModel.from_pretrained(load(base, "llama"), first)
    wrapped.load_adapter(second, "second")
    wrapped.merge_and_unload(adapter_names=["default", "second"]).save_pretrained(tmp_path / "peft")
    assert_same_tensors(stored_tensors(tmp_path / "out"), stored_tensors(tmp_path / "peft"))


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("factors", ["bf16", "fp16"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_half_precision_factors_are_computed_in_fp32_and_rounded_once(
    architecture: str,
    factors: str,
    dtype: str,
    tiny_models: TinyModels,
    tiny_adapters: TinyAdapters,
    tmp_path: Path,
) -> None:
    base = tiny_models.folder(architecture, dtype)
    adapter = tiny_adapters.folder(architecture, r=5, lora_alpha=7, factors=factors)
    stored = {tensor.dtype for tensor in stored_in_file(adapter / "adapter_model.safetensors").values()}
    assert stored == {factors.upper().replace("FP", "F")}
    loratool.merge([adapter], into=base, out=tmp_path / "out")
    merged = stored_tensors(tmp_path / "out")
    expected = merged_once_rounded(stored_tensors(base), [(adapter, 1.0)], fan_in_fan_out=architecture == "gpt2")
    assert_same_tensors(merged, expected)
    assert_same_tensors(merged, tiny_adapters.merged_by_peft(architecture, dtype, adapter), "from PEFT's")


def test_tensors_of_several_types_in_one_file_each_keep_their_own(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    types = {"q_proj": torch.bfloat16, "k_proj": torch.float16, "v_proj": torch.float32}
    weights = {
        f"model.layers.0.self_attn.{name}.weight": torch.randn(33, 47, generator=generator).to(dtype)
        for name, dtype in types.items()
    }
    base = save_plain_model(tmp_path / "base", weights | {"model.norm.weight": torch.ones(47)})
    modules = {f"model.layers.0.self_attn.{name}": (33, 47) for name in types}
    adapter = save_plain_adapter(tmp_path / "adapter", modules, r=3, lora_alpha=10)
    loratool.merge([adapter], into=base, out=tmp_path / "out")
    expected = merged_once_rounded(stored_tensors(base), [(adapter, 1.0)])
    assert_same_tensors(stored_tensors(tmp_path / "out"), expected)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_zeros_of_either_sign_subnormals_and_the_largest_numbers_equal_peft(
    dtype: str, tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    """Half of the adapter's rows are zero: there PEFT adds 0.0, which changes -0.0 and nothing else."""
    limits = torch.finfo(DTYPES[dtype])
    special = [
        0.0,
        -0.0,
        limits.smallest_normal / 4,
        -limits.smallest_normal / 2,
        limits.max,
        limits.min,
        limits.eps,
    ]
    base = tmp_path / "base"
    shutil.copytree(tiny_models.folder("llama", dtype), base)
    tensors = load_file(base / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        flat = tensors[name].view(-1)
        flat[::3] = torch.tensor(special).to(DTYPES[dtype]).repeat(len(flat))[: len(flat[::3])]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    adapter = copy_with(tiny_adapters.folder("llama"), tmp_path / "adapter")
    factors = load_file(adapter / "adapter_model.safetensors")
    for key in [key for key in factors if ".lora_B." in key]:
        factors[key][::2] = 0
    save_file(factors, adapter / "adapter_model.safetensors", {"format": "pt"})
    loratool.merge([adapter], into=base, out=tmp_path / "out")
    theirs = merge_by_peft(load(base, "llama"), adapter, tmp_path / "peft")
    assert_same_tensors(stored_tensors(tmp_path / "out"), theirs)


@pytest.mark.parametrize("suffix", ["safetensors", "st"])
def test_a_single_file_adapter_merges_as_its_directory_does(
    suffix: str, tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    base = tiny_models.folder("llama", "bf16")
    directory = tiny_adapters.folder("llama", r=6, lora_alpha=5, alpha_pattern={"v_proj": 3})
    file = save_single_file(directory, tmp_path / f"pirate.{suffix}")
    loratool.merge([str(file)], into=str(base), out=tmp_path / "out")
    expected = tiny_adapters.merged_by_peft("llama", "bf16", directory)
    assert_same_tensors(stored_tensors(tmp_path / "out"), expected)


@pytest.mark.parametrize("architecture", ["llama", "gpt2-without-prefix"])
def test_in_place_stores_what_out_stores(
    architecture: str, tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    base = tiny_models.folder(architecture, "bf16", "sharded")
    adapter = tiny_adapters.folder(architecture)
    copy = shutil.copytree(base, tmp_path / "copy")
    loratool.merge([adapter], into=copy, in_place=True)
    loratool.merge([adapter], into=base, out=tmp_path / "out")
    assert_same_tensors(stored_tensors(copy), stored_tensors(tmp_path / "out"))


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_the_base_stays_and_everything_beside_its_weights_comes_along(
    layout: Layout, tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    base = tiny_models.folder("gpt2", "bf16", layout)
    before = digest(base)
    result = loratool.merge([tiny_adapters.folder("gpt2")], into=base, out=tmp_path / "out")
    assert result.out == tmp_path / "out"
    assert digest(base) == before
    after = digest(tmp_path / "out")
    weights = {name for name in before if name.endswith(".safetensors")}
    assert set(before) <= set(after)
    assert {name: after[name] for name in set(before) - weights} == {
        name: before[name] for name in set(before) - weights
    }
    assert {name for name in after if name.endswith(".safetensors")} == weights
    for name in weights:
        ours, theirs = stored_in_file(tmp_path / "out" / name), stored_in_file(base / name)
        assert {key: (tensor.dtype, tensor.shape) for key, tensor in ours.items()} == {
            key: (tensor.dtype, tensor.shape) for key, tensor in theirs.items()
        }


@pytest.mark.parametrize("architecture", SHAPES_OF_THE_FIELD)
def test_transformers_and_peft_load_the_merged_model(
    architecture: str, tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    base = tiny_models.folder(architecture, "bf16", "sharded")
    adapter = tiny_adapters.folder(architecture, r=5, lora_alpha=7)
    loratool.merge([adapter], into=base, out=tmp_path / "out")
    model, report = ARCHITECTURES[architecture].auto.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert not report["unexpected_keys"]
    theirs = peft.PeftModel.from_pretrained(load(base, architecture), adapter).merge_and_unload()
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        ours = model(input_ids=tokens).to_tuple()[0]
        assert torch.equal(ours, theirs(input_ids=tokens).to_tuple()[0])
        second = peft.PeftModel.from_pretrained(model, tiny_adapters.folder(architecture, seed=2))
        assert not torch.equal(second(input_ids=tokens).to_tuple()[0], ours)


def test_embeddings_that_are_tied_stay_tied(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    base = tiny_models.folder("llama-tied", "bf16")
    adapter = tiny_adapters.folder("llama-tied")
    loratool.merge([adapter], into=base, out=tmp_path / "out")
    assert "lm_head.weight" not in stored_tensors(tmp_path / "out")
    model = load(tmp_path / "out", "llama-tied")
    assert model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def test_a_tied_head_that_is_stored_again_comes_along(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_models.folder("llama-tied", "bf16"), tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    adapter = tiny_adapters.folder("llama-tied")
    loratool.merge([adapter], into=base, out=tmp_path / "out")
    merged = stored_tensors(tmp_path / "out")
    assert merged["lm_head.weight"] == merged["model.embed_tokens.weight"]
    expected = tiny_adapters.merged_by_peft("llama-tied", "bf16", adapter)
    assert_same_tensors(merged, expected | {"lm_head.weight": as_stored(tensors["lm_head.weight"])})


@pytest.mark.timeout(600)
def test_smollm2_with_the_pirate_adapter_equals_peft(tmp_path: Path) -> None:
    folder = os.environ.get("LORATOOL_SMOLLM2")
    if not folder:
        pytest.skip("LORATOOL_SMOLLM2 does not name a folder with SmolLM2-135M-Instruct")
    shipped = PIRATE if PIRATE.exists() else PIRATE.with_suffix(".safetensors")
    adapter = as_peft_folder(shipped, tmp_path / "pirate")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    loratool.merge([shipped], into=folder, out=tmp_path / "out")
    theirs = merge_by_peft(model, adapter, tmp_path / "peft")
    assert_same_tensors(stored_tensors(tmp_path / "out"), theirs)
