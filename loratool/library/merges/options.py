"""Options of a merge besides its adapters and its base. Options that contradict each other are refused."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from loratool.errors import LoratoolError, quoted
from loratool.library.merges.calibration import calibration_text
from loratool.library.merges.tokenizer_choice import TokenizerOf
from loratool.library.resolving.adapter_spec import PathLike
from loratool.merging.conversion_plan import StorageChange
from loratool.weights.storages import MAKINGS

if TYPE_CHECKING:
    from loratool.running.data import Data


@dataclass(frozen=True, slots=True)
class Allowed:
    """Checks that the user chose to override.

    Attributes:
        force: replace an earlier output.
        any_base: ignore the base's fingerprint.
        again: merge an adapter that is in the base already.
        no_op: merge an adapter, or make a merge, that changes nothing.
        without_extras: leave out weights beside an adapter.
    """

    force: bool
    any_base: bool
    again: bool
    no_op: bool
    without_extras: bool


@dataclass(frozen=True, slots=True)
class Storage:
    """Requested storage of the merged model, if it differs from the base's; at most one of the three.

    Attributes:
        quantize: storage to which a dense base is quantized after the merge.
        base_as: storage to which a dense base is quantized before the merge.
        dequantize: whether a quantized base becomes dense.
    """

    quantize: str | None
    base_as: str | None
    dequantize: bool

    def change(self) -> StorageChange | None:
        """Return the change of storage, or None for the base's own storage.

        Raises:
            LoratoolError: loratool cannot quantize to the storage, or several options are given.
        """
        for option, value in (("--quantize", self.quantize), ("--base-as", self.base_as)):
            if value not in (None, *MAKINGS):
                names = " or ".join(MAKINGS)
                raise LoratoolError(
                    f"{option} is {quoted(value)}, but loratool quantizes only to {names}; give {option} {names}"
                )
        if sum((self.quantize is not None, self.base_as is not None, self.dequantize)) > 1:
            raise LoratoolError("--quantize, --base-as and --dequantize contradict each other; give one of them")
        if self.quantize:
            return StorageChange("quantize", MAKINGS[self.quantize]({}))
        if self.base_as:
            return StorageChange("base_as", MAKINGS[self.base_as]({}))
        return StorageChange("dequantize") if self.dequantize else None


@dataclass(frozen=True, slots=True)
class Writing:
    """How the merged model is written.

    Attributes:
        in_place: change the base's own files.
        undo: keep an undo file.
        untie: give the output head its own tensor.
        dry_run: plan and check only.
    """

    in_place: bool
    undo: bool
    untie: bool
    dry_run: bool


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """The options of one merge, checked to fit together.

    Attributes:
        change: the change of storage; None for the base's own storage.
        text: the text to calibrate on, if any.
        allowed: checks that the user chose to override.
        writing: how the merged model is written; with a calibration text an undo file is always kept.
        tokenizer: whose tokenizer the model gets; None for the default rule.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    """

    change: StorageChange | None
    text: Data | None
    allowed: Allowed
    writing: Writing
    tokenizer: TokenizerOf | None
    device: str

    @classmethod
    def of(cls, storage: Storage, calibrate: PathLike | None, allowed: Allowed, writing: Writing, *,
           tokenizer: TokenizerOf | None, device: str) -> Self:  # fmt: skip
        """Check that the options fit together, and read the calibration text.

        Raises:
            LoratoolError: two of them contradict each other.
            DataError, NotFoundError: the calibration file cannot be read.
        """
        change = storage.change()
        _refuse_beside_change(change, writing)
        _refuse_untying(writing, change, calibrated=calibrate is not None)
        text = calibration_text(calibrate, is_converted=change is not None)
        return cls(change, text, allowed, replace(writing, undo=writing.undo or text is not None), tokenizer, device)

    @property
    def changes_base(self) -> bool:
        """Whether the merge changes the base's own files."""
        return self.writing.in_place and not self.writing.dry_run


def _refuse_beside_change(change: StorageChange | None, writing: Writing) -> None:
    """Raise LoratoolError for options that need the base's bytes in the output, which another storage does not keep."""
    option = "--in-place" if writing.in_place else "--undo" if writing.undo else None
    if change is None or option is None:
        return
    raise LoratoolError(
        f"a model that is stored differently than its base cannot be made with {option}: the base's own bytes are not in "
        f"it; leave {option} out, and keep the base to unmerge from"
    )


def _refuse_untying(writing: Writing, change: StorageChange | None, *, calibrated: bool) -> None:
    """Raise LoratoolError for options that cannot be combined with untying."""
    option = "--in-place" if writing.in_place else "--calibrate" if calibrated else None
    if writing.untie and (option or change is not None):
        raise LoratoolError(
            "--untie writes a model with one more tensor, in the base's own storage, to a new folder; leave "
            f"{option or '--quantize, --base-as and --dequantize'} out, or merge twice"
        )
