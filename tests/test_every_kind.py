"""What holds of every kind of adapter that is computed: laws on its tensors, and one whole command."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from four_bit_models import decoded_by_bitsandbytes
from kinds import CASES, MODULE, OTHER, VECTORS, Case, save_case
from tiny_models import DTYPES, as_torch, assert_same_tensors, save_plain_model, stored_tensors

import loratool
from loratool.errors import LoratoolError
from loratool.formats.adapter import Adapter
from loratool.formats.builders import BUILDERS
from loratool.formats.kinds import KINDS
from loratool.formats.read import read_adapter
from loratool.formats.write import write_peft, write_single_file
from loratool.updates import LoadedUpdate, Measuring, OutputwiseUpdate, RowsUpdate, Update
from loratool.updates.shapes import fits, sized

OUTPUTS, INPUTS = 8, 6
CLOSE = 1e-5


def weight_of(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def weight() -> torch.Tensor:
    return weight_of()


@pytest.fixture
def adapter(case: Case, weight: torch.Tensor, tmp_path: Path) -> Adapter:
    save_case(tmp_path / "adapter", case, {MODULE: weight})
    return read_adapter(tmp_path / "adapter")


def wanted(case: Case, weight: torch.Tensor) -> torch.Tensor:
    """W' of one weight by the oracle, the adapter being that of the first."""
    tensors = case.tensors(weight_of(), torch.Generator().manual_seed(1))
    return case.wanted(weight, tensors)


def only_update(adapter: Adapter, shape: tuple[int, int] = (OUTPUTS, INPUTS)) -> Update:
    return sized(adapter.changes[f"{MODULE}.weight"], shape)


def blocks(rows: int) -> Iterator[range]:
    """A few rows at a time, in whole pairs."""
    return (range(start, min(start + 4, rows)) for start in range(0, rows, 4))


def applied(loaded: LoadedUpdate, weight: torch.Tensor) -> tuple[torch.Tensor, list[bytes]]:
    changed, kept = weight.float().clone(), []
    for rows in blocks(len(changed)) if isinstance(loaded, Measuring) and loaded.measures_whole else ():
        loaded.measure(changed[rows.start : rows.stop], rows, torch.empty_like(changed[rows.start : rows.stop]))
    for rows in blocks(len(changed)):
        block = changed[rows.start : rows.stop].clone()
        kept.append(loaded.apply(block, rows, torch.empty_like(block)))
        changed[rows.start : rows.stop] = block
    return changed, kept


def test_there_is_a_case_of_every_kind_that_is_computed() -> None:
    assert set(CASES) | VECTORS == {name for name, kind in KINDS.items() if kind.why_not is None}


def test_every_kind_that_is_computed_has_a_builder_and_no_other_has_one() -> None:
    assert set(BUILDERS) == {name for name, kind in KINDS.items() if kind.why_not is None}


def test_the_table_for_people_has_a_row_of_every_kind_that_is_computed() -> None:
    page = (Path(__file__).parents[1] / "docs" / "kinds.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == {name for name in KINDS if name in BUILDERS}


def test_it_is_read_as_what_it_is(case: Case, adapter: Adapter) -> None:
    assert adapter.kind == case.name
    assert {f"{MODULE}.weight"} <= set(adapter.changes) <= {f"{MODULE}.weight", f"{MODULE}.bias"}
    assert fits(only_update(adapter).shape, (OUTPUTS, INPUTS))
    assert (adapter.alpha, adapter.modules, adapter.dtype) == (case.alpha, (MODULE,), "F32")


def test_w_becomes_what_the_paper_says_in_any_cut_into_blocks(
    case: Case, adapter: Adapter, weight: torch.Tensor
) -> None:
    loaded = only_update(adapter).load(transposed=False, weight=1.0, device="cpu")
    expected = wanted(case, weight)
    assert torch.allclose(applied(loaded, weight)[0].double(), expected, atol=CLOSE)
    whole = weight.clone()
    loaded.apply(whole, range(OUTPUTS), torch.empty_like(whole))
    assert torch.allclose(whole.double(), expected, atol=CLOSE)
    assert not torch.allclose(whole, weight, atol=0.01)


def test_it_is_taken_out_of_blocks_with_what_it_kept_of_them(adapter: Adapter, weight: torch.Tensor) -> None:
    update = only_update(adapter)
    if update.replaces or isinstance(update, RowsUpdate):
        pytest.skip("an undo file holds what it replaces")
    loaded = update.load(transposed=False, weight=1.0, device="cpu")
    changed, kept = applied(loaded, weight)
    assert all(bool(each) == loaded.keeps and len(each) <= 4 * OUTPUTS for each in kept)
    for rows, each in zip(blocks(OUTPUTS), kept, strict=True):
        block = changed[rows.start : rows.stop]
        loaded.revert(block, rows, torch.empty_like(block), each)
    assert torch.allclose(changed, weight, atol=CLOSE)


def test_it_says_whether_what_it_adds_depends_on_w(case: Case, adapter: Adapter) -> None:
    first, second = weight_of(), weight_of(seed=2)
    added = [wanted(case, each) - each.double() for each in (first, second)]
    assert torch.allclose(*added) != only_update(adapter).needs_weight


def test_a_matrix_that_is_stored_turned_becomes_the_same(case: Case, adapter: Adapter, weight: torch.Tensor) -> None:
    update = only_update(adapter)
    if isinstance(update, OutputwiseUpdate) and update.needs_outputs:
        with pytest.raises(LoratoolError, match=r"as \(in_features, out_features\)"):
            update.load(transposed=True, weight=1.0, device="cpu")
        return
    loaded = update.load(transposed=True, weight=1.0, device="cpu")
    changed, _ = applied(loaded, weight.T.contiguous())
    assert torch.allclose(changed.T.double(), wanted(case, weight), atol=CLOSE)


def test_a_weight_multiplies_what_is_added_where_it_may_have_one(
    case: Case, adapter: Adapter, weight: torch.Tensor, tmp_path: Path
) -> None:
    base, half = tmp_path / "base", [(tmp_path / "adapter", 0.5)]
    save_plain_model(base, {f"{MODULE}.weight": weight})
    if only_update(adapter).needs_weight:
        pytest.skip("its own tests say what a weight multiplies")
    if not only_update(adapter).scalable:
        with pytest.raises(LoratoolError, match="needs a weight of 1"):
            loratool.merge(half, base, out=tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    merged = as_torch(stored_tensors(loratool.merge(half, base, out=tmp_path / "out").out)[f"{MODULE}.weight"])
    expected = weight.double() + 0.5 * (wanted(case, weight) - weight.double())
    assert torch.allclose(merged.double(), expected, atol=CLOSE)


@pytest.mark.parametrize("form", ["folder", "file"])
def test_what_is_written_is_read_as_the_same(form: str, case: Case, adapter: Adapter, tmp_path: Path) -> None:
    out = tmp_path / ("again" if form == "folder" else "again.safetensors")
    (write_peft if form == "folder" else write_single_file)(adapter, out)
    again = read_adapter(out)
    told = ("kind", "ranks", "alpha", "scaling", "modules", "parameter_count")
    assert [getattr(again, name) for name in told] == [getattr(adapter, name) for name in told]
    for name, update in adapter.changes.items():
        assert {letter: (info.dtype, info.shape) for letter, info in update.tensors.items()} == {
            letter: (info.dtype, info.shape) for letter, info in again.changes[name].tensors.items()
        }


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_a_merge_is_the_papers_rounded_once_and_its_undo_gives_the_base_back(
    dtype: str, case: Case, tmp_path: Path
) -> None:
    stored = {f"{module}.weight": weight_of(seed, DTYPES[dtype]) for seed, module in enumerate((MODULE, OTHER, "norm"))}
    adapted = {name.removesuffix(".weight"): each.float() for name, each in stored.items() if name != "norm.weight"}
    base, folder = tmp_path / "base", tmp_path / "adapter"
    save_plain_model(base, stored)
    tensors = save_case(folder, case, adapted)
    merged = loratool.merge(folder, base, out=tmp_path / "merged", undo=True).out
    found = stored_tensors(merged)
    for module, weight in adapted.items():
        ours = as_torch(found[f"{module}.weight"])
        exact = case.wanted(weight, tensors[module])
        step = torch.finfo(DTYPES[dtype]).eps
        assert ours.dtype == DTYPES[dtype]
        assert bool(((ours.double() - exact).abs() <= step / 2 * exact.abs() * (1 + 1e-3) + CLOSE).all())
    assert found["norm.weight"] == stored_tensors(base)["norm.weight"]
    loratool.verify(merged)
    assert_same_tensors(stored_tensors(loratool.unmerge(merged, out=tmp_path / "back").out), stored_tensors(base))


def test_4_bits_carry_the_change_and_give_it_back(case: Case, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    dense = {MODULE: torch.randn(64, 128, generator=generator).bfloat16()}
    folder = save_plain_model(tmp_path / "dense", {f"{MODULE}.weight": dense[MODULE]})
    base = loratool.quantize(folder, out=tmp_path / "base").out
    tensors = save_case(tmp_path / "adapter", case, {MODULE: dense[MODULE].float()})[MODULE]
    update = only_update(read_adapter(tmp_path / "adapter"), (64, 128))
    if update.replaces or isinstance(update, RowsUpdate):
        with pytest.raises(LoratoolError, match="merge into the dense base instead"):
            loratool.merge(tmp_path / "adapter", base, out=tmp_path / "merged")
        return
    merged = loratool.merge(tmp_path / "adapter", base, out=tmp_path / "merged", undo=True).out
    before, after = (decoded_by_bitsandbytes(each)[f"{MODULE}.weight"].double() for each in (base, merged))
    asked, carried = (case.wanted(before, tensors) - before).flatten(), (after - before).flatten()
    assert float(asked @ carried / (asked @ asked)) == pytest.approx(1, abs=0.1)
    assert_same_tensors(stored_tensors(loratool.unmerge(merged, out=tmp_path / "back").out), stored_tensors(base))
