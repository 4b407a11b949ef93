"""Kinds other than LoRA, as PEFT saves them: merged to PEFT's bytes, taken out bit for bit, refused when broken."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from other_machine import assert_taken_out_alike
from safetensors.torch import load_file, save_file
from test_layers import Net, by_peft, save_base
from tiny_adapters import merge_by_peft, save_peft_adapter
from tiny_models import DTYPES, TinyModels, as_stored, as_torch, assert_same_tensors, load, stored_tensors

import loratool
from loratool.errors import AdapterError, LoratoolError
from loratool.formats.identify import identify
from loratool.formats.read import read_adapter
from loratool.updates.gralora import Granular
from loratool.updates.lokr import KroneckerProduct

WEIGHTS = "adapter_model.safetensors"
TARGETS = ["q_proj", "v_proj", "down_proj"]
CONFIGS: dict[str, peft.PeftConfig] = {
    "loha": peft.LoHaConfig(r=3, alpha=5, target_modules=TARGETS),
    "loha-patterns": peft.LoHaConfig(
        r=3, alpha=5, target_modules=TARGETS, rank_pattern={"layers.0.self_attn.q_proj": 2}, alpha_pattern={"v_proj": 3}
    ),
    "lokr": peft.LoKrConfig(r=3, alpha=5, target_modules=TARGETS),
    "lokr-both": peft.LoKrConfig(r=2, alpha=5, target_modules=TARGETS, decompose_both=True, decompose_factor=8),
    "lokr-whole": peft.LoKrConfig(r=64, alpha=32, target_modules=TARGETS, alpha_pattern={"v_proj": 3}),
    "delora": peft.DeloraConfig(r=3, delora_lambda=4, target_modules=TARGETS, rank_pattern={"v_proj": 2}),
    "miss": peft.MissConfig(r=3, target_modules=TARGETS),
    "miss-whole": peft.MissConfig(r=4, target_modules=TARGETS),
    "miss-mini": peft.MissConfig(r=3, target_modules=TARGETS, init_weights="mini", mini_r=2),
    "miss-bat": peft.MissConfig(r=4, target_modules=TARGETS, init_weights="bat"),
    "shira": peft.ShiraConfig(r=2, target_modules=TARGETS, random_seed=1),
    "vera": peft.VeraConfig(r=3, target_modules=TARGETS),
    "vblora": peft.VBLoRAConfig(r=3, num_vectors=10, vector_length=4, topk=3, target_modules=TARGETS),
    "vblora-topk": peft.VBLoRAConfig(
        r=3, num_vectors=10, vector_length=4, topk=3, target_modules=TARGETS, save_only_topk_weights=True
    ),
    "randlora": peft.RandLoraConfig(r=3, randlora_alpha=5, target_modules=TARGETS),
    "randlora-sparse": peft.RandLoraConfig(r=4, randlora_alpha=2, target_modules=TARGETS, very_sparse=True),
    "gralora": peft.GraloraConfig(r=4, alpha=3, gralora_k=2, target_modules=TARGETS),
    "gralora-hybrid": peft.GraloraConfig(r=8, alpha=3, gralora_k=4, hybrid_r=3, target_modules=TARGETS),
    "unilora": peft.UniLoraConfig(r=3, theta_d_length=40, target_modules=TARGETS, save_indices=True),
    "tinylora": peft.TinyLoraConfig(r=3, u=5, weight_tying=1.0, target_modules=TARGETS),
    "pvera": peft.PveraConfig(r=3, target_modules=TARGETS),
    "pvera-drawn": peft.PveraConfig(r=3, target_modules=TARGETS, save_projection=False, projection_prng_key=7),
    "vera-drawn": peft.VeraConfig(r=3, target_modules=TARGETS, save_projection=False, projection_prng_key=7),
}
ROUNDED_TWICE = {"randlora", "randlora-sparse", "delora"}
"""Configurations whose update PEFT rounds to the base's type before adding it; loratool rounds PEFT's merge over fp32 once."""


class Saved:
    """Adapters of these configurations, as PEFT saves them, made when first asked for."""

    def __init__(self, root: Path, models: TinyModels) -> None:
        self._root, self._models = root, models

    def folder(self, name: str) -> Path:
        folder = self._root / name
        if not folder.exists():
            model = load(self._models.folder("llama", "fp32"), "llama")
            save_peft_adapter(model, CONFIGS[name], folder, seed=5)
        return folder


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny_models: TinyModels) -> Saved:
    return Saved(tmp_path_factory.mktemp("kinds"), tiny_models)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("name", CONFIGS)
def test_a_merge_has_pefts_bytes_and_is_taken_out_bit_for_bit(
    name: str, dtype: str, saved: Saved, tiny_models: TinyModels, tmp_path: Path
) -> None:
    base, adapter = tiny_models.folder("llama", dtype), saved.folder(name)
    merged = loratool.merge(adapter, base, out=tmp_path / "merged", undo=True, allow_no_op=True).out
    before, after = stored_tensors(base), stored_tensors(merged)
    if name in ROUNDED_TWICE:
        theirs = merge_by_peft(load(base, "llama").float(), adapter, tmp_path / "peft")
        theirs = {each: as_stored(as_torch(tensor).to(DTYPES[dtype])) for each, tensor in theirs.items()}
    else:
        theirs = merge_by_peft(load(base, "llama"), adapter, tmp_path / "peft")
    assert_same_tensors(after, before | theirs)
    changed = {each for each in before if after[each].data != before[each].data}
    assert changed == set(read_adapter(adapter).changes)
    loratool.verify(merged)
    assert_same_tensors(stored_tensors(loratool.unmerge(merged, out=tmp_path / "back").out), before)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_taken_out_with_the_same_bits_on_every_machine(name: str, saved: Saved, tiny_models: TinyModels) -> None:
    assert_taken_out_alike(saved.folder(name), tiny_models.folder("llama", "fp32"))


def test_vectors_with_equal_logits_are_taken_out_with_the_same_bits_on_every_machine(
    saved: Saved, tiny_models: TinyModels, tmp_path: Path
) -> None:
    adapter = shutil.copytree(saved.folder("vblora"), tmp_path / "adapter")
    tensors = load_file(adapter / WEIGHTS)
    save_file({key: each.round() if "logits" in key else each for key, each in tensors.items()}, adapter / WEIGHTS)
    assert_taken_out_alike(adapter, tiny_models.folder("llama", "fp32"))


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_loads_in_peft_with_the_same_numbers(
    name: str, saved: Saved, tiny_models: TinyModels, tmp_path: Path
) -> None:
    from loratool.formats.write import write_peft

    written = tmp_path / "written"
    write_peft(read_adapter(saved.folder(name)), written, keep_metadata=False)
    base = tiny_models.folder("llama", "fp32")
    merged = [
        merge_by_peft(load(base, "llama"), each, tmp_path / str(place))
        for place, each in enumerate((saved.folder(name), written))
    ]
    assert_same_tensors(merged[0], merged[1])


Change = Callable[[dict[str, torch.Tensor], dict[str, Any]], object]


def first(tensors: dict[str, torch.Tensor], part: str) -> str:
    return min(name for name in tensors if part in name)


def without(part: str) -> Change:
    return lambda tensors, config: tensors.pop(first(tensors, part))


def with_last_cut(part: str) -> Change:
    """The tensor has one number less along its last axis."""

    def cut(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        name = first(tensors, part)
        tensors[name] = tensors[name][..., :-1].contiguous()

    return cut


def with_nan(part: str) -> Change:
    return lambda tensors, config: tensors[first(tensors, part)].view(-1)[0].fill_(torch.nan)


def saying(**values: Any) -> Change:
    return lambda tensors, config: config.update(values)


BROKEN: dict[str, tuple[str, Change, str]] = {
    "a missing partner": ("loha", without("hada_w2_b"), "has no hada_w2_b; the file is incomplete"),
    "a wrong shape": ("loha", with_last_cut("hada_w1_b"), r"down_proj.* must be \[\d+, \d+\]"),
    "a vector for a matrix": ("loha", lambda t, c: t.update({(n := first(t, "w1_a")): t[n][0].clone()}), "2 axes"),
    "half a product": ("lokr", without("lokr_w2_a"), "has no lokr_w2_a; the file is incomplete"),
    "no first factor": ("lokr", without("lokr_w1"), "has no lokr_w1_a; the file is incomplete"),
    "a factor whole and as a product": (
        "lokr",
        lambda t, c: t.update({first(t, "lokr_w2_a").replace("w2_a", "w2"): torch.ones(2, 2)}),
        "both whole and",
    ),
    "a Kronecker product of another shape": ("lokr", with_last_cut("lokr_w1"), r"fits a matrix of shape \[\d+, \d+\]"),
    "a norm of another length": ("delora", with_last_cut("delora_w_norm"), r"delora_w_norm' of shape .* must be \["),
    "two bounds": (
        "delora",
        lambda t, c: t.update({first(t, "_lambda"): torch.ones(2)}),
        r"of shape \[2\], which must be \[1\]",
    ),
    "NaN in a norm": ("delora", with_nan("delora_w_norm"), "NaN"),
    "a tile of another rank": ("miss", saying(r=5), "has rank 3 and the configuration says 5"),
    "a mode of tomorrow": ("miss", saying(init_weights="maxi"), "'init_weights' in .* is 'maxi' and must be"),
    "blocks that are not square": ("miss-bat", with_last_cut("miss_block"), r"which must be \[\d+, 4, 4\]"),
    "tiles for another base": (
        "miss-mini",
        lambda t, c: (t.update({n: torch.ones(3, 7) for n in t}), c.update(mini_r=7)),
        "cannot be repeated over",
    ),
    "indices without values": ("shira", without("shira_weight"), "has no shira_weight; the file is incomplete"),
    "fewer values than indices": ("shira", with_last_cut("shira_weight"), r"shira_indices' of shape .* must be \[2, "),
    "an index outside": ("shira", lambda t, c: t[first(t, "indices")][0].fill_(9999), "names places outside a matrix"),
    "a negative index": ("shira", lambda t, c: t[first(t, "indices")][1, 0].fill_(-1), "names places outside a matrix"),
    "an index twice": ("shira", lambda t, c: t[first(t, "indices")].fill_(1), "names a place twice"),
    "indices of another dtype": (
        "shira",
        lambda t, c: t.update({(n := first(t, "indices")): t[n].half()}),
        "dtype F16, which must be I32",
    ),
    "NaN in values": ("shira", with_nan("shira_weight"), "NaN"),
    "no shared projection": (
        "vera",
        lambda t, c: t.pop("base_model.vera_A"),
        r"has no base_model\.vera_A; the file is incom",
    ),
    "a projection that is too narrow": (
        "vera",
        lambda t, c: t.update({"base_model.vera_A": t["base_model.vera_A"][:, :20].clone()}),
        r"vera_A' .* shape \[3, 20\], and a module has \d+ inputs",
    ),
    "a projection that is too short": (
        "vera",
        lambda t, c: t.update({"base_model.vera_B": t["base_model.vera_B"][:20].clone()}),
        r"has \d+ outputs and .*vera_B' has 20 rows",
    ),
    "a projection of another rank": (
        "vera",
        lambda t, c: t.update({"base_model.vera_B": t["base_model.vera_B"][:, :2].clone()}),
        r"vera_B' of shape .* must be \[\d+, 3\]",
    ),
    "a vector of another rank": (
        "vera",
        with_last_cut("lambda_d"),
        "lambda_d of 2 numbers and the configuration says 3",
    ),
    "no vector": ("vera", without("vera_lambda_b"), "has no vera_lambda_b; the file is incomplete"),
    "half a vector": ("pvera", with_last_cut("lambda_d"), "lambda_d of 5 numbers and the configuration says 6"),
    "no shared variance": (
        "pvera",
        lambda t, c: t.pop("base_model.pvera_B"),
        r"has no base_model\.pvera_B; the file is",
    ),
    "no bank": (
        "vblora",
        lambda t, c: t.pop("base_model.vblora_vector_bank"),
        r"has no base_model\.vblora_vector_bank; the",
    ),
    "a bank of another size": (
        "vblora",
        saying(num_vectors=9),
        r"vector_bank' of shape \[10, 4\], which must be \[9, 4\]",
    ),
    "logits for another bank": (
        "vblora",
        with_last_cut("logits_B"),
        r"logits_B' of shape .* which must be \[\d+, 3, 10\]",
    ),
    "more vectors than there are": (
        "vblora",
        saying(topk=11),
        "'topk' in .* is 11, more than the 10 vectors of the bank",
    ),
    "logits where weights are meant": (
        "vblora",
        saying(save_only_topk_weights=True),
        "its save_only_topk_weights is true",
    ),
    "indices outside the bank": (
        "vblora-topk",
        lambda t, c: t[first(t, "topk_indices")].view(-1)[0].fill_(10),
        "names vectors outside a bank of 10",
    ),
    "weights above 1": ("vblora-topk", lambda t, c: t[first(t, "topk_weights")].fill_(0.6), "that are no shares of 1"),
    "NaN in a bank": ("vblora", with_nan("vector_bank"), "NaN"),
    "no shared projection of RandLoRA": (
        "randlora",
        lambda t, c: t.pop("base_model.randlora_B"),
        r"no base_model\.randlora_B;",
    ),
    "RandLoRA's projections drawn": (
        "randlora",
        saying(save_projection=False),
        "without its projections .* save it again",
    ),
    "a diagonal of another length": (
        "randlora",
        with_last_cut("gamma"),
        "randlora_gamma' .* does not fit a matrix of shape",
    ),
    "RandLoRA of another rank": ("randlora", saying(r=4), "has rank 3 and the configuration says 4"),
    "a copy of another shape": (
        "randlora",
        with_last_cut("down_proj.randlora_A"),
        "randlora_A' of shape .* which must be",
    ),
    "NaN in a diagonal": ("randlora", with_nan("gamma"), "NaN"),
    "blocks that do not divide the rank": ("gralora", saying(r=5), "'r' in .* is 5, which gralora_k=2 does not divide"),
    "blocks of another number": ("gralora", saying(gralora_k=4), r"gralora_A' of shape .* which must be \[4, \d+, 4\]"),
    "half of GraLoRA": ("gralora", without("gralora_B"), "has no gralora_B; the file is incomplete"),
    "a hybrid without its LoRA": (
        "gralora",
        saying(hybrid_r=2),
        r"has no gralora_A_general\.weight; the file is incomplete",
    ),
    "the LoRA of no hybrid": ("gralora-hybrid", saying(hybrid_r=0), "has the LoRA of a hybrid, and its hybrid_r is 0"),
    "NaN in a block": ("gralora", with_nan("gralora_A"), "NaN"),
    "no shared vector": (
        "unilora",
        lambda t, c: t.pop("base_model.unilora_theta_d"),
        r"has no base_model\.unilora_theta_d; the",
    ),
    "Uni-LoRA without indices": (
        "unilora",
        saying(save_indices=False),
        "without its indices .* save it again with save_indices",
    ),
    "scales without indices": (
        "unilora",
        without("unilora_indices_B"),
        "has no unilora_indices_B; the file is incomplete",
    ),
    "fewer scales than indices": (
        "unilora",
        with_last_cut("scales_A"),
        r"scales_A' of shape .* which must be \[3, \d+\]",
    ),
    "an index outside the vector": (
        "unilora",
        lambda t, c: t[first(t, "indices_A")].fill_(40),
        "outside a vector of 40",
    ),
    "Uni-LoRA of another rank": ("unilora", saying(r=4), "has rank 3 and the configuration says 4"),
    "NaN in the shared vector": ("unilora", with_nan("theta_d"), "NaN"),
    "no vector of TinyLoRA": (
        "tinylora",
        lambda t, c: t.pop("base_model.tinylora_v.0"),
        r"has no base_model\.tinylora_v\.0; the",
    ),
    "several vectors of TinyLoRA": (
        "tinylora",
        lambda t, c: t.update({"base_model.tinylora_v.1": torch.ones(5)}),
        "with 2 vectors, .* merge it with PEFT",
    ),
    "TinyLoRA without projections": (
        "tinylora",
        saying(save_projection=False),
        "without its projections .* save it again with",
    ),
    "no projection of TinyLoRA": ("tinylora", without("tinylora_P"), "has no tinylora_P; the file is incomplete"),
    "a vector of another length": (
        "tinylora",
        lambda t, c: t.update({"base_model.tinylora_v.0": torch.ones(4)}),
        r"P' of shape .* must be \[4, 3, 3\]",
    ),
    "TinyLoRA of a greater rank": ("tinylora", saying(r=2), "has rank 3 and the configuration says 2"),
    "NaN in a factor of TinyLoRA": ("tinylora", with_nan("tinylora_A"), "NaN"),
    "no seed": ("vera-drawn", saying(projection_prng_key=None), "'projection_prng_key' is 'None'; it must be"),
    "a seed that is no number": (
        "vera-drawn",
        saying(projection_prng_key="7"),
        "'projection_prng_key' is '7'; it must be",
    ),
    "projections beside a seed": ("vera", saying(save_projection=False), "which PEFT would ignore because"),
    "drawn projections, and a module left out": (
        "vera-drawn",
        lambda t, c: [t.pop(n) for n in list(t) if "layers.0.mlp" in n],
        "lacks the tensors of 'model.layers.0.mlp.down_proj'",
    ),
    "NaN in a projection": ("vera", with_nan("vera_A"), "NaN"),
    "NaN": ("loha", with_nan("hada_w2_a"), "NaN"),
    "another rank": ("loha", saying(r=4), "has rank 3 and the configuration says 4"),
    "no rank": ("loha", saying(r=0), "'r' in"),
    "text as alpha": ("loha", saying(alpha="5"), "'alpha' in .* the text '5'"),
    "modules that are not targets": ("loha", saying(target_modules=["q_proj"]), "does not target"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_adapter_is_refused_with_a_sentence_and_nothing_is_written(
    what: str, saved: Saved, tiny_models: TinyModels, tmp_path: Path
) -> None:
    name, change, message = BROKEN[what]
    folder = shutil.copytree(saved.folder(name), tmp_path / "broken")
    tensors, config = load_file(folder / WEIGHTS), json.loads((folder / "adapter_config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(LoratoolError, match=message):
        loratool.merge(folder, tiny_models.folder("llama", "fp32"), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_keys_that_a_type_lacks_are_noted_and_alpha_is_the_configurations(saved: Saved, tmp_path: Path) -> None:
    folder = shutil.copytree(saved.folder("loha"), tmp_path / "noted")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 99, "use_rslora": True}))
    adapter = read_adapter(folder)
    assert (adapter.alpha, adapter.scaling) == (5.0, 5 / 3)
    assert any("'lora_alpha', 'use_rslora'" in note for note in adapter.notes)
    with pytest.raises(AdapterError, match="leave --alpha out"):
        read_adapter(folder, 7.0)


def test_without_a_configuration_it_is_told_what_it_is_and_that_it_needs_one(saved: Saved, tmp_path: Path) -> None:
    bare = tmp_path / "bare.safetensors"
    shutil.copyfile(saved.folder("loha") / WEIGHTS, bare)
    with pytest.raises(AdapterError, match=r"LoHa tensors and no configuration; put its adapter_config\.json"):
        read_adapter(bare)


class Convolved(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(8, 12, 3)


CONVOLUTIONS: dict[str, peft.PeftConfig] = {
    "loha": peft.LoHaConfig(r=3, alpha=5, target_modules=["conv"], init_weights=False),
    "loha, Tucker": peft.LoHaConfig(r=3, alpha=5, target_modules=["conv"], use_effective_conv2d=True, init_weights=False),
    "lokr": peft.LoKrConfig(r=9, alpha=5, target_modules=["conv"], init_weights=False),
    "lokr, a product": peft.LoKrConfig(r=2, alpha=5, target_modules=["conv"], decompose_factor=2, init_weights=False),
    "lokr, Tucker": peft.LoKrConfig(
        r=2, alpha=5, target_modules=["conv"], decompose_factor=2, use_effective_conv2d=True, init_weights=False),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_rows_of_a_convolution_become_pefts_and_come_back(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(Convolved(), CONVOLUTIONS[name])
    layer = model.base_model.model.conv
    model.save_pretrained(tmp_path / "adapter")
    (update,) = read_adapter(tmp_path / "adapter").changes.values()
    weight = layer.base_layer.weight.detach().flatten(1)
    assert update.shape in (tuple(layer.base_layer.weight.shape), tuple(weight.shape))
    loaded = update.load(transposed=False, weight=1.0, device="cpu")
    wanted = weight + layer.get_delta_weight("default").detach().flatten(1)
    for rows in (range(12), range(5, 9)):
        block = weight[rows.start : rows.stop].clone()
        loaded.apply(block, rows, torch.empty_like(block))
        assert torch.equal(block, wanted[rows.start : rows.stop])
        loaded.revert(block, rows, torch.empty_like(block), b"")
        assert torch.allclose(block, weight[rows.start : rows.stop], atol=1e-6)


LAYERS = ["wave", "image", "point", "linear"]
WHOLE: dict[str, peft.PeftConfig] = {
    "loha": peft.LoHaConfig(r=3, alpha=5, target_modules=LAYERS),
    "loha, Tucker": peft.LoHaConfig(r=3, alpha=5, target_modules=LAYERS, use_effective_conv2d=True),
    "lokr": peft.LoKrConfig(r=16, alpha=24, target_modules=LAYERS[1:]),
    "lokr, Tucker": peft.LoKrConfig(
        r=2, alpha=5, target_modules=LAYERS, decompose_factor=2, decompose_both=True, use_effective_conv2d=True),
}  # fmt: skip


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("name", WHOLE)
def test_convolutions_are_merged_to_pefts_bytes_and_come_back_bit_for_bit(
    name: str, dtype: str, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", dtype)
    adapter = save_peft_adapter(Net(), WHOLE[name], tmp_path / "adapter", seed=4)
    merged = loratool.merge(adapter, base, out=tmp_path / "merged", undo=True, allow_no_op=True).out
    before, after = stored_tensors(base), stored_tensors(merged)
    assert_same_tensors(after, by_peft(base, adapter))
    if dtype == "fp32":
        changed = {each.removesuffix(".weight") for each in before if after[each] != before[each]}
        assert changed == set(WHOLE[name].target_modules)
    assert_same_tensors(stored_tensors(loratool.unmerge(merged, out=tmp_path / "back").out), before)


def test_a_whole_second_factor_on_a_conv1d_is_refused(tmp_path: Path) -> None:
    adapter = save_peft_adapter(Net(), peft.LoKrConfig(r=64, target_modules=["wave"]), tmp_path / "adapter")
    with pytest.raises(LoratoolError, match="on a Conv1d, whose product each program lays out differently"):
        read_adapter(adapter)


def test_any_part_of_a_kronecker_product_is_that_part_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 3, generator=generator), torch.randn(3, 2, generator=generator)
    whole, product = torch.kron(first, second), KroneckerProduct((first,), (second,))
    spans = [slice(start, stop) for start in range(6) for stop in range(start + 1, 7)] + [slice(None)]
    for rows, columns in itertools.product(spans, spans):
        assert torch.equal(product.part(rows, columns), whole[rows, columns])
        assert torch.equal(product.fixed(rows, columns).float(), whole[rows, columns])


def test_any_part_of_granular_blocks_is_that_part_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"A": (2, 3, 4), "B": (2, 4, 5), "general_A": (2, 6), "general_B": (10, 2)}
    a, b, left, right = (torch.randn(shape, generator=generator) for shape in shapes.values())
    blocks = Granular(a, b, (right, left))
    whole = blocks.part(slice(0, 10), slice(0, 6))
    for rows, columns in itertools.product(itertools.combinations(range(11), 2), itertools.combinations(range(7), 2)):
        assert torch.equal(blocks.part(slice(*rows), slice(*columns)), whole[slice(*rows), slice(*columns)])
        assert torch.allclose(
            blocks.fixed(slice(*rows), slice(*columns)).float(), whole[slice(*rows), slice(*columns)], atol=1e-5
        )


def test_modules_saved_whole_beside_it_replace_the_bases(saved: Saved, tiny_models: TinyModels, tmp_path: Path) -> None:
    config = peft.LoHaConfig(r=3, alpha=5, target_modules=["q_proj"], modules_to_save=["lm_head"])
    base = tiny_models.folder("llama", "fp32")
    save_peft_adapter(load(base, "llama"), config, tmp_path / "whole", seed=2)
    merged = loratool.merge(tmp_path / "whole", base, out=tmp_path / "merged").out
    theirs = merge_by_peft(load(base, "llama"), tmp_path / "whole", tmp_path / "peft")
    assert_same_tensors(stored_tensors(merged), stored_tensors(base) | theirs)
    assert identify(tmp_path / "whole").kind == "loha"
