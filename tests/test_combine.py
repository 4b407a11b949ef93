"""`loratool combine` gives the numbers of PEFT's `add_weighted_adapter`, and refuses what has no meaning."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_adapters import as_peft_folder, copy_with, save_kohya_dylora, save_plain_adapter
from tiny_models import load

import loratool
from loratool.errors import LoratoolError
from loratool.ranks.combine import Share, plan_combine
from loratool.ranks.methods import Recipe, drawn
from registry import Registry, RegistryError, home

if TYPE_CHECKING:
    from tiny_adapters import TinyAdapters
    from tiny_models import TinyModels

PREFIX = "base_model.model."
Deltas = dict[str, torch.Tensor]


def factors_of(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter's file or folder."""
    return load_file(file / "adapter_model.safetensors" if file.is_dir() else file)


def deltas_of(file: Path) -> Deltas:
    """What a combined adapter adds to each module, in fp64; its scaling is 1."""
    factors = {name: tensor.double() for name, tensor in factors_of(file).items()}
    modules = [name.removesuffix(".lora_A.weight") for name in factors if name.endswith(".lora_A.weight")]
    return {
        module.removeprefix(PREFIX): factors[f"{module}.lora_B.weight"] @ factors[f"{module}.lora_A.weight"]
        for module in modules
    }


def peft_model(base: Path, adapters: Mapping[str, Path], architecture: str = "llama") -> Any:
    """The base with each adapter loaded by PEFT under its name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (first, folder), *others = adapters.items()
        model = peft.PeftModel.from_pretrained(load(base, architecture), folder, adapter_name=first)
        for name, folder in others:
            model.load_adapter(folder, name)
    return model


def lora_layers(model: Any, name: str) -> dict[str, Any]:
    """The layers that hold the adapter `name`, by module."""
    return {
        key.removeprefix(PREFIX): module
        for key, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer) and name in module.lora_A
    }


def combined_by_peft(
    base: Path, adapters: Sequence[Path], weights: Sequence[float], method: str, **options: Any
) -> Any:
    """PEFT's own combination, as the adapter ``both`` of its model."""
    named = {f"adapter{place}": adapter for place, adapter in enumerate(adapters)}
    model = peft_model(base, named)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(list(named), list(weights), "both", method.replace("-", "_"), **options)
    return model


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The Frobenius norm of the difference, relative to that of what is expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture
def base(tiny_models: TinyModels) -> Path:
    return tiny_models.folder("llama", "fp32")


@pytest.fixture
def trio(tiny_adapters: TinyAdapters) -> list[Path]:
    """Three adapters of one rank, with other alphas, of which one has fewer targets."""
    return [
        tiny_adapters.folder("llama", seed=1),
        tiny_adapters.folder("llama", seed=2, lora_alpha=5, use_rslora=True),
        tiny_adapters.folder("llama", seed=3, lora_alpha=3, target_modules=["q_proj", "up_proj"]),
    ]


@pytest.fixture
def unlike(tiny_adapters: TinyAdapters) -> list[Path]:
    """Two adapters of other ranks, alphas and targets, one with patterns."""
    return [
        tiny_adapters.folder("llama", seed=4, r=2, rank_pattern={"q_proj": 6}, alpha_pattern={"down_proj": 1}),
        tiny_adapters.folder("llama", seed=5, r=5, lora_alpha=3, target_modules=["q_proj", "v_proj", "o_proj"]),
    ]


WEIGHTS = [0.7, -0.4, 1.3]
ON_FACTORS: dict[str, dict[str, float]] = {
    "linear": {},
    "ties": {"density": 0.4},
    "magnitude-prune": {"density": 0.6},
}


@pytest.mark.parametrize("method", ON_FACTORS)
def test_methods_on_factors_give_the_factors_of_peft(method: str, base: Path, trio: list[Path], tmp_path: Path) -> None:
    model = combined_by_peft(base, trio, WEIGHTS, method, **ON_FACTORS[method])
    result = loratool.combine(
        list(zip(trio, WEIGHTS, strict=True)), method, out=tmp_path / "both.st", **ON_FACTORS[method]
    )
    factors = factors_of(result.out)
    layers = lora_layers(model, "both")
    assert len(factors) == 2 * len(layers)
    for module, layer in layers.items():
        assert relative(factors[f"{PREFIX}{module}.lora_A.weight"], layer.lora_A["both"].weight) < 1e-5
        assert relative(factors[f"{PREFIX}{module}.lora_B.weight"], layer.lora_B["both"].weight) < 1e-5


@pytest.mark.parametrize("method", ["cat", "svd", *ON_FACTORS])
def test_every_method_gives_the_delta_of_peft_also_when_peft_loads_it(
    method: str, base: Path, trio: list[Path], tmp_path: Path
) -> None:
    options = ON_FACTORS.get(method, {})
    model = combined_by_peft(base, trio, WEIGHTS, method, **options)
    result = loratool.combine(list(zip(trio, WEIGHTS, strict=True)), method, out=tmp_path / "both.st", **options)
    expected = {module: layer.get_delta_weight("both") for module, layer in lora_layers(model, "both").items()}
    loaded = lora_layers(peft_model(base, {"ours": as_peft_folder(result.out, tmp_path / "ours")}), "ours")
    deltas = deltas_of(result.out)
    assert deltas.keys() == expected.keys() == loaded.keys()
    for module, delta in expected.items():
        assert relative(deltas[module], delta) < 1e-5
        assert relative(loaded[module].get_delta_weight("ours"), delta) < 1e-5


@pytest.mark.parametrize(("method", "rank"), [("cat", None), ("svd", None), ("svd", 3), ("svd", 1)])
def test_adapters_of_other_ranks_alphas_and_targets_combine_as_in_peft(
    method: str, rank: int | None, base: Path, unlike: list[Path], tmp_path: Path
) -> None:
    options = {} if rank is None else {"svd_rank": rank}
    model = combined_by_peft(base, unlike, [1.5, 0.5], method, **options)
    result = loratool.combine([(unlike[0], 1.5), (unlike[1], 0.5)], method, rank=rank, out=tmp_path / "both")
    expected = {module: layer.get_delta_weight("both") for module, layer in lora_layers(model, "both").items()}
    deltas = deltas_of(result.out)
    assert deltas.keys() == expected.keys()
    for module, delta in expected.items():
        assert relative(deltas[module], delta) < 1e-5
    assert any("not in every adapter" in note for note in result.notes)
    loaded = lora_layers(peft_model(base, {"ours": result.out}), "ours")
    assert loaded.keys() == expected.keys()
    for module, delta in expected.items():
        assert relative(loaded[module].get_delta_weight("ours"), delta) < 1e-5


def test_svd_is_the_nearest_of_its_rank_and_says_what_it_lost(trio: list[Path], tmp_path: Path) -> None:
    exact = deltas_of(loratool.combine(trio, "cat", out=tmp_path / "cat.st").out)
    result = loratool.combine(trio, "svd", rank=2, out=tmp_path / "svd.st")
    lost = total = 0.0
    for module, delta in deltas_of(result.out).items():
        values = np.linalg.svd(exact[module].numpy(), compute_uv=False)
        optimum = float((values[2:] ** 2).sum())
        assert abs(float((delta - exact[module]).norm()) / optimum**0.5 - 1) < 1e-5
        lost, total = lost + optimum, total + float((values**2).sum())
    assert result.error is not None
    assert abs(result.error / (lost / total) ** 0.5 - 1) < 1e-5


def test_fan_in_fan_out_modules_combine_by_svd_as_in_peft(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    adapters = [tiny_adapters.folder("gpt2", seed=seed, fan_in_fan_out=True) for seed in (1, 2)]
    named = {"a": adapters[0], "b": adapters[1]}
    model = peft_model(tiny_models.folder("gpt2", "fp32"), named, "gpt2")
    model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "both", "svd")
    result = loratool.combine([adapters[0], (adapters[1], 0.5)], "svd", out=tmp_path / "both")
    deltas = deltas_of(result.out)
    for module, layer in lora_layers(model, "both").items():
        assert relative(deltas[module].T, layer.get_delta_weight("both")) < 1e-5


@pytest.mark.parametrize("method", ["dare-linear", "dare-ties"])
def test_dare_with_everything_kept_is_its_plain_method(
    method: str, base: Path, trio: list[Path], tmp_path: Path
) -> None:
    model = combined_by_peft(base, trio, WEIGHTS, method, density=1.0)
    result = loratool.combine(list(zip(trio, WEIGHTS, strict=True)), method, density=1.0, out=tmp_path / "both.st")
    for module, layer in lora_layers(model, "both").items():
        assert relative(deltas_of(result.out)[module], layer.get_delta_weight("both")) < 1e-5


def test_dare_draws_as_peft_does() -> None:
    factor = torch.full((500, 400), 3.0)
    ours = drawn(factor, 0.3, seed=7)
    torch.manual_seed(7)
    theirs = peft.utils.merge_utils.random_pruning(factor, 0.3, rescale=True)
    assert set(ours.unique().tolist()) == set(theirs.unique().tolist()) == {0.0, 10.0}
    spread = (0.3 * 0.7 / factor.numel()) ** 0.5
    for drawing in (ours, theirs):
        assert abs(float((drawing != 0).double().mean()) - 0.3) < 5 * spread
    for dim in (0, 1):
        assert float((ours != 0).double().mean(dim).std()) < 1.2 * (0.21 / factor.shape[dim]) ** 0.5
    assert float(((ours != 0) & (drawn(factor, 0.3, seed=8) != 0)).double().mean()) == pytest.approx(0.09, abs=0.01)


def test_dare_draws_each_factor_of_each_adapter_on_its_own(tmp_path: Path) -> None:
    adapter = save_plain_adapter(tmp_path / "one", {"x.q_proj": (40, 40), "y.q_proj": (40, 40)}, r=8)
    result = loratool.combine([adapter], "dare-linear", density=0.5, out=tmp_path / "both.st")
    masks = [tensor.reshape(-1) != 0 for tensor in factors_of(result.out).values()]
    assert len(masks) == 4
    for place, mask in enumerate(masks):
        assert 0.35 < float(mask.double().mean()) < 0.65
        assert all(not torch.equal(mask, other) for other in masks[place + 1 :])


def test_the_same_combination_gives_the_same_bytes_and_a_seed_other_ones(trio: list[Path], tmp_path: Path) -> None:
    def once(out: str, **options: Any) -> bytes:
        loratool.combine(trio, "dare-ties", density=0.5, out=tmp_path / out, name="both", **options)
        return (tmp_path / out).read_bytes()

    first = once("a.st")
    assert once("b.st") == first
    seed = json.loads(metadata(tmp_path / "a.st")["loratool"])["lineage"]["seed"]
    assert once("c.st", seed=seed) == first
    assert once("d.st", seed=1) != first


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata())


def test_a_combination_is_a_child_of_every_adapter_with_the_figures(trio: list[Path], tmp_path: Path) -> None:
    loratool.add(trio[0], name="first")
    result = loratool.combine([("first", 2.0), trio[1]], "svd", rank=3, out=tmp_path / "both.st")
    edges = loratool.show("both").ancestors
    assert [(edge.parent, edge.operation) for edge in edges] == [("first@1", "combine"), (trio[1].name, "combine")]
    details = edges[0].details
    assert details is not None
    assert (details["method"], details["rank"], details["lost"]) == ("svd", 3, result.error)
    assert [each["weight"] for each in details["weights"]] == [2.0, 1.0]
    assert loratool.list()[0].reference == result.record.reference == "both@1"


def test_the_targets_stay_as_they_are_written_where_all_agree(tiny_adapters: TinyAdapters, tmp_path: Path) -> None:
    pattern = {"target_modules": r".*\.self_attn\.q_proj", "r": 3}
    alike = [tiny_adapters.folder("llama", seed=seed, **pattern) for seed in (1, 2)]
    loratool.combine(alike, "linear", out=tmp_path / "both")
    config = json.loads((tmp_path / "both" / "adapter_config.json").read_text())
    assert config["target_modules"] == pattern["target_modules"]


def test_a_single_adapter_is_scaled(trio: list[Path], tmp_path: Path) -> None:
    whole = deltas_of(loratool.combine([trio[1]], "cat", out=tmp_path / "one.st").out)
    half = deltas_of(loratool.combine([(trio[1], 0.5)], "linear", out=tmp_path / "half.st").out)
    for module, delta in whole.items():
        assert relative(2 * half[module], delta) < 1e-6


# What is refused


def test_a_dylora_is_combined_at_each_rank_that_is_asked_for(tiny_adapters: TinyAdapters, tmp_path: Path) -> None:
    dylora = shutil.copytree(tiny_adapters.folder("llama", r=6, lora_alpha=7), tmp_path / "dylora")
    (dylora / "loratool.json").write_text(json.dumps({"kind": "dylora"}))
    loratool.add(dylora)
    result = loratool.combine([("dylora@rank=2", 0.5), ("dylora", -1.0)], "cat", out=tmp_path / "both.st")
    assert result.parents == (("dylora@1@rank=2", 0.5), ("dylora@1", -1.0))
    factors = {name: tensor.double() for name, tensor in factors_of(dylora).items()}
    for module, delta in deltas_of(result.out).items():
        a, b = (factors[f"{PREFIX}{module}.lora_{letter}.weight"] for letter in "AB")
        assert relative(delta, 0.5 * 7 / 2 * b[:, :2] @ a[:2] - 7 / 6 * b @ a) < 1e-6
    with pytest.raises(LoratoolError, match="not one of them"):
        loratool.combine(["dylora@rank=7"], "cat", out=tmp_path / "no.st")
    with pytest.raises(LoratoolError, match="loratool truncate"):
        loratool.truncate("dylora@rank=2", rank=1)


def test_kohyas_files_combine_in_their_own_layout_and_with_no_other(trio: list[Path], tmp_path: Path) -> None:
    shapes = {"model.layers.0.self_attn.q_proj": (20, 16), "model.layers.0.self_attn.v_proj": (8, 16)}
    files = [save_kohya_dylora(tmp_path / f"{n}.safetensors", shapes, r=2 + n, alpha=3.0, seed=n) for n in (0, 1)]
    result = loratool.combine([(files[0], 0.5), (files[1], 2.0)], "cat", out=tmp_path / "both.safetensors")
    found, parts = load_file(result.out), [load_file(file) for file in files]
    for module in ("lora_te_model_layers_0_self_attn_q_proj", "lora_te_model_layers_0_self_attn_v_proj"):
        up, down, alpha = (found[f"{module}.{name}"] for name in ("lora_up.weight", "lora_down.weight", "alpha"))
        terms = [
            weight
            * 3.0
            / rank
            * part[f"{module}.lora_up.weight"].double()
            @ part[f"{module}.lora_down.weight"].double()
            for part, weight, rank in zip(parts, (0.5, 2.0), (2, 3), strict=True)
        ]
        assert relative(float(alpha) / len(down) * up.double() @ down.double(), terms[0] + terms[1]) < 1e-6
    assert result.record.kind == "lora"
    with pytest.raises(LoratoolError, match="kohya's layout"):
        loratool.combine([files[0], trio[0]], "cat", out=tmp_path / "no.safetensors")


def test_linear_needs_equal_ranks_and_points_to_cat_and_svd(unlike: list[Path], tmp_path: Path) -> None:
    for method, options in ON_FACTORS.items():
        with pytest.raises(LoratoolError, match=r"equal rank.*o_proj.*2 in .*5 in .*--method cat.*svd"):
            loratool.combine(unlike, method, out=tmp_path / "both.st", **options)
    assert not (tmp_path / "both.st").exists()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "ties of one adapter": ({"method": "ties", "density": 0.5, "count": 1}, "only one is given"),
    "dare-ties of one adapter": ({"method": "dare-ties", "density": 0.5, "count": 1}, "only one is given"),
    "no adapter": ({"method": "cat", "count": 0}, "nothing to combine"),
    "no density": ({"method": "ties"}, "--density"),
    "a density of 0": ({"method": "ties", "density": 0.0}, "above 0"),
    "a density above 1": ({"method": "magnitude-prune", "density": 1.5}, "at most 1"),
    "a density that is no number": ({"method": "dare-ties", "density": float("nan")}, "density is nan"),
    "a density that keeps nothing": ({"method": "ties", "density": 1e-9}, "keeps none of the"),
    "a density for cat": ({"method": "cat", "density": 0.5}, "leave it out"),
    "a rank for cat": ({"method": "cat", "rank": 2}, "leave it out"),
    "a seed for svd": ({"method": "svd", "seed": 2}, "leave it out"),
    "rank 0": ({"method": "svd", "rank": 0}, "at least 1"),
    "a negative rank": ({"method": "svd", "rank": -1}, "at least 1"),
    "a rank above the most": ({"method": "svd", "rank": 13}, "at most 12"),
    "a negative seed": ({"method": "dare-linear", "density": 0.5, "seed": -1}, "seed is -1"),
    "a seed beyond 64 bits": ({"method": "dare-linear", "density": 0.5, "seed": 2**64}, "seed is"),
    "a method that is none": ({"method": "slerp"}, "is not a method"),
    "a name that is none": ({"method": "cat", "name": "a/b"}, "a/b"),
    "a weight that is no number": ({"method": "cat", "weight": float("nan")}, "must be a number"),
    "an infinite weight": ({"method": "cat", "weight": float("inf")}, "must be a number"),
    "nothing but weights of 0": ({"method": "cat", "weight": 0.0}, "every weight is 0"),
    "a weight beyond fp32": ({"method": "cat", "weight": 1e300}, "overflows fp32"),
    "a weight whose result is beyond fp32": ({"method": "cat", "weight": 1.5e38}, "overflows fp32"),
    "an output without a path": ({"method": "cat", "out": ""}, "empty"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_impossible_numbers_are_refused_and_nothing_is_written(case: str, trio: list[Path], tmp_path: Path) -> None:
    options, message = REFUSED[case]
    count, weight = options.get("count", 3), options.get("weight", 1.0)
    chosen = {"out": tmp_path / "both.st"} | {
        key: value for key, value in options.items() if key not in {"count", "weight"}
    }
    with pytest.raises((LoratoolError, RegistryError), match=message):
        loratool.combine([(adapter, weight) for adapter in trio[:count]], **chosen)
    assert list(tmp_path.iterdir()) == []
    assert loratool.list() == ()


def test_an_adapter_given_twice_is_refused(trio: list[Path], tmp_path: Path) -> None:
    with pytest.raises(LoratoolError, match="given twice"):
        loratool.combine([trio[0], trio[0]], "cat", out=tmp_path / "both.st")


def test_an_output_that_is_one_of_the_adapters_is_refused(trio: list[Path], tmp_path: Path) -> None:
    copy = copy_with(trio[0], tmp_path / "copy")
    before = (copy / "adapter_model.safetensors").read_bytes()
    with pytest.raises(LoratoolError, match="overlap; choose another"):
        loratool.combine([copy, trio[1]], "cat", out=copy, force=True)
    assert (copy / "adapter_model.safetensors").read_bytes() == before


def test_factors_with_nan_are_refused(trio: list[Path], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    copy = copy_with(trio[0], tmp_path / "copy")
    factors = factors_of(copy)
    next(iter(factors.values()))[0, 0] = float("nan")
    save_file(factors, copy / "adapter_model.safetensors")
    with pytest.raises(LoratoolError, match="NaN"):
        loratool.combine([copy, trio[1]], "linear", out=tmp_path / "both.st")
    assert not (tmp_path / "both.st").exists()


# Bases


def test_adapters_of_bases_with_other_fingerprints_are_refused(
    tiny_models: TinyModels, trio: list[Path], tmp_path: Path
) -> None:
    for name, dtype in (("one", "fp32"), ("two", "bf16")):
        loratool.base_add(name, tiny_models.folder("llama", dtype))
    loratool.add(trio[0], name="first", base="one")
    loratool.add(trio[1], name="second", base="two")
    with pytest.raises(LoratoolError, match=r"'first'.* belongs to the base .* and 'second'"):
        loratool.combine(["first", "second"], "cat", out=tmp_path / "both.st")
    forced = loratool.combine(["first", "second"], "cat", out=tmp_path / "both.st", any_base=True)
    assert any("with --any-base" in note for note in forced.notes)


def test_the_base_of_the_adapters_is_that_of_the_result(
    tiny_models: TinyModels, trio: list[Path], tmp_path: Path
) -> None:
    base = loratool.base_add("one", tiny_models.folder("llama", "fp32"))
    loratool.add(trio[0], name="first", base="one")
    result = loratool.combine(["first", trio[2]], "cat", out=tmp_path / "both.st")
    assert (result.record.base, result.record.base_fingerprint) == ("one", base.fingerprint)
    merged = loratool.merge(result.out, into="one", out=tmp_path / "merged")
    assert loratool.verify(merged.out)


def test_adapters_that_name_other_bases_are_refused(trio: list[Path], tmp_path: Path) -> None:
    named = [
        copy_with(adapter, tmp_path / name, base_model_name_or_path=f"hub/{name}")
        for adapter, name in zip(trio[:2], ("llama", "mistral"), strict=True)
    ]
    with pytest.raises(LoratoolError, match=r"'hub/llama'.*'hub/mistral'.*--any-base"):
        loratool.combine(named, "cat", out=tmp_path / "both.st")
    loratool.combine(named, "cat", out=tmp_path / "both.st", any_base=True)


def test_modules_of_other_shapes_are_of_other_bases(tmp_path: Path) -> None:
    left = save_plain_adapter(tmp_path / "left", {"x.q_proj": (40, 40)})
    right = save_plain_adapter(tmp_path / "right", {"x.q_proj": (40, 48)})
    for method in ("cat", "svd", "linear"):
        with pytest.raises(LoratoolError, match=r"\[40, 40\] in 'left' and \[40, 48\] in 'right'"):
            loratool.combine([left, right], method, out=tmp_path / "both.st")


def test_a_plan_needs_no_numbers(trio: list[Path]) -> None:
    from loratool.formats.read import read_adapter

    shares = [Share(read_adapter(adapter), 1.0) for adapter in trio]
    plan = plan_combine(shares, Recipe("cat"))
    assert set(plan.ranks.values()) == {8, 12}
    assert plan.nbytes == sum(tensor.nbytes for adapter in trio for tensor in factors_of(adapter).values())


def test_the_catalogue_stays_as_it_was_when_a_combination_fails(trio: list[Path], tmp_path: Path) -> None:
    with Registry.open(home()) as catalogue:
        before = catalogue.counts()
    (tmp_path / "both.st").write_bytes(b"mine")
    with pytest.raises(LoratoolError, match="exists already"):
        loratool.combine(trio, "cat", out=tmp_path / "both.st")
    assert (tmp_path / "both.st").read_bytes() == b"mine"
    with Registry.open(home()) as catalogue:
        assert catalogue.counts() == before
