"""The 4-bit codec: matrices as bitsandbytes stores them, NF4 (Dettmers et al. 2023, arXiv:2305.14314) and FP4.

A matrix ``X.weight`` of n elements is a tensor of ``ceil(n / 2)`` bytes, two codes each, the first in the upper half.
A code is an index into 16 values from -1 to 1; every `blocksize` elements share a scale, their largest magnitude
(``X.weight.absmax``). With double quantization the scales are themselves bytes: indices into 256 values
(``.nested_quant_map``), times a scale for every `nested_blocksize` of them (``.nested_absmax``), plus one offset for
all. ``X.weight.quant_state.bitsandbytes__nf4`` (or ``__fp4``) is JSON with the sizes and the dtype that the matrix
decodes to. Layout: bitsandbytes, ``QuantState.as_dict(packed=True)``; arithmetic: its ``dequantize_4bit``.

Reading never changes a scale. Writing keeps each block's scale and moves codes alone, so that the rest of the file stays
as it is. A code is never rounded to the nearest: an update is much smaller than the step between two codes, and
nearest would put every code back where it was. It goes to one of its two neighbours by chance, so that the value to
expect is the exact one (stochastic rounding).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from loratool.checkpoint.blocks import read_exactly
from loratool.checkpoint.header import TensorInfo, parse_json_object
from loratool.errors import CheckpointError, RestoreError, quoted
from loratool.weights.short_steps import ShortSteps

if TYPE_CHECKING:
    import torch

    from loratool.weights.rounding import Rounding

STATE: Final = ".quant_state.bitsandbytes__"
KINDS: Final = ("nf4", "fp4")
NF4: Final = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
              -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
              0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)  # fmt: skip
FP4: Final = (0.0, 0.005208333333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25,
              0.0, -0.005208333333, -0.66666667, -1.0, -0.33333333, -0.5, -0.16666667, -0.25)  # fmt: skip
VALUES: Final[Mapping[str, tuple[float, ...]]] = MappingProxyType({"nf4": NF4, "fp4": FP4})
"""The value of each code as bitsandbytes decodes it."""

PLAIN: Final = bytes(4)
"""What `recover` is told where chance alone decided."""

LARGEST_STATE: Final = 1 << 16
DTYPES: Final = ("bfloat16", "float16", "float32")
ALL: Final = slice(None)
Part = tuple[slice, slice]
"""Rows and columns of a block."""

CELLS: Final = 1024
"""Equal cells from -1 to 1 so small that none holds more than one value of NF4 or two of FP4 next to zero."""


@dataclass(frozen=True, slots=True)
class QuantState:
    """What the JSON of a matrix says: its shape, block size and dtype, and those of its scales where they are nested."""

    kind: str
    shape: tuple[int, int]
    blocksize: int
    dtype: str
    nested_blocksize: int | None = None
    nested_offset: float = 0.0


@dataclass(frozen=True, slots=True)
class FourBitWeight:
    """A matrix of shape (rows, columns) in 4 bits; `scales` are its other tensors, by what follows its name."""

    name: str
    state: QuantState
    codes: TensorInfo
    scales: Mapping[str, TensorInfo]

    @property
    def codec(self) -> str:
        return self.state.kind

    @property
    def state_name(self) -> str:
        """The name of the tensor that holds its quant_state."""
        return f"{self.name}{STATE}{self.state.kind}"

    @property
    def shape(self) -> tuple[int, int]:
        return self.state.shape

    @property
    def element_bytes(self) -> int:
        """Two codes share a byte; the byte is what an undo file counts in."""
        return 1

    @property
    def limit(self) -> float:
        """What is beyond a block's scale becomes its largest code."""
        return math.inf

    @property
    def lossy(self) -> bool:
        return True

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        return (self.codes,)

    def extents(self, rows: range) -> tuple[tuple[TensorInfo, int, int], ...]:
        columns = self.shape[1]
        start, stop = rows.start * columns // 2, -(-rows.stop * columns // 2)
        return ((self.codes, self.codes.start + start, self.codes.start + stop),)

    def load(self, device: str) -> LoadedFourBit:
        """Read the scales.

        Raises:
            CheckpointError: a scale is NaN, infinite or negative, or the values of the codes are not those of the kind.
        """
        return LoadedFourBit(self, _read_scales(self).to(device))


class LoadedFourBit:
    """A 4-bit matrix whose scales, fp32, one for each block, are in memory."""

    def __init__(self, weight: FourBitWeight, scales: torch.Tensor) -> None:
        import torch

        self.weight = weight
        self._scales = scales
        device = scales.device
        values = torch.tensor(VALUES[weight.state.kind], device=device)
        high, low = torch.meshgrid(values, values, indexing="ij")
        # Two fp32 numbers, looked up as one integer of 64 bits.
        self._pairs = torch.stack([high, low], -1).view(torch.int64).view(256)
        self._sorted, order = values.sort(stable=True)
        self._place_of = order.argsort().to(torch.int32)
        high, low = torch.meshgrid(self._place_of, self._place_of, indexing="ij")
        self._pair_places = torch.stack([high, low], -1).view(torch.int64).view(256)
        self._code_of = order.to(torch.uint8)
        self._high_code_of = self._code_of << 4
        # Above the last step there is none to go to: no number is at or above infinity.
        self._next = torch.cat([self._sorted[1:15], self._sorted.new_full((1,), math.inf)])
        self._per_step = 1 / (self._sorted[1:] - self._sorted[:-1])
        cells = torch.linspace(-1, 1, CELLS + 1, device=device)[:-1]
        self._below = (torch.searchsorted(self._sorted, cells, right=True) - 1).clamp_(0, 14).to(torch.int32)
        self._short = None
        if weight.state.kind == "nf4":
            self._short = ShortSteps(scales, weight.shape, weight.state.blocksize, self._sorted)

    def decode(self, rows: range, parts: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        """The bits of bitsandbytes' ``dequantize_4bit``: value times scale in fp32, rounded to the state's dtype."""
        import torch

        flat = self._values_of(rows, parts, out)
        self._by_scale(rows, flat, torch.mul)
        dtype = getattr(torch, self.weight.state.dtype)
        if dtype != torch.float32:
            out.copy_(out.to(dtype))

    def encode(self, rows: range, block: torch.Tensor, parts: tuple[torch.Tensor, ...], rounding: Rounding) -> bytes:
        """Move the codes in `parts` to those of `block`, each to one of the two values around its own, by chance.

        What is moved by is the difference to the old decoded value, so a code that nothing was added to stays. In NF4 the
        codes with short steps carry it for the others (`ShortSteps`), and how many of each column do, int32, is what `recover`
        is told. What errors add that were passed on (`Feedback`, `OutputFeedback`) it is not told; that is left to the undo file.
        """
        import torch

        old = torch.empty_like(block)
        self.decode(rows, parts, old)
        shift = (block - old).view(-1)
        self._by_scale(rows, shift, _divide)
        places = self._places(parts, len(shift))
        noise = rounding.noise(rows, len(shift), shift.device)
        concentrated, told = shift, PLAIN
        if self._short is not None:
            chosen = self._short.chosen(rows, places, shift)
            counts = self._short.counts(rows, chosen)
            concentrated = self._short.concentrated(rows, shift, chosen, counts)
            told = counts.cpu().numpy().tobytes()
        if rounding.feedback is None and rounding.outputs is None:
            self._put(parts, self._moved(places, concentrated, noise))
            return told
        scale = torch.ones_like(old)
        self._by_scale(rows, scale.view(-1), _multiply)
        per_scale = torch.where(scale == 0, 0.0, 1 / scale)  # where all is zero no code moves
        change, carried = (flat.view(old.shape) * scale for flat in (shift, concentrated))

        def move(part: Part, change: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            """Where the codes of a part of the block go when `change` is added, and the numbers that they stand for there."""
            steps = change * per_scale[part]
            here, chance = (flat.view(old.shape)[part].reshape(-1) for flat in (places, noise))
            there = self._moved(here, steps.reshape(-1), chance)
            return there.view(steps.shape), self._sorted.index_select(0, there).view(steps.shape) * scale[part]

        if rounding.feedback is not None:
            moved, short = rounding.feedback.best(old, change, carried, lambda part, added: move((ALL, part), added))
        else:
            assert rounding.outputs is not None
            moved = rounding.outputs.carry(rows, old, change, carried, lambda part, added: move((part, ALL), added))
            short = True
        self._put(parts, moved.view(-1))
        return told if short else PLAIN

    def recover(
        self,
        rows: range,
        parts: tuple[torch.Tensor, ...],
        block: torch.Tensor,
        subtract: Callable[[torch.Tensor], None],
        rounding: Rounding,
        told: bytes | None,
    ) -> None:
        """Take back what `encode` did.

        Chance is known, so a code came from where the same chance leads to it: from itself, or from the one that lies
        against what was added. About one in a hundred could have come from both, or was moved further.
        """
        import torch

        subtract(block.zero_())
        shift = block.neg_().view(-1)
        self._by_scale(rows, shift, _divide)
        noise = rounding.noise(rows, len(shift), shift.device)
        stayed = self._places(parts, len(shift))
        came = (stayed - torch.sign(shift).to(torch.int32)).clamp_(0, 15)
        from_there, from_itself = shift, shift
        if self._short is not None and told != PLAIN:
            chosen = self._short.chosen(rows, stayed, shift)
            counts = self._counts(told, rows, chosen)
            from_itself = self._short.concentrated(rows, shift, chosen, counts)
            from_there = self._short.concentrated(rows, shift, self._short.chosen(rows, came, shift), counts)
        only = (self._moved(came, from_there, noise) == stayed) & (self._moved(stayed, from_itself, noise) != stayed)
        self._put(parts, torch.where(only, came, stayed))

    def _counts(self, told: bytes | None, rows: range, chosen: torch.Tensor) -> torch.Tensor:
        """What `encode` told; without it, what can be seen of it now."""
        import torch

        assert self._short is not None
        if told is None:
            return self._short.counts(rows, chosen)
        if len(told) != 4 * self.weight.shape[1]:
            raise RestoreError("a block of the undo file is damaged")
        return torch.frombuffer(bytearray(told), dtype=torch.int32).to(chosen.device)

    def doubt(self, stored: tuple[torch.Tensor, ...], predicted: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        import torch

        return tuple(torch.zeros_like(part) for part in stored)

    def _places(self, parts: tuple[torch.Tensor, ...], count: int) -> torch.Tensor:
        """The place of each code's value in the order of size: int32, 0 to 15."""
        import torch

        (raw,) = parts
        return self._pair_places.index_select(0, raw.int()).view(torch.int32)[:count]

    def _put(self, parts: tuple[torch.Tensor, ...], places: torch.Tensor) -> None:
        """Put the codes of `places` into `parts`."""
        import torch

        if len(places) % 2:
            places = torch.cat([places, self._place_of[:1]])
        torch.add(
            self._high_code_of.index_select(0, places[::2]),
            self._code_of.index_select(0, places[1::2]),
            out=parts[0],
        )

    def _moved(self, places: torch.Tensor, shift: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Where the values at `places` go when `shift`, in units of the scale, is added.

        To the value above with the odds of its nearness, else to the one below; `noise` decides.
        """
        some = _true(shift != 0)  # of an update that few codes carry, the others need no work
        here, added = places.index_select(0, some), shift.index_select(0, some)
        wanted = self._sorted.index_select(0, here).add_(added)
        below = self._at_or_below(wanted)
        odds = wanted.sub_(self._sorted.index_select(0, below)).mul_(self._per_step.index_select(0, below))
        return places.index_copy(0, some, below.add_(odds > noise.index_select(0, some)))

    def _at_or_below(self, wanted: torch.Tensor) -> torch.Tensor:
        """The place of the largest value that is not above each number, 14 at most."""
        cell = (wanted + 1).mul_(CELLS // 2).clamp_(0, CELLS - 1).int()
        below = self._below.index_select(0, cell)
        for _ in range(2 if self.weight.state.kind == "fp4" else 1):
            below += wanted >= self._next.index_select(0, below)
        return below

    def _values_of(self, rows: range, parts: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
        """Put the value of each code into `out`; returns it flat."""
        import torch

        (raw,) = parts
        flat = out.view(-1)
        if rows.start * out.shape[1] % 2:
            raise CheckpointError(f"{quoted(self.weight.name)} was cut inside a byte; the undo file is damaged")
        pairs = self._pairs.index_select(0, raw.int())
        flat.copy_(pairs.view(torch.float32)[: len(flat)])
        return flat

    def _by_scale(self, rows: range, flat: torch.Tensor, operation: Callable[..., Any]) -> None:
        """Multiply or divide the elements, in place, by the scales of their blocks."""
        size, start = self.weight.state.blocksize, rows.start * self.weight.shape[1]
        first, offset = divmod(start, size)
        scales = self._scales[first : -(-(start + len(flat)) // size)]
        if offset == 0 and len(flat) % size == 0:
            blocks = flat.view(-1, size)
            operation(blocks, scales[:, None], out=blocks)
        else:
            operation(flat, scales.repeat_interleave(size)[offset : offset + len(flat)], out=flat)


def _true(mask: torch.Tensor) -> torch.Tensor:
    """Where a flat `mask` is true: int64. On a CPU numpy tells it several times as quickly as torch."""
    import numpy as np
    import torch

    return torch.from_numpy(np.flatnonzero(mask.numpy())) if mask.device.type == "cpu" else mask.nonzero().squeeze(1)


def _multiply(numbers: torch.Tensor, scales: torch.Tensor, *, out: torch.Tensor) -> None:
    import torch

    torch.mul(numbers, scales, out=out)


def _divide(numbers: torch.Tensor, scales: torch.Tensor, *, out: torch.Tensor) -> None:
    """`numbers` by `scales`; by 1 where a block is all zeros, whose scale is zero."""
    import torch

    torch.div(numbers, torch.where(scales == 0, 1.0, scales), out=out)


def claim(tensors: Mapping[str, TensorInfo], name: str) -> FourBitWeight | None:
    """The 4-bit matrix called `name`, or None where there is none; its quant_state is read, its numbers are not.

    Raises:
        CheckpointError: the tensors of a 4-bit matrix are missing, damaged, or contradict one another.
    """
    kinds = [kind for kind in KINDS if name + STATE + kind in tensors]
    if name not in tensors or not kinds:
        return None
    info = tensors[name + STATE + kinds[0]]
    try:
        state = parse_state(json_of(info), kinds[0])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{quoted(info.name)} in {quoted(info.file)} is damaged; download the model again"
        ) from None
    scales = {part: tensors[f"{name}.{part}"] for part in _PARTS if f"{name}.{part}" in tensors}
    weight = FourBitWeight(name, state, tensors[name], scales)
    _check_sizes(weight)
    return weight


_PARTS: Final = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def names(tensors: Iterable[str]) -> tuple[str, ...]:
    """The names of the matrices that the names of `tensors` say are stored in 4 bits, sorted.

    A part that is all that is left of one counts: `claim` then says what is missing, or finds nothing.
    """
    ends = (*(STATE + kind for kind in KINDS), *(f".{part}" for part in _PARTS))
    found = {name.removesuffix(end) for name in tensors for end in ends if name.endswith(end)}
    return tuple(sorted(found))


def json_of(info: TensorInfo) -> dict[str, Any]:
    """The JSON object whose text is the bytes of a tensor; CheckpointError where it is none."""
    if info.dtype != "U8" or info.nbytes > LARGEST_STATE:
        raise CheckpointError(f"{quoted(info.name)} in {quoted(info.file)} is no quant_state; download the model again")
    try:
        return parse_json_object(_read(info), info.file)
    except CheckpointError:
        raise CheckpointError(
            f"{quoted(info.name)} in {quoted(info.file)} is not valid JSON; download the model again"
        ) from None


def parse_state(value: Mapping[str, Any], kind: str) -> QuantState:
    """What the JSON of a quant_state says; KeyError, TypeError or ValueError where it does not say it."""

    def whole(key: str) -> int:
        if type(value[key]) is not int or not 0 < value[key] <= 1 << 20:
            raise ValueError(key)
        return int(value[key])

    rows, columns = value["shape"]
    if not all(type(side) is int and 0 < side < 1 << 40 for side in (rows, columns)):
        raise ValueError("shape")
    if value["dtype"] not in DTYPES or value["quant_type"] != kind:
        raise ValueError("dtype")
    if "nested_blocksize" not in value:
        return QuantState(kind, (rows, columns), whole("blocksize"), value["dtype"])
    offset = value["nested_offset"]
    if type(offset) not in (int, float) or not math.isfinite(offset):
        raise ValueError("nested_offset")
    return QuantState(
        kind, (rows, columns), whole("blocksize"), value["dtype"], whole("nested_blocksize"), float(offset)
    )


def _check_sizes(weight: FourBitWeight) -> None:
    """Raise CheckpointError unless every tensor that the matrix needs is there, with the dtype and size that it must have."""
    state, nested = weight.state, weight.state.nested_blocksize is not None
    count = state.shape[0] * state.shape[1]
    blocks = -(-count // state.blocksize)
    expected: dict[str, tuple[str, int]] = {"absmax": ("U8", blocks) if nested else ("F32", 4 * blocks)}
    if nested:
        assert state.nested_blocksize is not None
        expected["nested_absmax"] = ("F32", 4 * -(-blocks // state.nested_blocksize))
        expected["nested_quant_map"] = ("F32", 4 * 256)
    for part, (dtype, nbytes) in expected.items():
        info = weight.scales.get(part)
        if info is None:
            raise CheckpointError(
                f"{quoted(weight.name)} in {quoted(weight.codes.file)} is stored in 4 bits, but its {quoted(part)} is "
                "missing; download the model again"
            )
        _check_size(info, dtype, nbytes)
    _check_size(weight.codes, weight.codes.dtype, -(-count // 2))
    if "quant_map" in weight.scales:
        _check_size(weight.scales["quant_map"], "F32", 4 * 16)


def _check_size(info: TensorInfo, dtype: str, nbytes: int) -> None:
    if (info.dtype, info.nbytes) != (dtype, nbytes):
        raise CheckpointError(
            f"{quoted(info.name)} in {quoted(info.file)} is {info.dtype} of {info.nbytes} bytes, and its quant_state asks "
            f"for {dtype} of {nbytes}; download the model again"
        )


def _read_scales(weight: FourBitWeight) -> torch.Tensor:
    """The scale of every block, fp32, as bitsandbytes computes it."""
    import torch

    if "quant_map" in weight.scales:
        values = _floats(weight.scales["quant_map"])
        if not torch.equal(values, torch.tensor(VALUES[weight.state.kind])):
            raise CheckpointError(
                f"{quoted(weight.name)}.quant_map in {quoted(weight.codes.file)} does not hold the values of "
                f"{weight.state.kind}; such models are not supported"
            )
    if weight.state.nested_blocksize is None:
        scales = _floats(weight.scales["absmax"])
    else:
        indices = torch.frombuffer(bytearray(_read(weight.scales["absmax"])), dtype=torch.uint8)
        values, outer = (_floats(weight.scales[part]) for part in ("nested_quant_map", "nested_absmax"))
        scales = nested_scales(indices, values, outer, weight.state)
    if not torch.isfinite(scales).all():
        raise CheckpointError(
            f"the scales of {quoted(weight.name)} in {quoted(weight.codes.file)} hold NaN or infinity; "
            "download the model again"
        )
    return scales


def nested_scales(indices: torch.Tensor, values: torch.Tensor, outer: torch.Tensor, state: QuantState) -> torch.Tensor:
    """Scales that are quantized themselves, fp32: of the 256 `values` those at `indices`, times `outer`, plus the offset."""
    assert state.nested_blocksize is not None
    scales = values[indices.int()]
    return scales.mul_(outer.repeat_interleave(state.nested_blocksize)[: len(scales)]).add_(state.nested_offset)


def _floats(info: TensorInfo) -> torch.Tensor:
    import torch

    return torch.frombuffer(bytearray(_read(info)), dtype=torch.float32)


def _read(info: TensorInfo) -> bytes:
    """The bytes of a small tensor."""
    buffer = bytearray(info.nbytes)
    try:
        fd = os.open(info.file, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"cannot read {quoted(info.file)}: {error.strerror}") from None
    try:
        read_exactly(fd, memoryview(buffer), info.start)
    finally:
        os.close(fd)
    return bytes(buffer)
