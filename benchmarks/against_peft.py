"""One adapter merged twice, by PEFT and by loratool, and how the bytes of the two models compare.

PEFT saves the adapter and, with `merge_and_unload` and `save_pretrained`, the merged model. In half types loratool must write
either these bytes or those of PEFT's merge over the base in fp32, rounded once. PEFT's bytes depend on torch's number of threads
where matrices are tiny, since a BLAS then sums in another order: those on all threads and those on one are both PEFT's.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import re
import shutil
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

os.environ["LORATOOL_HOME"] = tempfile.mkdtemp(prefix="against-peft-home-")

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import loratool
from loratool.errors import LoratoolError

DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BITS: Final = {4: torch.int32, 2: torch.int16}
SPREAD: Final = 0.05
"""Standard deviation of what is added to each trained number, so that no update is zero."""

STATES: Final = ("EQUAL", "REFUSED", "DIFFERENT", "CRASH", "PEFT WRONG", "NEITHER", "PEFT FAILS")
MEANING: Final = (
    "neither: both refuse to merge it; peft fails: PEFT cannot make it, or cannot merge it where loratool does."
)

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a case ended.

    Attributes:
        state: EQUAL; REFUSED by loratool; DIFFERENT; CRASH of loratool; PEFT WRONG where loratool differs from a known fault of
            PEFT's; NEITHER where both refuse to merge it; PEFT FAILS where PEFT cannot make it, or only loratool merges it.
        detail: why, or in what they differ.
        ulps: the largest distance of two numbers, in units in the last place.
    """

    state: str
    detail: str = ""
    ulps: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.state}{f' ({self.detail})' if self.detail else ''}"


@dataclass(frozen=True, slots=True)
class Fault:
    """A known fault of PEFT's merge.

    Attributes:
        tensors: matches the names of the tensors that it makes wrong.
        reason: what is wrong.
    """

    tensors: re.Pattern[str]
    reason: str


def compare(
    build: Callable[[], nn.Module], config: Callable[[], peft.PeftConfig], dtype: str, fault: Fault | None = None
) -> Outcome:
    """Make a base of `dtype` and a random adapter of this configuration, merge both ways, and compare."""
    shared = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="against-peft-", dir=shared if shared.is_dir() else None))
    try:
        with _quiet():
            return _compare(build, config, dtype, fault, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _compare(build: Callable[[], nn.Module], config: Callable[[], peft.PeftConfig], dtype: str, fault: Fault | None,
             folder: Path) -> Outcome:  # fmt: skip
    try:
        base = build().to(DTYPES[dtype])
        _save(base, folder / "base")
        trained = _saved_adapter(copy.deepcopy(base), config(), folder / "adapter")
        adapter = folder / "adapter"
    except Exception as error:
        return Outcome("PEFT FAILS", f"to make it: {last_line(error)}")
    try:
        loratool.merge([adapter], into=folder / "base", out=folder / "ours")
    except LoratoolError as error:
        return _refused(base, adapter, _one_line(str(error), folder), folder)
    except Exception as error:
        return Outcome("CRASH", last_line(error))
    ours, before = _stored(folder / "ours"), _stored(folder / "base")
    failure, found = "", []
    for name, model, threads in _oracles(base, dtype):
        try:
            with _threads(threads):
                theirs = _merged(model, adapter, folder / name, before)
        except Exception as error:
            failure = failure or f"to merge it, and loratool merges: {last_line(error)}"
            continue
        found.append(_difference(ours, theirs, before, fault))
        if found[-1].state == "EQUAL":
            return found[-1]
    if not found:
        return Outcome("PEFT FAILS", failure)
    closest = min(found, key=lambda each: (STATES.index(each.state), each.ulps))
    if closest.state == "DIFFERENT" and _equals_unsaved(trained, ours, before, folder / "unsaved"):
        return Outcome(
            "PEFT WRONG", "its merge before saving is loratool's: PEFT loads what it saved in part", closest.ulps
        )
    return closest


def _equals_unsaved(trained: peft.PeftModel, ours: Tensors, before: Tensors, folder: Path) -> bool:
    """Return whether loratool's merge is that of PEFT's model as it was before its adapter was saved and loaded."""
    try:
        _save(trained.merge_and_unload(), folder)
    except Exception:
        return False
    return _difference(ours, _in_types_of(before, _stored(folder)), before, None).state == "EQUAL"


def _refused(base: nn.Module, adapter: Path, why: str, folder: Path) -> Outcome:
    try:
        _merged(base, adapter, folder / "theirs", {})
    except Exception as error:
        return Outcome("NEITHER", f"loratool: {why}; PEFT: {last_line(error)}")
    return Outcome("REFUSED", why)


def _oracles(base: nn.Module, dtype: str) -> Iterator[tuple[str, nn.Module, int]]:
    """Yield names, bases and numbers of threads of the merges by PEFT of which one must be loratool's."""
    for threads in dict.fromkeys((torch.get_num_threads(), 1)):
        yield f"theirs-{threads}", copy.deepcopy(base), threads
        if dtype != "fp32":
            yield f"theirs-fp32-{threads}", copy.deepcopy(base).float(), threads


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _save(model: nn.Module, folder: Path) -> None:
    """Save a model as its library does; one without `save_pretrained` as a lone safetensors file."""
    if isinstance(model, transformers.PreTrainedModel):
        model.save_pretrained(folder)
        return
    folder.mkdir()
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def _saved_adapter(model: nn.Module, config: peft.PeftConfig, folder: Path) -> peft.PeftModel:
    """Save a random adapter, and return the model with it as it is before it is saved."""
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, parameter in sorted(wrapped.named_parameters()):
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_((SPREAD * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))
    try:
        wrapped.save_pretrained(folder)
    except NotImplementedError:  # a model that does not tell its embeddings
        wrapped.save_pretrained(folder, save_embedding_layers=False)
    return wrapped


def _merged(model: nn.Module, adapter: Path, folder: Path, before: Tensors) -> dict[str, torch.Tensor]:
    """Merge by PEFT, and return the model's tensors in the types in which the base has them."""
    merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    _save(merged, folder)
    return _in_types_of(before, _stored(folder))


def _in_types_of(before: Tensors, tensors: Tensors) -> dict[str, torch.Tensor]:
    return {name: each.to(before[name].dtype) if name in before else each for name, each in tensors.items()}


def _stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: each for file in sorted(folder.glob("*.safetensors")) for name, each in load_file(file).items()}


def _difference(ours: Tensors, theirs: Tensors, before: Tensors, fault: Fault | None) -> Outcome:
    if missing := sorted(set(theirs) ^ set(ours)):
        if fault and all(fault.tensors.search(name) for name in missing):
            return Outcome("PEFT WRONG", fault.reason)
        return Outcome(
            "DIFFERENT", f"names: {', '.join(missing[:3])}{'' if len(missing) < 4 else f' and {len(missing) - 3} more'}"
        )
    shapes = [name for name in ours if ours[name].shape != theirs[name].shape or ours[name].dtype != theirs[name].dtype]
    if shapes:
        return Outcome(
            "DIFFERENT", f"shape or type of {shapes[0]}: {ours[shapes[0]].shape}, PEFT's {theirs[shapes[0]].shape}"
        )
    unlike = {name: count for name in ours if (count := ulps(ours[name], theirs[name]))}
    if unlike:
        if fault and all(fault.tensors.search(name) for name in unlike):
            return Outcome("PEFT WRONG", fault.reason, max(unlike.values()))
        first = max(unlike, key=lambda name: unlike[name])
        return Outcome(
            "DIFFERENT",
            f"{max(unlike.values())} ulps, {len(unlike)} of {len(ours)} tensors, {first}",
            max(unlike.values()),
        )
    if not any(
        ulps(ours[name], before[name]) for name in ours if name in before and before[name].shape == ours[name].shape
    ):
        return Outcome("DIFFERENT", "both merges changed nothing: the case shows nothing")
    return Outcome("EQUAL")


def ulps(a: torch.Tensor, b: torch.Tensor) -> int:
    """Return the largest number of floats that lie between two numbers at the same place; 0 if all bytes are equal."""
    if (
        torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        if a.dim()
        else torch.equal(a, b)
    ):
        return 0
    if not a.is_floating_point():
        return int((a.long() - b.long()).abs().max())
    kind = BITS[a.element_size()]
    ordered = []
    for each in (a, b):
        whole = each.contiguous().view(kind).long()
        least = torch.iinfo(kind).min
        ordered.append(torch.where(whole < 0, least - whole, whole))
    return max(int((ordered[0] - ordered[1]).abs().max()), 1)


def last_line(error: BaseException) -> str:
    """Return the error's class, its words, and the innermost line of code, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}{place}"


def _one_line(text: str, folder: Path) -> str:
    """Return a message in one line, without the paths of temporary files."""
    return " ".join(text.replace(f"{folder}/", "").replace(str(folder), "").split())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield
