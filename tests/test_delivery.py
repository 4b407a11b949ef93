"""What a merge delivers of its update, measured in every storage: shown, recorded, and refused if it is too little."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny_adapters import ADAPTER_PREFIX
from tiny_models import DTYPES, as_torch, digest, stored_tensors

import loratool
from loratool.checkpoint.blocks import row_blocks
from loratool.cli import cli
from loratool.errors import NoChangeError
from loratool.merging.delivery import DeliveryCount, measured_rows
from loratool.merging.manifest import MANIFEST_NAME, read_manifest

if TYPE_CHECKING:
    from tiny_adapters import TinyAdapters
    from tiny_models import TinyModels

WEAK = 3e-4
"""A weight at which a bf16 model loses most of a tiny adapter."""


def carried(base: Path, merged: Path, adapter: Path, weight: float) -> dict[str, tuple[float, float]]:
    """Return <W' - W, d> and <d, d> of every parameter that a LoRA changes, in fp64."""
    factors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    before, after, sums = stored_tensors(base), stored_tensors(merged), {}
    for name, a in factors.items():
        if name.endswith("lora_A.weight"):
            parameter = name.removeprefix(ADAPTER_PREFIX).replace("lora_A.", "")
            b = factors[name.replace("lora_A", "lora_B")].double()
            delta = weight * config["lora_alpha"] / config["r"] * (b @ a.double())
            change = as_torch(after[parameter]).double() - as_torch(before[parameter]).double()
            sums[parameter] = float((change * delta).sum()), float((delta * delta).sum())
    return sums


@pytest.mark.parametrize(("dtype", "weight"), [("bf16", 1.0), ("bf16", WEAK), ("fp16", 0.01), ("fp32", 1e-3)])
def test_the_share_in_a_dense_model_is_what_fp64_says(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path, dtype: str, weight: float
) -> None:
    base, adapter = tiny_models.folder("llama", dtype), tiny_adapters.folder("llama")
    result = loratool.merge([(adapter, weight)], base, out=tmp_path / "out", allow_no_op=True)
    sums = carried(base, result.out, adapter, weight)
    assert set(result.deliveries) == set(sums)
    assert result.delivery is not None
    total = sum(each[0] for each in sums.values()) / sum(each[1] for each in sums.values())
    assert result.delivery.share == pytest.approx(total, abs=0.05)
    assert 0 < result.delivery.measured < 1
    if (dtype, weight) == ("bf16", WEAK):
        assert total < 0.5
    else:
        assert result.delivery.share == pytest.approx(1, abs=0.02)


def test_a_dense_merge_that_loses_most_of_its_update_is_refused_before_it_appears(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    base, adapter = tiny_models.folder("llama", "bf16"), tiny_adapters.folder("llama")
    for options in ({}, {"undo": True}):
        with pytest.raises(NoChangeError, match=r"only \d+% of the update would be left in the bf16 weights.*fp32"):
            loratool.merge([(adapter, WEAK)], base, out=tmp_path / "out", **options)
        assert not list(tmp_path.iterdir())
    result = loratool.merge([(adapter, WEAK)], base, out=tmp_path / "out", allow_no_op=True)
    assert any("of the update is left in the bf16 weights" in note for note in result.notes)


def test_in_place_it_is_refused_before_a_byte_changes(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    import shutil

    base = shutil.copytree(tiny_models.folder("llama", "bf16"), tmp_path / "base")
    before = digest(tmp_path)
    with pytest.raises(NoChangeError, match="of the update"):
        loratool.merge([(tiny_adapters.folder("llama"), WEAK)], base, in_place=True)
    assert digest(tmp_path) == before


def test_manifest_catalogue_and_commands_agree_on_what_was_delivered(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    loratool.add(tiny_adapters.folder("llama"), name="pirate")
    words = ["merge", "pirate", "--into", str(tiny_models.folder("llama", "bf16")), "--out", str(tmp_path / "out")]
    printed = CliRunner().invoke(cli, [*words, "--json"])
    assert printed.exit_code == 0, printed.output
    found = json.loads(printed.stdout)
    assert set(found["delivery"]) == {"share", "noise", "changed", "measured"}
    assert all(tensor["delivery"]["share"] == pytest.approx(1, abs=0.1) for tensor in found["tensors"])
    manifest = read_manifest(tmp_path / "out")
    assert manifest.delivery_of_all is not None
    assert manifest.delivery_of_all.to_json() == found["delivery"]
    assert loratool.show("pirate").to_json()["merges"][0]["delivery"] == found["delivery"]
    line = f"{found['delivery']['share']:.1%} of the update; {found['delivery']['changed']:.1%} of elements changed"
    for shown in (["show", "pirate"], ["verify", str(tmp_path / "out")]):
        assert line in " ".join(CliRunner().invoke(cli, shown).output.split())


def test_a_manifest_of_an_earlier_version_is_read(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    out = loratool.merge(tiny_adapters.folder("llama"), tiny_models.folder("llama", "bf16"), out=tmp_path / "out").out
    value = json.loads((out / MANIFEST_NAME).read_text())
    value["survival"] = value.pop("delivery")
    for each in (value["survival"]["all"], *value["survival"]["tensors"].values()):
        del each["measured"]
    (out / MANIFEST_NAME).write_text(json.dumps(value))
    read = read_manifest(out).delivery_of_all
    assert read is not None
    assert (read.share, read.measured) == (value["survival"]["all"]["share"], 1.0)


def test_a_replaced_parameter_says_nothing_of_an_update_that_is_lost(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    adapter = tiny_adapters.folder("llama", modules_to_save=["lm_head"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    weak = {name: each * (WEAK if "lora_B" in name else 1) for name, each in tensors.items()}
    (tmp_path / "weak").mkdir()
    save_file(weak, tmp_path / "weak" / "adapter_model.safetensors", {"format": "pt"})
    (tmp_path / "weak" / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    with pytest.raises(NoChangeError, match="of the update"):
        loratool.merge(tmp_path / "weak", tiny_models.folder("llama", "bf16"), out=tmp_path / "out")


def test_what_is_measured_of_a_matrix_stands_for_all_of_it() -> None:
    """Two matrices of which one loses its update: the total is by their whole sizes, not by the rows that were measured."""
    large, small = DeliveryCount(elements=1000), DeliveryCount(elements=10)
    ones = torch.ones(1, 10)
    large.add(torch.zeros(1, 10), ones.clone(), torch.zeros(1, 10))
    small.add(torch.zeros(1, 10), ones.clone(), ones.clone())
    found = DeliveryCount.of_all([large, small]).delivery()
    assert found.share == pytest.approx(10 / 1010, abs=1e-6)
    assert found.changed == pytest.approx(10 / 1010, abs=1e-6)
    assert found.measured == pytest.approx(20 / 1010, abs=1e-6)


def test_few_rows_of_a_large_matrix_are_measured_and_always_the_same() -> None:
    blocks = list(row_blocks(4096, 4096 * 4))
    chosen = measured_rows("model.layers.0.self_attn.q_proj.weight", blocks)
    assert chosen == measured_rows("model.layers.0.self_attn.q_proj.weight", blocks)
    assert chosen != measured_rows("model.layers.1.self_attn.q_proj.weight", blocks)
    assert all(set(rows) <= set(block) for block, rows in chosen.items())
    assert sum(map(len, chosen.values())) * 16 < 4096
    assert measured_rows("x", [range(3)]) == {range(3): range(3)}
    assert measured_rows("x", []) == {}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dequantized_merge_is_measured_against_the_decoded_base(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path, dtype: str
) -> None:
    image = loratool.quantize(tiny_models.folder("llama", dtype), out=tmp_path / "image").out
    result = loratool.merge(tiny_adapters.folder("llama"), image, out=tmp_path / "out", dequantize=True)
    assert result.delivery is not None
    assert result.delivery.share == pytest.approx(1, abs=0.02)
