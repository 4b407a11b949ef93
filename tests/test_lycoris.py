"""LoHa and LoKr as LyCORIS saves them: merged by its formulas, written again, and refused where they are something else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import as_torch, save_plain_model, stored_tensors

import loratool
from loratool.errors import AdapterError, LoratoolError
from loratool.formats.identify import identify
from loratool.formats.read import read_adapter
from loratool.formats.write import write_single_file

DATA = Path(__file__).parent / "data" / "adapters" / "lycoris"
MODULE = "lycoris_block_q_proj"
PLACE = "block.q_proj.weight"
Tensors = dict[str, torch.Tensor]


def linear(name: str) -> Tensors:
    """The tensors of the linear layer in a file that LyCORIS wrote."""
    return {key: each for key, each in load_file(DATA / f"{name}.safetensors").items() if key.startswith(MODULE)}


def saved(tensors: Mapping[str, torch.Tensor], file: Path) -> Path:
    save_file(dict(tensors), file, {"ss_network_module": "lycoris.kohya"})
    return file


def loha(of: Tensors) -> torch.Tensor:
    w1, w2 = (of[f"{MODULE}.hada_w{n}_a"].double() @ of[f"{MODULE}.hada_w{n}_b"].double() for n in (1, 2))
    return float(of[f"{MODULE}.alpha"]) / 2 * w1 * w2


def lokr(of: Tensors) -> torch.Tensor:
    """Both factors whole: alpha is ignored."""
    return torch.kron(of[f"{MODULE}.lokr_w1"].double(), of[f"{MODULE}.lokr_w2"].double())


def lokr_product(of: Tensors) -> torch.Tensor:
    w2 = of[f"{MODULE}.lokr_w2_a"].double() @ of[f"{MODULE}.lokr_w2_b"].double()
    return float(of[f"{MODULE}.alpha"]) / 2 * torch.kron(of[f"{MODULE}.lokr_w1"].double(), w2)


def with_product(of: Tensors) -> Tensors:
    """The second factor of a LoKr as a product of rank 2."""
    generator = torch.Generator().manual_seed(0)
    of = {name: each for name, each in of.items() if not name.endswith("w2")}
    return of | {
        f"{MODULE}.lokr_w2_a": torch.randn(2, 2, generator=generator),
        f"{MODULE}.lokr_w2_b": torch.randn(2, 3, generator=generator),
        f"{MODULE}.alpha": torch.tensor(3.0),
    }


FILES = {
    "loha": (linear("loha"), loha),
    "lokr": (linear("lokr"), lokr),
    "lokr, a product": (with_product(linear("lokr")), lokr_product),
}


@pytest.mark.parametrize("name", FILES)
def test_a_merge_is_the_formulas_and_is_taken_out_bit_for_bit(name: str, tmp_path: Path) -> None:
    tensors, delta = FILES[name]
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    base = save_plain_model(tmp_path / "base", {PLACE: weight, "block.norm.weight": torch.ones(4)})
    merged = loratool.merge(saved(tensors, tmp_path / "x.safetensors"), base, out=tmp_path / "out", undo=True).out
    found = as_torch(stored_tensors(merged)[PLACE])
    assert torch.allclose(found.double(), weight.double() + delta(tensors), rtol=0, atol=3e-7)
    assert not torch.allclose(found, weight, rtol=0, atol=3e-5)
    assert stored_tensors(loratool.unmerge(merged, out=tmp_path / "back").out) == stored_tensors(base)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_written_again_has_its_names_and_numbers(name: str, tmp_path: Path) -> None:
    tensors, delta = FILES[name]
    adapter = read_adapter(saved(tensors, tmp_path / "x.safetensors"))
    write_single_file(adapter, tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == tensors.keys()
    assert torch.allclose(delta(again), delta(tensors))
    assert identify(tmp_path / "again.safetensors").format == "lycoris"


def test_plain_layers_under_its_prefix_are_a_lora(tmp_path: Path) -> None:
    adapter = read_adapter(saved(linear("locon"), tmp_path / "x.safetensors"))
    assert (adapter.kind, adapter.rank, adapter.scaling) == ("lora", 2, 0.5)


def test_a_locon_with_a_convolution_is_its_formula_and_is_taken_out_bit_for_bit(tmp_path: Path) -> None:
    tensors = load_file(DATA / "locon.safetensors")
    generator = torch.Generator().manual_seed(2)
    weights = {
        "block.conv.weight": torch.randn(4, 4, 3, 3, generator=generator),
        PLACE: torch.randn(4, 6, generator=generator),
    }
    base = save_plain_model(tmp_path / "base", weights)
    merged = loratool.merge(DATA / "locon.safetensors", base, out=tmp_path / "out", undo=True).out
    for name, weight in weights.items():
        module = "lycoris_" + name.removesuffix(".weight").replace(".", "_")
        down, up = (tensors[f"{module}.lora_{part}.weight"].double() for part in ("down", "up"))
        delta = 0.5 * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        found = as_torch(stored_tensors(merged)[name])
        assert torch.allclose(found.double(), weight.double() + delta, rtol=0, atol=3e-7)
        assert not torch.allclose(found, weight, rtol=0, atol=3e-5)
    assert stored_tensors(loratool.unmerge(merged, out=tmp_path / "back").out) == stored_tensors(base)


def test_a_kernel_in_three_factors_is_refused(tmp_path: Path) -> None:
    tensors = load_file(DATA / "locon.safetensors")
    tensors["lycoris_block_conv.lora_down.weight"] = torch.ones(2, 4, 1, 1)
    tensors["lycoris_block_conv.lora_mid.weight"] = torch.ones(2, 2, 3, 3)
    with pytest.raises(LoratoolError, match="lora_mid"):
        read_adapter(saved(tensors, tmp_path / "x.safetensors"))


def test_a_module_without_alpha_has_its_rank_and_the_users_alpha_decides(tmp_path: Path) -> None:
    tensors = {name: each for name, each in linear("loha").items() if not name.endswith("alpha")}
    file = saved(tensors, tmp_path / "x.safetensors")
    assert read_adapter(file).scaling == 1
    assert read_adapter(file, 3.0).scaling == 1.5
    with pytest.raises(AdapterError, match="--alpha"):
        read_adapter(saved(linear("loha"), tmp_path / "y.safetensors"), 3.0)


OTHERS = {
    "a dora_scale": (f"{MODULE}.dora_scale", "is DoRA in the LyCORIS format"),
    "a norm beside": ("lycoris_block_norm.w_norm", "w_norm"),
    "a training state": (f"{MODULE}.scalar", "scalar"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_it_holds_beside_is_refused_by_name(what: str, tmp_path: Path) -> None:
    key, message = OTHERS[what]
    file = saved(linear("loha") | {key: torch.ones(4)}, tmp_path / "x.safetensors")
    with pytest.raises(LoratoolError, match=message):
        read_adapter(file)
    assert identify(file).why_not is not None
