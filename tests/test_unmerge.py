"""What a merge changed comes out bit for bit, every file of it, or the unmerge refuses; wrong bytes are never written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_adapters import copy_with, save_plain_adapter, save_single_file
from tiny_models import Layout, as_torch, digest, save_plain_model, stored_tensors

import loratool
from loratool.checkpoint import journal
from loratool.checkpoint.header import read_header
from loratool.errors import LoratoolError, NotFoundError, OutputError, RestoreError, VerificationError
from loratool.merging.residual import MOST_DOUBT, add_residual, residual
from loratool.updates.low_rank import FixedPointProduct
from loratool.weights import dense

if TYPE_CHECKING:
    from tiny_adapters import TinyAdapters
    from tiny_models import TinyModels


CASES: list[tuple[str, str, Layout]] = [
    ("llama", "bf16", "single"),
    ("llama", "fp16", "sharded"),
    ("llama", "fp32", "sharded"),
    ("gpt2", "bf16", "sharded"),
    ("gpt2", "fp32", "single"),
    ("gpt2-without-prefix", "fp16", "single"),
    ("llama-odd", "bf16", "sharded"),
    ("llama-many-blocks", "bf16", "single"),
    ("bert", "fp16", "sharded"),
]
EVERY_CASE = pytest.mark.parametrize(("architecture", "dtype", "layout"), CASES, ids=["-".join(case) for case in CASES])


@dataclass(frozen=True, slots=True)
class Work:
    """A base and an adapter that a test may delete, with the digests of every file of the base."""

    folder: Path
    base: Path
    adapter: Path
    before: dict[str, str]

    @property
    def out(self) -> Path:
        return self.folder / "merged"

    def merge(self, **options: Any) -> Path:
        """Merge the adapter and return the merged model; by default to `out`."""
        if "in_place" not in options:
            options = {"out": self.out} | options
        result = loratool.merge([self.adapter], into=self.base, **options)
        assert digest(result.out) != self.before
        return result.out

    def lose_base(self) -> None:
        shutil.rmtree(self.base)

    def lose_adapter(self) -> None:
        shutil.rmtree(self.adapter)


@pytest.fixture
def work(tmp_path: Path, tiny_models: TinyModels, tiny_adapters: TinyAdapters) -> Callable[..., Work]:
    """Copies of a base and its adapter."""

    def make(architecture: str = "llama", dtype: str = "bf16", layout: Layout = "single", **lora: Any) -> Work:
        base = shutil.copytree(tiny_models.folder(architecture, dtype, layout), tmp_path / "base")
        adapter = shutil.copytree(tiny_adapters.folder(architecture, **lora), tmp_path / "adapter")
        return Work(tmp_path, base, adapter, digest(base))

    return make


def entries(folder: Path) -> list[str]:
    """Every file, folder and link below `folder`, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def expect_refusal(merged: Path, error: type[LoratoolError] = RestoreError, named: str = ".", **options: Any) -> str:
    """The unmerge must fail and leave everything around it as it was."""
    before, names = digest(merged.parent), entries(merged.parent)
    with pytest.raises(error, match=named) as raised:
        loratool.unmerge(merged, **({"out": merged.parent / "restored"} | options))
    assert digest(merged.parent) == before
    assert entries(merged.parent) == names
    return str(raised.value)


@EVERY_CASE
def test_the_undo_file_alone_restores_every_file(
    architecture: str, dtype: str, layout: Layout, work: Callable[..., Work]
) -> None:
    case = work(architecture, dtype, layout)
    merged = case.merge(undo=True)
    case.lose_base()
    case.lose_adapter()
    result = loratool.unmerge(merged, out=case.folder / "restored")
    assert (result.method, result.inexact, result.notes) == ("undo", (), ())
    assert digest(result.out) == case.before
    assert entries(result.out) == sorted(case.before)


@EVERY_CASE
def test_the_base_alone_restores_every_file(
    architecture: str, dtype: str, layout: Layout, work: Callable[..., Work]
) -> None:
    case = work(architecture, dtype, layout)
    merged = case.merge()
    case.lose_adapter()
    result = loratool.unmerge(merged)
    assert (result.method, result.inexact, result.notes) == ("base", (), ())
    assert result.out == case.folder / "merged-unmerged"
    assert digest(result.out) == case.before


@EVERY_CASE
def test_a_merge_in_place_comes_out_in_place_and_leaves_nothing(
    architecture: str, dtype: str, layout: Layout, work: Callable[..., Work]
) -> None:
    case = work(architecture, dtype, layout)
    names = entries(case.base)
    merged = case.merge(in_place=True)
    assert merged == case.base
    case.lose_adapter()
    result = loratool.unmerge(case.base, in_place=True)
    assert (result.method, result.out) == ("undo", case.base)
    assert digest(case.base) == case.before
    assert entries(case.base) == names


def test_a_merge_in_place_and_one_to_a_new_folder_give_the_same_files(work: Callable[..., Work]) -> None:
    case = work(layout="sharded")
    merged = case.merge(undo=True)
    case.merge(in_place=True)
    out, in_place = (json.loads((folder / "loratool.json").read_text()) for folder in (merged, case.base))
    assert (out.pop("in_place"), in_place.pop("in_place")) == (False, True)
    assert out == in_place
    for folder in (merged, case.base):
        (folder / "loratool.json").unlink()
    assert digest(merged) == digest(case.base)


def test_equal_merges_give_equal_files(work: Callable[..., Work]) -> None:
    case = work("gpt2", "fp16")
    first = digest(case.merge(undo=True))
    assert digest(case.merge(undo=True, out=case.folder / "again")) == first


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_several_adapters_with_weights_come_out(
    dtype: str, work: Callable[..., Work], tiny_adapters: TinyAdapters
) -> None:
    case = work("llama", dtype, "sharded")
    other = tiny_adapters.folder("llama", seed=2, r=8, lora_alpha=5, target_modules=["q_proj", "down_proj"])
    third = tiny_adapters.folder("llama", seed=3, r=3, lora_alpha=7, use_rslora=True, target_modules=["q_proj"])
    both: list[Any] = [(case.adapter, 0.3), (other, -1.75), third]
    merged = loratool.merge(both, into=case.base, out=case.out, undo=True).out
    loratool.merge(both, into=case.base, in_place=True)
    assert stored_tensors(merged) == stored_tensors(case.base)
    result = loratool.unmerge(case.base, in_place=True)
    assert digest(result.out) == case.before
    case.lose_base()
    assert digest(loratool.unmerge(merged).out) == case.before


def test_two_merges_in_place_come_out_last_one_first(work: Callable[..., Work], tiny_adapters: TinyAdapters) -> None:
    case = work("llama", "bf16", "sharded")
    other = tiny_adapters.folder("llama", seed=2, target_modules=["v_proj", "up_proj"])
    case.merge(in_place=True)
    between = digest(case.base)
    loratool.merge([other], into=case.base, in_place=True)
    case.lose_adapter()
    loratool.unmerge(case.base, in_place=True)
    assert digest(case.base) == between
    loratool.verify(case.base)
    loratool.unmerge(case.base, in_place=True)
    assert digest(case.base) == case.before
    with pytest.raises(NotFoundError, match=r"loratool\.json"):
        loratool.unmerge(case.base, in_place=True)


def test_the_same_adapter_twice_in_place_comes_out_twice(work: Callable[..., Work]) -> None:
    case = work("gpt2", "bf16")
    case.merge(in_place=True)
    between = digest(case.base)
    case.merge(in_place=True, again=True)
    assert loratool.unmerge(case.base, in_place=True).method == "undo"
    assert digest(case.base) == between
    loratool.unmerge(case.base, in_place=True)
    assert digest(case.base) == case.before


@pytest.mark.parametrize("undo", [True, False])
def test_a_merge_into_a_merged_model_comes_out_to_that_model(
    undo: bool, work: Callable[..., Work], tiny_adapters: TinyAdapters
) -> None:
    case = work("llama", "fp16", "sharded")
    first = case.merge(undo=True)
    between = digest(first)
    other = tiny_adapters.folder("llama", seed=2)
    second = loratool.merge([other], into=first, out=case.folder / "second", undo=undo).out
    restored = loratool.unmerge(second, out=case.folder / "first again").out
    assert digest(restored) == between
    case.lose_base()
    assert digest(loratool.unmerge(restored, out=case.folder / "base again").out) == case.before


def test_ten_merges_on_one_another_keep_manifests_that_grow_linearly_and_all_come_out(
    work: Callable[..., Work], tiny_adapters: TinyAdapters
) -> None:
    case = work("llama", "bf16", target_modules=["q_proj"])
    other = tiny_adapters.folder("llama", seed=2, target_modules=["v_proj"])
    levels, sizes = [case.before], []
    for adapter in [case.adapter, other] * 5:
        loratool.merge([adapter], into=case.base, in_place=True, again=True)
        levels.append(digest(case.base))
        sizes.append((case.base / "loratool.json").stat().st_size)
    assert sizes[9] < 10 * sizes[0]
    assert sizes[9] - sizes[8] < 2 * (sizes[2] - sizes[1])
    for level in reversed(levels[:-1]):
        assert loratool.unmerge(case.base, in_place=True).method == "undo"
        assert digest(case.base) == level
    assert entries(case.base) == sorted(case.before)


def test_a_manifest_of_the_base_that_is_too_large_to_keep_stops_the_merge(work: Callable[..., Work]) -> None:
    case = work()
    with open(case.base / "loratool.json", "wb") as file:
        file.truncate((64 << 20) + 1)
    before = digest(case.folder)
    for options in ({"out": case.out}, {"in_place": True}):
        with pytest.raises(LoratoolError, match=r"loratool\.json"):
            loratool.merge([case.adapter], into=case.base, **options)
        assert digest(case.folder) == before


def test_an_in_place_merge_into_a_merged_copy_comes_out(work: Callable[..., Work], tiny_adapters: TinyAdapters) -> None:
    case = work()
    first = case.merge()
    between = digest(first)
    loratool.merge([tiny_adapters.folder("llama", seed=2)], into=first, in_place=True)
    loratool.unmerge(first, in_place=True)
    assert digest(first) == between
    assert loratool.unmerge(first, in_place=True).method == "base"
    assert digest(first) == case.before
    assert entries(first) == entries(case.base)


def test_the_base_is_found_by_its_fingerprint_under_another_name(work: Callable[..., Work]) -> None:
    case = work(layout="sharded")
    merged = case.merge()
    moved = case.base.rename(case.folder / "elsewhere")
    expect_refusal(merged, named="not available")
    loratool.base_add("moved", moved)
    assert digest(loratool.unmerge(merged).out) == case.before


def test_the_merged_model_is_never_taken_for_its_own_base(work: Callable[..., Work]) -> None:
    """Not even where the merge changed no bit of it."""
    case = work()
    loratool.merge([(case.adapter, 0.0)], into=case.base, in_place=True, allow_no_op=True)
    shutil.rmtree(case.base / "loratool-undo")
    loratool.base_add("itself", case.base)
    expect_refusal(case.base, named="not available")


def test_an_interrupted_change_of_the_base_is_finished_before_it_is_looked_at(
    work: Callable[..., Work], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = work(layout="sharded")
    merged = case.merge()
    case.merge(in_place=True)

    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(journal, "recover", killed)
        loratool.unmerge(case.base, in_place=True)
    assert (case.base / ".loratool-journal" / "commit.json").exists()
    result = loratool.unmerge(merged)
    assert result.method == "base"
    assert digest(result.out) == case.before
    assert entries(case.base) == sorted(case.before)


def test_a_base_that_another_run_is_changing_is_not_at_hand(work: Callable[..., Work]) -> None:
    case = work()
    merged = case.merge()
    with journal.locked(case.base, exclusive=True):
        expect_refusal(merged, named="not available")
    assert loratool.unmerge(merged).method == "base"


def test_a_base_of_another_sharding_restores_the_tensors(work: Callable[..., Work], tiny_models: TinyModels) -> None:
    case = work(layout="sharded")
    merged = case.merge()
    case.lose_base()
    loratool.base_add("one-file", tiny_models.folder("llama", "bf16", "single"))
    assert digest(loratool.unmerge(merged).out) == case.before


def test_another_model_under_the_bases_path_is_not_taken_for_it(
    work: Callable[..., Work], tiny_models: TinyModels
) -> None:
    case = work()
    merged = case.merge()
    file = case.base / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] += 1
    save_file(tensors, file, {"format": "pt"})
    expect_refusal(merged, named="not available")


def test_a_single_file_model_and_a_bare_adapter_come_out(work: Callable[..., Work]) -> None:
    case = work("gpt2-untied", "bf16")
    bare = case.folder / "bare.st"
    save_file(load_file(case.adapter / "adapter_model.safetensors"), bare)
    file = case.base / "model.safetensors"
    content = file.read_bytes()
    merged = loratool.merge([bare], into=file, out=case.out, undo=True, alpha=13).out
    bare.unlink()
    case.lose_base()
    restored = loratool.unmerge(merged).out
    assert entries(restored) == ["model.safetensors"]
    assert (restored / "model.safetensors").read_bytes() == content


def test_an_adapter_in_one_file_comes_out(work: Callable[..., Work]) -> None:
    case = work("gpt2", "fp16")
    single = save_single_file(case.adapter, case.folder / "one.st")
    loratool.merge([single], into=case.base, in_place=True)
    single.unlink()
    loratool.unmerge(case.base, in_place=True)
    assert digest(case.base) == case.before


@pytest.mark.parametrize("factors", ["bf16", "fp16"])
def test_adapters_of_half_precision_come_out(factors: str, work: Callable[..., Work]) -> None:
    case = work("llama", "bf16", factors=factors)
    merged = case.merge(undo=True)
    case.lose_base()
    assert digest(loratool.unmerge(merged).out) == case.before


EXTREMES = {
    "huge": 3e38,
    "tiny": 1e-40,
    "the smallest": torch.finfo(torch.float32).smallest_normal / 2**22,
    "zero": 0.0,
    "minus zero": -0.0,
    "infinite": float("inf"),
    "not a number": float("nan"),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_extreme_weights_and_updates_come_out(dtype: torch.dtype, scale: float, tmp_path: Path) -> None:
    """Infinities, NaN with their payload, subnormals and overflow in the base are restored as bits."""
    generator = torch.Generator().manual_seed(3)
    bits = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}[dtype]
    limit = torch.iinfo(bits)
    matrix = torch.randint(limit.min, limit.max, (130, 70), generator=generator, dtype=bits).view(dtype)
    matrix[: len(EXTREMES), 0] = torch.tensor(list(EXTREMES.values())).to(dtype)
    base = save_plain_model(tmp_path / "base", {"layers.0.proj.weight": matrix})
    before = digest(base)
    adapter = save_plain_adapter(tmp_path / "adapter", {"layers.0.proj": (130, 70)}, r=5, lora_alpha=5 * scale)
    loratool.merge([adapter], into=base, in_place=True)
    loratool.unmerge(base, in_place=True)
    assert digest(base) == before


def test_an_undo_file_made_with_other_blocks_restores(
    work: Callable[..., Work], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = work("llama-many-blocks", "bf16")
    with monkeypatch.context() as patch:
        patch.setattr(dense, "BLOCK_BYTES", 1 << 18)
        merged = case.merge(undo=True)
    case.lose_base()
    assert digest(loratool.unmerge(merged).out) == case.before


# Without undo and base.


@pytest.mark.parametrize(("architecture", "dtype"), [("llama", "bf16"), ("llama", "fp16"), ("gpt2", "fp32")])
def test_approximate_is_near_and_names_what_is_not_exact(
    architecture: str, dtype: str, work: Callable[..., Work]
) -> None:
    case = work(architecture, dtype)
    original = stored_tensors(case.base)
    merged = case.merge()
    case.lose_base()
    message = expect_refusal(merged, named="bit for bit")
    assert "--approximate" in message
    result = loratool.unmerge(merged, approximate=True)
    restored = stored_tensors(result.out)
    assert result.method == "approximate"
    assert set(result.inexact) == {name for name in original if restored[name].data != original[name].data}
    assert result.fingerprint is None
    epsilon = torch.finfo(as_torch(restored[result.inexact[0]]).dtype).eps
    differing = total = 0
    for name, tensor in restored.items():
        ours, theirs = as_torch(tensor).double(), as_torch(original[name]).double()
        merged_size = (ours - theirs).abs() <= 2 * epsilon * torch.maximum(theirs.abs(), torch.tensor(1.0))
        assert merged_size.all(), f"{name} is off by more than a rounding"
        differing += int((ours != theirs).sum()) if name in result.inexact else 0
        total += ours.numel() if name in result.inexact else 0
    assert differing < total / 2
    others = {name: value for name, value in case.before.items() if not name.endswith(".safetensors")}
    assert {name: digest(result.out)[name] for name in others} == others


def test_approximate_still_prefers_the_exact_ways(work: Callable[..., Work]) -> None:
    case = work()
    merged = case.merge(undo=True)
    assert loratool.unmerge(merged, approximate=True, out=case.folder / "a").method == "undo"
    shutil.rmtree(merged / "loratool-undo")
    assert loratool.unmerge(merged, approximate=True, out=case.folder / "b").method == "base"


def test_approximate_in_place_takes_the_manifest_away(work: Callable[..., Work]) -> None:
    case = work()
    merged = case.merge()
    names = entries(case.base)
    case.lose_base()
    assert loratool.unmerge(merged, in_place=True, approximate=True).method == "approximate"
    assert entries(merged) == names


def test_approximate_without_the_adapter_says_where_it_looked(work: Callable[..., Work]) -> None:
    case = work()
    merged = case.merge()
    case.lose_base()
    case.lose_adapter()
    expect_refusal(merged, NotFoundError, "neither in the catalogue nor at", approximate=True)


def test_another_adapter_at_the_recorded_path_is_not_taken_for_it(
    work: Callable[..., Work], tiny_adapters: TinyAdapters
) -> None:
    case = work()
    merged = case.merge()
    case.lose_base()
    case.lose_adapter()
    shutil.copytree(tiny_adapters.folder("llama", seed=9), case.adapter)
    expect_refusal(merged, NotFoundError, "neither in the catalogue nor at", approximate=True)


# Damage.


def undo_file(merged: Path) -> Path:
    (file,) = merged.glob("loratool-undo/*/undo.st")
    return file


def expect_the_base_or_a_refusal(case: Work, merged: Path, name: str) -> bool:
    """With a damaged undo file alone: right bytes or none. Returns whether it was refused."""
    kept = digest(merged)
    out = case.folder / name
    try:
        result = loratool.unmerge(merged, out=out)
    except RestoreError:
        assert not out.exists()
        assert not list(case.folder.glob(".*"))
        assert digest(merged) == kept
        return True
    assert digest(result.out) == case.before
    shutil.rmtree(out)
    return False


def test_no_flipped_byte_of_the_undo_file_gives_wrong_bytes(work: Callable[..., Work]) -> None:
    case = work("llama", "bf16", target_modules=["q_proj", "v_proj"])
    merged = case.merge(undo=True)
    hidden = case.base.rename(case.folder / "hidden")
    file = undo_file(merged)
    content = file.read_bytes()
    refused = 0
    offsets = [*range(0, 24, 3), *range(24, len(content), max(1, len(content) // 60))]
    for at in offsets:
        file.write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
        refused += expect_the_base_or_a_refusal(case, merged, f"flip-{at}")
    assert refused > len(offsets) / 2
    hidden.rename(case.base)
    result = loratool.unmerge(merged)
    assert digest(result.out) == case.before


def test_no_truncated_undo_file_gives_wrong_bytes(work: Callable[..., Work]) -> None:
    case = work("gpt2", "fp32", target_modules=["c_attn"])
    merged = case.merge(undo=True)
    case.lose_base()
    file = undo_file(merged)
    content = file.read_bytes()
    for length in [0, 1, 8, 100, len(content) // 2, len(content) - 1]:
        file.write_bytes(content[:length])
        assert expect_the_base_or_a_refusal(case, merged, f"cut-{length}")
    file.write_bytes(content + b"\0")
    assert expect_the_base_or_a_refusal(case, merged, "longer")


def test_no_flipped_byte_of_the_kept_adapter_gives_wrong_bytes(work: Callable[..., Work]) -> None:
    case = work("llama", "bf16", target_modules=["q_proj"])
    merged = case.merge(undo=True)
    case.lose_base()
    case.lose_adapter()
    file = undo_file(merged).with_name("adapter-0.st")
    content = file.read_bytes()
    for at in range(3, len(content), len(content) // 30):
        file.write_bytes(content[:at] + bytes([content[at] ^ 0x40]) + content[at + 1 :])
        expect_the_base_or_a_refusal(case, merged, f"flip-{at}")


@pytest.mark.parametrize("what", ["undo.st", "adapter-0.st", "both"])
def test_another_merges_undo_gives_no_wrong_bytes(
    what: str, work: Callable[..., Work], tiny_adapters: TinyAdapters
) -> None:
    case = work()
    merged = case.merge(undo=True)
    for number, other in enumerate([tiny_adapters.folder("llama", seed=2), tiny_adapters.folder("llama", seed=3, r=2),
                                    tiny_adapters.folder("llama", target_modules=["q_proj"])]):  # fmt: skip
        strange = loratool.merge([other], into=case.base, out=case.folder / f"other-{number}", undo=True).out
        for name in ["undo.st", "adapter-0.st"] if what == "both" else [what]:
            shutil.copyfile(undo_file(strange).with_name(name), undo_file(merged).with_name(name))
        hidden = case.base.rename(case.folder / "hidden")
        assert expect_the_base_or_a_refusal(case, merged, f"strange-{number}")
        hidden.rename(case.base)
        result = loratool.unmerge(merged, out=case.folder / f"restored-{number}")
        assert result.method == "base"
        assert any("undo" in note for note in result.notes), "it does not say that the undo file failed"
        assert digest(result.out) == case.before


def test_a_damaged_undo_file_in_place_changes_nothing_without_the_base(work: Callable[..., Work]) -> None:
    case = work("llama", "bf16", "sharded")
    merged = case.merge(in_place=True)
    file = undo_file(merged)
    content = bytearray(file.read_bytes())
    content[-20:] = bytes(20)
    file.write_bytes(content)
    expect_refusal(merged, out=None, in_place=True)


def test_a_damaged_undo_file_in_place_falls_back_to_a_copy_of_the_base(work: Callable[..., Work]) -> None:
    case = work("llama", "bf16", "sharded")
    copy = shutil.copytree(case.base, case.folder / "copy")
    loratool.base_add("copy", copy)
    merged = case.merge(in_place=True)
    undo_file(merged).write_bytes(b"nothing")
    result = loratool.unmerge(merged, in_place=True)
    assert result.method == "base"
    assert digest(merged) == case.before
    assert entries(merged) == entries(copy)


@pytest.mark.parametrize("make", [Path.unlink, lambda path: (path.unlink(), path.mkdir()),
                                  lambda path: (path.unlink(), os.mkfifo(path)),
                                  lambda path: (path.unlink(), path.symlink_to("/dev/zero"))],
                         ids=["missing", "folder", "fifo", "device"])  # fmt: skip
@pytest.mark.parametrize("name", ["undo.st", "adapter-0.st"])
def test_without_a_regular_undo_file_it_is_refused_or_taken_from_the_base(
    name: str, make: Callable[[Path], Any], work: Callable[..., Work]
) -> None:
    case = work()
    merged = case.merge(undo=True)
    make(undo_file(merged).with_name(name))
    hidden = case.base.rename(case.folder / "hidden")
    with pytest.raises(LoratoolError):
        loratool.unmerge(merged, out=case.folder / "restored")
    assert not (case.folder / "restored").exists()
    hidden.rename(case.base)
    result = loratool.unmerge(merged, in_place=True)
    assert result.method == "base"
    assert digest(merged) == case.before


@pytest.mark.parametrize("lost", ["", "*", "*/*"], ids=["folder", "merge's folder", "files"])
def test_in_place_a_lost_undo_folder_leaves_the_base(lost: str, work: Callable[..., Work]) -> None:
    case = work()
    merged = case.merge(undo=True)
    for path in list((merged / "loratool-undo").glob(lost)) if lost else [merged / "loratool-undo"]:
        path.unlink() if path.is_file() else shutil.rmtree(path)
    result = loratool.unmerge(merged, in_place=True)
    assert result.method == "base"
    assert digest(merged) == case.before
    assert entries(merged) == entries(case.base)


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("in_place", [True, False])
def test_a_kept_adapter_with_a_number_that_is_none_leaves_the_base(
    in_place: bool, recorded: bool, work: Callable[..., Work]
) -> None:
    case = work("llama", "bf16", "sharded")
    merged = case.merge(undo=True)
    kept = undo_file(merged).with_name("adapter-0.st")
    content = kept.read_bytes()
    kept.write_bytes(content[:-4] + b"\xff\xff\xff\x7f")
    if not recorded:
        forget_kept_adapters(merged)
    hidden = case.base.rename(case.folder / "hidden")
    with pytest.raises(RestoreError, match="damaged"):
        loratool.unmerge(merged, in_place=in_place)
    hidden.rename(case.base)
    result = loratool.unmerge(merged, in_place=in_place)
    assert result.method == "base"
    assert "adapter" in result.notes[0]
    assert digest(result.out) == case.before


def forget_kept_adapters(merged: Path) -> None:
    file = merged / "loratool.json"
    manifest = json.loads(file.read_text())
    assert len(manifest.pop("undo_adapters")) == 1
    file.write_text(json.dumps(manifest))


def test_a_kept_adapter_with_another_number_is_named(work: Callable[..., Work]) -> None:
    case = work()
    merged = case.merge(undo=True)
    kept = undo_file(merged).with_name("adapter-0.st")
    flip(kept, kept.stat().st_size - 4)
    hidden = case.base.rename(case.folder / "hidden")
    expect_refusal(merged, named=r"adapter-0\.st' is not as the merge wrote it")
    with pytest.raises(RestoreError, match=r"adapter-0\.st"):
        loratool.verify(merged)
    hidden.rename(case.base)
    assert loratool.verify(merged).replayed == "base"
    assert digest(loratool.unmerge(merged).out) == case.before


def test_an_undo_whose_adapters_were_not_recorded_restores(work: Callable[..., Work]) -> None:
    case = work()
    merged = case.merge(undo=True)
    case.lose_base()
    forget_kept_adapters(merged)
    assert digest(loratool.unmerge(merged).out) == case.before


def test_an_undo_folder_that_is_a_link_is_never_removed_through(work: Callable[..., Work]) -> None:
    case = work()
    merged = case.merge(in_place=True)
    elsewhere = (merged / "loratool-undo").rename(case.folder / "elsewhere")
    (merged / "loratool-undo").symlink_to(elsewhere)
    kept = digest(elsewhere)
    try:
        loratool.unmerge(merged, in_place=True)
    except LoratoolError as error:
        assert "loratool-undo" in str(error)
        (merged / "loratool-undo").unlink()
        elsewhere.rename(merged / "loratool-undo")
        loratool.unmerge(merged, in_place=True)
    else:
        assert digest(elsewhere) == kept
    assert digest(merged) == case.before
    assert entries(merged) == sorted(case.before)


def flip(file: Path, at: int) -> None:
    with open(file, "r+b") as stream:
        stream.seek(at)
        (byte,) = stream.read(1)
        stream.seek(at)
        stream.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("undo", [True, False])
@pytest.mark.parametrize("in_place", [True, False])
def test_a_changed_tensor_that_was_changed_again_is_refused(
    undo: bool, in_place: bool, work: Callable[..., Work]
) -> None:
    case = work("llama", "bf16", target_modules=["v_proj"])
    merged = case.merge(undo=undo)
    name = "model.layers.1.self_attn.v_proj.weight"
    tensors = stored_tensors(merged)
    at = (merged / "model.safetensors").read_bytes().index(tensors[name].data)
    flip(merged / "model.safetensors", at + 5)
    options = {"in_place": True, "out": None} if in_place else {}
    message = expect_refusal(merged, VerificationError, name, **options)
    assert "since the merge" in message
    expect_refusal(merged, VerificationError, name, approximate=True, **options)


def test_a_file_that_was_changed_after_the_merge_stays_and_is_named(work: Callable[..., Work]) -> None:
    case = work()
    merged = case.merge(undo=True)
    (merged / "tokenizer_config.json").write_text("mine")
    (merged / "generation_config.json").unlink()
    (merged / "notes.md").write_text("mine too")
    result = loratool.unmerge(merged)
    assert [("tokenizer_config.json" in note, "generation_config.json" in note) for note in result.notes] == [
        (False, True),
        (True, False),
    ]
    restored = digest(result.out)
    assert (result.out / "notes.md").read_text() == "mine too"
    assert restored["model.safetensors"] == case.before["model.safetensors"]


def test_a_manifest_of_the_base_with_any_line_ends_is_restored(work: Callable[..., Work]) -> None:
    """A folder may hold a loratool.json of its own; it comes back byte for byte."""
    for text in [b'{"kind": "lora",\r\n "x": "\xc3\xa9"}\r\n', b"\xef\xbb\xbf{}\r"]:
        case = work()
        (case.base / "loratool.json").write_bytes(text)
        loratool.merge([case.adapter], into=case.base, in_place=True)
        loratool.unmerge(case.base, in_place=True)
        assert (case.base / "loratool.json").read_bytes() == text
        shutil.rmtree(case.base)
        shutil.rmtree(case.adapter)


def test_a_manifest_of_the_base_that_is_no_text_stops_the_merge(work: Callable[..., Work]) -> None:
    case = work()
    (case.base / "loratool.json").write_bytes(b"\xff\xfe\0")
    before = digest(case.folder)
    for options in ({"out": case.out}, {"in_place": True}):
        with pytest.raises(LoratoolError, match=r"loratool\.json"):
            loratool.merge([case.adapter], into=case.base, **options)
        assert digest(case.folder) == before


# Where it goes.


def test_an_output_that_exists_is_refused_and_replaced_with_force_only_if_it_is_ours(work: Callable[..., Work]) -> None:
    case = work()
    merged = case.merge(undo=True)
    other = case.folder / "other"
    other.mkdir()
    (other / "precious").write_text("x")
    expect_refusal(merged, OutputError, "exists", out=other)
    expect_refusal(merged, OutputError, "did not write", out=other, force=True)
    again = case.merge(out=case.folder / "again")
    expect_refusal(merged, OutputError, "exists", out=again)
    assert digest(loratool.unmerge(merged, out=again, force=True).out) == case.before


@pytest.mark.parametrize("where", ["merged", "merged/inside", ".", "merged/../merged"])
@pytest.mark.parametrize("force", [True, False])
def test_an_output_in_or_around_the_merged_model_is_refused(where: str, force: bool, work: Callable[..., Work]) -> None:
    case = work()
    merged = case.merge(undo=True)
    expect_refusal(merged, OutputError, out=case.folder / where, force=force)


def test_in_place_and_an_output_together_are_refused(work: Callable[..., Work]) -> None:
    case = work()
    merged = case.merge(undo=True)
    expect_refusal(merged, LoratoolError, "one of them", in_place=True)


def test_a_model_that_was_not_merged_is_refused(work: Callable[..., Work]) -> None:
    case = work()
    expect_refusal(case.base, NotFoundError, r"loratool\.json")


def test_an_adapters_own_facts_are_no_merge(work: Callable[..., Work]) -> None:
    case = work()
    (case.base / "loratool.json").write_text(json.dumps({"kind": "lora"}))
    expect_refusal(case.base, NotFoundError, "does not describe a merge")


def test_linked_weights_are_not_restored_in_place(work: Callable[..., Work]) -> None:
    case = work(layout="sharded")
    merged = case.merge(undo=True)
    shard = sorted(merged.glob("*.safetensors"))[0]
    os.link(shard, case.folder / "second-name.safetensors")
    expect_refusal(merged, OutputError, "second name", out=None, in_place=True)


# The arithmetic of the undo file.

FACTORS = [(40, 3, 70), (200, 16, 130), (130, 64, 257), (64, 1, 65), (96, 256, 80)]


def factors(rows: int, rank: int, columns: int, spread: float = 6.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors whose elements are of many magnitudes, some of them zero."""
    generator = torch.Generator().manual_seed(rows)

    def one(*shape: int) -> torch.Tensor:
        magnitudes = torch.exp2(torch.randn(shape, generator=generator) * spread)
        return torch.randn(shape, generator=generator) * magnitudes * (torch.rand(shape, generator=generator) > 0.1)

    return one(rows, rank), one(rank, columns)


@pytest.mark.parametrize("shape", FACTORS)
def test_the_fixed_point_product_has_the_same_bits_for_every_cut_and_thread_count(shape: tuple[int, int, int]) -> None:
    left, right = factors(*shape)
    rows = shape[0]
    before = torch.get_num_threads()
    whole = FixedPointProduct(left, right).product(range(rows))
    try:
        for threads, step in [(1, 1), (1, 7), (2, 64), (3, rows), (1, rows - 1)]:
            torch.set_num_threads(threads)
            product = FixedPointProduct(left, right)
            cuts = [product.product(range(start, min(start + step, rows))) for start in range(0, rows, step)]
            assert torch.equal(torch.cat(cuts), whole), f"{threads} threads, {step} rows"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", FACTORS)
def test_the_fixed_point_product_is_near_the_true_one(shape: tuple[int, int, int]) -> None:
    left, right = factors(*shape)
    rank = shape[1]
    product = FixedPointProduct(left, right)
    true = left.double() @ right.double()
    bound = left.double().abs().amax(1, keepdim=True) * right.double().abs().amax(0, keepdim=True)
    assert ((product.product(range(shape[0])) - true).abs() <= bound * rank * 2.0 ** (1 - product.bits)).all()


def by_whole_numbers(left: torch.Tensor, right: torch.Tensor, bits: int) -> npt.NDArray[np.object_]:
    """The product of the factors as integers, as Python counts, which knows no rounding; and its scale, in floats."""

    def whole(matrix: torch.Tensor, axis: int) -> tuple[npt.NDArray[np.object_], npt.NDArray[np.float64]]:
        values = matrix.double().numpy()
        exponents = np.frexp(np.abs(values).max(axis=axis, keepdims=True))[1]
        steps = np.ldexp(1.0, exponents - bits)
        return np.vectorize(lambda x: round(float(x)), otypes=[object])(values / steps), steps

    (a, row_steps), (b, column_steps) = whole(left, 1), whole(right, 0)
    return (a @ b).astype(np.float64) * row_steps * column_steps


@pytest.mark.parametrize("shape", [(12, 3, 9), (9, 16, 8), (6, 100, 7)])
def test_the_fixed_point_product_is_what_whole_numbers_give(shape: tuple[int, int, int]) -> None:
    """An implementation that shares nothing with a BLAS gives the same bits."""
    left, right = factors(*shape)
    product = FixedPointProduct(left, right)
    expected = by_whole_numbers(left, right, product.bits)
    assert np.array_equal(product.product(range(shape[0])).numpy(), expected)


@pytest.mark.parametrize("scale", [2.0**-149, 2.0**-130, 1.0, 2.0**120])
def test_the_fixed_point_product_bears_the_ends_of_the_range(scale: float) -> None:
    left, right = factors(20, 4, 30, spread=0.5)
    left = left / left.abs().max() * scale
    product = FixedPointProduct(left, right).product(range(20))
    assert product.isfinite().all()
    assert (product - left.double() @ right.double()).abs().max() <= right.abs().max().item() * scale * 1e-5


def test_powers_of_two_are_exact() -> None:
    """The product is portable because its steps are; they come from exp2."""
    exponents = torch.arange(-1000, 1000).double()
    assert torch.exp2(exponents).tolist() == [2.0**n for n in range(-1000, 1000)]


@st.composite
def blocks(draw: st.DrawFn) -> tuple[Any, Any, Any, int]:
    """Original and predicted bytes of a block, each element's doubt, and the elements' width."""
    width = draw(st.sampled_from([1, 2, 4]))
    count = draw(st.integers(1, 700))
    random = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    original = random.integers(0, 256, count * width, dtype=np.uint8)
    predicted = original.copy()
    changed = random.random(count) < draw(st.sampled_from([0, 0.001, 0.05, 0.5, 1.0]))
    noise = random.integers(0, 256, count * width, dtype=np.uint8).reshape(count, width)
    predicted.reshape(count, width)[changed] = noise[changed]
    doubt = random.integers(0, draw(st.integers(1, MOST_DOUBT + 1)), count, dtype=np.uint8)
    return original, predicted, doubt, width


@given(blocks(), st.binary(max_size=5))
@settings(max_examples=150, deadline=None)
def test_a_residual_turns_the_prediction_into_the_original(block: tuple[Any, Any, Any, int], after: bytes) -> None:
    original, predicted, doubt, width = block
    packed = residual(original, predicted, doubt, width)
    restored = predicted.copy()
    assert bytes(add_residual(restored, doubt, memoryview(packed + after), width)) == after
    assert restored.tobytes() == original.tobytes()


@given(blocks(), st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=3), st.booleans())
@settings(max_examples=300, deadline=None)
def test_a_damaged_residual_raises_nothing_but_restore_error(
    block: tuple[Any, Any, Any, int], damages: list[tuple[int, int]], cut: bool
) -> None:
    original, predicted, doubt, width = block
    packed = bytearray(residual(original, predicted, doubt, width))
    for at, byte in damages:
        packed[at % len(packed)] = byte
    try:
        add_residual(predicted.copy(), doubt, memoryview(packed[: damages[0][0]] if cut else packed), width)
    except RestoreError as error:
        assert "block of the undo file" in str(error)


@given(blocks(), st.binary(max_size=200))
@settings(max_examples=150, deadline=None)
def test_random_bytes_as_a_residual_raise_nothing_but_restore_error(
    block: tuple[Any, Any, Any, int], packed: bytes
) -> None:
    _, predicted, doubt, width = block
    try:
        add_residual(predicted.copy(), doubt, memoryview(packed), width)
    except RestoreError as error:
        assert "block of the undo file" in str(error)


def test_an_adapter_renamed_after_the_merge_does_not_matter(work: Callable[..., Work]) -> None:
    case = work("llama", "bf16", target_modules=["q_proj"])
    merged = case.merge(undo=True)
    copy_with(case.adapter, case.folder / "renamed")
    case.lose_adapter()
    case.lose_base()
    assert digest(loratool.unmerge(merged).out) == case.before


def test_a_tensor_that_the_merge_left_alone_and_somebody_changed_is_said(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    merged = loratool.merge(
        [tiny_adapters.folder("llama")], into=tiny_models.folder("llama", "bf16"), out=tmp_path / "merged", undo=True
    ).out
    header = read_header(merged / "model.safetensors")
    norm = header.tensors["model.norm.weight"]
    with open(norm.file, "r+b") as stream:
        stream.seek(norm.start)
        stream.write(b"\x11\x22")
    result = loratool.unmerge(merged, out=tmp_path / "back")
    assert (result.fingerprint, result.inexact) == (None, ("model.norm.weight",))
    assert any("model.norm.weight" in note for note in result.notes)
