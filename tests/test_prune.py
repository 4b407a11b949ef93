"""Pruning an AdaLoRA: the budget exactly, the best triplets first, bit for bit, and the same delta in PEFT."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import peft
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_adapters import merge_by_peft, save_peft_adalora
from tiny_models import ARCHITECTURES, assert_same_tensors, load, stored_tensors

import loratool
from loratool.cli import cli
from loratool.errors import LoratoolError
from loratool.formats.read import read_adapter
from loratool.ranks.prune import Limit, plan_prune

if TYPE_CHECKING:
    from tiny_models import TinyModels

PREFIX = "base_model.model."
Q0 = "model.layers.0.self_attn.q_proj"
Q1 = "model.layers.1.self_attn.q_proj"
V0 = "model.layers.0.self_attn.v_proj"
V1 = "model.layers.1.self_attn.v_proj"
ALPHA, INIT_R = 7, 6
SINGULAR = {
    Q0: [0.9, -0.8, 0.05, 0.3, -0.01, 0.2],
    Q1: [0.001, 0.002, -0.003, 0.004, 0.0, 0.005],
    V0: [-2.0, 1.5, 1.0, -0.7, 0.6, 0.5],
    V1: [0.04, 0.4, -0.1, 0.0, 0.0, 0.02],
}


@pytest.fixture(scope="module")
def adalora(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An AdaLoRA of rank 6 with the singular values above. Read it only."""
    folder = tmp_path_factory.mktemp("adalora") / "ada"
    save_peft_adalora(load(tiny_models.folder("llama", "fp32"), "llama"), folder, init_r=INIT_R, lora_alpha=ALPHA)
    file = folder / "adapter_model.safetensors"
    values = {f"{PREFIX}{module}.lora_E": torch.tensor(e)[:, None] for module, e in SINGULAR.items()}
    save_file(load_file(file) | values, file, {"format": "pt"})
    return folder


def best(scores: Mapping[str, list[float]], budget: int) -> dict[str, list[int]]:
    """The places of the `budget` largest scores of all, by module."""
    flat = np.array([score for module in sorted(scores) for score in scores[module]])
    owners = [(module, place) for module in sorted(scores) for place in range(len(scores[module]))]
    chosen = [owners[index] for index in np.argsort(-flat, kind="stable")[:budget]]
    return {module: sorted(place for owner, place in chosen if owner == module) for module in scores}


def magnitudes() -> dict[str, list[float]]:
    return {module: [abs(value) for value in values] for module, values in SINGULAR.items()}


def delta_of_kept(adalora: Path, kept: Mapping[str, list[int]]) -> dict[str, Any]:
    """Float64: ``B (A * E) * alpha / (init_r + 1e-5)`` of the triplets that stay."""
    tensors = {
        name: tensor.double().numpy() for name, tensor in load_file(adalora / "adapter_model.safetensors").items()
    }
    return {
        module: tensors[f"{PREFIX}{module}.lora_B"][:, places]
        @ (tensors[f"{PREFIX}{module}.lora_A"] * tensors[f"{PREFIX}{module}.lora_E"])[places]
        * (ALPHA / (INIT_R + 1e-5))
        for module, places in kept.items()
    }


def deltas_in_peft(base: torch.nn.Module, adapter: Path) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = peft.PeftModel.from_pretrained(base, adapter)
    return {
        name: module.get_delta_weight("default").detach().double().numpy()
        for name, module in model.base_model.model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


@pytest.mark.parametrize("kind", ["adalora", "lora"])
@pytest.mark.parametrize("budget", [1, 2, 7, 12, 23, 24])
def test_the_budget_is_kept_exactly_and_pefts_delta_is_that_of_the_best_triplets(
    budget: int, kind: Any, adalora: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    result = loratool.prune(adalora, budget=budget, as_=kind, out=tmp_path / "pruned")
    kept = best(magnitudes(), budget)
    assert (result.before, result.total, sum(result.ranks.values())) == (24, budget, budget)
    assert result.ranks == {module: len(places) for module, places in kept.items()}
    read = read_adapter(tmp_path / "pruned")
    assert read.kind == result.record.kind == kind
    assert sum(read.ranks.values()) == budget
    ours = deltas_in_peft(load(tiny_models.folder("llama", "fp32"), "llama"), tmp_path / "pruned")
    for module, expected in delta_of_kept(adalora, kept).items():
        if kind == "lora" and not kept[module]:
            assert module not in ours
            continue
        np.testing.assert_allclose(ours[module], expected, rtol=0, atol=1e-6 * (np.abs(expected).max() or 1))


def test_triplets_that_stay_are_the_same_bits_in_their_order(adalora: Path, tmp_path: Path) -> None:
    loratool.prune(adalora, budget=9, out=tmp_path / "pruned.st")
    before, after = load_file(adalora / "adapter_model.safetensors"), load_file(tmp_path / "pruned.st")
    for module, places in best(magnitudes(), 9).items():
        for letter in "AEB":
            name = f"{PREFIX}{module}.lora_{letter}"
            expected = before[name][:, places] if letter == "B" else before[name][places]
            assert torch.equal(after[name], expected)


def test_pruned_twice_is_pruned_once_and_masks_name_the_first_components(adalora: Path, tmp_path: Path) -> None:
    loratool.prune(adalora, budget=15, out=tmp_path / "first.st")
    loratool.prune(tmp_path / "first.st", budget=11, out=tmp_path / "twice")
    loratool.prune(adalora, budget=11, out=tmp_path / "once")
    once, twice = (json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("once", "twice"))
    assert once == twice
    kept = best(magnitudes(), 11)
    assert once["rank_pattern"] == {
        f"{module}.lora_E": [place in kept[module] for place in range(INIT_R)] for module in SINGULAR
    }
    ours, theirs = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("once", "twice"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", ["adalora", "lora"])
def test_a_pruned_adapter_merges_to_pefts_bytes(
    kind: Any, adalora: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    loratool.prune(adalora, budget=9, as_=kind, out=tmp_path / "pruned")
    base = tiny_models.folder("llama", "fp32")
    loratool.merge([tmp_path / "pruned"], into=base, out=tmp_path / "merged")
    theirs = merge_by_peft(load(base, "llama"), tmp_path / "pruned")
    assert_same_tensors(stored_tensors(tmp_path / "merged"), theirs)
    assert loratool.verify(tmp_path / "merged").replayed == "base"


def test_the_lora_gives_every_module_one_scaling_and_leaves_out_what_was_pruned_away(
    adalora: Path, tmp_path: Path
) -> None:
    loratool.prune(adalora, budget=9, as_="lora", out=tmp_path / "pruned")
    config = json.loads((tmp_path / "pruned" / "adapter_config.json").read_text())
    read = read_adapter(tmp_path / "pruned")
    assert Q1 not in read.ranked
    assert config["peft_type"] == "LORA" and config["rank_pattern"].keys() == config["alpha_pattern"].keys()
    assert {update.scaling for update in read.ranked.values()} == {config["lora_alpha"] / config["r"]}


@pytest.mark.parametrize(("average", "budget"), [(1, 4), (2.25, 9), (0.3, 1), (6, 24)])
def test_an_average_rank_is_a_budget_over_the_modules(
    average: float, budget: int, adalora: Path, tmp_path: Path
) -> None:
    assert loratool.prune(adalora, average_rank=average, out=tmp_path / "pruned.st").total == budget


def test_an_average_rank_that_binary_cannot_write_is_rounded_as_a_person_would() -> None:
    assert Limit(average_rank=0.29).budget_of([1.0] * 100, 100, "x") == 29


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0, 1.4])
def test_a_threshold_keeps_what_scores_above_it(threshold: float, adalora: Path, tmp_path: Path) -> None:
    result = loratool.prune(adalora, threshold=threshold, out=tmp_path / "pruned.st")
    values = {module: torch.tensor(each).abs() for module, each in SINGULAR.items()}
    assert result.ranks == {module: int((each > threshold).sum()) for module, each in values.items()}


def with_importance(adalora: Path, folder: Path, scores: object) -> Path:
    shutil.copytree(adalora, folder)
    (folder / "loratool.json").write_text(json.dumps({"kind": "adalora", "importance": scores}))
    return folder


SCORES = st.lists(st.floats(0, 1) | st.just(0.5), min_size=INIT_R, max_size=INIT_R)


@given(scores=st.fixed_dictionaries(dict.fromkeys(SINGULAR, SCORES)), budget=st.integers(1, 24))
@settings(max_examples=50, deadline=None)
def test_importance_scores_decide_where_the_file_has_them(
    scores: dict[str, list[float]], budget: int, adalora: Path
) -> None:
    pruning = plan_prune(replace(read_adapter(adalora), facts={"importance": scores}), Limit(budget=budget))
    assert pruning.criterion == "importance"
    assert {module: list(places) for module, places in pruning.kept.items()} == best(scores, budget)


def test_importance_scores_of_what_stays_go_along(adalora: Path, tmp_path: Path) -> None:
    scores = {module: [float(place) for place in range(INIT_R)] for module in SINGULAR}
    source = with_importance(adalora, tmp_path / "scored", scores)
    assert loratool.prune(source, budget=8, out=tmp_path / "pruned.st").criterion == "importance"
    assert read_adapter(tmp_path / "pruned.st").facts["importance"] == {module: [4.0, 5.0] for module in SINGULAR}
    again = loratool.prune(tmp_path / "pruned.st", budget=4, out=tmp_path / "again.st")
    assert again.ranks == dict.fromkeys(SINGULAR, 1)


def test_gpt2s_transposed_layers_are_pruned_and_converted(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models.folder("gpt2", "fp32")
    targets = list(ARCHITECTURES["gpt2"].target_modules)
    source = save_peft_adalora(load(base, "gpt2"), tmp_path / "ada", target_modules=targets, fan_in_fan_out=True)
    for kind in ("adalora", "lora"):
        loratool.prune(source, average_rank=1, as_=kind, out=tmp_path / kind)
        loratool.merge([tmp_path / kind], into=base, out=tmp_path / f"merged-{kind}")
        theirs = merge_by_peft(load(base, "gpt2"), tmp_path / kind, tmp_path / f"peft-{kind}")
        assert_same_tensors(stored_tensors(tmp_path / f"merged-{kind}"), stored_tensors(base) | theirs)


# The catalogue and the command line


def test_the_result_is_catalogued_as_a_child_with_its_figures(
    adalora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    loratool.add(adalora, name="ada")
    runner = CliRunner()
    output = runner.invoke(cli, ["prune", "ada", "--budget", "9"]).output
    assert "9 of 24 ranks" in output and "1 module" in output
    shown = loratool.show("ada-b9")
    assert (shown.record.kind, shown.record.ranks) == ("adalora", {Q0: 3, Q1: 0, V0: 6, V1: 0} | ranks_of("ada-b9"))
    (edge,) = shown.ancestors
    assert (edge.parent, edge.operation) == ("ada@1", "prune")
    assert edge.details == {"budget": 9, "of": 24, "by": "singular values", "as": "adalora"}
    printed = json.loads(
        runner.invoke(cli, ["prune", "ada", "--average-rank", "1", "--as", "lora", "--name", "small", "--json"]).stdout
    )
    assert (printed["name"], printed["total"], printed["kind"]) == ("small", 4, "lora")


def ranks_of(name: str) -> dict[str, int]:
    ranks = loratool.show(name).record.ranks
    assert ranks is not None
    return ranks


def test_equal_prunings_give_equal_bytes(adalora: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        loratool.prune(adalora, budget=9, out=tmp_path / name / "pruned.st", name=name)
    assert (tmp_path / "one" / "pruned.st").read_bytes() == (tmp_path / "two" / "pruned.st").read_bytes()


# What is wrong is said

BAD: dict[str, tuple[Mapping[str, Any], str]] = {
    "a budget of 0": ({"budget": 0}, "budget of 0 does not fit.*--budget of 1 to 24"),
    "a negative budget": ({"budget": -4}, "-4"),
    "a budget above the total": ({"budget": 25}, "budget of 25 does not fit.*has 24 triplets"),
    "half a rank as budget": ({"budget": 2.5}, r"the budget is '2\.5'; give a whole number"),
    "an average of 0": ({"average_rank": 0.0}, "average rank of 0 does not fit"),
    "an average above the total": ({"average_rank": 6.5}, "--average-rank of up to 6"),
    "an average beyond all numbers": ({"average_rank": 1e308}, r"average rank of 1e\+308 does not fit"),
    "a budget beyond all numbers": ({"budget": 10**400}, "does not fit"),
    "an average that is no number": ({"average_rank": math.nan}, "nan"),
    "a threshold above all": ({"threshold": 3.0}, "the largest score is 2"),
    "an infinite threshold": ({"threshold": math.inf}, "inf"),
    "nothing to prune to": ({}, "give one of them"),
    "two limits": ({"budget": 3, "threshold": 0.1}, "give one of them"),
    "another kind": ({"budget": 3, "as_": "dora"}, "dora"),
    "no output": ({"budget": 3, "out": ""}, "empty"),
    "no name": ({"budget": 3, "name": ""}, "name"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_pruned_is_refused_before_anything_is_written(case: str, adalora: Path, tmp_path: Path) -> None:
    options, message = BAD[case]
    with pytest.raises(Exception, match=message) as raised:
        loratool.prune(adalora, **{"out": tmp_path / "pruned.st", **options})
    assert type(raised.value).__module__ in {"loratool.errors", "registry.errors"}
    assert list(tmp_path.iterdir()) == []
    assert loratool.list() == ()


@pytest.mark.parametrize(
    "scores",
    [[], {}, {Q0: [1.0] * 6}, {module: [1.0] * 5 for module in SINGULAR}, {m: ["a"] * 6 for m in SINGULAR}, 7],
    ids=["a list", "none", "one module", "too few", "words", "a number"],
)
def test_importance_scores_that_do_not_fit_are_refused(scores: object, adalora: Path, tmp_path: Path) -> None:
    source = with_importance(adalora, tmp_path / "scored", scores)
    with pytest.raises(LoratoolError, match="importance scores"):
        loratool.prune(source, budget=3, out=tmp_path / "pruned.st")


def test_a_lora_has_no_triplets(tmp_path: Path) -> None:
    pirate = Path(__file__).parents[1] / "examples" / "pirate"
    with pytest.raises(LoratoolError, match="truncate --energy"):
        loratool.prune(pirate, budget=3, out=tmp_path / "pruned.st")


def test_an_alpha_that_stands_for_the_rank_is_pruned_as_a_lora_only(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models.folder("llama", "fp32")
    source = save_peft_adalora(load(base, "llama"), tmp_path / "ada", lora_alpha=0)
    with pytest.raises(LoratoolError, match="--as lora"):
        loratool.prune(source, budget=16, out=tmp_path / "pruned")
    loratool.prune(source, budget=16, as_="lora", out=tmp_path / "lora")
    before, after = (deltas_in_peft(load(base, "llama"), folder) for folder in (source, tmp_path / "lora"))
    for module, delta in before.items():
        np.testing.assert_allclose(after[module], delta, rtol=0, atol=1e-6 * np.abs(delta).max())
