"""`loratool extract` gives each linear layer the best factors of its rank, and says truly what they miss."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_adapters import as_peft_folder, merge_by_peft
from tiny_models import as_torch, load, save_plain_model, stored_tensors

import loratool
from loratool.checkpoint.header import read_header
from loratool.errors import LoratoolError
from loratool.ranks.difference import Difference
from loratool.ranks.low_rank_fit import EXACT_SIDE, Wanted, fit
from registry import RegistryError

if TYPE_CHECKING:
    from tiny_adapters import TinyAdapters
    from tiny_models import TinyModels

PREFIX = "base_model.model."


def tuned_from(base: Path, folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """A copy of a model with every tensor as `change` gives it."""
    shutil.copytree(base, folder)
    for file in sorted(folder.glob("*.safetensors")):
        changed = {name: change(name, tensor).contiguous() for name, tensor in load_file(file).items()}
        save_file(changed, file, {"format": "pt"})
    return folder


def noisy(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with a change of every rank, falling from one to the next, in each matrix of a layer."""
    if tensor.dim() != 2 or ".layers." not in name:
        return tensor
    generator = torch.Generator().manual_seed(len(name))
    u, s, v = torch.linalg.svd(torch.randn(tensor.shape, generator=generator, dtype=torch.float64), full_matrices=False)
    return (tensor.double() + (u * s * 0.8 ** torch.arange(len(s)) * 0.01) @ v).to(tensor.dtype)


def differences(tuned: Path, base: Path) -> dict[str, np.ndarray[Any, Any]]:
    """What changed in each matrix, in fp64, by module; those that are equal are left out."""
    after, before = stored_tensors(tuned), stored_tensors(base)
    found = {
        name.removesuffix(".weight"): (as_torch(after[name]).double() - as_torch(before[name]).double()).numpy()
        for name in after
        if len(after[name].shape) == 2
    }
    return {name: difference for name, difference in found.items() if difference.any()}


def deltas_of(file: Path) -> dict[str, np.ndarray[Any, Any]]:
    """What the adapter adds to each module, in fp64; its scaling is 1."""
    factors = {name: tensor.double().numpy() for name, tensor in load_file(file).items()}
    modules = [name.removesuffix(".lora_A.weight") for name in factors if name.endswith(".lora_A.weight")]
    return {
        module.removeprefix(PREFIX): factors[f"{module}.lora_B.weight"] @ factors[f"{module}.lora_A.weight"]
        for module in modules
    }


def relative(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def singular_values(matrix: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    values: np.ndarray[Any, Any] = np.linalg.svd(matrix, compute_uv=False)
    return values


@pytest.fixture
def base(tiny_models: TinyModels) -> Path:
    return tiny_models.folder("llama", "fp32")


@pytest.fixture
def tuned(base: Path, tmp_path: Path) -> Path:
    return tuned_from(base, tmp_path / "tuned", noisy)


LOW_RANK: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"target_modules": ["q_proj", "down_proj"]},
    "gpt2": {"fan_in_fan_out": True},
    "llama-odd": {},
    "bert": {},
    "llama-many-blocks": {"target_modules": ["down_proj", "k_proj"]},
}


@pytest.mark.parametrize("architecture", LOW_RANK)
def test_an_exactly_low_rank_change_is_recovered(
    architecture: str, tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    base = tiny_models.folder(architecture, "fp32")
    adapter = tiny_adapters.folder(architecture, **LOW_RANK[architecture])
    tiny_adapters.merged_by_peft(architecture, "fp32", adapter)
    tuned = next(adapter.parent.glob(f"merged-{adapter.name}-fp32-*"))
    result = loratool.extract(tuned, base, rank=4, out=tmp_path / "found.st")
    expected, found = differences(tuned, base), deltas_of(result.out)
    assert found.keys() == expected.keys()
    for module, delta in found.items():
        fitting = delta.T if architecture == "gpt2" else delta
        assert relative(fitting, expected[module]) < 1e-3
    assert result.extraction.error < 1e-3


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_peft_loads_it_and_gives_the_tuned_model(
    architecture: str, tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    base = tiny_models.folder(architecture, "fp32")
    adapter = tiny_adapters.folder(architecture, **LOW_RANK[architecture])
    expected = tiny_adapters.merged_by_peft(architecture, "fp32", adapter)
    tuned = next(adapter.parent.glob(f"merged-{adapter.name}-fp32-*"))
    result = loratool.extract(tuned, base, rank=4, out=tmp_path / "found.st")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT's, of tensors that are missing or did not land
        folder = as_peft_folder(result.out, tmp_path / "peft")
        model = peft.PeftModel.from_pretrained(load(base, architecture), folder)
    merged = model.merge_and_unload().state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], as_torch(tensor), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 20])
def test_the_error_is_the_least_of_its_rank_and_is_stated_truly(
    rank: int, base: Path, tuned: Path, tmp_path: Path
) -> None:
    result = loratool.extract(tuned, base, rank=rank, out=tmp_path / "found.st")
    expected, found = differences(tuned, base), deltas_of(result.out)
    lost = total = 0.0
    for module, difference in expected.items():
        values = singular_values(difference)
        optimum = float(np.linalg.norm(values[rank:]))
        missed = float(np.linalg.norm(found[module] - difference))
        assert missed == pytest.approx(optimum, rel=1e-5)
        assert result.extraction.errors[module] == pytest.approx(missed / np.linalg.norm(values), rel=1e-4)
        lost, total = lost + optimum**2, total + float((values**2).sum())
    assert result.extraction.error == pytest.approx((lost / total) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999])
def test_energy_gives_each_module_the_smallest_rank_that_keeps_it(
    energy: float, base: Path, tuned: Path, tmp_path: Path
) -> None:
    result = loratool.extract(tuned, base, energy=energy, out=tmp_path / "found")
    expected = {
        module: int(np.argmax(np.cumsum(values**2) >= energy * (values**2).sum())) + 1
        for module, values in ((module, singular_values(d)) for module, d in differences(tuned, base).items())
    }
    assert result.extraction.ranks == expected
    assert result.record.ranks == expected
    config = peft.LoraConfig.from_pretrained(str(tmp_path / "found"))
    model = peft.PeftModel.from_pretrained(load(base, "llama"), tmp_path / "found")
    assert config.r == max(expected.values())
    for module, rank in expected.items():
        layer = model.get_submodule(f"base_model.model.{module}")
        assert (layer.r["default"], layer.scaling["default"]) == (rank, 1.0)


def test_a_rank_is_cut_where_a_matrix_is_smaller(tmp_path: Path) -> None:
    base = save_plain_model(tmp_path / "base", {"a.weight": torch.zeros(8, 40), "b.weight": torch.zeros(40, 40)})
    tuned = tuned_from(base, tmp_path / "tuned", lambda name, tensor: torch.randn(tensor.shape))
    result = loratool.extract(tuned, base, rank=12, out=tmp_path / "found.st")
    assert result.extraction.ranks == {"a": 8, "b": 12}
    with pytest.raises(LoratoolError, match="no matrix has more than 40"):
        loratool.extract(tuned, base, rank=41, out=tmp_path / "more.st")


def test_stored_types_and_shards_may_differ(tiny_models: TinyModels, base: Path, tmp_path: Path) -> None:
    sharded = tiny_models.folder("llama", "bf16", "sharded")
    tuned = tuned_from(sharded, tmp_path / "tuned", lambda name, tensor: noisy(name, tensor.float()).half())
    result = loratool.extract(tuned, sharded, rank=2, out=tmp_path / "found.st")
    expected = differences(tuned, sharded)
    for module, delta in deltas_of(result.out).items():
        optimum = float(np.linalg.norm(singular_values(expected[module])[2:]))
        assert float(np.linalg.norm(delta - expected[module])) == pytest.approx(optimum, rel=1e-4)
    assert not result.extraction.left_out


def test_names_may_differ_by_a_prefix(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models.folder("gpt2-without-prefix", "fp32")
    tuned = tuned_from(tiny_models.folder("gpt2", "fp32"), tmp_path / "tuned", lambda name, tensor: tensor)
    factors = load_file(tuned / "model.safetensors")
    factors["transformer.h.1.mlp.c_fc.weight"][:] += torch.outer(torch.ones(64), torch.arange(256.0))
    save_file(factors, tuned / "model.safetensors", {"format": "pt"})
    result = loratool.extract(tuned, base, rank=1, out=tmp_path / "found.st")
    assert list(result.extraction.ranks) == ["transformer.h.1.mlp.c_fc"]
    merged = loratool.merge(result.out, into=base, out=tmp_path / "merged")
    expected = factors["transformer.h.1.mlp.c_fc.weight"]
    torch.testing.assert_close(load_file(merged.out / "model.safetensors")["h.1.mlp.c_fc.weight"], expected)


# The randomized method


def difference_of(folder: Path, change: torch.Tensor) -> Difference:
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    before = torch.randn(change.shape, generator=generator) * 0.05
    save_file({"w.weight": before}, folder / "base.safetensors")
    save_file({"w.weight": before + change}, folder / "tuned.safetensors")
    infos = [read_header(folder / name).tensors["w.weight"] for name in ("tuned.safetensors", "base.safetensors")]
    return Difference(*infos)


def spectrum(rows: int, columns: int, fall: float) -> torch.Tensor:
    """A matrix whose singular values fall by this factor from one to the next."""
    generator = torch.Generator().manual_seed(rows)
    rank = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, rank, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, rank, generator=generator)).Q
    return (left * fall ** torch.arange(rank)) @ right.T


@pytest.mark.parametrize("shape", [(EXACT_SIDE + 40, EXACT_SIDE + 300), (EXACT_SIDE + 300, EXACT_SIDE + 1)])
@pytest.mark.parametrize("fall", [0.5, 0.97, 0.999])
def test_the_randomized_method_is_near_the_optimum_and_states_its_error(
    shape: tuple[int, int], fall: float, tmp_path: Path
) -> None:
    difference = difference_of(tmp_path / "pair", spectrum(*shape, fall))
    found = fit(difference, Wanted(rank=8), seed=3)
    assert found is not None
    assert found.randomized
    exact = torch.cat([block.clone() for _, block in difference.blocks()]).double().numpy()
    missed = float(np.linalg.norm(exact - found.b.double().numpy() @ found.a.double().numpy()))
    assert found.lost**0.5 == pytest.approx(missed, rel=1e-4, abs=1e-6)
    assert missed <= 1.002 * float(np.linalg.norm(singular_values(exact)[8:])) + 1e-6


def test_energy_widens_the_randomized_method_and_falls_back_to_the_exact_one(tmp_path: Path) -> None:
    side = EXACT_SIDE + 200
    steep = fit(difference_of(tmp_path / "steep", spectrum(side, side, 0.8)), Wanted(share=0.99), seed=3)
    flat = fit(difference_of(tmp_path / "flat", spectrum(side, side, 0.9999)), Wanted(share=0.5), seed=3)
    assert steep is not None
    assert flat is not None
    assert (steep.randomized, len(steep.a)) == (True, 11)  # 1 - 0.64 ** 10 < 0.99 <= 1 - 0.64 ** 11
    assert not flat.randomized
    assert len(flat.a) == pytest.approx(side * 0.5, rel=0.1)


def test_the_same_models_give_the_same_bytes(tmp_path: Path) -> None:
    side = EXACT_SIDE + 1
    base = save_plain_model(tmp_path / "base", {"a.weight": torch.zeros(side, side)})
    tuned = tuned_from(base, tmp_path / "tuned", lambda name, tensor: spectrum(side, side, 0.9))
    first, second = (
        loratool.extract(tuned, base, rank=2, out=tmp_path / out, name="found") for out in ("first.st", "second.st")
    )
    assert first.extraction.randomized == ("a",)
    assert first.out.read_bytes() == second.out.read_bytes()


# What no LoRA holds


def test_other_tensors_that_changed_are_reported_and_equal_ones_are_not(base: Path, tmp_path: Path) -> None:
    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + 0.5 if name in {"model.norm.weight", "model.embed_tokens.weight"} else noisy(name, tensor)

    tuned = tuned_from(base, tmp_path / "tuned", change)
    result = loratool.extract(tuned, base, rank=2, out=tmp_path / "found.st")
    assert result.extraction.left_out == ("model.embed_tokens.weight", "model.norm.weight")
    assert any("'model.embed_tokens.weight', 'model.norm.weight'" in note for note in result.notes)
    assert result.extraction.unchanged == 1  # lm_head


def test_an_embedding_of_positions_is_no_linear_layer(tiny_models: TinyModels, tmp_path: Path) -> None:
    """PEFT puts other factors on it (lora_embedding_A), so that an adapter with ordinary ones could not be loaded."""
    base = tiny_models.folder("bert", "fp32")
    tuned = tuned_from(
        base, tmp_path / "tuned", lambda name, tensor: tensor + torch.linspace(0, 1, tensor.numel()).view_as(tensor)
    )
    result = loratool.extract(tuned, base, rank=2, out=tmp_path / "found.st")
    assert not [module for module in result.extraction.ranks if "embeddings" in module]
    position = "bert.embeddings.position_embeddings.weight"
    assert position in result.extraction.left_out


def test_a_head_that_is_tied_to_the_embedding_is_no_linear_layer(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models.folder("llama-tied", "fp32")
    tuned = tuned_from(
        base, tmp_path / "tuned", lambda name, tensor: tensor + 0.1 if "embed" in name else noisy(name, tensor)
    )
    both = load_file(tuned / "model.safetensors")
    both["lm_head.weight"] = both["model.embed_tokens.weight"].clone()
    save_file(both, tuned / "model.safetensors", {"format": "pt"})
    result = loratool.extract(tuned, base, rank=2, out=tmp_path / "found.st")
    assert "lm_head" not in result.extraction.ranks
    assert result.extraction.left_out == ("model.embed_tokens.weight",)


# The catalogue


def test_it_is_tied_to_its_base_and_a_child_of_the_model(base: Path, tuned: Path, tmp_path: Path) -> None:
    record = loratool.base_add("llama", base)
    result = loratool.extract(tuned, "llama", rank=3, out=tmp_path / "found.st", name="mine")
    assert (result.record.reference, result.record.base) == ("mine@1", "llama")
    assert result.record.base_fingerprint == record.fingerprint
    (edge,) = loratool.show("mine").ancestors
    assert (edge.parent, edge.parent_id, edge.operation) == ("tuned", None, "extract")
    assert edge.details is not None
    assert edge.details["rank"] == 3
    assert edge.details["lost"] == result.extraction.error
    config = result.record.config
    assert config is not None
    assert len(config["target_modules"]) == 7
    loratool.merge("mine", into="llama", out=tmp_path / "merged")


def test_targets_are_full_names_where_short_ones_would_choose_more(base: Path, tmp_path: Path) -> None:
    only = "model.layers.1.self_attn.q_proj"
    tuned = tuned_from(base, tmp_path / "tuned", lambda name, t: noisy(name, t) if name == f"{only}.weight" else t)
    result = loratool.extract(tuned, base, rank=2, out=tmp_path / "found")
    assert json.loads((result.out / "adapter_config.json").read_text())["target_modules"] == [only]


# What is refused


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "rank 0": ({"rank": 0}, "at least 1"),
    "a negative rank": ({"rank": -3}, "at least 1"),
    "a rank above the most": ({"rank": 65}, "no matrix has more than 64"),
    "no size": ({}, "one of them"),
    "two sizes": ({"rank": 2, "energy": 0.5}, "one of them"),
    "an energy of 0": ({"energy": 0.0}, "above 0"),
    "an energy above 1": ({"energy": 1.01}, "at most 1"),
    "an energy that is no number": ({"energy": float("nan")}, "energy is nan"),
    "an infinite energy": ({"energy": float("inf")}, "energy is inf"),
    "a name that is none": ({"rank": 2, "name": "a b"}, "a b"),
    "an output without a path": ({"rank": 2, "out": ""}, "empty"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_impossible_numbers_are_refused_and_nothing_is_written(
    case: str, base: Path, tuned: Path, tmp_path: Path
) -> None:
    options, message = REFUSED[case]
    before = sorted(tmp_path.iterdir())
    with pytest.raises((LoratoolError, RegistryError), match=message):
        loratool.extract(tuned, base, **{"out": tmp_path / "found.st", **options})
    assert sorted(tmp_path.iterdir()) == before
    assert loratool.list() == ()


OTHER_MODELS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]], str]] = {
    "equal models": (lambda tensors: tensors, "no linear layer differs"),
    "only a norm changed": (
        lambda tensors: tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1},
        "1 other tensors did, such as 'model.norm.weight'",
    ),
    "a missing tensor": (
        lambda tensors: {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"},
        r"1 tensors that .* lacks, such as 'model.norm.weight'",
    ),
    "one tensor more": (
        lambda tensors: tensors | {"model.layers.0.gate.weight": torch.zeros(3, 3)},
        r"1 tensors that .* lacks, such as 'model.layers.0.gate.weight'",
    ),
    "a larger vocabulary": (
        lambda tensors: tensors | {"model.embed_tokens.weight": torch.zeros(140, 64)},
        r"shape \[140, 64\] in the tuned model and \[131, 64\] in the base",
    ),
    "NaN": (
        lambda tensors: tensors | {"model.layers.0.mlp.up_proj.weight": torch.full((172, 64), float("nan"))},
        "'model.layers.0.mlp.up_proj.weight' .* holds NaN",
    ),
    "infinity": (
        lambda tensors: tensors | {"model.layers.0.mlp.up_proj.weight": torch.full((172, 64), float("inf"))},
        "'model.layers.0.mlp.up_proj.weight' .* holds NaN or infinity",
    ),
    "8-bit floats": (
        lambda tensors: tensors | {"lm_head.weight": tensors["lm_head.weight"].to(torch.float8_e4m3fn)},
        "'lm_head.weight' .* stored as F8_E4M3",
    ),
}


@pytest.mark.parametrize("case", OTHER_MODELS)
def test_models_that_do_not_belong_together_are_refused(case: str, base: Path, tmp_path: Path) -> None:
    change, message = OTHER_MODELS[case]
    tuned = tuned_from(base, tmp_path / "tuned", lambda name, tensor: tensor)
    save_file(dict(change(load_file(base / "model.safetensors"))), tuned / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoratoolError, match=message):
        loratool.extract(tuned, base, rank=2, out=tmp_path / "found.st")
    assert not (tmp_path / "found.st").exists()
    assert loratool.list() == ()


def test_an_output_inside_a_model_is_refused(base: Path, tuned: Path) -> None:
    with pytest.raises(LoratoolError, match="overlap; choose another"):
        loratool.extract(tuned, base, rank=2, out=tuned / "found.st")


# Modules that are kept whole


def norms_and_more(name: str, tensor: torch.Tensor) -> torch.Tensor:
    changed = name in {"model.norm.weight", "model.layers.1.input_layernorm.weight", "model.embed_tokens.weight"}
    return tensor + 0.25 if changed else noisy(name, tensor)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_kept_modules_give_peft_and_loratool_the_tuned_models_own(
    dtype: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    base = tiny_models.folder("llama", dtype)
    tuned = tuned_from(base, tmp_path / "tuned", norms_and_more)
    result = loratool.extract(tuned, base, rank=64, keep_full=True, out=tmp_path / "found")
    whole = ["model.embed_tokens.weight", "model.layers.1.input_layernorm.weight", "model.norm.weight"]
    assert (list(result.extraction.kept), result.extraction.left_out) == (whole, ())
    expected = stored_tensors(tuned)
    merged = loratool.merge(result.out, into=base, out=tmp_path / "merged")
    found = stored_tensors(merged.out)
    by_peft = merge_by_peft(load(base, "llama"), result.out)
    for name in whole:
        assert found[name] == expected[name] == by_peft[name]
    for name in expected:
        assert found[name] == by_peft[name]
        torch.testing.assert_close(as_torch(found[name]), as_torch(expected[name]), rtol=0.01, atol=1e-3)


def test_a_merge_of_kept_modules_comes_out_again_and_is_verified(base: Path, tmp_path: Path) -> None:
    tuned = tuned_from(base, tmp_path / "tuned", norms_and_more)
    adapter = loratool.extract(tuned, base, rank=4, keep_full=True, out=tmp_path / "found.st")
    merged = loratool.merge(adapter.out, into=base, out=tmp_path / "merged", undo=True)
    assert loratool.verify(merged.out).replayed == "base"
    restored = loratool.unmerge(merged.out, out=tmp_path / "restored")
    assert restored.method == "undo"
    assert stored_tensors(restored.out) == stored_tensors(base)


def test_a_linear_layer_whose_bias_changed_is_kept_whole(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models.folder("qwen2", "fp32")
    only = "model.layers.0.self_attn.q_proj"
    tuned = tuned_from(base, tmp_path / "tuned", lambda n, t: t + 0.1 if n == f"{only}.bias" else noisy(n, t))
    result = loratool.extract(tuned, base, rank=56, keep_full=True, out=tmp_path / "found")
    assert list(result.extraction.kept) == [f"{only}.bias", f"{only}.weight"]
    assert only not in result.extraction.ranks
    by_peft = merge_by_peft(load(base, "qwen2"), result.out)
    merged = stored_tensors(loratool.merge(result.out, into=base, out=tmp_path / "merged").out)
    expected = stored_tensors(tuned)
    for name in merged:
        assert merged[name] == by_peft[name]
    assert merged[f"{only}.weight"] == expected[f"{only}.weight"]


def test_what_peft_cannot_keep_is_refused_by_name(tiny_models: TinyModels, tmp_path: Path) -> None:
    tied = tiny_models.folder("llama-tied", "fp32")
    tuned = tuned_from(tied, tmp_path / "tied", norms_and_more)
    with pytest.raises(LoratoolError, match=r"'model.embed_tokens.weight' changed .* tied to the output head"):
        loratool.extract(tuned, tied, rank=2, keep_full=True, out=tmp_path / "found.st")
    tensors = {"a.weight": torch.zeros(8, 8), "a.b.weight": torch.zeros(8, 8), "a.scale": torch.zeros(4)}
    base = save_plain_model(tmp_path / "base", tensors)
    tuned = tuned_from(base, tmp_path / "nested", lambda name, tensor: tensor + 1)
    with pytest.raises(LoratoolError, match=r"'a.scale' changed .* no module that can be kept by itself"):
        loratool.extract(tuned, base, rank=2, keep_full=True, out=tmp_path / "found.st")
    assert not (tmp_path / "found.st").exists()


def test_kept_modules_survive_the_catalogue_and_an_export(base: Path, tmp_path: Path) -> None:
    tuned = tuned_from(base, tmp_path / "tuned", norms_and_more)
    loratool.extract(tuned, base, rank=2, keep_full=True, out=tmp_path / "found.st", name="mine")
    loratool.export("mine", tmp_path / "peft")
    kept = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    expected = load_file(tuned / "model.safetensors")
    assert torch.equal(kept[f"{PREFIX}model.norm.weight"], expected["model.norm.weight"])
    assert "model.norm" in json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["modules_to_save"]


def test_two_tensors_of_the_tuned_model_that_are_one_of_the_base_are_refused(tmp_path: Path) -> None:
    matrix, norm = torch.ones(24, 16), torch.ones(16)
    base = save_plain_model(tmp_path / "base", {"layers.0.q.weight": matrix, "norm.weight": norm})
    tensors = {"model.layers.0.q.weight": 2 * matrix, "model.norm.weight": norm, "norm.weight": norm.clone()}
    tuned = save_plain_model(tmp_path / "tuned", tensors)
    with pytest.raises(LoratoolError, match=r"two tensors of .* match one tensor of the base"):
        loratool.extract(tuned, base=base, rank=1, out=tmp_path / "x.safetensors")
