"""What an adapter trains beside its factors: ``lora_bias`` and rows of embeddings, merged to PEFT's bytes and taken out again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny_adapters import TinyAdapters, copy_with, merge_by_peft, save_peft_adapter, save_plain_adapter
from tiny_models import DTYPES, TinyModels, as_torch, assert_same_tensors, load, stored_tensors

import loratool
from loratool.cli import cli
from loratool.errors import LoratoolError
from loratool.formats.read import read_adapter

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
EMBEDDING = "model.embed_tokens"
ROWS = f"{PREFIX}{EMBEDDING}.token_adapter.trainable_tokens_delta"
BIAS = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_B.bias"
COPY = f"{PREFIX}lm_head.base_layer.weight"
Tensors = dict[str, torch.Tensor]

PLAIN: Tensors = {
    f"{PREFIX}model.layers.0.self_attn.k_proj.lora_A.weight": torch.ones(4, 56),
    f"{PREFIX}model.layers.0.self_attn.k_proj.lora_B.weight": torch.ones(28, 4),
    f"{PREFIX}model.layers.0.self_attn.k_proj.lora_B.bias": torch.ones(28),
}
"""A LoRA with a bias of another module."""

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora_bias": ("qwen2", {"lora_bias": True, "target_modules": ["q_proj", "v_proj"], "lora_alpha": 7}),
    "lora_bias with patterns": (
        "bert", {"lora_bias": True, "target_modules": ["query", "dense"], "use_rslora": True, "rank_pattern": {"query": 3}},
    ),
    "GPT-2's lora_bias": ("gpt2", {"lora_bias": True, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "rows of an untied embedding": ("llama", {"trainable_token_indices": [5, 1, 130]}),
    "rows of a tied embedding": ("llama-tied", {"trainable_token_indices": [0, 7]}),
    "rows by module": ("llama", {"trainable_token_indices": {"embed_tokens": [3, 2], "lm_head": [4]}}),
    "rows of GPT-2": (
        "gpt2", {"trainable_token_indices": [9, 8], "target_modules": ["c_attn"], "fan_in_fan_out": True},
    ),
    "rows of GPT-2's positions": (
        "gpt2", {"trainable_token_indices": {"wpe": [3]}, "target_modules": ["c_attn"], "fan_in_fan_out": True},
    ),
    "rows beside a head that is held whole": (
        "llama", {"trainable_token_indices": [5], "modules_to_save": ["lm_head"]},
    ),
}  # fmt: skip


def same(tensors: Tensors) -> Tensors:
    return tensors


ALONE: dict[str, tuple[str, peft.PeftConfig]] = {
    "BEFT": ("qwen2", peft.BeftConfig(target_modules=["q_proj", "k_proj"])),
    "BEFT beside a head": ("bert", peft.BeftConfig(target_modules=["query", "dense"], modules_to_save=["classifier"])),
    "RMS norms": ("llama", peft.LNTuningConfig(target_modules=["input_layernorm", "model.norm"])),
    "layer norms with biases": ("gpt2", peft.LNTuningConfig(target_modules=["ln_1", "ln_f"])),
    "tokens of an untied embedding": ("llama", peft.TrainableTokensConfig(token_indices=[5, 1])),
    "tokens of a tied embedding": ("llama-tied", peft.TrainableTokensConfig(token_indices=[5, 1])),
    "tokens of GPT-2": ("gpt2", peft.TrainableTokensConfig(token_indices=[0, 130])),
}


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("case", ALONE)
def test_what_is_trained_alone_has_pefts_bytes_and_comes_out_again_bit_for_bit(
    case: str, dtype: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    architecture, config = ALONE[case]
    base = tiny_models.folder(architecture, dtype)
    model = load(tiny_models.folder(architecture, "fp32"), architecture)
    adapter = save_peft_adapter(model, config, tmp_path / "adapter", save_embedding_layers=False)
    record = loratool.add(adapter, name="mine").record
    assert (record.kind, record.rank, record.alpha) == (str(config.peft_type.value).lower(), None, None)
    merged = loratool.merge("mine", into=base, out=tmp_path / "merged", undo=True).out
    theirs = merge_by_peft(load(base, architecture), adapter)
    before, ours = stored_tensors(base), stored_tensors(merged)
    for name, tensor in ours.items():
        expected = next(
            theirs[each] for each in (name, f"{name.rpartition('.')[0]}.modules_to_save.default") if each in theirs
        )
        assert torch.equal(as_torch(tensor), as_torch(expected).to(DTYPES[dtype])), name
    assert {name for name in ours if ours[name] != before[name]} == set(read_adapter(adapter).changes)
    assert_same_tensors(stored_tensors(loratool.unmerge(merged, out=tmp_path / "back").out), before)
    folder = loratool.export(loratool.export(adapter, tmp_path / "single.st"), tmp_path / "folder")
    assert_same_tensors(stored_tensors(loratool.merge(folder, into=base, out=tmp_path / "again").out), ours)
    again = merge_by_peft(load(base, architecture), folder)
    assert all(torch.equal(as_torch(again[name]), as_torch(tensor)) for name, tensor in theirs.items())


@pytest.mark.parametrize(
    ("case", "change", "config", "message"),
    [
        ("BEFT", lambda t: {n: v[:, :-1] for n, v in t.items()}, {}, r"shape \[27\], but .* has \[28\]"),
        ("BEFT", lambda t: {n: v.repeat(2, 1) for n, v in t.items()}, {}, "must be one vector"),
        ("BEFT", lambda t: {n: v * torch.nan for n, v in t.items()}, {}, "holds NaN or infinity"),
        ("RMS norms", lambda t: {n: v[:-1] for n, v in t.items()}, {}, r"shape \[63\], which has \[64\] there"),
        (
            "layer norms with biases",
            lambda t: {n: v for n, v in t.items() if "bias" in n},
            {},
            "no .*weight; .* incomplete",
        ),
        ("tokens of an untied embedding", same, {"token_indices": [5, 5]}, "lists the row 5 twice"),
        ("tokens of an untied embedding", same, {"token_indices": [5, 131]}, "row 131 .* which has 131 rows"),
        ("tokens of an untied embedding", same, {"token_indices": [5]}, "token_indices lists 1 rows"),
        ("tokens of an untied embedding", same, {"token_indices": None}, "must be a list of row numbers"),
    ],
)
def test_a_damaged_one_that_was_trained_alone_is_refused(
    case: str,
    change: Callable[[Tensors], Tensors],
    config: dict[str, Any],
    message: str,
    tiny_models: TinyModels,
    tmp_path: Path,
) -> None:
    architecture, trained = ALONE[case]
    model = load(tiny_models.folder(architecture, "fp32"), architecture)
    whole = save_peft_adapter(model, trained, tmp_path / "adapter", save_embedding_layers=False)
    damaged, base = changed(whole, tmp_path / "damaged", change, **config), tiny_models.folder(architecture)
    with pytest.raises(LoratoolError, match=message):
        loratool.merge(damaged, into=base, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("case", CASES)
def test_a_merge_has_pefts_bytes_and_comes_out_again_bit_for_bit(
    case: str, dtype: str, tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    architecture, options = CASES[case]
    adapter, base = tiny_adapters.folder(architecture, **options), tiny_models.folder(architecture, dtype)
    before = stored_tensors(base)
    merged = loratool.merge(adapter, into=base, out=tmp_path / "merged", undo=True)
    theirs = merge_by_peft(load(base, architecture), adapter, tmp_path / "peft")
    assert_same_tensors(stored_tensors(merged.out), theirs)
    changed = read_adapter(adapter).changes
    assert {name for name in changed if theirs.get(name) != before.get(name)} == set(changed)
    assert loratool.verify(merged.out).replayed == "base"
    assert_same_tensors(stored_tensors(loratool.unmerge(merged.out, out=tmp_path / "back").out), before)
    copy = shutil.copytree(base, tmp_path / "copy")
    loratool.merge(adapter, into=copy, in_place=True)
    assert_same_tensors(stored_tensors(copy), theirs)
    assert loratool.unmerge(copy, in_place=True).method == "undo"
    assert_same_tensors(stored_tensors(copy), before)


def test_a_head_that_is_tied_and_stored_gets_the_rows_too(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    tied = tiny_models.folder("llama-tied", "bf16")
    adapter = tiny_adapters.folder("llama-tied", trainable_token_indices=[0, 7])
    base = shutil.copytree(tied, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors[f"{EMBEDDING}.weight"].clone()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    merged = stored_tensors(loratool.merge(adapter, into=base, out=tmp_path / "merged").out)
    theirs = merge_by_peft(load(tied, "llama-tied"), adapter, tmp_path / "peft")
    assert merged["lm_head.weight"].data == merged[f"{EMBEDDING}.weight"].data == theirs[f"{EMBEDDING}.weight"].data
    back = loratool.unmerge(tmp_path / "merged", out=tmp_path / "back").out
    assert_same_tensors(stored_tensors(back), stored_tensors(base))
    untied = loratool.merge(adapter, into=tied, out=tmp_path / "untied", untie=True).out
    ours = stored_tensors(untied)
    assert ours[f"{EMBEDDING}.weight"].data == theirs[f"{EMBEDDING}.weight"].data
    assert ours["lm_head.weight"].data == stored_tensors(tied)[f"{EMBEDDING}.weight"].data


def test_a_weight_multiplies_the_bias_as_in_peft(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    adapter, base = tiny_adapters.folder("qwen2", **CASES["lora_bias"][1]), tiny_models.folder("qwen2", "fp32")
    merged = loratool.merge([(adapter, 0.5)], into=base, out=tmp_path / "merged")
    theirs = merge_by_peft(load(base, "qwen2"), adapter, tmp_path / "peft", weight=0.5)
    assert_same_tensors(stored_tensors(merged.out), theirs)


@pytest.mark.parametrize("case", ["lora_bias", "rows of an untied embedding"])
def test_a_model_that_is_quantized_in_the_merge_gets_them_too(
    case: str, tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    architecture, options = CASES[case]
    adapter, base = tiny_adapters.folder(architecture, **options), tiny_models.folder(architecture, "bf16")
    plain = stored_tensors(loratool.merge(adapter, into=base, out=tmp_path / "plain").out)
    small = stored_tensors(loratool.merge(adapter, into=base, out=tmp_path / "small", quantize="nf4").out)
    image = loratool.quantize(base, out=tmp_path / "image").out
    inside = stored_tensors(loratool.merge(adapter, into=image, out=tmp_path / "inside", undo=True).out)
    names = [name for name in read_adapter(adapter).changes if name.endswith(".bias") or "embed" in name]
    assert names
    assert all(small[name] == plain[name] == inside[name] for name in names)
    back = loratool.unmerge(tmp_path / "inside", out=tmp_path / "back").out
    assert_same_tensors(stored_tensors(back), stored_tensors(image))


@pytest.mark.parametrize("case", ["lora_bias", "rows by module"])
def test_what_is_exported_is_read_as_the_same_by_peft_and_by_loratool(
    case: str, tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    architecture, options = CASES[case]
    adapter, base = tiny_adapters.folder(architecture, **options), tiny_models.folder(architecture, "fp32")
    folder = loratool.export(loratool.export(adapter, tmp_path / "single.st"), tmp_path / "folder")
    assert load_file(folder / WEIGHTS).keys() == load_file(adapter / WEIGHTS).keys()
    theirs = merge_by_peft(load(base, architecture), folder, tmp_path / "peft")
    merged = loratool.merge(folder, into=base, out=tmp_path / "merged")
    assert_same_tensors(stored_tensors(merged.out), theirs)


def test_it_is_catalogued_with_its_rank_and_shown(tiny_adapters: TinyAdapters) -> None:
    adapter = tiny_adapters.folder("llama", trainable_token_indices=[5, 1], target_modules=["q_proj"])
    record = loratool.add(adapter, name="mine").record
    assert (record.kind, record.rank, record.alpha, record.scaling) == ("lora", 4, 8.0, 2.0)
    assert record.target_modules == ["embed_tokens", "q_proj"]
    assert CliRunner().invoke(cli, ["show", "mine"]).exit_code == 0


def changed(folder: Path, out: Path, change: Callable[[Tensors], Tensors], **config: Any) -> Path:
    copy_with(folder, out, **config)
    save_file({name: t.contiguous() for name, t in change(load_file(folder / WEIGHTS)).items()}, out / WEIGHTS)
    return out


DAMAGED: dict[str, tuple[str, Callable[[Tensors], Tensors], dict[str, Any], str]] = {
    "no bias": ("bias", lambda t: {n: v for n, v in t.items() if n != BIAS}, {}, "has no lora_B.bias; .* incomplete"),
    "a bias alone": (
        "bias", lambda t: {n: v for n, v in t.items() if ".weight" not in n} | PLAIN, {"target_modules": ["q_proj", "k_proj"]},
        "lora_B.bias and no factors; .* incomplete",
    ),
    "a bias of another length": ("bias", lambda t: t | {BIAS: t[BIAS][:-1]}, {}, r"\[55\] and its factors have 56 outputs"),
    "NaN in a bias": ("bias", lambda t: t | {BIAS: t[BIAS] * torch.nan}, {}, "holds NaN or infinity"),
    "biases that are not asked for": ("bias", same, {"lora_bias": False}, "PEFT would ignore it; set lora_bias to true"),
    "a text": ("bias", same, {"lora_bias": "true"}, "PEFT treats any text as true"),
    "no rows": ("rows", lambda t: {n: v for n, v in t.items() if n != ROWS}, {}, "which its file lacks; .* incomplete"),
    "too few rows": ("rows", lambda t: t | {ROWS: t[ROWS][:1]}, {}, r"\[1, 64\], and trainable_token_indices lists 2 rows"),
    "rows of another width": ("rows", lambda t: t | {ROWS: t[ROWS][:, :60]}, {}, "rows of 60 numbers, and the base's have 64"),
    "NaN in a row": ("rows", lambda t: t | {ROWS: t[ROWS] * torch.nan}, {}, "holds NaN or infinity"),
    "a row beyond the base's": ("rows", same, {"trainable_token_indices": [1, 131]}, "row 131 .* which has 131 rows; .*grow"),
    "a row before the first": ("rows", same, {"trainable_token_indices": [1, -1]}, "each at least 0"),
    "a row twice": ("rows", same, {"trainable_token_indices": [1, 1]}, "lists the row 1 twice"),
    "no row numbers": ("rows", same, {"trainable_token_indices": "all"}, "must be a list of row numbers"),
    "no list": ("rows", same, {"trainable_token_indices": None}, "does not say which"),
    "rows of another module": ("rows", same, {"trainable_token_indices": {"wte": [1, 5]}}, "lists none of it"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_one_is_refused_before_anything_is_written(
    case: str, tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    feature, change, config, message = DAMAGED[case]
    architecture, options = {
        "bias": ("qwen2", {"lora_bias": True, "target_modules": ["q_proj"]}),
        "rows": ("llama", {"trainable_token_indices": [5, 1], "target_modules": ["q_proj"]}),
    }[feature]
    adapter = changed(tiny_adapters.folder(architecture, **options), tmp_path / "damaged", change, **config)
    with pytest.raises(LoratoolError, match=message):
        loratool.merge(adapter, into=tiny_models.folder(architecture), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bias_that_the_base_lacks_is_refused_as_peft_cannot_merge_it(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models.folder("llama", "fp32")
    config = peft.LoraConfig(r=2, lora_bias=True, target_modules=["q_proj"])
    adapter = save_peft_adapter(load(base, "llama"), config, tmp_path / "adapter")
    with pytest.raises(RuntimeError, match="base layer has no bias"):
        merge_by_peft(load(base, "llama"), adapter)
    with pytest.raises(LoratoolError, match=r"q_proj.bias' by lora_bias, and the base has no such parameter"):
        loratool.merge(adapter, into=base, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_needs_the_old_rows_is_refused(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_models.folder("llama"), tmp_path / "base")
    adapter = tiny_adapters.folder("llama", trainable_token_indices=[5, 1], target_modules=["q_proj"])
    with pytest.raises(LoratoolError, match=r"token rows, which needs a weight of 1"):
        loratool.merge([(adapter, 0.5)], into=base, out=tmp_path / "out")
    with pytest.raises(LoratoolError, match=r"'token rows', which is not a product of two matrices"):
        loratool.truncate(adapter, rank=2, out=tmp_path / "out")
    merged = loratool.merge(adapter, into=base, out=tmp_path / "merged").out
    shutil.rmtree(base)
    with pytest.raises(LoratoolError, match="token rows, which arithmetic alone cannot undo"):
        loratool.unmerge(merged, out=tmp_path / "out", approximate=True)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def with_copy(tiny_models: TinyModels, tmp_path: Path) -> Path:
    """What PEFT saves when the head is adapted: its factors, and a copy of its own weight."""
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["lm_head", "q_proj"])
    adapter = save_peft_adapter(load(tiny_models.folder("llama", "fp32"), "llama"), config, tmp_path / "with-copy")
    assert COPY in load_file(adapter / WEIGHTS)
    return adapter


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_a_copy_of_the_bases_head_beside_its_factors_is_where_the_update_begins(
    dtype: str, with_copy: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    base = tiny_models.folder("llama", dtype)
    merged = loratool.merge(with_copy, into=base, out=tmp_path / "merged", undo=True)
    theirs = merge_by_peft(load(base, "llama").float(), with_copy)  # in fp32, to be rounded once
    ours = stored_tensors(merged.out)
    assert torch.equal(as_torch(ours["lm_head.weight"]), as_torch(theirs["lm_head.weight"]).to(DTYPES[dtype]))
    if dtype == "fp32":
        assert_same_tensors(ours, theirs)
        assert merged.undo_file is not None and merged.undo_file.stat().st_size < merged.plan.touched_bytes / 4
    loratool.verify(merged.out)
    back = loratool.unmerge(merged.out, out=tmp_path / "back").out
    assert_same_tensors(stored_tensors(back), stored_tensors(base))


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_a_bias_that_was_trained_twice_is_replaced_and_then_added_to(
    dtype: str, tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    base = tiny_models.folder("qwen2", dtype)
    adapter = tiny_adapters.folder("qwen2", lora_bias=True, bias="all", target_modules=["q_proj"])
    merged = loratool.merge(adapter, into=base, out=tmp_path / "merged", undo=True).out
    theirs = merge_by_peft(load(base, "qwen2").float(), adapter)  # in fp32, to be rounded once
    ours = stored_tensors(merged)
    assert all(torch.equal(as_torch(ours[name]), as_torch(theirs[name]).to(DTYPES[dtype])) for name in ours)
    assert_same_tensors(stored_tensors(loratool.unmerge(merged, out=tmp_path / "back").out), stored_tensors(base))


def test_a_copy_of_the_base_stays_with_what_is_made_of_its_adapter(
    with_copy: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    base = tiny_models.folder("llama", "fp32")
    folder = loratool.export(loratool.export(with_copy, tmp_path / "single.st"), tmp_path / "folder")
    tensors = load_file(with_copy / WEIGHTS)
    assert load_file(folder / WEIGHTS).keys() == tensors.keys()
    small = tmp_path / "small"
    loratool.truncate(with_copy, rank=2, out=small)
    assert torch.equal(load_file(small / WEIGHTS)[COPY], tensors[COPY])
    theirs = merge_by_peft(load(base, "llama"), small, tmp_path / "peft")
    assert_same_tensors(stored_tensors(loratool.merge(small, into=base, out=tmp_path / "merged").out), theirs)
    other = save_peft_adapter(
        load(base, "llama"), peft.LoraConfig(r=2, target_modules=["lm_head"]), tmp_path / "other", seed=5
    )
    two = loratool.merge([with_copy, other], into=base, out=tmp_path / "two", undo=True)
    assert_same_tensors(stored_tensors(loratool.unmerge(two.out, out=tmp_path / "back").out), stored_tensors(base))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {COPY: t[COPY][:-1]}, r"is \[130, 64\] and its update fits \[131, 64\]"),
        (lambda t: {n: v for n, v in t.items() if "lm_head.lora" not in n}, "no update of it, .* incomplete"),
        (lambda t: t | {COPY: t[COPY] + 1}, "has other numbers; merge into the base that it was trained on"),
        (lambda t: t | {COPY: t[COPY].half() * torch.nan}, "holds NaN or infinity"),
        (lambda t: t | {COPY: t[COPY].int()}, "in I32, which PEFT would put in the place of the base's"),
    ],
)
def test_a_damaged_copy_of_the_base_is_refused(
    change: Callable[[Tensors], Tensors], message: str, with_copy: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    adapter = changed(with_copy, tmp_path / "damaged", change)
    with pytest.raises(LoratoolError, match=message):
        loratool.merge(adapter, into=tiny_models.folder("llama", "fp32"), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_with_rows_in_float16_is_rounded_once(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models.folder("llama", "bf16")
    save_plain_adapter(tmp_path / "adapter", {"model.layers.0.self_attn.q_proj": (64, 64)}, trainable_token_indices=[2])
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    row = torch.linspace(-3, 3, 64).half()[None]
    save_file(tensors | {ROWS: row}, tmp_path / "adapter" / WEIGHTS)
    merged = loratool.merge(tmp_path / "adapter", into=base, out=tmp_path / "merged").out
    assert torch.equal(as_torch(stored_tensors(merged)[f"{EMBEDDING}.weight"])[2], row[0].bfloat16())
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["trainable_token_indices"] == [2]


@pytest.mark.parametrize("case", ["lora_bias", "rows of a tied embedding"])
def test_the_commands_merge_and_take_out_what_is_beside_the_factors(
    case: str, tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    architecture, options = CASES[case]
    adapter, base = tiny_adapters.folder(architecture, **options), tiny_models.folder(architecture, "bf16")
    out, back = tmp_path / "merged", tmp_path / "back"
    words = ["merge", str(adapter), "--into", str(base), "--out", str(out), "--undo", "--json"]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    assert_same_tensors(stored_tensors(out), merge_by_peft(load(base, architecture), adapter, tmp_path / "peft"))
    assert CliRunner().invoke(cli, ["verify", str(out)]).exit_code == 0
    assert CliRunner().invoke(cli, ["unmerge", str(out), "--out", str(back)]).exit_code == 0
    assert_same_tensors(stored_tensors(back), stored_tensors(base))
    tensors = load_file(adapter / WEIGHTS)
    broken = changed(adapter, tmp_path / "broken", lambda t: {n: v * torch.nan for n, v in tensors.items()})
    refused = CliRunner().invoke(cli, ["merge", str(broken), "--into", str(base), "--out", str(tmp_path / "none")])
    assert refused.exit_code == 1
    assert isinstance(refused.exception, LoratoolError)
    assert "holds NaN or infinity" in str(refused.exception)
    assert not (tmp_path / "none").exists()
