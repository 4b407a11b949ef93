"""Updates around other updates: they tell of themselves what the inner one tells, and compute what it computes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from kinds import CASES, MODULE, save_case
from safetensors.torch import save_file
from test_every_kind import CLOSE, INPUTS, OUTPUTS, applied, weight_of

from loratool.architecture import View
from loratool.checkpoint.header import TensorInfo, read_header
from loratool.formats.read import read_adapter
from loratool.updates import OutputwiseUpdate, RowsUpdate, UndividedUpdate, Update
from loratool.updates.based import Based
from loratool.updates.part import SomeOutputs, is_divisible, part_of
from loratool.updates.shapes import sized
from loratool.updates.wrapper import whole_of

Wrap = Callable[[Update, TensorInfo], Update]
WRAPPERS: Mapping[str, Wrap] = {
    "some outputs": lambda update, copy: SomeOutputs(update, slice(2, 5)),
    "interleaved outputs": lambda update, copy: SomeOutputs(update, slice(1, None, 2)),
    "a copy of the base's": lambda update, copy: Based(copy, update),
    "some outputs of a copy of the base's": lambda update, copy: SomeOutputs(Based(copy, update), slice(2, 5)),
}
TRAITS = {"needs_outputs": OutputwiseUpdate, "undivided": UndividedUpdate}
"""Traits that only some updates have, each with the protocol of these."""
EVERY_TRAIT = ("replaces", "scalable", "needs_weight", "kind", "tensors")


@pytest.fixture(params=CASES)
def update(request: pytest.FixtureRequest, tmp_path: Path) -> Update:
    save_case(tmp_path / "adapter", CASES[request.param], {MODULE: weight_of()})
    return read_adapter(tmp_path / "adapter").changes[f"{MODULE}.weight"]


@pytest.fixture
def copy(tmp_path: Path) -> TensorInfo:
    save_file({"copy": weight_of()}, tmp_path / "copy.safetensors")
    return read_header(tmp_path / "copy.safetensors").tensors["copy"]


def trait(update: Update, name: str) -> bool:
    return isinstance(update, TRAITS[name]) and bool(getattr(update, name))


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_an_update_around_another_has_its_traits(wrap: Wrap, update: Update, copy: TensorInfo) -> None:
    around = wrap(update, copy)
    assert whole_of(around) is update
    assert [trait(around, name) for name in TRAITS] == [trait(update, name) for name in TRAITS]
    layers = list(itertools.takewhile(lambda each: each is not update, _inwards(around)))
    for name in EVERY_TRAIT:
        own = any(name in vars(type(each)) for each in layers)
        assert own or getattr(around, name) == getattr(update, name)


def _inwards(update: Update) -> list[Update]:
    found = [update]
    while isinstance(found[-1], Based | SomeOutputs):
        found.append(found[-1].inner)
    return found


@pytest.mark.parametrize("outputs", [slice(2, 5), slice(1, None, 2)], ids=["a run", "interleaved"])
def test_a_part_changes_as_in_the_whole_or_there_is_none(outputs: slice, update: Update) -> None:
    """Of a kind that depends on all outputs, there is no part."""
    if update.replaces or isinstance(update, RowsUpdate):
        pytest.skip("it is whole, or of rows of its own")
    weight = weight_of()
    whole = sized(update, (OUTPUTS, INPUTS)).load(transposed=False, weight=1.0, device="cpu")
    expected = applied(whole, weight)[0][outputs]
    if not is_divisible(update):
        with pytest.raises(AssertionError):
            part_of(update, View(outputs=outputs))
        return
    part = sized(part_of(update, View(outputs=outputs)), tuple(expected.shape))
    found, _ = applied(part.load(transposed=False, weight=1.0, device="cpu"), weight[outputs].contiguous())
    assert torch.allclose(found, expected, atol=CLOSE)
