"""DoRA: merged to PEFT's bytes into dense models, carried by 4-bit ones, and taken out of both bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from four_bit_models import decoded_by_bitsandbytes
from safetensors.torch import load_file, save_file
from tiny_adapters import ADAPTER_PREFIX, TinyAdapters, copy_with, merge_by_peft
from tiny_models import DTYPES, TinyModels, as_torch, assert_same_tensors, load, stored_tensors

import loratool
from loratool.errors import AdapterError, RestoreError, UnsupportedError
from loratool.formats.read import read_adapter

WEIGHTS = "adapter_model.safetensors"
MAGNITUDE = ".lora_magnitude_vector"


@pytest.fixture
def trained(tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path) -> Path:
    """A DoRA as PEFT saves it, whose magnitudes have moved by some hundredths from the norms that they begin with."""
    folder = shutil.copytree(tiny_adapters.folder("llama", r=5, lora_alpha=7, use_dora=True), tmp_path / "dora")
    base, tensors = stored_tensors(tiny_models.folder("llama", "fp32")), load_file(folder / WEIGHTS)
    generator = torch.Generator().manual_seed(3)
    for name in sorted(tensors):
        if name.endswith(MAGNITUDE):
            weight = as_torch(base[name.removeprefix(ADAPTER_PREFIX).replace(MAGNITUDE, ".weight")])
            moved = 1 + 0.03 * torch.randn(len(weight), generator=generator)
            tensors[name] = torch.linalg.norm(weight, dim=1) * moved
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def wanted(adapter: Path, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """W' = m (W + s B A) / ||W + s B A|| of equation 5 of the paper, in fp64, of the matrices that are adapted."""
    config, tensors = json.loads((adapter / "adapter_config.json").read_text()), load_file(adapter / WEIGHTS)
    found = {}
    for key in (name for name in tensors if name.endswith(MAGNITUDE)):
        module = key.removesuffix(MAGNITUDE)
        a, b = (tensors[f"{module}.lora_{letter}.weight"].double() for letter in "AB")
        name = f"{module.removeprefix(ADAPTER_PREFIX)}.weight"
        total = weights[name].double() + config["lora_alpha"] / config["r"] * b @ a
        found[name] = tensors[key].double()[:, None] * total / total.norm(dim=1, keepdim=True)
    return found


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_a_merge_has_pefts_bytes_and_is_taken_out_bit_for_bit(
    dtype: str, trained: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    base = tiny_models.folder("llama", dtype)
    merged = loratool.merge(trained, base, out=tmp_path / "merged", undo=True).out
    theirs = merge_by_peft(load(base, "llama"), trained, tmp_path / "peft")
    before = stored_tensors(base)
    assert_same_tensors(stored_tensors(merged), before | theirs)
    changed = [name for name in before if stored_tensors(merged)[name].data != before[name].data]
    assert changed == sorted(wanted(trained, {name: as_torch(tensor) for name, tensor in before.items()}))

    loratool.verify(merged)
    back = loratool.unmerge(merged, out=tmp_path / "back").out
    assert_same_tensors(stored_tensors(back), before)


def test_an_undo_keeps_norms_and_not_the_matrices(trained: Path, tiny_models: TinyModels, tmp_path: Path) -> None:
    """Of bf16, which PEFT's factors change by most of its bits, the norms give most numbers back."""
    merged = loratool.merge(trained, tiny_models.folder("llama", "bf16"), out=tmp_path / "merged", undo=True)
    assert merged.undo_file is not None
    touched = merged.plan.touched_bytes
    assert merged.undo_file.stat().st_size < 0.25 * touched


@pytest.mark.parametrize("into", ["dense", "image"])
def test_4_bits_carry_the_change_and_give_it_back_bit_for_bit(
    into: str, trained: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    dense = tiny_models.folder("llama", "bf16")
    base = loratool.quantize(dense, out=tmp_path / "nf4").out
    if into == "dense":
        result = loratool.merge(trained, dense, out=tmp_path / "merged", base_as="nf4")
    else:
        result = loratool.merge(trained, base, out=tmp_path / "merged", undo=True)
    before, after = decoded_by_bitsandbytes(base), decoded_by_bitsandbytes(result.out)
    aim = wanted(trained, before)
    asked = torch.cat([(aim[name] - before[name].double()).flatten() for name in aim])
    carried = torch.cat([(after[name].double() - before[name].double()).flatten() for name in aim])
    assert float(asked @ carried / (asked @ asked)) == pytest.approx(1, abs=0.06)
    if into == "image":
        back = loratool.unmerge(result.out, out=tmp_path / "back").out
        assert_same_tensors(stored_tensors(back), stored_tensors(base))


def test_a_single_file_and_a_folder_of_it_say_the_same(trained: Path, tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models.folder("llama", "fp32")
    file = loratool.export(trained, tmp_path / "dora.safetensors")
    folder = loratool.export(file, tmp_path / "again")
    ours, theirs = load_file(folder / WEIGHTS), load_file(trained / WEIGHTS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    outs = [loratool.merge(each, base, out=tmp_path / f"out-{n}").out for n, each in enumerate((trained, file, folder))]
    first = stored_tensors(outs[0])
    for out in outs[1:]:
        assert_same_tensors(stored_tensors(out), first)


def test_it_is_told_by_its_tensors_where_it_has_no_configuration(
    trained: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    bare = tmp_path / "bare.safetensors"
    shutil.copy(trained / WEIGHTS, bare)
    adapter = read_adapter(bare, 7.0)
    assert (adapter.kind, adapter.rank, adapter.alpha) == ("dora", 5, 7.0)
    base = tiny_models.folder("llama", "fp32")
    assert_same_tensors(
        stored_tensors(loratool.merge(bare, base, out=tmp_path / "a", alpha=7.0).out),
        stored_tensors(loratool.merge(trained, base, out=tmp_path / "b").out),
    )


def changed(folder: Path, out: Path, change: Any) -> Path:
    shutil.copytree(folder, out)
    save_file(change(load_file(folder / WEIGHTS)), out / WEIGHTS, {"format": "pt"})
    return out


def without(tensors: dict[str, torch.Tensor], ending: str) -> dict[str, torch.Tensor]:
    gone = next(name for name in sorted(tensors) if name.endswith(ending))
    return {name: tensor for name, tensor in tensors.items() if name != gone}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: without(t, MAGNITUDE), "no lora_magnitude_vector; the file is incomplete"),
        (lambda t: {n: v[:-1] if n.endswith(MAGNITUDE) else v for n, v in t.items()}, "were|outputs; was it saved"),
        (lambda t: {n: v for n, v in t.items() if "q_proj.lora_A" not in n}, "has no lora_A"),
        (lambda t: {n: v * torch.nan if n.endswith(MAGNITUDE) else v for n, v in t.items()}, "NaN or infinity"),
    ],
)
def test_a_damaged_one_is_refused_before_anything_is_written(
    change: Any, said: str, trained: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    broken = changed(trained, tmp_path / "broken", change)
    with pytest.raises(AdapterError, match=said):
        loratool.merge(broken, tiny_models.folder("llama"), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_it_cannot_do_is_refused(trained: Path, tiny_models: TinyModels, tmp_path: Path) -> None:
    base, out = tiny_models.folder("llama", "bf16"), tmp_path / "out"
    with pytest.raises(UnsupportedError, match=r"dora r=5'?, which is not a product of two matrices"):
        loratool.truncate(trained, rank=2, out=out)
    assert not out.exists()

    merged = loratool.merge(trained, base, out=tmp_path / "merged").out
    shutil.move(base, tmp_path / "away")
    try:
        with pytest.raises(RestoreError, match=r"dora r=5, which arithmetic alone cannot undo"):
            loratool.unmerge(merged, out=tmp_path / "back", approximate=True)
    finally:
        shutil.move(tmp_path / "away", base)


def test_a_configuration_that_names_it_with_another_kind_is_refused(
    trained: Path, tiny_adapters: TinyAdapters, tiny_models: TinyModels, tmp_path: Path
) -> None:
    plain = copy_with(tiny_adapters.folder("llama"), tmp_path / "plain", use_dora=True)
    with pytest.raises(AdapterError, match="a DoRA, has no lora_magnitude_vector"):
        loratool.merge(plain, tiny_models.folder("llama"), out=tmp_path / "out")


def test_the_catalogue_shows_its_rank_and_its_kind(trained: Path) -> None:
    record = loratool.add(trained, name="mine").record
    assert (record.kind, record.rank, record.alpha, record.scaling) == ("dora", 5, 7.0, 7 / 5)
    assert loratool.list(kind="dora")[0].name == "mine"
