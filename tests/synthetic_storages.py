"""Coarse storages that nobody has: random levels, scales, tiles and packings, with what numpy says that they stand for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from loratool.checkpoint.dtypes import DTYPES, Dtype
from loratool.checkpoint.header import TensorInfo
from loratool.weights.coarse.block import Coding
from loratool.weights.coarse.levels import Levels
from loratool.weights.coarse.machine import LoadedCoarse
from loratool.weights.coarse.packing import Bytes, Packing
from loratool.weights.coarse.stored import CoarseWeight
from loratool.weights.coarse.tiles import FlatTiles, GridTiles, Scaling, Tiles

Floats = NDArray[np.float64]
Codes = NDArray[np.uint8]


@dataclass(frozen=True)
class Weight:
    """What the machine asks of a stored weight."""

    rows: int
    columns: int
    turned: bool = False
    row_step: int = 1
    name: str = "w"
    tensors: tuple[TensorInfo, ...] = (TensorInfo("w", "U8", (0,), Path("synthetic"), 0, 0),)
    dtype: Dtype = DTYPES["F32"]


@dataclass(frozen=True)
class Mixed:
    """Codes that lie behind a scale, fp16, every `size` of them, as in GGUF."""

    size: int
    per_byte: int = 1
    high_first: bool = False

    def open(self, rows: range, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return parts[0].view(-1, 2 + self.size)[:, 2:].reshape(-1)

    def close(self, rows: range, parts: tuple[torch.Tensor, ...], raw: torch.Tensor) -> None:
        parts[0].view(-1, 2 + self.size)[:, 2:] = raw.view(-1, self.size)


@dataclass(frozen=True)
class Synthetic:
    """A storage with one parameter in it.

    Attributes:
        weight, loaded: as the machine knows it.
        parts: the bytes of all rows, as they are cut.
        row_bytes: how many of them belong to a row; a half where two rows share a byte.
        values: (rows, columns), the level of each element; `scales`, `zeros` and `offsets` likewise.
    """

    weight: Weight
    coding: Coding
    loaded: LoadedCoarse
    content: torch.Tensor
    row_bytes: float
    codes: Codes
    scales: Floats
    zeros: Floats
    offsets: Floats

    def parts(self, rows: range | None = None) -> tuple[torch.Tensor, ...]:
        rows = range(self.weight.rows) if rows is None else rows
        start, stop = int(rows.start * self.row_bytes), math.ceil(rows.stop * self.row_bytes)
        return (self.content[start:stop].clone(),)

    def decoded(self, parts: tuple[torch.Tensor, ...] | None = None, rows: range | None = None) -> torch.Tensor:
        rows = range(self.weight.rows) if rows is None else rows
        out = torch.empty(len(rows), self.weight.columns)
        self.loaded.decode(rows, self.parts(rows) if parts is None else parts, out)
        return out

    def by_numpy(self) -> Floats:
        """The numbers, fp64, but for roundings."""
        values = np.array(self.coding.levels.values)[self.codes]
        return self.scales * self.coding.unit * (values - self.zeros) + self.offsets

    def codes_in(self, parts: tuple[torch.Tensor, ...]) -> Codes:
        """The codes of all rows, as they are cut."""
        raw = self.coding.packing.open(range(self.weight.rows), parts).numpy()
        if self.coding.packing.per_byte == 2:
            halves = [raw >> 4, raw & 15] if self.coding.packing.high_first else [raw & 15, raw >> 4]
            raw = np.stack(halves, 1).ravel()[: self.weight.rows * self.weight.columns]
        return raw.reshape(self.weight.rows, self.weight.columns)

    def step(self) -> float:
        """The root mean square of steps between levels, in numbers."""
        values = np.unique([v for v in self.coding.levels.values if not math.isnan(v)])
        return float(np.sqrt(np.mean(np.diff(values) ** 2)) * np.sqrt(np.mean((self.scales * self.coding.unit) ** 2)))


# Levels


def uneven(count: int, seed: int) -> Levels:
    """Random levels in a random order, some of them twins, some no numbers, some barred."""
    generator = np.random.default_rng(seed)
    values = np.sort(generator.normal(size=count))
    values[count // 3] = values[count // 3 + 1]
    values = generator.permutation(values)
    barred = frozenset(generator.choice(count, 2, replace=False).tolist()) if count > 16 else frozenset[int]()
    if count > 16:
        values[next(code for code in range(count) if code not in barred)] = np.nan
    return Levels(tuple(values.astype(np.float32).tolist()), barred=barred)


def floats(exponent: int, mantissa: int) -> Levels:
    """Small floating-point numbers: a sign, an exponent, a mantissa; the two zeros are twins, the last of each sign no number."""
    values = []
    for code in range(1 << (exponent + mantissa)):
        power, rest = code >> mantissa, code & ((1 << mantissa) - 1)
        lead, at = (0.0, 1) if power == 0 else (1.0, power)
        values.append((lead + rest / (1 << mantissa)) * 2.0 ** (at - (1 << (exponent - 1)) + 1))
    if mantissa > 1:
        values[-1] = math.nan
    return Levels((*values, *(-value for value in values)))


def integers(bits: int, *, signed: bool, barred: frozenset[int] = frozenset()) -> Levels:
    """Whole numbers by their two's complement, or from 0."""
    count = 1 << bits
    return Levels(tuple(float(c - count if signed and c >= count // 2 else c) for c in range(count)), barred=barred)


LEVELS: dict[str, Levels] = {
    "uneven-16": uneven(16, 3),
    "uneven-200": uneven(200, 4),
    "e2m1": floats(2, 1),
    "e4m3": floats(4, 3),
    "int4": integers(4, signed=True),
    "uint4": integers(4, signed=False),
    "int8": integers(8, signed=True, barred=frozenset({128})),
    "uint6": integers(6, signed=False),
}
EVEN = ("int4", "uint4", "int8", "uint6")


# Tiles: of a matrix of rows and columns as it is cut; what each element's tile is by numpy

Numbered = tuple[Tiles, NDArray[np.int64]]
MakeTiles = Callable[[int, int, np.random.Generator], Numbered]


def flat(size: int) -> MakeTiles:
    def make(rows: int, columns: int, generator: np.random.Generator) -> Numbered:
        return FlatTiles(size, columns), (np.arange(rows * columns) // size).reshape(rows, columns)

    return make


def grid(height: int | None, width: int | None) -> MakeTiles:
    """Tiles of so many rows and columns, the last ones ragged; None for all of them."""

    def make(rows: int, columns: int, generator: np.random.Generator) -> Numbered:
        high, wide = height or rows, width or columns
        across = -(-columns // wide)
        numbers = np.arange(rows)[:, None] // high * across + np.arange(columns)[None] // wide
        return GridTiles(high, wide, across), numbers

    return make


def by_index(rows: int, columns: int, generator: np.random.Generator) -> Numbered:
    """Groups of columns by an index, in no order."""
    index = generator.permutation(np.arange(columns) % 5)
    numbers = np.arange(rows)[:, None] * 5 + index[None]
    return GridTiles(1, torch.from_numpy(index), 5), numbers


def by_row_index(rows: int, columns: int, generator: np.random.Generator) -> Numbered:
    """Groups of rows by an index, each column with scales of its own."""
    index = generator.permutation(np.arange(rows) % 4)
    return GridTiles(torch.from_numpy(index), 1, columns), index[:, None] * columns + np.arange(columns)[None]


TILES: dict[str, MakeTiles] = {
    "flat": flat(48),
    "tensor": grid(None, None),
    "rows": grid(1, None),
    "columns": grid(None, 1),
    "groups": grid(1, 16),
    "ragged groups": grid(1, 28),
    "ragged grid": grid(24, 40),
    "index": by_index,
    "row index": by_row_index,
}


def synthetic(levels: str, tiles: str, *, rows: int = 60, columns: int = 96, seed: int = 0, turned: bool = False,
              zeros: bool = False, offsets: bool = False, signed: bool = True, spread: float = 1.0, unit: float = 1.0,
              per_byte: int = 1, high_first: bool = False, dtype: str = "F32",
              product: str | None = None) -> Synthetic:  # fmt: skip
    """A random parameter. Codes are those of a normal distribution, so that few are at the ends."""
    generator, table = np.random.default_rng(seed), LEVELS[levels]
    made, numbers = TILES[tiles](*((columns, rows) if turned else (rows, columns)), generator)
    numbers = numbers.T if turned else numbers  # tiles are those of the parameter
    count = int(numbers.max()) + 1
    each = (0.02 + 0.02 * generator.random(count)).astype(np.float32) * (
        generator.choice([-1, 1], count) if signed else 1
    )
    each = each.astype(np.float32)
    middle = 0.5 * (np.nanmax(table.values) + np.nanmin(table.values))
    zero = np.round(middle + generator.normal(size=count)).astype(np.float32) if zeros else None
    offset = generator.normal(size=count).astype(np.float32) if offsets else None
    codes = random_codes(table, (rows, columns), generator, spread)
    packing: Packing = Bytes(per_byte, high_first)
    content = codes.ravel()
    if per_byte == 2:
        content = np.concatenate([content, content[:1]]) if len(content) % 2 else content
        first, second = content.reshape(-1, 2).T
        content = first * 16 + second if high_first else second * 16 + first
    coding = Coding(table, packing, DTYPES[dtype], unit, None if product is None else DTYPES[product])
    weight = Weight(rows, columns, turned, 1 + columns % 2 if per_byte == 2 else 1, dtype=DTYPES[dtype])
    as_torch = [None if part is None else torch.from_numpy(part) for part in (zero, offset)]
    scaling = Scaling.of(made, torch.from_numpy(each), zeros=as_torch[0], offsets=as_torch[1], unit=unit)
    spread_out = [np.zeros((rows, columns)) if part is None else part[numbers].astype(float) for part in (zero, offset)]
    return Synthetic(weight, coding, LoadedCoarse(weight, coding, scaling, "cpu"), torch.from_numpy(content.copy()),
                     columns / per_byte, codes, each[numbers].astype(float), *spread_out)  # fmt: skip


def random_codes(levels: Levels, shape: tuple[int, int], generator: np.random.Generator, spread: float) -> Codes:
    """Codes of normally distributed numbers, the levels nearest to them."""
    values = np.array(levels.values)
    usable = np.array([c for c in range(len(values)) if c not in levels.barred and not math.isnan(values[c])])
    low, high = values[usable].min(), values[usable].max()
    wanted = (low + high) / 2 + generator.normal(size=shape) * spread * (high - low) / 6
    order = usable[np.argsort(values[usable], kind="stable")]
    middles = (values[order][1:] + values[order][:-1]) / 2
    return order[np.searchsorted(middles, wanted)].astype(np.uint8)


def mixed(levels: str, *, rows: int = 60, size: int = 32, seed: int = 0) -> Synthetic:
    """A parameter whose scales, fp16 of either sign, lie before every `size` codes."""
    generator, table, columns = np.random.default_rng(seed), LEVELS[levels], 3 * size
    each = ((0.02 + 0.02 * generator.random((rows, 3))) * generator.choice([-1, 1], (rows, 3))).astype(np.float16)
    codes = random_codes(table, (rows, columns), generator, 1.0)
    content = np.concatenate([each[..., None].view(np.uint8).reshape(rows, 3, 2), codes.reshape(rows, 3, size)], 2)
    coding, weight = Coding(table, Mixed(size), DTYPES["F32"]), Weight(rows, columns)

    def scaling(rows: range, parts: tuple[torch.Tensor, ...]) -> Scaling:
        scales = parts[0].view(-1, 2 + size)[:, :2].reshape(-1).view(torch.float16).float()
        return Scaling.of(GridTiles(1, size, 3, first_row=rows.start), scales)

    scales = np.repeat(each.astype(float), size, axis=1)
    nothing = np.zeros((rows, columns))
    return Synthetic(weight, coding, LoadedCoarse(weight, coding, scaling, "cpu"), torch.from_numpy(content.ravel().copy()),
                     3 * (2 + size), codes, scales, nothing, nothing)  # fmt: skip


@dataclass(frozen=True)
class Stored(CoarseWeight):
    """A synthetic parameter as a plan holds it."""

    of: Synthetic
    name: str = "w"

    @property
    def rows(self) -> int:
        return self.of.weight.rows

    @property
    def columns(self) -> int:
        return self.of.weight.columns

    @property
    def turned(self) -> bool:
        return self.of.weight.turned

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.columns, self.rows) if self.turned else (self.rows, self.columns)

    @property
    def storage(self) -> str:
        return "synthetic"

    def load(self, device: str) -> LoadedCoarse:
        return self.of.loaded
