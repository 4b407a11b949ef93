"""Truncation: a DyLoRA's leading slices under the law of its training; of any other adapter the best approximation."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import peft
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_adapters import save_kohya_dylora, save_peft_adalora, save_plain_adapter
from tiny_models import load

import loratool
from loratool.cli import cli
from loratool.errors import LoratoolError
from loratool.formats.read import read_adapter

if TYPE_CHECKING:
    from tiny_adapters import TinyAdapters
    from tiny_models import TinyModels

R, ALPHA = 6, 7
PREFIX = "base_model.model."
Array = np.ndarray[Any, np.dtype[np.float64]]


def deltas_in_peft(base: torch.nn.Module, adapter: Path) -> dict[str, Array]:
    """PEFT's own delta of each module that it loads from a folder, float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of tensors that it does not find
        model = peft.PeftModel.from_pretrained(base, adapter)
    layers = (peft.tuners.lora.LoraLayer,)
    return {
        name: module.get_delta_weight("default").detach().double().numpy()
        for name, module in model.base_model.model.named_modules()
        if isinstance(module, layers)
    }


def deltas_by_hand(adapter: Path) -> dict[str, Array]:
    """The dense update of each module as numpy computes it in float64, from the tensors and the scaling that is read."""
    read = read_adapter(adapter)
    tensors = load_file(read.file)
    dense = {}
    for module, update in read.ranked.items():
        a, b = (tensors[update.tensors[letter].name].double() for letter in "AB")
        if "E" in update.tensors:
            a = a * tensors[update.tensors["E"].name].double()
        dense[module] = (b @ a * update.scaling).numpy()
    return dense


def optimum(delta: Array, rank: int) -> float:
    """The least Frobenius norm of what a matrix of this rank can miss of `delta` (Eckart and Young)."""
    return float(np.sqrt((np.linalg.svd(delta, compute_uv=False)[rank:] ** 2).sum()))


def as_dylora(folder: Path, scaling: str | None = "paper") -> Path:
    facts = {"kind": "dylora"} | ({} if scaling is None else {"scaling": scaling})
    (folder / "loratool.json").write_text(json.dumps(facts))
    return folder


# A DyLoRA's leading components


@pytest.mark.parametrize("factors", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("rank", range(1, R + 1))
def test_factors_are_the_leading_slices_bit_for_bit(
    rank: int, factors: str, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    source = shutil.copytree(tiny_adapters.folder("llama", r=R, lora_alpha=ALPHA, factors=factors), tmp_path / "dylora")
    (result,) = loratool.truncate(as_dylora(source), rank=rank, out=tmp_path / "cut")
    assert (result.method, result.error, result.record.rank, result.record.alpha) == ("leading", None, rank, ALPHA)
    full, cut = (load_file(folder / "adapter_model.safetensors") for folder in (source, tmp_path / "cut"))
    assert full.keys() == cut.keys()
    for name, tensor in full.items():
        expected = tensor[:rank] if "lora_A" in name else tensor[:, :rank]
        assert cut[name].dtype == tensor.dtype and torch.equal(cut[name], expected), name


def test_factors_in_fp64_are_cut_bit_for_bit_too(tmp_path: Path) -> None:
    source = as_dylora(save_plain_adapter(tmp_path / "dylora", {"q_proj": (10, 6)}, r=4))
    file = source / "adapter_model.safetensors"
    save_file({name: tensor.double() / 3 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    loratool.truncate(source, rank=3, out=tmp_path / "cut.st")
    full, cut = load_file(file), load_file(tmp_path / "cut.st")
    assert torch.equal(cut[f"{PREFIX}q_proj.lora_B.weight"], full[f"{PREFIX}q_proj.lora_B.weight"][:, :3])


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("law", ["paper", "kohya"])
@pytest.mark.parametrize("rank", range(1, R + 1))
def test_pefts_delta_is_the_trained_forward_at_that_rank(
    rank: int, law: str, rslora: bool, tiny_adapters: TinyAdapters, tiny_models: TinyModels, tmp_path: Path
) -> None:
    folder = tiny_adapters.folder("llama", r=R, lora_alpha=ALPHA, use_rslora=rslora)
    source = as_dylora(shutil.copytree(folder, tmp_path / "dylora"), law)
    loratool.truncate(source, rank=rank, out=tmp_path / "cut")
    scale = ALPHA / rank if law == "paper" else ALPHA / R * math.sqrt(R / rank)
    tensors = load_file(source / "adapter_model.safetensors")
    deltas = deltas_in_peft(load(tiny_models.folder("llama", "fp32"), "llama"), tmp_path / "cut")
    assert deltas
    for module, delta in deltas.items():
        a, b = (tensors[f"{PREFIX}{module}.lora_{letter}.weight"].double() for letter in "AB")
        forward = (b[:, :rank] @ a[:rank] * (ALPHA / math.sqrt(rank) if rslora else scale)).numpy()
        np.testing.assert_allclose(delta, forward, rtol=0, atol=1e-6 * np.abs(forward).max())


class Flat(torch.nn.Module):
    """Modules under the names that kohya's layout gives them."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_te_layers_0_q_proj = torch.nn.Linear(6, 10, bias=False)
        self.lora_te_layers_1_fc1 = torch.nn.Linear(8, 5, bias=False)


SHAPES = {"layers.0.q_proj": (10, 6), "layers.1.fc1": (5, 8)}


@pytest.mark.parametrize("rank", range(1, R + 1))
def test_a_cut_of_kohyas_file_gives_its_forward_in_peft_and_stays_in_its_layout(rank: int, tmp_path: Path) -> None:
    """kohya loads alpha and divides it by the new rank, and so does PEFT."""
    source = save_kohya_dylora(tmp_path / "kohya.safetensors", SHAPES, r=R, alpha=ALPHA)
    (result,) = loratool.truncate(source, rank=rank)
    assert result.out == tmp_path / f"kohya-r{rank}.safetensors"
    full, cut = load_file(source), load_file(result.out)
    assert full.keys() == cut.keys()
    loratool.export(result.out, tmp_path / "peft")
    deltas = deltas_in_peft(Flat(), tmp_path / "peft")
    for module in ("lora_te_layers_0_q_proj", "lora_te_layers_1_fc1"):
        down, up = full[f"{module}.lora_down.weight"], full[f"{module}.lora_up.weight"]
        assert torch.equal(cut[f"{module}.lora_down.weight"], down[:rank])
        assert torch.equal(cut[f"{module}.lora_up.weight"], up[:, :rank])
        forward = (up[:, :rank].double() @ down[:rank].double()).numpy() * (ALPHA / R) * math.sqrt(R / rank)
        scale = cut[f"{module}.alpha"].item() / rank
        assert scale == pytest.approx(ALPHA / R * math.sqrt(R / rank), rel=1e-7)
        np.testing.assert_allclose(deltas[module], forward, rtol=0, atol=1e-6 * np.abs(forward).max())
    with safe_open(result.out, framework="pt") as opened:
        facts = opened.metadata()
    assert (facts["ss_network_module"], facts["ss_network_dim"]) == ("networks.dylora", str(rank))


@pytest.mark.parametrize("law", ["paper", "kohya"])
def test_a_cut_of_a_cut_is_the_cut_itself(law: str, tiny_adapters: TinyAdapters, tmp_path: Path) -> None:
    source = as_dylora(shutil.copytree(tiny_adapters.folder("llama", r=R, lora_alpha=ALPHA), tmp_path / "dylora"), law)
    loratool.truncate(source, rank=4, out=tmp_path / "four.st")
    loratool.truncate(tmp_path / "four.st", rank=2, out=tmp_path / "twice.st")
    loratool.truncate(source, rank=2, out=tmp_path / "once.st")
    once, twice = read_adapter(tmp_path / "once.st"), read_adapter(tmp_path / "twice.st")
    assert once.kind == twice.kind == "dylora"
    for module, update in once.ranked.items():
        assert twice.ranked[module].scaling == pytest.approx(update.scaling, rel=1e-12)
    assert [t.sum() for t in load_file(once.file).values()] == [t.sum() for t in load_file(twice.file).values()]


def test_the_law_that_is_asked_for_overrides_the_files(tiny_adapters: TinyAdapters, tmp_path: Path) -> None:
    source = as_dylora(shutil.copytree(tiny_adapters.folder("llama", r=R, lora_alpha=ALPHA), tmp_path / "dylora"))
    (result,) = loratool.truncate(source, rank=2, scaling="kohya", out=tmp_path / "cut.st")
    assert result.record.alpha == ALPHA * math.sqrt(2 / R)
    assert read_adapter(tmp_path / "cut.st").facts["scaling"] == "kohya"


def test_a_law_makes_leading_components_of_a_file_that_does_not_say_it_is_a_dylora(
    tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    (result,) = loratool.truncate(tiny_adapters.folder("llama", r=R), rank=2, scaling="paper", out=tmp_path / "cut.st")
    assert (result.method, result.record.kind) == ("leading", "dylora")


def test_a_dylora_can_be_cut_by_its_best_approximation(tiny_adapters: TinyAdapters, tmp_path: Path) -> None:
    source = as_dylora(shutil.copytree(tiny_adapters.folder("llama", r=R), tmp_path / "dylora"))
    (result,) = loratool.truncate(source, rank=2, svd=True, out=tmp_path / "cut.st")
    assert (result.method, result.record.kind) == ("svd", "lora")


# The best approximation

SOURCES: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "negative alpha": {"lora_alpha": -5},
    "many ranks and alphas": {
        "rank_pattern": {"q_proj": 3, "layers.1.mlp.down_proj": 9},
        "alpha_pattern": {"q_proj": 1},
    },
    "regex targets": {"target_modules": r".*layers\.1\.self_attn\.(q|v)_proj"},
}


@pytest.fixture(params=[*SOURCES, "adalora"])
def source(
    request: pytest.FixtureRequest, tiny_adapters: TinyAdapters, tiny_models: TinyModels, tmp_path: Path
) -> Path:
    if request.param == "adalora":
        kept = {"model.layers.0.self_attn.q_proj": [True, False, True, True, False, True]}
        kept |= {"model.layers.1.self_attn.q_proj": [False] * 6}
        model = load(tiny_models.folder("llama", "fp32"), "llama")
        return save_peft_adalora(model, tmp_path / "adalora", kept=kept, init_r=6)
    return tiny_adapters.folder("llama", **({"r": R, "lora_alpha": ALPHA} | SOURCES[request.param]))


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_error_is_the_least_there_is(rank: int, source: Path, tiny_models: TinyModels, tmp_path: Path) -> None:
    (result,) = loratool.truncate(source, rank=rank, out=tmp_path / "cut")
    before = deltas_by_hand(source)
    after = deltas_in_peft(load(tiny_models.folder("llama", "fp32"), "llama"), tmp_path / "cut")
    assert after.keys() == {module for module, delta in before.items() if np.any(delta)}
    lost = total = 0.0
    for module, delta in after.items():
        best = optimum(before[module], rank)
        norm = float(np.linalg.norm(before[module]))
        missed = float(np.linalg.norm(before[module] - delta))
        assert missed == pytest.approx(best, rel=1e-5, abs=1e-6 * norm)
        assert result.errors[module] == pytest.approx(best / norm, rel=1e-5, abs=1e-7)
        lost, total = lost + best**2, total + norm**2
    assert result.error == pytest.approx(math.sqrt(lost / total), rel=1e-5)


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999, 1.0])
def test_energy_takes_the_smallest_rank_that_keeps_it(energy: float, source: Path, tmp_path: Path) -> None:
    (result,) = loratool.truncate(source, energy=energy, out=tmp_path / "cut.st")
    for module, rank in read_adapter(tmp_path / "cut.st").ranks.items():
        squares = np.linalg.svd(deltas_by_hand(source)[module], compute_uv=False) ** 2
        kept = np.cumsum(squares) / squares.sum()
        assert kept[rank - 1] >= energy - 1e-9
        assert rank == 1 or kept[rank - 2] < energy
    if energy < 1:
        assert result.error is not None and result.error**2 <= 1 - energy


@pytest.mark.parametrize("error", [0.0, 0.01, 0.5, 0.9])
def test_error_takes_the_smallest_rank_that_stays_below_it(error: float, source: Path, tmp_path: Path) -> None:
    (result,) = loratool.truncate(source, error=error, out=tmp_path / "cut.st")
    before, after = deltas_by_hand(source), deltas_by_hand(tmp_path / "cut.st")
    for module, rank in read_adapter(tmp_path / "cut.st").ranks.items():
        norm = float(np.linalg.norm(before[module]))
        assert float(np.linalg.norm(before[module] - after[module])) <= error * norm + 1e-6 * norm
        assert rank == 1 or optimum(before[module], rank - 1) > error * norm
        assert result.errors[module] <= error + 1e-12


def test_modules_of_several_ranks_are_written_as_patterns_that_ignoring_does_not_change(
    source: Path, tmp_path: Path
) -> None:
    """A program that knows ``r`` and ``lora_alpha`` alone finds the scaling of every module."""
    loratool.truncate(source, energy=0.8, out=tmp_path / "cut")
    config = json.loads((tmp_path / "cut" / "adapter_config.json").read_text())
    assert config["rank_pattern"].keys() == config["alpha_pattern"].keys()
    assert {update.scaling for update in read_adapter(tmp_path / "cut").ranked.values()} == {
        config["lora_alpha"] / config["r"]
    }


def test_a_module_that_has_less_keeps_what_it_has(tiny_adapters: TinyAdapters, tmp_path: Path) -> None:
    source = tiny_adapters.folder("llama", r=R, rank_pattern={"q_proj": 2})
    loratool.truncate(source, rank=4, out=tmp_path / "cut.st")
    ranks = read_adapter(tmp_path / "cut.st").ranks
    assert {rank for module, rank in ranks.items() if module.endswith("q_proj")} == {2}
    assert {rank for module, rank in ranks.items() if not module.endswith("q_proj")} == {4}


def test_the_dense_update_is_never_formed(tmp_path: Path) -> None:
    """It would take 128 GB here."""
    source = save_plain_adapter(tmp_path / "wide", {"q_proj": (200_000, 80_000)}, r=2)
    (result,) = loratool.truncate(source, rank=1, out=tmp_path / "cut.st")
    assert result.error is not None and 0 < result.error < 1


def test_an_update_of_zeros_is_cut_to_zeros(tmp_path: Path) -> None:
    source = save_plain_adapter(tmp_path / "zero", {"q_proj": (10, 6)})
    file = source / "adapter_model.safetensors"
    save_file({k: v * 0 if "lora_B" in k else v for k, v in load_file(file).items()}, file, {"format": "pt"})
    for options in ({"rank": 2}, {"energy": 0.9}):
        (result,) = loratool.truncate(source, **options, out=tmp_path / "cut.st", force=True)
        assert result.error == 0
        assert not deltas_by_hand(tmp_path / "cut.st")["q_proj"].any()


def test_equal_cuts_give_equal_bytes(source: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        loratool.truncate(source, rank=2, out=tmp_path / name / "cut.st", name=name)
    assert (tmp_path / "one" / "cut.st").read_bytes() == (tmp_path / "two" / "cut.st").read_bytes()


# Several ranks, names and lineage


@pytest.mark.parametrize("kind", ["lora", "dylora"])
def test_several_ranks_give_a_file_and_a_child_each(kind: str, tiny_adapters: TinyAdapters, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_adapters.folder("llama", r=R), tmp_path / "many")
    if kind == "dylora":
        as_dylora(source)
    loratool.add(source, name="many")
    results = loratool.truncate(source, rank=[1, 2, 4])
    assert [result.out for result in results] == [tmp_path / f"many-r{rank}" for rank in (1, 2, 4)]
    assert [result.record.reference for result in results] == ["many-r1@1", "many-r2@1", "many-r4@1"]
    assert [read_adapter(result.out).rank for result in results] == [1, 2, 4]
    for result, rank in zip(results, (1, 2, 4), strict=True):
        (edge,) = loratool.show(result.record.reference).ancestors
        assert (edge.parent, edge.operation) == ("many@1", "truncate")
        assert edge.details is not None and edge.details["rank"] == rank
        (alone,) = loratool.truncate(source, rank=rank, out=tmp_path / "alone.st", name="alone", force=True)
        assert load_file(alone.out).keys() == load_file(result.out / "adapter_model.safetensors").keys()
        for name, tensor in load_file(alone.out).items():
            assert torch.equal(tensor, load_file(result.out / "adapter_model.safetensors")[name])


def test_a_cut_to_the_full_rank_can_be_made_again(tiny_adapters: TinyAdapters, tmp_path: Path) -> None:
    source = as_dylora(shutil.copytree(tiny_adapters.folder("llama", r=R), tmp_path / "whole"))
    for _ in range(2):
        first, last = loratool.truncate(source, rank=[1, R], force=True)
        assert (first.record.reference, last.record.reference) == ("whole-r1@1", f"whole-r{R}@1")
    parents = {edge.parent for edge in loratool.show("whole-r1").ancestors}
    assert parents == {"whole", f"whole-r{R}@1"}


def test_names_and_outputs_of_several_ranks_have_them_added(tiny_adapters: TinyAdapters, tmp_path: Path) -> None:
    source = tiny_adapters.folder("llama", r=R)
    results = loratool.truncate(source, rank=(1, 2), out=tmp_path / "small.st", name="tiny")
    assert [(r.out.name, r.record.name) for r in results] == [("small-r1.st", "tiny-r1"), ("small-r2.st", "tiny-r2")]


def test_the_file_records_what_it_was_made_from(tiny_adapters: TinyAdapters, tmp_path: Path) -> None:
    source = tiny_adapters.folder("llama", r=R)
    loratool.truncate(source, rank=2, out=tmp_path / "cut.st")
    lineage = read_adapter(tmp_path / "cut.st").facts["lineage"]
    assert lineage["operation"] == "truncate" and lineage["rank"] == 2
    assert lineage["parents"] == [{"name": source.name, "sha256": read_adapter(source).sha256}]


def test_a_base_that_is_recorded_is_the_childs_too(
    tiny_adapters: TinyAdapters, tiny_models: TinyModels, tmp_path: Path
) -> None:
    loratool.base_add("tiny", tiny_models.folder("llama", "fp32"))
    loratool.add(tiny_adapters.folder("llama", r=R), name="parent", base="tiny")
    (result,) = loratool.truncate("parent", rank=2, out=tmp_path / "cut.st")
    assert result.record.base == "tiny"
    assert read_adapter(tmp_path / "cut.st").base_fingerprint == result.record.base_fingerprint
    loratool.merge(["cut"], into="tiny", out=tmp_path / "merged")
    assert loratool.verify(tmp_path / "merged").replayed == "base"


def test_the_command_prints_ranks_errors_and_json(
    tiny_adapters: TinyAdapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = str(tiny_adapters.folder("llama", r=R))
    runner = CliRunner()
    table = runner.invoke(cli, ["truncate", source, "--rank", "1,2", "--out", "small.st"])
    assert table.exit_code == 0 and "small-r1@1" in table.output and "%" in table.output
    one = runner.invoke(cli, ["truncate", source, "--energy", "0.9", "--out", "e.st"])
    assert one.exit_code == 0 and "error" in one.output
    printed = json.loads(runner.invoke(cli, ["truncate", source, "--rank", "3", "--out", "three.st", "--json"]).stdout)
    assert [(each["rank"], each["method"], each["name"]) for each in printed] == [(3, "svd", "three")]


# What is wrong is said

BAD: dict[str, tuple[Mapping[str, Any], str]] = {
    "rank 0": ({"rank": 0}, "at least 1"),
    "a negative rank": ({"rank": -3}, "at least 1"),
    "a rank above the largest": ({"rank": 7}, "has rank 6, so it cannot be cut to 7"),
    "one of several too large": ({"rank": (2, 9)}, "cannot be cut to 9"),
    "no rank": ({"rank": ()}, "no rank"),
    "nothing to cut by": ({}, "give one of them"),
    "two to cut by": ({"rank": 2, "energy": 0.5}, "give one of them"),
    "no energy": ({"energy": 0.0}, "above 0 and at most 1"),
    "too much energy": ({"energy": 1.01}, "above 0 and at most 1"),
    "energy that is no number": ({"energy": math.nan}, "above 0 and at most 1"),
    "a negative error": ({"error": -0.1}, "from 0 to below 1"),
    "an error of all": ({"error": 1.0}, "from 0 to below 1"),
    "an error that is no number": ({"error": math.nan}, "from 0 to below 1"),
    "a law nobody knows": ({"rank": 2, "scaling": "mine"}, "paper or kohya"),
    "a law for an approximation": ({"rank": 2, "scaling": "paper", "svd": True}, "give one of them"),
    "energy of leading components": ({"energy": 0.9, "scaling": "paper"}, "--svd"),
    "leading components above the largest": ({"rank": 7, "scaling": "paper"}, "ranks 1 to 6"),
    "a name that is none": ({"rank": 2, "name": "no/name"}, "name"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_cut_is_refused_before_anything_is_written(
    case: str, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    options, message = BAD[case]
    with pytest.raises(Exception, match=message) as raised:
        loratool.truncate(tiny_adapters.folder("llama", r=R), **{"out": tmp_path / "cut.st", **options})
    assert type(raised.value).__module__ in {"loratool.errors", "registry.errors"}
    assert list(tmp_path.iterdir()) == []
    assert loratool.list() == ()


def test_an_output_that_exists_or_is_the_input_is_refused(tiny_adapters: TinyAdapters, tmp_path: Path) -> None:
    source = tiny_adapters.folder("llama", r=R)
    (tmp_path / "two-r2.st").write_text("mine")
    with pytest.raises(LoratoolError, match=r"two-r2\.st"):
        loratool.truncate(source, rank=[1, 2], out=tmp_path / "two.st")
    assert [path.name for path in tmp_path.iterdir()] == ["two-r2.st"]
    with pytest.raises(LoratoolError, match="overlap; choose another"):
        loratool.truncate(source, rank=1, out=source / "adapter_model.safetensors", force=True)


def test_an_adalora_has_no_leading_components(tiny_models: TinyModels, tmp_path: Path) -> None:
    source = save_peft_adalora(load(tiny_models.folder("llama", "fp32"), "llama"), tmp_path / "adalora")
    with pytest.raises(LoratoolError, match="prune"):
        loratool.truncate(source, rank=1, scaling="paper", out=tmp_path / "cut.st")


@pytest.mark.parametrize("words", [["--rank", "0x2"], ["--rank", "1,,2"], ["--rank", ""], ["--energy", "much"], []])
def test_words_that_are_no_numbers_are_wrong_usage(words: list[str], tiny_adapters: TinyAdapters) -> None:
    result = CliRunner().invoke(cli, ["truncate", str(tiny_adapters.folder("llama", r=R)), *words])
    assert result.exit_code == 2
