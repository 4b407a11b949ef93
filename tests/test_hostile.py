"""Bad and hostile input: a clear error, nothing written or changed, nothing executed, no path followed out of its folder."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_adapters import copy_with, save_plain_adapter, save_single_file
from tiny_models import digest, rewrite_tensors, save_plain_model, stored_tensors

import loratool
from loratool.errors import (
    AdapterError,
    CheckpointError,
    LoratoolError,
    NotFoundError,
    OutputError,
    PlacementError,
    WrongBaseError,
)
from loratool.formats.lora_config import LoraConfig
from registry import RegistryError

if TYPE_CHECKING:
    from tiny_adapters import TinyAdapters
    from tiny_models import TinyModels

Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"
WEIGHTS = "adapter_model.safetensors"


def entries(folder: Path) -> dict[str, str]:
    """Everything below a folder: the bytes of files, the kind of everything else."""
    found = dict(digest(folder))
    for path in folder.rglob("*"):
        found.setdefault(str(path.relative_to(folder)), f"kind {path.lstat().st_mode >> 12}")
        if path.is_symlink():
            found[str(path.relative_to(folder))] = f"to {path.readlink()}"
    return found


def expect_clear(error: BaseException) -> str:
    """The message of an error that a person can use: no control characters, not endless."""
    message = str(error)
    assert message
    assert not any(unicodedata.category(c) in {"Cc", "Cf", "Cs"} for c in message.replace("\n", ""))
    assert len(message) < 3_000, "the message is endless"
    return message


def expect_refusal(
    adapters: Any, base: Path, named: str, kind: type[LoratoolError] = LoratoolError, **options: Any
) -> str:
    """A merge into a new folder and one in place both fail and change nothing beside the base."""
    before = entries(base.parent)
    adapters = adapters if isinstance(adapters, list) else [adapters]
    for where in ({"out": base.parent / "out"}, {"in_place": True}):
        with pytest.raises(kind, match=named) as raised:
            loratool.merge(adapters, into=base, **where, **options)
        expect_clear(raised.value)
        assert entries(base.parent) == before
    return str(raised.value)


@pytest.fixture
def base(tiny_models: TinyModels, tmp_path: Path) -> Path:
    """A copy of a base that a test may change."""
    return shutil.copytree(tiny_models.folder("llama", "bf16", "sharded"), tmp_path / "work" / "base")


@pytest.fixture
def adapter(tiny_adapters: TinyAdapters) -> Path:
    """A good adapter for `base`; read only."""
    return tiny_adapters.folder("llama")


def rewritten(adapter: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], **config: Any) -> Path:
    """A copy of an adapter whose tensors `change` has changed."""
    copy_with(adapter, folder, **config)
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    return folder


# Damaged files.


@pytest.mark.parametrize("keep", [0, 7, 8, 200, 2000, -1])
def test_a_truncated_base_is_refused(keep: int, base: Path, adapter: Path) -> None:
    file = sorted(base.glob("*.safetensors"))[1]
    os.truncate(file, keep % file.stat().st_size)
    expect_refusal(adapter, base, file.name, CheckpointError)
    with pytest.raises(CheckpointError, match=file.name):
        loratool.base_add("base", base)


@pytest.mark.parametrize("keep", [0, 7, 8, 200, 2000, -1])
def test_a_truncated_adapter_is_refused(keep: int, base: Path, adapter: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(adapter, tmp_path / "broken")
    os.truncate(broken / WEIGHTS, keep % (broken / WEIGHTS).stat().st_size)
    expect_refusal(broken, base, WEIGHTS, AdapterError)
    with pytest.raises(AdapterError, match=WEIGHTS):
        loratool.add(broken)
    assert loratool.list() == ()


def test_an_index_that_leads_out_of_the_model_is_refused(base: Path, adapter: Path) -> None:
    index = base / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first = sorted(base.glob("*.safetensors"))[0]
    shutil.move(first, base.parent / first.name)
    content["weight_map"] = {
        name: f"../{shard}" if shard == first.name else shard for name, shard in content["weight_map"].items()
    }
    index.write_text(json.dumps(content))
    expect_refusal(adapter, base, "own folder", CheckpointError)


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json", "loratool.json"])
@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b'{"r":1,"r":2}', b'{"r": NaN}', b"[" * 200_000])
def test_damaged_json_is_refused_by_its_name(name: str, text: bytes, base: Path, adapter: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(adapter, tmp_path / "broken")
    folder = base if name == "config.json" else broken
    (folder / name).write_bytes(text)
    if name != "config.json":
        expect_refusal(broken, base, name.replace(".", r"\."))
    else:
        with pytest.raises(CheckpointError, match=r"config\.json"):
            loratool.base_add("base", base)


@pytest.mark.parametrize("text", ["", "{", "[]", "1", '{"x": "\\ud800"}', "[" * 100_000, '{"a":1,"a":2}'])
@pytest.mark.parametrize("key", ["adapter_config", "loratool"])
def test_damaged_json_in_a_files_metadata_is_refused_by_its_key(
    key: str, text: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    file = tmp_path / "one.safetensors"
    metadata = {"adapter_config": (adapter / "adapter_config.json").read_text()} | {key: text}
    save_file(load_file(adapter / WEIGHTS), file, metadata)
    expect_refusal(file, base, f"metadata '{key}'", AdapterError)


# Factors that do not fit.


def without(name: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.pop(name)


def instead(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.update({name: torch.zeros(shape).to(dtype)})


UNFIT: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "A without B": (without(f"{Q_PROJ}.lora_B.weight"), "has no lora_B"),
    "B without A": (without(f"{Q_PROJ}.lora_A.weight"), "has no lora_A"),
    "A of another width": (instead(f"{Q_PROJ}.lora_A.weight", 4, 63), "fits a matrix of shape"),
    "B of another height": (instead(f"{Q_PROJ}.lora_B.weight", 65, 4), "fits a matrix of shape"),
    "A and B of different ranks": (instead(f"{Q_PROJ}.lora_A.weight", 5, 64), "do not fit together"),
    "a vector": (instead(f"{Q_PROJ}.lora_A.weight", 64), "must be a matrix"),
    "a convolution": (instead(f"{Q_PROJ}.lora_A.weight", 4, 64, 1, 1), "do not fit together"),
    "six dimensions": (instead(f"{Q_PROJ}.lora_A.weight", 4, 64, 1, 1, 1, 1), "must be a matrix"),
    "both of an embedding and of a linear layer": (
        instead("base_model.model.model.layers.0.self_attn.q_proj.lora_embedding_A", 4, 64),
        "has no lora_embedding_B|as of an embedding and of a linear layer",
    ),
    "no rows": (instead(f"{Q_PROJ}.lora_A.weight", 0, 64), "must be a matrix"),
    "whole numbers": (instead(f"{Q_PROJ}.lora_A.weight", 4, 64, dtype=torch.int32), "dtype I32"),
    "eight-bit floats": (instead(f"{Q_PROJ}.lora_A.weight", 4, 64, dtype=torch.float8_e4m3fn), "dtype F8_E4M3"),
    "truth values": (instead(f"{Q_PROJ}.lora_A.weight", 4, 64, dtype=torch.bool), "dtype BOOL"),
    "a factor twice": (instead(f"{Q_PROJ}.lora_A.default.weight", 4, 64), "twice"),
    "a factor of nothing": (instead("base_model.model.lora_A.weight", 4, 64), "LoRA tensor|lora_B"),
    "nothing": (lambda tensors: tensors.clear(), "no LoRA tensors"),
}


@pytest.mark.parametrize("what", UNFIT)
def test_factors_that_do_not_fit_are_refused_with_their_module(
    what: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    change, named = UNFIT[what]
    message = expect_refusal(rewritten(adapter, tmp_path / "bad", change), base, named)
    assert "q_proj" in message or what in {"nothing", "a factor of nothing"}


@pytest.mark.parametrize("config", [{"r": 5}, {"rank_pattern": {"q_proj": 7}}, {"r": 3, "rank_pattern": {"k_proj": 4}}])
def test_ranks_unlike_the_configs_are_refused(
    config: dict[str, Any], base: Path, adapter: Path, tmp_path: Path
) -> None:
    message = expect_refusal(copy_with(adapter, tmp_path / "bad", **config), base, "has rank 4", AdapterError)
    assert "rank_pattern" in message


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_number_that_is_none_is_refused(
    number: float, dtype: torch.dtype, factor: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        name = f"{Q_PROJ}.lora_{factor}.weight"
        tensors[name] = tensors[name].to(dtype)
        tensors[name][-1, -1] = number

    bad = rewritten(adapter, tmp_path / "bad", spoil)
    expect_refusal(bad, base, f"q_proj.lora_{factor}.weight.*NaN or infinity", AdapterError)
    with pytest.raises(AdapterError, match="NaN or infinity"):
        loratool.add(bad)
    assert loratool.list() == ()


def test_a_double_too_large_for_fp32_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        name = f"{Q_PROJ}.lora_A.weight"
        tensors[name] = tensors[name].double() * 1e300

    expect_refusal(rewritten(adapter, tmp_path / "bad", spoil), base, "NaN or infinity", AdapterError)


@pytest.mark.parametrize("alpha", [None, float("nan"), float("inf")])
def test_a_bare_file_without_a_usable_alpha_is_refused(
    alpha: float | None, base: Path, adapter: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(adapter / WEIGHTS), bare)
    message = expect_refusal(bare, base, "alpha", AdapterError, alpha=alpha)
    assert alpha is not None or "--alpha" in message


def test_an_alpha_beside_the_files_own_is_refused(base: Path, adapter: Path) -> None:
    expect_refusal(adapter, base, "states its own alpha", AdapterError, alpha=4.0)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_number_is_refused(weight: float, base: Path, adapter: Path) -> None:
    expect_refusal([(adapter, weight)], base, "must be a number")


def test_the_same_adapter_twice_and_no_adapter_at_all_are_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    expect_refusal([adapter, shutil.copytree(adapter, tmp_path / "again")], base, "given twice")
    expect_refusal([], base, "nothing to merge")


@pytest.mark.parametrize("device", ["", "gpu", "cuda:x", "cuda:99", "cpu:0", "cuda:-1", "\x1b[31m"])
def test_a_device_that_is_not_there_is_refused(device: str, base: Path, adapter: Path) -> None:
    expect_refusal(adapter, base, "device", device=device)


# Landing.


def test_a_tensor_that_lands_nowhere_shows_the_nearest_names(base: Path, adapter: Path, tmp_path: Path) -> None:
    strange = copy_with(adapter, tmp_path / "strange", lambda key: key.replace("layers.1.", "layers.7."))
    message = expect_refusal(strange, base, "land on no tensor", PlacementError)
    assert "'model.layers.7.self_attn.q_proj'" in message or "'model.layers.7.mlp.down_proj'" in message
    assert "nearest: 'model.layers." in message
    assert "and 2 more" in message


def test_another_models_adapter_lands_nowhere(base: Path, tiny_adapters: TinyAdapters) -> None:
    expect_refusal(tiny_adapters.folder("gpt2"), base, "land on no tensor", PlacementError)


def test_an_adapter_of_a_tied_head_says_to_untie_it(tiny_models: TinyModels, tmp_path: Path) -> None:
    work = shutil.copytree(tiny_models.folder("llama-tied", "bf16"), tmp_path / "work" / "base")
    head = save_plain_adapter(tmp_path / "head", {"lm_head": (131, 64)})
    expect_refusal(head, work, "untie", PlacementError)
    embedding = load_file(work / "model.safetensors")["model.embed_tokens.weight"]
    rewrite_tensors(work, extra={"lm_head.weight": embedding})
    expect_refusal(head, work, "tied to the embedding 'model.embed_tokens.weight'.*untie", PlacementError)


# Pickles.


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.marker, "loaded")


@pytest.fixture
def bomb(tmp_path: Path) -> Iterator[bytes]:
    """A pickle whose loading would be noticed after the test."""
    marker = tmp_path / "loaded"
    yield pickle.dumps(Bomb(marker))
    assert not marker.exists(), "a pickle was loaded"
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.exists(), "the bomb was none"


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter.pt", "adapter.pth", "adapter.ckpt", "adapter.pkl"])
def test_a_pickled_adapter_is_never_loaded(name: str, bomb: bytes, base: Path, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(bomb)
    message = expect_refusal(file, base, "pickle", AdapterError)
    assert "save_pretrained" in message
    with pytest.raises(AdapterError, match="pickle"):
        loratool.add(file)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter.st", "adapter.safetensors", "adapter"])
def test_a_pickle_under_another_name_is_never_loaded(name: str, bomb: bytes, base: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(bomb)
    expect_refusal(tmp_path / name, base, "not a valid safetensors file", AdapterError)


def test_a_peft_folder_with_a_pickle_is_refused_with_advice(
    bomb: bytes, base: Path, adapter: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(adapter, tmp_path / "pickled")
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(bomb)
    expect_refusal(folder, base, "pickle.*save_pretrained", AdapterError)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickled_base_is_never_loaded(name: str, bomb: bytes, adapter: Path, tmp_path: Path) -> None:
    folder = tmp_path / "work" / "base"
    folder.mkdir(parents=True)
    (folder / name).write_bytes(bomb)
    (folder / "config.json").write_text("{}")
    expect_refusal(adapter, folder, "pickle.*save_pretrained", CheckpointError)
    for path in (folder, folder / name):
        with pytest.raises(CheckpointError, match="pickle"):
            loratool.base_add("base", path)


def test_a_pickle_beside_the_weights_is_copied_and_never_loaded(
    bomb: bytes, base: Path, adapter: Path, tmp_path: Path
) -> None:
    (base / "training_args.bin").write_bytes(bomb)
    out = loratool.merge([adapter], into=base, out=tmp_path / "out", undo=True).out
    assert (out / "training_args.bin").read_bytes() == bomb
    loratool.verify(out)
    loratool.unmerge(out)


# The right base.


def another_base(base: Path, folder: Path) -> Path:
    """The same names and shapes with one other number."""
    shutil.copytree(base, folder)
    file = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(file)
    tensors[sorted(tensors)[0]].view(-1)[0] += 1
    save_file(tensors, file, {"format": "pt"})
    return folder


def test_an_adapter_that_records_another_base_is_refused_without_any_base(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    tied = shutil.copytree(adapter, tmp_path / "tied")
    (tied / "loratool.json").write_text(json.dumps({"schema": 1, "kind": "lora", "base_fingerprint": "ab" * 32}))
    message = expect_refusal(tied, base, "belongs to the base", WrongBaseError)
    assert "--any-base" in message and "--force" not in message
    merged = loratool.merge([tied], into=base, out=tmp_path / "out", any_base=True)
    assert any("--any-base" in note for note in merged.notes)


def test_a_catalogued_adapter_of_another_base_is_refused_without_any_base(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    other = another_base(base, tmp_path / "other")
    loratool.base_add("mine", base)
    loratool.base_add("theirs", other)
    loratool.add(adapter, name="pirate", base="mine")
    with pytest.raises(WrongBaseError, match="belongs to the base 'mine'"):
        loratool.merge(["pirate"], into="theirs", out=tmp_path / "out")
    with pytest.raises(WrongBaseError):
        loratool.merge(["pirate"], into=other, in_place=True)
    assert not (tmp_path / "out").exists()
    assert loratool.merge(["pirate"], into="theirs", out=tmp_path / "out", any_base=True).out.exists()
    assert loratool.merge(["pirate"], into="mine", out=tmp_path / "mine-pirate").out.exists()


def test_an_adapter_exported_with_its_base_is_refused_elsewhere(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = another_base(base, tmp_path / "other")
    loratool.base_add("mine", base)
    loratool.add(adapter, name="pirate", base="mine")
    for name in ("exported", "exported.safetensors"):
        exported = loratool.export("pirate", tmp_path / name)
        with pytest.raises(WrongBaseError):
            loratool.merge([exported], into=other, out=tmp_path / "out")
    with pytest.raises(WrongBaseError):
        loratool.merge([exported], into=other, out=tmp_path / "out", dry_run=True)


def test_a_base_that_changed_since_it_was_catalogued_is_refused(base: Path, adapter: Path) -> None:
    loratool.base_add("mine", base)
    file = sorted(base.glob("*.safetensors"))[0]
    tensors = load_file(file)
    tensors[sorted(tensors)[0]].view(-1)[0] += 1
    save_file(tensors, file, {"format": "pt"})
    expect_refusal(adapter, base, "not those that were catalogued", WrongBaseError)


def test_force_does_not_go_past_the_fingerprint_nor_any_base_replace_an_output(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    other = another_base(base, tmp_path / "other")
    loratool.base_add("mine", base)
    loratool.base_add("theirs", other)
    loratool.add(adapter, name="pirate", base="mine")
    out = loratool.merge(["pirate"], into="mine", out=tmp_path / "out").out
    before = entries(tmp_path)
    for force in (True, False):  # the wrong base is said first: it is the greater mistake
        with pytest.raises(WrongBaseError, match="belongs to the base 'mine'"):
            loratool.merge(["pirate"], into="theirs", out=out, force=force)
    with pytest.raises(OutputError, match="exists already"):
        loratool.merge(["pirate"], into="theirs", out=out, any_base=True)
    assert entries(tmp_path) == before
    loratool.merge(["pirate"], into="theirs", out=out, any_base=True, force=True)
    assert entries(tmp_path) != before


def test_quantize_and_extract_look_at_the_base_before_the_output(base: Path, adapter: Path, tmp_path: Path) -> None:
    loratool.base_add("mine", base)
    tuned = loratool.merge([adapter], into=base, out=tmp_path / "tuned").out
    image = loratool.quantize("mine", out=tmp_path / "image", name="image").out
    file = sorted(base.glob("*.safetensors"))[0]
    tensors = load_file(file)
    tensors[sorted(tensors)[0]].view(-1)[0] += 1
    save_file(tensors, file, {"format": "pt"})
    for command in (
        lambda **given: loratool.quantize("mine", out=image, name="image", **given),
        lambda **given: loratool.extract(tuned, "mine", rank=1, out=tmp_path / "out.st", **given),
    ):
        for force in (True, False):
            with pytest.raises(WrongBaseError, match=r"not those that were catalogued.*--any-base"):
                command(force=force)
    with pytest.raises(OutputError, match="exists already"):
        loratool.quantize("mine", out=image, name="image", any_base=True)
    assert any("--any-base" in note for note in loratool.quantize("mine", out=image, force=True, any_base=True).notes)
    assert loratool.extract(tuned, "mine", rank=1, out=tmp_path / "out.st", any_base=True).record.base is None


# Outputs.


def tree_and(base: Path, make: Callable[[Path], Any]) -> Path:
    out = base.parent / "out"
    make(out)
    return out


EXISTING: dict[str, Callable[[Path], Any]] = {
    "a file": lambda out: out.write_text("precious"),
    "an empty file": lambda out: out.touch(),
    "a foreign folder": lambda out: (out.mkdir(), (out / "precious").write_text("x")),
    "a link to a folder": lambda out: out.symlink_to(out.parent / "base"),
    "a dangling link": lambda out: out.symlink_to("nowhere"),
    "a link to itself": lambda out: out.symlink_to("out"),
    "a fifo": os.mkfifo,
}


@pytest.mark.parametrize("what", EXISTING)
@pytest.mark.parametrize("force", [True, False])
def test_an_output_that_exists_is_never_lost(what: str, force: bool, base: Path, adapter: Path) -> None:
    out = tree_and(base, EXISTING[what])
    before = entries(base.parent)
    with pytest.raises(OutputError) as raised:
        loratool.merge([adapter], into=base, out=out, force=force)
    expect_clear(raised.value)
    assert entries(base.parent) == before


def test_an_output_of_ours_is_replaced_with_force_only(base: Path, adapter: Path) -> None:
    out = loratool.merge([(adapter, 0.5)], into=base, out=base.parent / "out").out
    before = entries(base.parent)
    with pytest.raises(OutputError, match="exists"):
        loratool.merge([adapter], into=base, out=out)
    assert entries(base.parent) == before
    loratool.merge([adapter], into=base, out=out, force=True)
    assert entries(out) != {name: value for name, value in before.items() if name.startswith("out/")}
    loratool.verify(out)


@pytest.mark.parametrize(
    "where", ["base", "base/inside", "base/deep/inside", ".", "base/../base", "link", "link/inside"]
)
@pytest.mark.parametrize("force", [True, False])
def test_base_and_output_in_one_another_are_refused(where: str, force: bool, base: Path, adapter: Path) -> None:
    (base.parent / "link").symlink_to(base)
    (base / "loratool.json").write_text('{"kind": "other"}')
    before = entries(base.parent)
    with pytest.raises(OutputError):
        loratool.merge([adapter], into=base, out=base.parent / where, force=force)
    assert entries(base.parent) == before


def test_the_folder_of_a_single_file_base_is_no_output(tiny_models: TinyModels, adapter: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_models.folder("llama", "bf16", "single"), tmp_path / "base")
    (folder / "loratool.json").write_text('{"kind": "other"}')
    before = entries(tmp_path)
    for out in (folder, folder / "model.safetensors"):
        with pytest.raises(OutputError):
            loratool.merge([adapter], into=folder / "model.safetensors", out=out, force=True)
        assert entries(tmp_path) == before


def test_an_adapters_own_folder_is_no_output(base: Path, adapter: Path, tmp_path: Path) -> None:
    """It holds an adapter_config.json, so --force alone would replace it."""
    mine = shutil.copytree(adapter, tmp_path / "adapters" / "mine")
    before = entries(tmp_path)
    for out in (mine, mine.parent, mine / WEIGHTS):
        with pytest.raises(OutputError):
            loratool.merge([mine], into=base, out=out, force=True)
        assert entries(tmp_path) == before


BAD_NAMES = {
    "a zero byte": "a\0b",
    "300 letters": "x" * 300,
    "300 letters below": "x" * 300 + "/out",
    "half a surrogate pair": "a\ud800",
}


@pytest.mark.parametrize("what", BAD_NAMES)
def test_a_name_that_no_folder_can_have_is_refused_as_output(what: str, base: Path, adapter: Path) -> None:
    before = entries(base.parent)
    for command in (
        lambda out: loratool.merge([adapter], into=base, out=out),
        lambda out: loratool.merge([adapter], into=base, out=out, dry_run=True, force=True) and 1 / 0,
        lambda out: loratool.export(adapter, out),
        lambda out: loratool.export(adapter, out + ".safetensors"),
    ):
        try:
            with pytest.raises(OutputError) as raised:
                command(str(base.parent / BAD_NAMES[what]))
            expect_clear(raised.value)
        except ZeroDivisionError:
            assert what != "a zero byte"
        assert entries(base.parent) == before


@pytest.mark.parametrize("place", ["/proc/nowhere/out", "/dev/null/out", "/proc/out"])
def test_a_place_that_takes_no_folder_is_refused_as_output(place: str, base: Path, adapter: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        loratool.merge([adapter], into=base, out=place)


def test_a_safetensors_file_is_no_output(base: Path, adapter: Path) -> None:
    with pytest.raises(OutputError, match="folder"):
        loratool.merge([adapter], into=base, out=base.parent / "out.safetensors")


STRANGE_NAMES = ["../../etc", "/", "..", ".", "", "a/b/c", "a\x1b[31mb", "x" * 300, "a\0b", "name@", "@1", "-x", "a b",
                 "~nobody-here", "a\u202eb", "\ud800", "http://host/x", "name@0", "name@" + "9" * 5000]  # fmt: skip


@pytest.mark.parametrize("name", STRANGE_NAMES, ids=range(len(STRANGE_NAMES)))
def test_a_strange_name_is_a_clear_error_everywhere(name: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    commands: dict[str, Callable[[], Any]] = {
        "merge": lambda: loratool.merge([name], into=base, out=tmp_path / "out"),
        "into": lambda: loratool.merge([adapter], into=name, out=tmp_path / "out"),
        "unmerge": lambda: loratool.unmerge(name, out=tmp_path / "out"),
        "verify": lambda: loratool.verify(name),
        "add": lambda: loratool.add(name),
        "name": lambda: loratool.add(adapter, name=name) if name else loratool.add(name),
        "tag": lambda: loratool.tag(name, ["x"]),
        "tags": lambda: loratool.add(adapter, name="good", tags=[name]),
        "show": lambda: loratool.show(name),
        "remove": lambda: loratool.remove(name),
        "export": lambda: loratool.export(name, tmp_path / "out"),
        "base add": lambda: loratool.base_add(name, base),
        "base add source": lambda: loratool.base_add("good", name),
        "base show": lambda: loratool.base_show(name),
        "base verify": lambda: loratool.base_verify(name),
        "base remove": lambda: loratool.base_remove(name),
        "of base": lambda: loratool.add(adapter, name="good", base=name) if name else loratool.base_show(name),
        "list": lambda: loratool.list(base=name),
    }
    before = entries(base.parent)
    for what, command in commands.items():
        with pytest.raises((LoratoolError, RegistryError)) as raised:
            command()
        expect_clear(raised.value)
        assert not (tmp_path / "out").exists(), what
    assert entries(base.parent) == before
    assert loratool.list() == ()


def test_an_adapter_folder_of_any_name_merges_to_a_default_output_beside_the_base(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    for name in ("with space", "a\x1b[31mb", "ünïcode", "-x", "x\ny", "..."):
        odd = shutil.copytree(adapter, tmp_path / "adapters" / name)
        result = loratool.merge([odd], into=base)
        assert result.out.parent == base.parent
        shutil.rmtree(result.out)
    long = shutil.copytree(adapter, tmp_path / "adapters" / ("x" * 250))
    with pytest.raises(OutputError):
        loratool.merge([long], into=base)
    assert os.listdir(base.parent) == ["base"]


@pytest.mark.parametrize(
    "name", ["\x1b]0;owned\x07", "\r\n", "x" * 100_000, "\u202e", "a" * 200 + "\x9b31m", "%s%n{0}"]
)
def test_tensor_names_are_printed_without_their_control_characters(
    name: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    key = f"base_model.model.{name}.q_proj"
    strange = rewritten(
        adapter,
        tmp_path / "strange",
        lambda tensors: tensors.update(
            {f"{key}.lora_A.weight": torch.zeros(4, 64), f"{key}.lora_B.weight": torch.zeros(64, 4)}
        ),
    )
    expect_refusal(strange, base, "land on no tensor|LoRA tensor")
    expect_refusal(rewritten(adapter, tmp_path / "other", instead(name, 4, 4)), base, "LoRA tensor")


# Links and things that are no files.


def as_hub_snapshot(base: Path, folder: Path) -> Path:
    """The model as the Hub's cache holds it: every file a link to a blob."""
    blobs = folder / "blobs"
    snapshot = folder / "snapshots" / ("ab" * 20)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(base.iterdir())):
        shutil.copyfile(file, blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064x}")
    return snapshot


def test_a_hub_snapshot_is_read_through_its_links_and_never_written(base: Path, adapter: Path, tmp_path: Path) -> None:
    snapshot = as_hub_snapshot(base, tmp_path / "hub")
    before = entries(tmp_path / "hub")
    with pytest.raises(OutputError, match="link"):
        loratool.merge([adapter], into=snapshot, in_place=True)
    assert entries(tmp_path / "hub") == before
    linked = loratool.merge([adapter], into=snapshot, out=tmp_path / "out").out
    plain = loratool.merge([adapter], into=base, out=tmp_path / "plain").out
    assert entries(tmp_path / "hub") == before
    assert stored_tensors(linked) == stored_tensors(plain)
    assert not any(path.is_symlink() for path in linked.rglob("*"))


@pytest.mark.parametrize("what", ["folder", "hard link", "soft link"])
def test_a_model_with_links_is_not_changed_in_place(what: str, base: Path, adapter: Path) -> None:
    target = base
    shard = sorted(base.glob("*.safetensors"))[1]
    if what == "folder":
        target = base.parent / "link"
        target.symlink_to(base)
    elif what == "hard link":
        os.link(shard, base.parent / "second.safetensors")
    else:
        shutil.move(shard, base.parent / "real.safetensors")
        shard.symlink_to(base.parent / "real.safetensors")
    before = entries(base.parent)
    with pytest.raises(OutputError, match="link"):
        loratool.merge([adapter], into=target, in_place=True)
    assert entries(base.parent) == before


def test_a_single_file_is_not_changed_in_place(tiny_models: TinyModels, adapter: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_models.folder("llama", "bf16", "single"), tmp_path / "base")
    before = entries(tmp_path)
    with pytest.raises(OutputError, match="single file"):
        loratool.merge([adapter], into=folder / "model.safetensors", in_place=True)
    assert entries(tmp_path) == before


def bind_socket(path: Path) -> None:
    bound = socket.socket(socket.AF_UNIX)
    here = os.open(path.parent, os.O_RDONLY)
    bound.bind(f"/proc/self/fd/{here}/{path.name}")
    os.close(here)
    bound.close()


STRANGE_FILES: dict[str, Callable[[Path], Any]] = {
    "a fifo": os.mkfifo,
    "a socket": bind_socket,
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to a folder": lambda path: path.symlink_to("/usr"),
    "a link to the folder itself": lambda path: path.symlink_to("."),
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("what", STRANGE_FILES)
@pytest.mark.parametrize("name", ["README.md", "deep/er/file"])
def test_what_is_no_file_in_a_model_is_refused_without_waiting(what: str, name: str, base: Path, adapter: Path) -> None:
    (base / name).parent.mkdir(parents=True, exist_ok=True)
    STRANGE_FILES[what](base / name)
    expect_refusal(adapter, base, Path(name).name, CheckpointError)


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_config.json", "loratool.json"])
def test_a_fifo_in_an_adapter_is_refused_without_waiting(name: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(adapter, tmp_path / "strange")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    if name == "loratool.json":
        loratool.merge([folder], into=base, out=tmp_path / "out")
    else:
        expect_refusal(folder, base, name, AdapterError)
    os.mkfifo(tmp_path / "one.safetensors")
    expect_refusal(tmp_path / "one.safetensors", base, "regular file", AdapterError)


def test_files_of_deep_folders_and_hidden_files_come_along(base: Path, adapter: Path, tmp_path: Path) -> None:
    (base / "deep" / "er").mkdir(parents=True)
    (base / "deep" / "er" / "file").write_text("x")
    (base / ".hidden").write_text("y")
    (base / ".cache").mkdir()
    (base / ".cache" / "lock").write_text("z")
    out = loratool.merge([adapter], into=base, out=tmp_path / "out", undo=True).out
    assert (out / "deep" / "er" / "file").read_text() == "x"
    assert (out / ".hidden").read_text() == "y"
    assert not (out / ".cache").exists()


# Patterns and configurations.

BOMBS = {
    "backtracking": r"(a|a)*(a|a)*(a|a)*$",
    "nested stars": r"((.*)*)*x",
    "repeats of repeats": "((a{1000}){1000}){1000}",
    "one great repeat": "a{4294967295}",
    "deep groups": "(" * 5_000 + ")" * 5_000,
    "deep groups that fit": "(" * 900 + ")" * 900,
    "recursion": "(?R)*(?R)*",
    "a group that calls itself": "((?1)(?1))*",
    "a huge pattern": "a|" * 1_000_000,
    "unbalanced": "(((",
    "a bad range": "[z-a]",
    "a bad count": "a{3,2}",
}


@pytest.mark.timeout(100)
@pytest.mark.parametrize(
    "key", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"]
)
@pytest.mark.parametrize("what", BOMBS)
def test_a_pattern_bomb_is_refused_or_harmless(what: str, key: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    value: Any = {BOMBS[what]: 4} if key.endswith("_pattern") and key != "layers_pattern" else BOMBS[what]
    config = {key: value} | ({"layers_to_transform": [0, 1]} if key == "layers_pattern" else {})
    module = "model.layers.0." + "a" * 40
    bad = rewritten(adapter, tmp_path / "bad", lambda tensors: rename_one(tensors, module), **config)
    before = entries(base.parent)
    with pytest.raises(LoratoolError) as raised:
        loratool.merge([bad], into=base, out=base.parent / "out")
    expect_clear(raised.value)
    assert entries(base.parent) == before


def rename_one(tensors: dict[str, torch.Tensor], module: str) -> None:
    for factor in ("A", "B"):
        tensors[f"base_model.model.{module}.lora_{factor}.weight"] = tensors.pop(f"{Q_PROJ}.lora_{factor}.weight")


@pytest.mark.parametrize(
    "pattern", ["model|layers", "(?P<idx>model)", "mod(?P<idx>e)l|layers", "model.layers.0|x", "("]
)
def test_a_layers_pattern_that_finds_no_number_is_a_clear_error(
    pattern: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    bad = copy_with(adapter, tmp_path / "bad", layers_to_transform=[0, 1], layers_pattern=pattern)
    expect_refusal(bad, base, "layers_pattern|layers_to_transform|pattern")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (key, value)
        for key in ("r", "lora_alpha")
        for value in (None, 0 if key == "r" else "1", "4", True, [4], {}, 10**400, -(10**400), 1e999, "x" * 1000)
    ]
    + [("r", -1), ("r", 4.5), ("use_rslora", "yes"), ("use_rslora", 2), ("rank_pattern", [1]), ("rank_pattern", {"q": 0}),
       ("rank_pattern", {"q_proj": None}), ("alpha_pattern", {"q_proj": "1"}), ("target_modules", 5),
       ("target_modules", [1]), ("target_modules", {"q_proj": 1}), ("exclude_modules", [None]), ("bias", "some"),
       ("bias", ["all"]), ("layers_to_transform", "all"), ("layers_to_transform", [True]), ("layers_pattern", 3),
       ("fan_in_fan_out", "x"), ("peft_type", 1), ("peft_type", ["LORA"]), ("init_lora_weights", {"x": 1}),
       ("init_lora_weights", "pissa")],
)  # fmt: skip
def test_a_configuration_value_that_cannot_be_is_refused_with_its_key(
    key: str, value: Any, base: Path, adapter: Path, tmp_path: Path
) -> None:
    bad = shutil.copytree(adapter, tmp_path / "bad")
    config = json.loads((bad / "adapter_config.json").read_text()) | {key: value}
    (bad / "adapter_config.json").write_text(json.dumps(config).replace("Infinity", "1e999"))
    expect_refusal(bad, base, "|".join([key, "adapter", "initialised", "has rank"]), AdapterError)


JSON_VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-3, 70), st.sampled_from([10**400, 1 << 64]), st.floats(), st.text(max_size=6),
        st.sampled_from(["q_proj", ".*", "all-linear", "none", "LORA", "layers", "(", "[0-", "model.layers"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=5,
)  # fmt: skip
KEYS = ["r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "bias",
        "layers_to_transform", "layers_pattern", "fan_in_fan_out", "init_lora_weights", "peft_type", "use_dora",
        "base_model_name_or_path", "task_type", "surprise"]  # fmt: skip


@given(st.dictionaries(st.sampled_from(KEYS), JSON_VALUES, max_size=4))
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_configuration_raises_anything_but_a_clear_error(changes: dict[str, Any]) -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]} | changes
    try:
        lora = LoraConfig.parse(config, "adapter_config.json")
        for module in ("model.layers.0.self_attn.q_proj", "q_proj", "", "layers.12345678901.x", "a..b.1.c"):
            lora.targets(module)
            assert isinstance(lora.scaling_of(module), float | int)
    except AdapterError as error:
        expect_clear(error)


# A journal that somebody else put into a model's folder.


def hostile_journal(base: Path, ranges: Any = (), remove: Any = (), redo: bytes = bytes(64)) -> Path:
    journal = base / ".loratool-journal"
    (journal / "new").mkdir(parents=True)
    (journal / "redo").write_bytes(redo)
    (journal / "commit.json").write_text(json.dumps({"ranges": list(ranges), "remove": list(remove)}))
    return journal


def written(file: Any, start: Any = 0, stop: Any = 8, at: Any = 0) -> dict[str, Any]:
    return {"file": file, "start": start, "stop": stop, "at": at}


SHARD = "model-00001-of-00009.safetensors"


def with_new(name: str, text: str = "x") -> Callable[[Path], None]:
    def make(base: Path) -> None:
        file = hostile_journal(base) / "new" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    return make


def with_link(name: str, target: str) -> Callable[[Path], None]:
    def make(base: Path) -> None:
        file = hostile_journal(base, [written("first.safetensors")]) / name
        if file.is_dir():
            file.rmdir()
        file.unlink(missing_ok=True)
        file.symlink_to(target)

    return make


def with_fifo(name: str) -> Callable[[Path], None]:
    def make(base: Path) -> None:
        file = hostile_journal(base) / name
        file.unlink(missing_ok=True)
        os.mkfifo(file)

    return make


HOSTILE_JOURNALS: dict[str, Callable[[Path], Any]] = {
    "writes to the folder above": lambda base: hostile_journal(base, [written("../victim.safetensors")]),
    "writes to an absolute path": lambda base: hostile_journal(base, [written(f"{base.parent}/victim.safetensors")]),
    "writes to a folder below": lambda base: hostile_journal(base, [written("sub/victim.safetensors")]),
    "writes to the configuration": lambda base: hostile_journal(base, [written("config.json")]),
    "writes to a file that is missing": lambda base: hostile_journal(base, [written("nowhere.safetensors")]),
    "writes to a name with a zero byte": lambda base: hostile_journal(base, [written("a\0.safetensors")]),
    "writes to a name of 300 letters": lambda base: hostile_journal(base, [written("x" * 300 + ".safetensors")]),
    "writes to a number": lambda base: hostile_journal(base, [written(5)]),
    "writes through a link": lambda base: (
        (base / "link.safetensors").symlink_to(base.parent / "victim.safetensors"),
        hostile_journal(base, [written("link.safetensors")]),
    ),
    "writes to a file with a second name": lambda base: (
        os.link(base.parent / "victim.safetensors", base / "hard.safetensors"),
        hostile_journal(base, [written("hard.safetensors")]),
    ),
    "writes before a file": lambda base: hostile_journal(base, [written("first.safetensors", -8, 0)]),
    "writes beyond a file": lambda base: hostile_journal(base, [written("first.safetensors", 0, 1 << 40)]),
    "writes backwards": lambda base: hostile_journal(base, [written("first.safetensors", 8, 0)]),
    "reads beyond the redo log": lambda base: hostile_journal(base, [written("first.safetensors", at=60)]),
    "reads before the redo log": lambda base: hostile_journal(base, [written("first.safetensors", at=-1)]),
    "counts in fractions": lambda base: hostile_journal(base, [written("first.safetensors", 0.5, 2.5)]),
    "counts in text": lambda base: hostile_journal(base, [written("first.safetensors", "0", "8")]),
    "counts in truth values": lambda base: hostile_journal(base, [written("first.safetensors", False, True)]),
    "lacks a field": lambda base: hostile_journal(base, [{"file": "first.safetensors"}]),
    "lists numbers": lambda base: hostile_journal(base, [1]),
    "removes the folder above": lambda base: hostile_journal(base, remove=[".."]),
    "removes the folder": lambda base: hostile_journal(base, remove=["."]),
    "removes a neighbour": lambda base: hostile_journal(base, remove=["../victim.safetensors"]),
    "removes by a way back": lambda base: hostile_journal(base, remove=["loratool-undo/../config.json"]),
    "removes an absolute path": lambda base: hostile_journal(base, remove=[f"{base.parent}/victim.safetensors"]),
    "removes the weights": lambda base: hostile_journal(base, remove=["first.safetensors"]),
    "removes the configuration": lambda base: hostile_journal(base, remove=["config.json"]),
    "removes a number": lambda base: hostile_journal(base, remove=[3]),
    "removes with a line end": lambda base: hostile_journal(base, remove=["loratool.json\n"]),
    "removes through a link": lambda base: (
        (base / "loratool-undo").symlink_to(base.parent / "elsewhere"),
        hostile_journal(base, remove=["loratool-undo/0123456789ab"]),
    ),
    "installs a configuration": with_new("config.json"),
    "installs weights": with_new("first.safetensors"),
    "installs a program": with_new("bin/x"),
    "installs below the undo": with_new("loratool-undo/0123456789ab/deep/x"),
    "installs under an odd undo": with_new("loratool-undo/../../x" if False else "loratool-undo-x/y"),
    "installs through a link": lambda base: (
        (base / "loratool-undo").symlink_to(base.parent / "elsewhere"),
        with_new("loratool-undo/0123456789ab/undo.st")(base),
    ),
    "has a link for its redo log": with_link("redo", "/etc/passwd"),
    "has a link for its new files": with_link("new", "../../elsewhere"),
    "has a link among its new files": with_link("new/loratool.json", "/etc/passwd"),
    "has a fifo for its redo log": with_fifo("redo"),
    "has a fifo among its new files": with_fifo("new/loratool.json"),
    "has no redo log": lambda base: (hostile_journal(base, [written("first.safetensors")]) / "redo").unlink(),
    "is no JSON": lambda base: (hostile_journal(base) / "commit.json").write_text("{"),
    "is deep": lambda base: (hostile_journal(base) / "commit.json").write_text("[" * 100_000),
    "is a list": lambda base: (hostile_journal(base) / "commit.json").write_text("[]"),
    "has numbers for lists": lambda base: (hostile_journal(base) / "commit.json").write_text(
        '{"ranges": 1, "remove": 2}'
    ),
    "is a link": lambda base: (base / ".loratool-journal").symlink_to(base.parent / "elsewhere"),
    "is a dangling link": lambda base: (base / ".loratool-journal").symlink_to("nowhere"),
    "is a file": lambda base: (base / ".loratool-journal").write_text("x"),
    "is a fifo": lambda base: os.mkfifo(base / ".loratool-journal"),
}


@pytest.mark.parametrize("what", HOSTILE_JOURNALS)
def test_a_hostile_journal_changes_nothing_and_is_refused(
    what: str, tmp_path: Path, tiny_models: TinyModels, adapter: Path
) -> None:
    base = shutil.copytree(tiny_models.folder("llama", "bf16", "single"), tmp_path / "work" / "base")
    (base / "model.safetensors").rename(base / "first.safetensors")
    shutil.copyfile(base / "first.safetensors", base.parent / "victim.safetensors")
    (base.parent / "elsewhere" / "0123456789ab").mkdir(parents=True)
    (base.parent / "elsewhere" / "loratool.json").write_text("{}")
    (base.parent / "elsewhere" / "0123456789ab" / "undo.st").write_text("precious")
    HOSTILE_JOURNALS[what](base)
    before = entries(base.parent)
    for command in (
        lambda: loratool.base_add("base", base),
        lambda: loratool.merge([adapter], into=base, out=base.parent / "out"),
        lambda: loratool.merge([adapter], into=base, in_place=True),
        lambda: loratool.verify(base),
        lambda: loratool.unmerge(base),
    ):
        with pytest.raises(CheckpointError, match="journal") as raised:
            command()
        assert "remove it" in expect_clear(raised.value)
        assert entries(base.parent) == before


# Everything together.


def test_a_missing_adapter_or_base_is_not_found(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises((NotFoundError, RegistryError)):
        loratool.merge(["nothing-of-the-kind"], into=base, out=tmp_path / "out")
    with pytest.raises((NotFoundError, RegistryError)):
        loratool.merge([adapter], into="nothing-of-the-kind", out=tmp_path / "out")
    with pytest.raises(NotFoundError):
        loratool.merge([tmp_path / "nowhere"], into=base, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_matrix_that_is_stored_otherwise_is_refused(tmp_path: Path) -> None:
    base = save_plain_model(tmp_path / "work" / "base", {"layers.0.proj.weight": torch.zeros(8, 8, dtype=torch.uint8)})
    adapter = save_plain_adapter(tmp_path / "adapter", {"layers.0.proj": (8, 8)})
    expect_refusal(adapter, base, r"stored as U8 \[8, 8\]")


def test_a_dry_run_of_bad_input_fails_as_well(base: Path, adapter: Path, tmp_path: Path) -> None:
    bad = rewritten(adapter, tmp_path / "bad", UNFIT["A without B"][0])
    with pytest.raises(AdapterError, match="has no lora_B"):
        loratool.merge([bad], into=base, out=tmp_path / "out", dry_run=True)


def test_a_single_file_adapter_is_as_strict_as_a_folder(base: Path, adapter: Path, tmp_path: Path) -> None:
    bad = rewritten(adapter, tmp_path / "bad", UNFIT["A and B of different ranks"][0])
    expect_refusal(save_single_file(bad, tmp_path / "bad.safetensors"), base, "do not fit together", AdapterError)
