"""AdaLoRA as PEFT saves it and as its authors' code does: read, merged to PEFT's bytes, taken out and written again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny_adapters import merge_by_peft, save_peft_adalora
from tiny_models import ARCHITECTURES, DTYPES, as_stored, as_torch, assert_same_tensors, digest, load, stored_tensors

import loratool
from loratool.cli import cli
from loratool.errors import AdapterError, LoratoolError
from loratool.formats.read import read_adapter

if TYPE_CHECKING:
    from tiny_models import TinyModels

Q0 = "model.layers.0.self_attn.q_proj"
Q1 = "model.layers.1.self_attn.q_proj"
V0 = "model.layers.0.self_attn.v_proj"
V1 = "model.layers.1.self_attn.v_proj"
PRUNED = {Q0: [True, False, True, False], Q1: [False] * 4, V0: [True] * 4, V1: [False, False, False, True]}
RANKS = {Q0: 2, Q1: 0, V0: 4, V1: 1}
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@pytest.fixture(scope="module")
def pruned(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An AdaLoRA of the tiny Llama whose modules were pruned to ranks 2, 0, 4 and 1. Read it only."""
    folder = tmp_path_factory.mktemp("adalora") / "pruned"
    return save_peft_adalora(load(tiny_models.folder("llama", "fp32"), "llama"), folder, kept=PRUNED)


def changed(adapter: Path, folder: Path, **config: Any) -> Path:
    """A copy of an adapter with other entries in its configuration."""
    shutil.copytree(adapter, folder)
    facts = json.loads((folder / CONFIG).read_text()) | config
    (folder / CONFIG).write_text(json.dumps(facts))
    return folder


def with_tensors(
    adapter: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> Path:
    """A copy of an adapter with other tensors."""
    shutil.copytree(adapter, folder)
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, {"format": "pt"})
    return folder


# Numbers, against PEFT


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize(("init_r", "alpha"), [(4, 7), (12, 32), (3, 0), (1, 1), (5, 0.3), (4, -2)])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_merged_bytes_are_pefts(
    architecture: str, init_r: int, alpha: float, dtype: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    base = tiny_models.folder(architecture, dtype)
    targets = list(ARCHITECTURES[architecture].target_modules)
    adapter = save_peft_adalora(
        load(base, architecture), tmp_path / "adapter", init_r=init_r, lora_alpha=alpha, target_modules=targets
    )
    loratool.merge([adapter], into=base, out=tmp_path / "out")
    before, after = stored_tensors(base), stored_tensors(tmp_path / "out")
    assert_same_tensors(after, before | merge_by_peft(load(base, architecture), adapter, tmp_path / "peft"))
    assert any(after[name].data != before[name].data for name in before)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("factors", sorted(DTYPES))
def test_pruned_modules_of_any_rank_and_rank_zero_merge_to_pefts_numbers_in_fp32_rounded_once(
    dtype: str, factors: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    """In fp32, since PEFT casts a pruned module's factors to the base's type and computes in that."""
    base = tiny_models.folder("llama", dtype)
    adapter = save_peft_adalora(
        load(tiny_models.folder("llama", "fp32"), "llama"), tmp_path / "adapter", kept=PRUNED, factors=factors
    )
    assert load_file(adapter / WEIGHTS)[f"base_model.model.{Q1}.lora_A"].shape[0] == 0
    loratool.merge([adapter], into=base, out=tmp_path / "out")
    theirs = merge_by_peft(load(base, "llama").float(), adapter)
    rounded = {name: as_stored(as_torch(tensor).to(DTYPES[dtype])) for name, tensor in theirs.items()}
    assert_same_tensors(stored_tensors(tmp_path / "out"), rounded)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_merge_with_undo_is_taken_out_bit_for_bit_and_verifies(
    in_place: bool, pruned: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_models.folder("llama", "bf16"), tmp_path / "base")
    before = digest(base)
    out = base if in_place else tmp_path / "out"
    loratool.merge([pruned], into=base, undo=not in_place, **({"in_place": True} if in_place else {"out": out}))
    assert loratool.verify(out).replayed == ("undo" if in_place else "base")
    if not in_place:
        base.rename(tmp_path / "away")
    restored = tmp_path / "restored"
    loratool.unmerge(out, **({"in_place": True} if in_place else {"out": restored}))
    assert digest(base if in_place else restored) == before


def test_approximate_unmerge_comes_near_the_base(pruned: Path, tiny_models: TinyModels, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_models.folder("llama", "fp32"), tmp_path / "base")
    loratool.merge([pruned], into=base, out=tmp_path / "out")
    base.rename(tmp_path / "away")
    result = loratool.unmerge(tmp_path / "out", out=tmp_path / "near", approximate=True)
    assert result.method == "approximate"
    name = f"{V0}.weight"
    near, exact = (load_file(tmp_path / folder / "model.safetensors")[name] for folder in ("near", "away"))
    torch.testing.assert_close(near, exact, rtol=1e-5, atol=1e-6)


def test_a_weight_multiplies_the_whole_update(pruned: Path, tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models.folder("llama", "fp32")
    loratool.merge([(pruned, 1.0)], into=base, out=tmp_path / "whole")
    loratool.merge([(pruned, -0.5)], into=base, out=tmp_path / "half")
    name = f"{V0}.weight"
    before, whole, half = (
        load_file(folder / "model.safetensors")[name] for folder in (base, tmp_path / "whole", tmp_path / "half")
    )
    torch.testing.assert_close(half - before, -0.5 * (whole - before), rtol=1e-4, atol=1e-7)


# Files


def test_kind_ranks_and_scaling_are_what_the_configuration_says(pruned: Path) -> None:
    adapter = read_adapter(pruned)
    assert (adapter.kind, adapter.rank, adapter.ranks, adapter.alpha) == ("adalora", 4, RANKS, 7)
    assert {update.scaling for update in adapter.ranked.values()} == {7 / (4 + 1e-5)}


@pytest.mark.parametrize("form", ["folder", "single.safetensors", "single.st"])
def test_what_is_exported_gives_pefts_own_merge(
    form: str, pruned: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    loratool.export(pruned, tmp_path / form)
    if form != "folder":
        loratool.export(tmp_path / form, tmp_path / "folder")
    base = tiny_models.folder("llama", "fp32")
    expected = merge_by_peft(load(base, "llama"), pruned)
    assert_same_tensors(merge_by_peft(load(base, "llama"), tmp_path / "folder"), expected)


def test_the_catalogue_says_adalora_and_each_modules_rank(
    pruned: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    added = loratool.add(pruned, name="ada").record
    assert (added.kind, added.rank, added.ranks) == ("adalora", 4, RANKS)
    assert [record.name for record in loratool.list(kind="adalora")] == ["ada"]
    shown = CliRunner().invoke(cli, ["show", "ada"]).output
    assert "adalora" in shown and "0 to 4" in shown
    base = tiny_models.folder("llama", "fp32")
    loratool.merge(["ada"], into=base, out=tmp_path / "out")
    assert_same_tensors(stored_tensors(tmp_path / "out"), merge_by_peft(load(base, "llama"), pruned))


@pytest.mark.parametrize("ranknum", [True, False])
@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_a_state_dict_of_the_authors_code_is_read_with_the_alpha_that_is_given(
    prefix: str, ranknum: bool, tiny_models: TinyModels, tmp_path: Path
) -> None:
    """Their delta is ``B (A * E) * alpha / (ranknum + 1e-5)``; E is masked with zeros, not cut."""
    base = tiny_models.folder("llama", "fp32")
    generator = torch.Generator().manual_seed(3)
    weight = load_file(base / "model.safetensors")[f"{Q0}.weight"]
    a = torch.randn(6, weight.shape[1], generator=generator)
    e = torch.randn(6, 1, generator=generator) * torch.tensor([1.0, 0, 1, 1, 0, 1])[:, None]
    b = torch.randn(weight.shape[0], 6, generator=generator) * 0.05
    tensors = {f"{prefix}{Q0}.lora_A": a, f"{prefix}{Q0}.lora_E": e, f"{prefix}{Q0}.lora_B": b}
    if ranknum:
        tensors[f"{prefix}{Q0}.ranknum"] = torch.tensor([6.0])
    save_file(tensors, tmp_path / "theirs.safetensors")
    expected = weight + b @ (a * e) * 16 / (torch.tensor([6.0]) + 1e-5)
    loratool.merge([tmp_path / "theirs.safetensors"], into=base, out=tmp_path / "out", alpha=16)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[f"{Q0}.weight"], expected)
    loratool.export(tmp_path / "theirs.safetensors", tmp_path / "peft", alpha=16)
    in_peft = merge_by_peft(load(base, "llama"), tmp_path / "peft")
    assert_same_tensors(stored_tensors(tmp_path / "out"), in_peft)
    loratool.add(tmp_path / "theirs.safetensors", name="theirs", alpha=16)
    loratool.merge(["theirs"], into=base, out=tmp_path / "from-catalogue")
    assert_same_tensors(stored_tensors(tmp_path / "from-catalogue"), stored_tensors(tmp_path / "out"))


# What is wrong is said


def without_alpha(pruned: Path, folder: Path) -> Path:
    folder.mkdir()
    return Path(shutil.copy(pruned / WEIGHTS, folder / "bare.safetensors"))


BROKEN: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "no alpha": (without_alpha, "--alpha"),
    "a mask too short": (lambda a, f: changed(a, f, rank_pattern={f"{Q0}.lora_E": [True]}), "list of 4"),
    "a mask of numbers": (lambda a, f: changed(a, f, rank_pattern={f"{Q0}.lora_E": [1, 0, 1, 0]}), "true or false"),
    "a mask of another rank": (lambda a, f: changed(a, f, rank_pattern=None), "correct init_r or rank_pattern"),
    "a mask for nothing": (
        lambda a, f: changed(
            a, f, rank_pattern={f"{m}.lora_E": p for m, p in (PRUNED | {"no.such.module": [True] * 4}).items()}
        ),
        "no.such.module",
    ),
    "no initial rank": (lambda a, f: changed(a, f, init_r=0), "init_r"),
    "alpha is a word": (lambda a, f: changed(a, f, lora_alpha="much"), "lora_alpha"),
    "no target": (lambda a, f: changed(a, f, target_modules=["k_proj"]), "does not target"),
    "dora": (lambda a, f: changed(a, f, use_dora=True), "DoRA"),
    "no E": (
        lambda a, f: with_tensors(a, f, lambda t: {k: v for k, v in t.items() if k != f"base_model.model.{Q0}.lora_E"}),
        "has no lora_E",
    ),
    "a flat E": (
        lambda a, f: with_tensors(
            a, f, lambda t: {k: v.flatten() if k.endswith(f"{Q0}.lora_E") else v for k, v in t.items()}
        ),
        "do not fit together",
    ),
    "another rank of training": (
        lambda a, f: with_tensors(a, f, lambda t: t | {f"base_model.model.{Q0}.ranknum": torch.tensor([9.0])}),
        "is 9 and its configuration says init_r 4",
    ),
    "a LoRA's tensor": (
        lambda a, f: with_tensors(a, f, lambda t: t | {f"base_model.model.{Q0}.lora_A.weight": torch.ones(4, 4)}),
        "is not an AdaLoRA tensor",
    ),
    "a LoRA's configuration": (lambda a, f: changed(a, f, peft_type="LORA", r=4, rank_pattern=None), "no LoRA tensor"),
    "a number that is none": (
        lambda a, f: with_tensors(a, f, lambda t: t | {f"base_model.model.{Q0}.ranknum": torch.tensor([torch.nan])}),
        "is nan",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_adalora_is_refused_with_what_is_wrong(case: str, pruned: Path, tmp_path: Path) -> None:
    damage, message = BROKEN[case]
    with pytest.raises(AdapterError, match=message):
        read_adapter(damage(pruned, tmp_path / "broken"))


@pytest.mark.parametrize(
    ("ranknum", "message"), [(1e9, "not a rank"), (0.0, "began with ranks"), (2.5, "began with ranks")]
)
def test_a_state_dict_that_began_with_no_rank_is_refused(ranknum: float, message: str, tmp_path: Path) -> None:
    tensors = {"q.lora_A": torch.ones(2, 6), "q.lora_E": torch.ones(2, 1), "q.lora_B": torch.ones(10, 2)}
    save_file(tensors | {"q.ranknum": torch.tensor([ranknum])}, tmp_path / "theirs.st")
    with pytest.raises(AdapterError, match=message):
        read_adapter(tmp_path / "theirs.st", 8)


def test_infinite_factors_are_refused_before_anything_is_written(
    pruned: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    broken = with_tensors(
        pruned, tmp_path / "broken", lambda t: t | {f"base_model.model.{V0}.lora_E": torch.full((4, 1), torch.inf)}
    )
    with pytest.raises(LoratoolError, match="NaN or infinity"):
        loratool.merge([broken], into=tiny_models.folder("llama", "fp32"), out=tmp_path / "out")
    with pytest.raises(LoratoolError, match="NaN or infinity"):
        loratool.add(broken)
    assert not (tmp_path / "out").exists()
