"""Laws of the machine that coarse storages share, over storages that nobody has."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from synthetic_storages import EVEN, LEVELS, TILES, Floats, Synthetic, mixed, synthetic

from loratool.errors import CheckpointError
from loratool.merging.delivery import DeliveryCount
from loratool.merging.residual import add_residual, residual
from loratool.weights.coarse.feedback import Feedback
from loratool.weights.coarse.output_feedback import OutputFeedback
from loratool.weights.code_moves import Moves
from loratool.weights.rounding import Rounding, noise_of

STORAGES = {
    f"{levels}, {tiles}": {
        "levels": levels,
        "tiles": tiles,
        "zeros": number % 2 == 0,
        "offsets": number % 3 == 0,
        "seed": number,
    }
    for number, (levels, tiles) in enumerate(itertools.product(LEVELS, TILES))
}
TURNED = {name: options | {"turned": True} for name, options in STORAGES.items() if options["tiles"] != "flat"}
NIBBLES = {
    f"nibbles {high_first} {tiles}": {
        "levels": levels,
        "tiles": tiles,
        "per_byte": 2,
        "high_first": high_first,
        "columns": columns,
    }
    for (levels, tiles, columns), high_first in itertools.product(
        [("uneven-16", "flat", 95), ("e2m1", "groups", 96), ("int4", "ragged grid", 77)], [False, True]
    )
}
ALL = STORAGES | {f"turned {name}": options for name, options in TURNED.items()} | NIBBLES
SOME = dict(itertools.islice(ALL.items(), 0, None, 5)) | NIBBLES
FEW = dict(itertools.islice(ALL.items(), 0, None, 11))


def made(name: str, **changes: object) -> Synthetic:
    return synthetic(**(ALL[name] | changes))  # type: ignore[arg-type]


def change_of(storage: Synthetic, strength: float, seed: int = 1, rank: int | None = None) -> torch.Tensor:
    """A random change whose numbers are `strength` steps; of this rank."""
    generator = torch.Generator().manual_seed(seed)
    shape = storage.weight.rows, storage.weight.columns
    if rank is None:
        delta = torch.randn(shape, generator=generator)
    else:
        delta = torch.randn(shape[0], rank, generator=generator) @ torch.randn(rank, shape[1], generator=generator)
        delta /= math.sqrt(rank)
    return delta * strength * storage.step()


def directions(change: torch.Tensor, storage: Synthetic) -> torch.Tensor:
    """What the outputs of a change of rank 4 are combinations of, (outputs, 4)."""
    generator = torch.Generator().manual_seed(3)
    outputs = change.T if storage.weight.turned else change
    return outputs @ torch.randn(outputs.shape[1], 4, generator=generator)


def merged(
    storage: Synthetic, change: torch.Tensor, rounding: Rounding, cut: int | None = None
) -> tuple[torch.Tensor, Moves]:
    """All bytes after a merge in blocks of `cut` rows, and what became of the last block."""
    content, rows = storage.content.clone(), storage.weight.rows
    for start in range(0, rows, cut or rows):
        block = range(start, min(start + (cut or rows), rows))
        part = content[int(block.start * storage.row_bytes) : math.ceil(block.stop * storage.row_bytes)]
        moves = storage.loaded.encode(block, change[start : block.stop].clone(), (part,), rounding)
    return content, moves


# Reading


@pytest.mark.parametrize("name", ALL)
def test_decoding_is_what_numpy_says(name: str) -> None:
    storage = made(name)
    np.testing.assert_allclose(storage.decoded().numpy(), storage.by_numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("product", [None, "BF16", "F16"])
@pytest.mark.parametrize("unit", [1.0, 7.874015718698502e-3])
def test_every_rounding_has_its_place(dtype: str, product: str | None, unit: float) -> None:
    """Level times scale and then times the unit in fp32; the product in its own dtype, plus the offset, in the end another."""
    storage = made("int8, groups", dtype=dtype, product=product, unit=unit, zeros=True, offsets=True)
    values = torch.tensor(storage.coding.levels.values)[torch.from_numpy(storage.codes).int()]
    scales, zeros, offsets = (
        torch.from_numpy(each).float() for each in (storage.scales, storage.zeros, storage.offsets)
    )
    numbers = (values - zeros) * scales
    if unit != 1:
        numbers = numbers * unit
    if product is not None:
        numbers = numbers.to({"BF16": torch.bfloat16, "F16": torch.float16}[product]).float()
    expected = (numbers + offsets).to(storage.weight.dtype.as_torch()).float()
    assert torch.equal(storage.decoded(), expected)


@pytest.mark.parametrize("name", SOME)
def test_decoding_does_not_depend_on_the_cut(name: str) -> None:
    storage = made(name)
    step = storage.weight.row_step * 7
    blocks = [range(start, min(start + step, storage.weight.rows)) for start in range(0, storage.weight.rows, step)]
    assert torch.equal(torch.cat([storage.decoded(rows=rows) for rows in blocks]), storage.decoded())


# Writing


@pytest.mark.parametrize("name", ALL)
def test_what_nothing_is_added_to_keeps_its_codes(name: str) -> None:
    storage = made(name)
    content, moves = merged(storage, torch.zeros(storage.weight.rows, storage.weight.columns), Rounding(1))
    assert torch.equal(content, storage.content)
    assert len(moves.at) == 0


def by_numpy(storage: Synthetic, change: torch.Tensor, noise: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """Where chance leads each number, and where it does so clearly, but for a tie in a thousand."""
    levels = storage.coding.levels
    values = np.unique([v for code, v in enumerate(levels.values) if code not in levels.barred and not math.isnan(v)])
    scale = storage.scales * storage.coding.unit
    wanted = np.array(levels.values)[storage.codes] + change.double().numpy() / scale
    below = np.clip(np.searchsorted(values, wanted, side="right") - 1, 0, len(values) - 2)
    odds = (wanted - values[below]) / (values[below + 1] - values[below])
    there = values[below + (odds > noise)]
    return scale * (there - storage.zeros) + storage.offsets, np.abs(odds - noise) > 1e-3


@pytest.mark.parametrize("strength", [0.05, 0.6, 4.0])
@pytest.mark.parametrize("name", SOME)
def test_every_code_goes_where_its_chance_leads_it(name: str, strength: float) -> None:
    """As numpy says in float64; where a row's longest step is no longer than its change, chance is one half: it is nearest."""
    storage = made(name)
    change, rounding = change_of(storage, strength), Rounding(11)
    content, moves = merged(storage, change, rounding)
    rows, columns = storage.weight.rows, storage.weight.columns
    noise = noise_of(rounding.words_of_rows(range(rows), columns, torch.device("cpu"))).double().numpy()
    nearest = np.frombuffer(moves.hint, np.int32).astype(bool)
    noise = np.where(np.broadcast_to(nearest, rows)[:, None], 0.5, noise)
    expected, clear = by_numpy(storage, change, noise)
    after = storage.decoded((content,)).double().numpy()
    assert clear.mean() > 0.98
    np.testing.assert_allclose(after[clear], expected[clear], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FEW)
def test_the_number_to_expect_is_the_exact_one(name: str) -> None:
    storage = made(name, spread=0.5)
    change, before = change_of(storage, 0.1), storage.decoded().double()
    runs = torch.stack(
        [storage.decoded((merged(storage, change, Rounding(seed))[0],)).double() - before for seed in range(200)]
    )
    values = np.sort(np.unique([v for v in storage.coding.levels.values if not math.isnan(v)]))
    place = np.searchsorted(values, np.array(storage.coding.levels.values)[storage.codes])
    inside = torch.from_numpy((place > 1) & (place < len(values) - 2))
    error = (runs.mean(0) - change.double())[inside] / (runs.std(0)[inside] / math.sqrt(len(runs))).clamp(min=1e-9)
    moved = runs.std(0)[inside] > 0
    assert moved.double().mean() > 0.3
    assert error[moved].mean().abs() < 0.1
    assert error[moved].square().mean() < 1.6


@pytest.mark.parametrize("name", ALL)
def test_most_of_an_update_is_delivered(name: str) -> None:
    """With what is cut at the outermost levels made up for by others, where the update is small."""
    storage = made(name, rows=192, columns=160)
    change, before, shares = change_of(storage, 0.1, rank=4), storage.decoded(), []
    for seed in (5, 6):
        rounding = Rounding(seed, outputs=OutputFeedback(directions(change, storage)))
        content, moves = merged(storage, change, rounding)
        after = storage.decoded((content,))
        shares.append(float((after - before).double().mul(change).sum() / change.double().square().sum()))
        count = DeliveryCount()
        count.add_moves(change, moves)
        assert count.delivery().share == pytest.approx(shares[-1], abs=1e-4)
        assert count.delivery().changed == pytest.approx(float((after != before).double().mean()), abs=1e-6)
    assert np.mean(shares) == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize("strength", [0.05, 0.5, 4.0])
@pytest.mark.parametrize("name", FEW)
def test_bytes_do_not_depend_on_the_cut(name: str, strength: float) -> None:
    """Some rows change by little, which passes errors on, and others by much, which is rounded to nearest."""
    storage = made(name, rows=120)
    change = change_of(storage, strength, rank=4) * torch.linspace(0.1, 3, 120)[:, None]
    outputs = directions(change, storage)
    cuts = [merged(storage, change, Rounding(3, outputs=OutputFeedback(outputs)), cut)[0] for cut in (120, 64, 22, 2)]
    assert not torch.equal(cuts[0], storage.content)
    for content in cuts[1:]:
        assert torch.equal(content, cuts[0])


@pytest.mark.parametrize("name", [name for name in ALL if "uneven" in name or "int8" in name or "e4m3" in name])
def test_barred_codes_never_appear_and_twins_stay_while_their_level_does(name: str) -> None:
    storage = made(name)
    levels, values = storage.coding.levels, np.array(storage.coding.levels.values)
    content, _ = merged(storage, change_of(storage, 3.0), Rounding(2))
    codes = storage.codes_in((content,))
    moved = codes != storage.codes
    assert moved.any()
    assert not np.isin(codes[moved], list(levels.barred)).any()
    assert not np.isnan(values[codes]).any()
    assert (values[codes] != values[storage.codes])[moved].all()


@pytest.mark.parametrize("levels", LEVELS)
def test_scales_among_codes_stay(levels: str) -> None:
    storage = mixed(levels)
    np.testing.assert_allclose(storage.decoded().numpy(), storage.by_numpy(), rtol=1e-5)
    content, _ = merged(storage, change_of(storage, 0.5), Rounding(2), 16)
    before, after = (each.view(-1, 34) for each in (storage.content, content))
    assert torch.equal(before[:, :2], after[:, :2])
    assert not torch.equal(before[:, 2:], after[:, 2:])


def test_a_code_that_is_no_number_is_refused() -> None:
    storage = made("e4m3, rows")
    storage.content[5] = 0x7F
    with pytest.raises(CheckpointError, match="NaN"):
        merged(storage, change_of(storage, 0.1), Rounding(1))


@pytest.mark.parametrize("name", ["int8, rows", "uneven-16, groups", "turned int4, index"])
def test_what_is_cut_is_counted(name: str) -> None:
    storage = made(name)
    change, rounding = change_of(storage, 3.0), Rounding(7)
    _, moves = merged(storage, change, rounding)
    levels = storage.coding.levels
    values = np.unique([v for code, v in enumerate(levels.values) if code not in levels.barred and not math.isnan(v)])
    wanted = np.array(levels.values)[storage.codes] + change.double().numpy() / storage.scales
    beyond = (wanted > values[-1]) | (wanted < values[0])
    assert 0.3 * beyond.sum() < moves.cut <= beyond.sum()


# Undoing


def recovered(
    storage: Synthetic, content: torch.Tensor, change: torch.Tensor, moves: Moves, rounding: Rounding
) -> torch.Tensor:
    parts = (content.clone(),)
    storage.loaded.recover(range(storage.weight.rows), change.clone(), parts, rounding, moves.hint)
    return parts[0]


@pytest.mark.parametrize("strength", [0.02, 0.5, 4.0])
@pytest.mark.parametrize("name", ALL)
def test_undoing_is_exact_with_what_an_undo_file_holds(name: str, strength: float) -> None:
    storage = made(name)
    change = change_of(storage, strength)
    content, moves = merged(storage, change, Rounding(4))
    predicted = recovered(storage, content, change, moves, Rounding(4))
    doubt = np.zeros(len(predicted), np.uint8)
    kept = residual(storage.content.numpy(), predicted.numpy(), doubt, 1)
    assert len(add_residual(predicted.numpy(), doubt, memoryview(kept), 1)) == 0
    assert torch.equal(predicted, storage.content)


@pytest.mark.parametrize("strength", [0.02, 0.5, 4.0])
@pytest.mark.parametrize("name", [name for name in ALL if any(even in name for even in EVEN)])
def test_of_even_steps_the_update_alone_tells_where_codes_came_from(name: str, strength: float) -> None:
    """But for those at the ends, which may have been cut."""
    storage = made(name, spread=0.3)
    change = change_of(storage, strength)
    content, moves = merged(storage, change, Rounding(4))
    predicted = recovered(storage, content, change, moves, Rounding(4))
    ends = np.array(storage.coding.levels.values)[storage.codes_in((content,))]
    inside = (ends > np.nanmin(storage.coding.levels.values) + 1) & (ends < np.nanmax(storage.coding.levels.values))
    wrong = storage.codes_in((predicted,)) != storage.codes
    assert wrong[inside].mean() < 1e-3


@pytest.mark.parametrize("name", [name for name in ALL if any(each in name for each in ("uneven-16", "e2m1", "e4m3"))])
def test_of_uneven_steps_most_codes_are_found(name: str) -> None:
    storage = made(name)
    change = change_of(storage, 0.05)
    content, moves = merged(storage, change, Rounding(4))
    predicted = recovered(storage, content, change, moves, Rounding(4))
    wrong = storage.codes_in((predicted,)) != storage.codes
    assert wrong.mean() < 0.5 * (storage.codes_in((content,)) != storage.codes).mean()


# Errors that are passed on


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("levels", ["int4", "e2m1", "uneven-16"])
def test_noise_in_the_directions_of_the_update_is_made_good(levels: str, turned: bool) -> None:
    storage = synthetic(levels, "groups", turned=turned, spread=0.6, rows=384, columns=512)
    change = change_of(storage, 0.02, rank=4)
    outputs = directions(change, storage)
    noise, moved = [], []
    for feedback in (None, OutputFeedback(outputs)):
        content, moves = merged(storage, change, Rounding(7, outputs=feedback), 128)
        error = storage.decoded((content,)) - storage.decoded() - change
        basis = torch.linalg.qr(outputs)[0]
        there = (error @ basis if turned else basis.T @ error).square().sum()
        noise.append(float(there))
        moved.append(len(moves.at))
    assert noise[1] < 0.5 * noise[0]
    assert moved[1] < 1.15 * moved[0]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("levels", ["int4", "e4m3", "uneven-16"])
def test_a_text_makes_outputs_be_off_by_less(levels: str, turned: bool) -> None:
    storage = synthetic(
        levels, "rows" if levels == "e4m3" else "groups", turned=turned, rows=128, columns=128, spread=0.6
    )
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(128, generator=generator) * 2 + torch.randn(300, 6, generator=generator) @ torch.randn(
        6, 128, generator=generator
    )
    change, off = change_of(storage, 0.2), []
    whole = (lambda columns: Feedback(inputs[:, columns.start : columns.stop])) if turned else Feedback(inputs)
    for feedback in (None, whole):
        content, _ = merged(storage, change, Rounding(7, feedback=feedback))
        error = storage.decoded((content,)) - storage.decoded() - change
        off.append(float(((error.T if turned else error) @ inputs.T).square().sum()))
    assert off[1] < 0.7 * off[0]
