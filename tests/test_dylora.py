"""DyLoRA as a kind: read from loratool's layouts and kohya's, merged at any of its ranks, taken out and verified."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_adapters import merge_by_peft, merged_once_rounded, save_kohya_dylora
from tiny_models import DTYPES, as_torch, assert_same_tensors, digest, load, stored_tensors

import loratool
from loratool.cli import cli
from loratool.errors import AdapterError, LoratoolError
from loratool.formats.at_rank import at_rank
from loratool.formats.read import read_adapter

if TYPE_CHECKING:
    from tiny_adapters import TinyAdapters
    from tiny_models import TinyModels

R, ALPHA = 6, 7.0
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")


@pytest.fixture
def dylora(tiny_adapters: TinyAdapters, tmp_path: Path) -> Path:
    """A DyLoRA of rank 6 for the tiny Llama, with the paper's scaling."""
    folder = shutil.copytree(tiny_adapters.folder("llama", r=R, lora_alpha=int(ALPHA)), tmp_path / "dylora")
    (folder / "loratool.json").write_text(json.dumps({"schema": 1, "kind": "dylora", "scaling": "paper"}))
    return folder


@pytest.fixture
def kohya(tiny_models: TinyModels, tmp_path: Path) -> Path:
    """A DyLoRA of rank 6 in kohya's layout, for two modules of the tiny Llama."""
    base = load_file(tiny_models.folder("llama", "fp32") / "model.safetensors")
    shapes = {module: tuple(base[f"{module}.weight"].shape) for module in MODULES}
    return save_kohya_dylora(tmp_path / "kohya.safetensors", shapes, r=R, alpha=ALPHA)


def cut_by_hand(adapter: Path, rank: int, folder: Path) -> Path:
    """A plain PEFT adapter with the leading slices: what the paper's forward computes at `rank`."""
    shutil.copytree(adapter, folder)
    (folder / "loratool.json").unlink()
    file = folder / "adapter_model.safetensors"
    cut = {k: (v[:rank] if "lora_A" in k else v[:, :rank].contiguous()) for k, v in load_file(file).items()}
    save_file(cut, file, {"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text()) | {"r": rank}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


# The paper's


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("rank", range(1, R + 1))
def test_a_merge_at_rank_b_is_the_leading_components_by_alpha_over_b(
    rank: int, dtype: str, dylora: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    base = tiny_models.folder("llama", dtype)
    loratool.merge([f"{dylora}@rank={rank}"], into=base, out=tmp_path / "out")
    theirs = merge_by_peft(load(base, "llama"), cut_by_hand(dylora, rank, tmp_path / "cut"))
    assert_same_tensors(stored_tensors(tmp_path / "out"), theirs)


def test_without_a_rank_it_merges_at_its_full_one(dylora: Path, tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models.folder("llama", "bf16")
    loratool.merge([dylora], into=base, out=tmp_path / "out")
    assert_same_tensors(stored_tensors(tmp_path / "out"), merge_by_peft(load(base, "llama"), dylora))


@pytest.mark.parametrize("way", ["undo", "base", "approximate"])
def test_a_merge_at_a_rank_verifies_and_is_taken_out(
    way: str, dylora: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_models.folder("llama", "bf16"), tmp_path / "base")
    loratool.merge([f"{dylora}@rank=3"], into=base, out=tmp_path / "out", undo=way == "undo")
    assert loratool.verify(tmp_path / "out").replayed == "base"
    if way != "base":
        base.rename(tmp_path / "away")
    if way == "undo":
        shutil.rmtree(dylora)
        assert loratool.verify(tmp_path / "out").replayed == "undo"
    result = loratool.unmerge(tmp_path / "out", out=tmp_path / "back", approximate=way == "approximate")
    assert result.method == way
    if way == "approximate":
        before, after = stored_tensors(tmp_path / "away"), stored_tensors(tmp_path / "back")
        for name in before:
            torch.testing.assert_close(as_torch(after[name]), as_torch(before[name]), rtol=0.02, atol=1e-3)
    else:
        assert digest(tmp_path / "back") == digest(base if way == "base" else tmp_path / "away")


def test_two_ranks_of_one_dylora_go_into_one_model_with_their_weights(
    dylora: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    base = tiny_models.folder("llama", "fp32")
    runner = CliRunner()
    words = [f"{dylora}@rank=2", f"{dylora}@rank=4=-0.5", "--into", str(base), "--out", str(tmp_path / "out")]
    assert runner.invoke(cli, ["merge", *words]).exit_code == 0
    cuts = [(cut_by_hand(dylora, 2, tmp_path / "two"), 1.0), (cut_by_hand(dylora, 4, tmp_path / "four"), -0.5)]
    assert_same_tensors(stored_tensors(tmp_path / "out"), merged_once_rounded(stored_tensors(base), cuts))
    assert loratool.verify(tmp_path / "out").replayed == "base"


@pytest.mark.parametrize("words", [["{}@rank=2", "{}@rank=2"], ["{}", "{}@rank=2"]])
def test_one_rank_of_a_dylora_goes_into_a_model_once(
    words: list[str], dylora: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    named = [word.format(dylora) for word in words]
    with pytest.raises(LoratoolError, match="twice"):
        loratool.merge(named, into=tiny_models.folder("llama", "fp32"), out=tmp_path / "out")


def test_the_catalogue_says_its_ranks_and_merges_it_at_each(
    dylora: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    record = loratool.add(dylora, name="dy").record
    assert (record.kind, record.rank) == ("dylora", R)
    runner = CliRunner()
    assert f"1..{R}" in runner.invoke(cli, ["list", "--kind", "dylora"]).output
    assert f"1..{R}" in runner.invoke(cli, ["show", "dy"]).output
    base = tiny_models.folder("llama", "fp32")
    result = loratool.merge(["dy@1@rank=2"], into=base, out=tmp_path / "out")
    assert result.adapters[0].adapter == "dy@1@rank=2"
    loratool.merge([f"{dylora}@rank=2"], into=base, out=tmp_path / "by-path")
    assert_same_tensors(stored_tensors(tmp_path / "out"), stored_tensors(tmp_path / "by-path"))


def test_the_default_output_is_named_after_the_rank(dylora: Path, tiny_models: TinyModels, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_models.folder("llama", "fp32"), tmp_path / "tiny")
    assert loratool.merge([f"{dylora}@rank=2"], into=base).out == tmp_path / "tiny-dylora-r2"


@pytest.mark.parametrize("form", ["folder", "single.st"])
def test_export_keeps_its_kind_and_law(form: str, kohya: Path, tmp_path: Path) -> None:
    loratool.export(kohya, tmp_path / form)
    adapter = read_adapter(tmp_path / form)
    assert (adapter.kind, adapter.facts["scaling"], adapter.rank, adapter.alpha) == ("dylora", "kohya", R, ALPHA)


# kohya's


@pytest.mark.parametrize("rank", range(1, R + 1))
def test_a_kohya_file_merges_at_rank_b_by_kohyas_rule(
    rank: int, kohya: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    """``lora_B lora_A * (alpha / r) * sqrt(r / b)``, in the words of its forward."""
    base = tiny_models.folder("llama", "fp32")
    loratool.merge([f"{kohya}@rank={rank}"], into=base, out=tmp_path / "out")
    before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "out"))
    trained = load_file(kohya)
    for module in MODULES:
        flat = f"lora_te_{module.replace('.', '_')}"
        down, up = trained[f"{flat}.lora_down.weight"].double(), trained[f"{flat}.lora_up.weight"].double()
        delta = up[:, :rank] @ down[:rank] * (ALPHA / R) * math.sqrt(R / rank)
        torch.testing.assert_close(
            after[f"{module}.weight"].double(), before[f"{module}.weight"] + delta, rtol=0, atol=1e-6
        )
    assert sum(not torch.equal(before[name], after[name]) for name in before) == len(MODULES)


def test_a_merge_of_a_kohya_file_at_a_rank_is_taken_out_with_nothing_but_its_own_folder(
    kohya: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_models.folder("llama", "bf16"), tmp_path / "base")
    before = digest(base)
    loratool.merge([f"{kohya}@rank=3"], into=base, in_place=True)
    kohya.unlink()
    assert loratool.verify(base).replayed == "undo"
    assert loratool.unmerge(base, in_place=True).method == "undo"
    assert digest(base) == before


def test_a_kohya_lora_is_no_dylora_and_scales_by_alpha_over_r(kohya: Path, tmp_path: Path) -> None:
    plain = save_file_with(kohya, tmp_path / "plain.safetensors", {"ss_network_module": "networks.lora"})
    adapter = read_adapter(plain)
    assert adapter.kind == "lora"
    assert {update.scaling for update in adapter.ranked.values()} == {ALPHA / R}
    with pytest.raises(AdapterError, match="not a DyLoRA"):
        at_rank(adapter, 2)


@pytest.mark.parametrize(("unit", "noted"), [("1", False), ("2", True), ("x", False)])
def test_a_dylora_that_was_trained_several_ranks_at_a_time_says_so(
    unit: str, noted: bool, kohya: Path, tmp_path: Path
) -> None:
    arguments = {"ss_network_args": json.dumps({"conv_dim": "4", "unit": unit})}
    adapter = read_adapter(save_file_with(kohya, tmp_path / "x.safetensors", arguments))
    assert any("multiple of 2" in note for note in adapter.notes) == noted


@pytest.mark.parametrize("alpha", [None, 0.0])
def test_an_alpha_that_is_missing_or_zero_is_the_rank_as_in_kohya(
    alpha: float | None, kohya: Path, tmp_path: Path
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        rest = {name: tensor for name, tensor in tensors.items() if not name.endswith(".alpha")}
        return rest if alpha is None else tensors | {n: torch.tensor(alpha) for n in tensors if n.endswith(".alpha")}

    silent = save_file_with(kohya, tmp_path / "x.safetensors", {"ss_network_alpha": "None"}, change=change)
    adapter = read_adapter(silent)
    assert {update.scaling for update in adapter.ranked.values()} == {1.0}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_an_alpha_of_any_type_is_read(dtype: torch.dtype, kohya: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.to(dtype) for name, tensor in tensors.items()}

    assert read_adapter(save_file_with(kohya, tmp_path / "x.safetensors", change=change)).alpha == ALPHA


def test_a_kohya_file_goes_through_the_catalogue_and_comes_out_in_its_layout(kohya: Path, tmp_path: Path) -> None:
    assert loratool.add(kohya, name="k").record.kind == "dylora"
    loratool.export("k", tmp_path / "out.safetensors")
    ours, theirs = load_file(tmp_path / "out.safetensors"), load_file(kohya)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with safe_open(tmp_path / "out.safetensors", framework="pt") as opened:
        assert opened.metadata()["ss_network_module"] == "networks.dylora"
        assert opened.metadata()["ss_sd_model_name"] == "model.safetensors"


def save_file_with(
    file: Path,
    out: Path,
    metadata: dict[str, str] | None = None,
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = lambda tensors: tensors,
) -> Path:
    """A copy of a kohya file with other metadata and tensors."""
    with safe_open(file, framework="pt") as opened:
        facts = opened.metadata() | (metadata or {})
    save_file(change(load_file(file)), out, facts)
    return out


FLAT = f"lora_te_{MODULES[0].replace('.', '_')}"
BAD_FILES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], str]] = {
    "a convolution whose factors do not fit together": (
        lambda t: (
            t
            | {
                "lora_unet_c.lora_down.weight": torch.ones(R, 4, 3, 3),
                "lora_unet_c.lora_up.weight": torch.ones(4, R, 3, 3),
            }
        ),
        "do not fit together",
    ),
    "layers of several ranks": (
        lambda t: t | {"lora_te_x.lora_down.weight": torch.ones(2, 4), "lora_te_x.lora_up.weight": torch.ones(4, 2)},
        "mixes layers: .* has rank 2 and .* rank 6",
    ),
    "a factor alone": (
        lambda t: {k: v for k, v in t.items() if k != f"{FLAT}.lora_up.weight"},
        "has no lora_up; the file is incomplete",
    ),
    "factors that do not fit": (lambda t: t | {f"{FLAT}.lora_up.weight": torch.ones(64, 5)}, "do not fit together"),
    "components apart": (lambda t: t | {f"{FLAT}.lora_A.0": torch.ones(1, 64)}, "is a single component"),
    "another method": (
        lambda t: t | {f"{FLAT}.hada_w1_a": torch.ones(4, 4)},
        "a mixture of kinds in the LyCORIS format",
    ),
    "PEFT's names": (
        lambda t: t | {"q.lora_A.weight": torch.ones(4, 4)},
        "mixes two formats.*kohya.*PEFT.*'q.lora_A.weight'",
    ),
    "an alpha that is no number": (lambda t: t | {f"{FLAT}.alpha": torch.tensor(math.inf)}, "is inf"),
    "an alpha beyond fp32": (
        lambda t: t | {f"{FLAT}.alpha": torch.tensor(1e300, dtype=torch.float64)},
        "fp32 cannot represent",
    ),
    "many alphas": (lambda t: t | {f"{FLAT}.alpha": torch.ones(3)}, "must be one number"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_kohya_file_that_cannot_be_read_is_refused_with_what_is_wrong(case: str, kohya: Path, tmp_path: Path) -> None:
    change, message = BAD_FILES[case]
    broken = save_file_with(kohya, tmp_path / "broken.safetensors", change=change)
    with pytest.raises(AdapterError, match=message):
        read_adapter(broken)


def test_kohyas_names_that_land_nowhere_are_refused(kohya: Path, tiny_models: TinyModels, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name.replace("layers_0", "layers_9"): tensor for name, tensor in tensors.items()}

    moved = save_file_with(kohya, tmp_path / "moved.safetensors", change=change)
    with pytest.raises(LoratoolError, match="land on no tensor"):
        loratool.merge([moved], into=tiny_models.folder("llama", "fp32"), out=tmp_path / "out")


# Ranks that are none


@pytest.mark.parametrize("rank", ["0", "7", "999999999999", "-1", "2.5", "two", "", "²"])
def test_a_rank_that_is_none_is_refused(rank: str, dylora: Path, tiny_models: TinyModels, tmp_path: Path) -> None:
    with pytest.raises(LoratoolError, match="rank"):
        loratool.merge([f"{dylora}@rank={rank}"], into=tiny_models.folder("llama", "fp32"), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_plain_lora_acts_at_its_own_rank_only(
    tiny_adapters: TinyAdapters, tiny_models: TinyModels, tmp_path: Path
) -> None:
    adapter = tiny_adapters.folder("llama")
    with pytest.raises(LoratoolError, match="truncate"):
        loratool.merge([f"{adapter}@rank=2"], into=tiny_models.folder("llama", "fp32"), out=tmp_path / "out")


def test_a_law_that_is_unknown_is_refused(dylora: Path, tiny_models: TinyModels, tmp_path: Path) -> None:
    facts: dict[str, Any] = {"kind": "dylora", "scaling": "mine"}
    (dylora / "loratool.json").write_text(json.dumps(facts))
    with pytest.raises(AdapterError, match="mine"):
        loratool.merge([f"{dylora}@rank=2"], into=tiny_models.folder("llama", "fp32"), out=tmp_path / "out")
