"""Parameters that hold several matrices: fused query, key and value; fused gate and up; a stack of a layer's experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

from loratool.architecture.pattern import NUMBER, PatternError, is_number, parse_components
from loratool.architecture.renaming import Spelling
from loratool.architecture.view import View

MOST_EXPERTS: Final = 1 << 16
"""The most matrices in a stack. A parameter with a larger first dimension is not a stack."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix of a model, and the part of a parameter that holds it. Its `name` does not depend on how it is stored."""

    name: str
    view: View


@dataclass(frozen=True, slots=True)
class Packing:
    """A parameter that holds several matrices, one below the other, or a stack of these.

    Attributes:
        parameter: the last components of its name.
        parts: the last components of each matrix's name, in order. If the first dimension is a stack of experts, they have one
            more ``#`` than `parameter`, the number of the expert.
        sizes: keys of the configuration. The rows of the matrices are in proportion to these numbers; without keys, all
            matrices have the same number of rows.
        interleaved: the programs whose rows alternate between matrices instead.
        transposed: the programs that hold the matrices as (in, out), side by side.
        packed_in: the programs that have the packed parameter. All others have the parts.
        in_features, out_features: keys of the configuration. If one of these numbers and the shape show the orientation, they
            decide, because programs differ under the same name.
    """

    parameter: tuple[str, ...]
    parts: tuple[tuple[str, ...], ...]
    sizes: tuple[str, ...] = ()
    interleaved: frozenset[Spelling] = frozenset()
    transposed: frozenset[Spelling] = frozenset()
    packed_in: frozenset[Spelling] = frozenset(Spelling)
    in_features: str | None = None
    out_features: str | None = None

    @classmethod
    def parse(cls, parameter: str, parts: Sequence[str], sizes: Sequence[str], **rest: Any) -> Packing:
        """Parse an entry of a table. `rest` are the other attributes.

        Raises:
            PatternError: a name cannot be read, or the parts do not match.
        """
        packing = cls(
            parse_components(parameter)[0], tuple(parse_components(part)[0] for part in parts), tuple(sizes), **rest
        )
        more = {part.count(NUMBER) - packing.parameter.count(NUMBER) for part in packing.parts}
        if not packing.parts or len(more) != 1 or not more <= {0, 1}:
            raise PatternError("its parts must all have as many # as the parameter, or one more, that of an expert")
        if packing.sizes and len(packing.sizes) != len(packing.parts):
            raise PatternError("it needs one size for each part")
        if packing.interleaved and packing.sizes:
            raise PatternError("rows that alternate are equally many; leave the sizes out")
        return packing

    @property
    def is_stack(self) -> bool:
        """Whether its first dimension counts experts."""
        return self.parts[0].count(NUMBER) > self.parameter.count(NUMBER)

    def prefix(self, name: Sequence[str]) -> tuple[str, ...] | None:
        """Return the components before `parameter` in a name that ends with it, or None if it ends differently."""
        return _before(name, self.parameter)

    def matrices(self, before: Sequence[str], name: Sequence[str], shape: Sequence[int], config: Mapping[str, Any],
                 spelling: Spelling) -> Iterator[Matrix]:  # fmt: skip
        """Yield every matrix in the parameter `name`, whose prefix is `before`; none if its shape cannot be divided."""
        dimensions = len(shape) - self.is_stack
        if dimensions < 1 or (self.is_stack and shape[0] > MOST_EXPERTS):
            return
        transposed = dimensions == 2 and self._is_transposed(shape, config, spelling)
        cuts = self._outputs(shape[self.is_stack + transposed], config, interleaved=spelling in self.interleaved)
        if cuts is None:
            return
        own = [part for part in name[len(before) :] if is_number(part) or part == NUMBER]
        for expert in range(shape[0]) if self.is_stack else (None,):
            for part, cut in zip(self.parts, cuts, strict=True):
                numbers = iter([*own, *(() if expert is None else (str(expert),))])
                filled = (next(numbers) if each == NUMBER else each for each in part)
                yield Matrix(".".join((*before, *filled)), View(expert, cut, transposed))

    def _is_transposed(self, shape: Sequence[int], config: Mapping[str, Any], spelling: Spelling) -> bool:
        rows, columns = shape[-2:]
        for key, size in ((self.in_features, columns), (self.out_features, rows)):
            width = config.get(key) if key is not None else None
            if rows != columns and width in (rows, columns):
                return bool(size != width)
        return spelling in self.transposed

    def holder(self, matrix: Sequence[str], shape: Sequence[int], config: Mapping[str, Any],
               spelling: Spelling) -> Matrix | None:  # fmt: skip
        """Return the packed parameter that holds a matrix of this name and shape, and the part of it, or None."""
        for index, part in enumerate(self.parts):
            before = _before(matrix, part)
            if before is None or spelling not in self.packed_in:
                continue
            numbers = [each for each in matrix[len(before) :] if is_number(each)]
            expert = int(numbers[-1]) if self.is_stack and numbers else None
            rest = iter(numbers)
            name = (next(rest) if each == NUMBER else each for each in self.parameter)
            shares = self._shares(config)
            rows = shape[0] * sum(shares) // shares[index] if shares and shape else 0
            cuts = self._outputs(rows, config, interleaved=spelling in self.interleaved)
            if cuts is not None and rows:
                view = View(expert, cuts[index], len(shape) == 2 and spelling in self.transposed)
                return Matrix(".".join((*before, *name)), view)
        return None

    def _shares(self, config: Mapping[str, Any]) -> list[int]:
        """Return the numbers that the parts' rows are in proportion to, or an empty list if the configuration lacks one."""
        given = [config.get(key) for key in self.sizes]
        shares = [share for share in given if type(share) is int and share > 0] if given else [1] * len(self.parts)
        return shares if len(shares) == len(self.parts) else []

    def _outputs(self, rows: int, config: Mapping[str, Any], *, interleaved: bool) -> list[slice] | None:
        """Return the slice of each part among `rows` rows, or None if these cannot be divided."""
        count, shares = len(self.parts), self._shares(config)
        if count == 1:
            return [slice(None)]
        if not shares or rows % sum(shares):
            return None
        if interleaved:
            return [slice(start, None, count) for start in range(count)]
        ends = [rows // sum(shares) * end for end in accumulate(shares)]
        return [slice(start, stop) for start, stop in zip([0, *ends], ends, strict=False)]


def _before(name: Sequence[str], ending: Sequence[str]) -> tuple[str, ...] | None:
    start = len(name) - len(ending)
    if start < 0:
        return None
    for part, wanted in zip(name[start:], ending, strict=True):
        if part != wanted and not (wanted == NUMBER and (is_number(part) or part == NUMBER)):
            return None
    return tuple(name[:start])
