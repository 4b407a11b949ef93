"""Verify a merged or quantized model: compare its bytes with its manifest, and replay the merge or quantization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from loratool.checkpoint.file_role import FileRole, may_be_loaded, role_of
from loratool.checkpoint.file_state import refuse_changed_meanwhile
from loratool.checkpoint.fingerprint import file_digest, fingerprint, tensor_digests
from loratool.checkpoint.model import Checkpoint, can_be_file, has_file
from loratool.errors import LoratoolError, VerificationError, quoted
from loratool.formats.adapter import Adapter
from loratool.merging.arithmetic import Merge, choose_device
from loratool.merging.conversion_plan import StorageChange, plan_conversion
from loratool.merging.conversion_stream import compute_converted
from loratool.merging.manifest import Manifest
from loratool.merging.plan import MergePlan, WeightedAdapter, plan_merge
from loratool.merging.stream import Progress, stream
from loratool.merging.unmerge import Restoration, check_restored
from loratool.merging.untied import untied_as


@dataclass(frozen=True, slots=True)
class Content:
    """The other files in a model's folder: how many are as recorded, and which are not.

    `edited` are harmless files that were changed or removed since; `added` are new files that no program loads.
    """

    files: int
    edited: tuple[str, ...]
    added: tuple[str, ...]


def verify_content(merged: Checkpoint, manifest: Manifest, progress: Progress = lambda count: None) -> Content:
    """Compare every tensor and every other file with its recorded digest.

    Raises:
        VerificationError: a tensor differs, is missing or is extra, or so does a file that affects how the model is loaded or
          what it computes. The message names the first.
    """
    for name in sorted(manifest.tensors.keys() ^ merged.tensors.keys()):
        what = "is missing from" if name in manifest.tensors else "is in no record of"
        raise VerificationError(f"{quoted(name)} {what} {quoted(merged.path)}")
    digests = tensor_digests(merged, progress=progress)
    for name in sorted(digests):
        _compare(name, digests[name], manifest.tensors[name], merged.path)
    if fingerprint(merged.tensors, digests) != manifest.fingerprint:
        raise VerificationError(f"the dtypes or shapes of {quoted(merged.path)} are not those of its manifest")
    edited = []
    for name, recorded in sorted(manifest.files.items()):
        file = merged.folder / name
        parts = Path(name).parts
        is_inside = parts != () and ".." not in parts and not Path(name).is_absolute() and can_be_file(file)
        is_here = is_inside and has_file(file)
        if is_inside and role_of(name).is_editable:
            if not is_here or file_digest(file) != recorded:
                edited.append(name)
            continue
        if not is_here:
            raise VerificationError(f"the file {quoted(name)} is missing from {quoted(merged.path)}")
        _compare(name, file_digest(file), recorded, merged.path)
    return Content(len(manifest.files) - len(edited), tuple(edited), _added_files(merged, manifest))


def _added_files(merged: Checkpoint, manifest: Manifest) -> tuple[str, ...]:
    """Return the files in the folder that the merge did not write."""
    added = []
    for name in merged.other_files():
        if str(name) in manifest.files or role_of(name) is FileRole.OWN:
            continue
        if may_be_loaded(name):
            raise VerificationError(
                f"the file {quoted(name)} is in no record of {quoted(merged.path)}, and programs that load the model may load "
                "it; remove it"
            )
        added.append(str(name))
    return tuple(added)


def replay(
    base: Checkpoint, manifest: Manifest, adapters: list[Adapter], progress: Progress = lambda count: None
) -> str | None:
    """Merge into `base` again and compare every changed tensor, or every tensor after a conversion.

    Returns None if all are identical. Another version of torch may round differently: under one, the name of the first tensor
    that differs is returned instead of an error.

    Raises:
        VerificationError: a tensor differs under the version of torch that merged. The message names the first.
        CheckpointError: a file of the base or of an adapter changed meanwhile.
    """
    weighted = [
        WeightedAdapter(entry.restored(a), entry.weight) for a, entry in zip(adapters, manifest.adapters, strict=True)
    ]
    if manifest.untied:
        base = untied_as(base, manifest.untied.embedding, manifest.untied.head)
    plan = plan_merge(weighted, base, manifest.options.get("seed")) if weighted else None
    digests, expected = _computed_again(base, manifest, plan, progress)
    refuse_changed_meanwhile([*base.states, *(state for adapter in adapters for state in adapter.states)])
    for name in sorted(digests.keys() | expected.keys()):
        found, recorded = digests.get(name, "not merged"), expected.get(name, "not merged")
        merged_in_both = name in digests and name in expected
        if found != recorded and merged_in_both and manifest.versions.get("torch") != version("torch"):
            return name
        _compare(name, found, recorded, base.path)
    return None


def _computed_again(base: Checkpoint, manifest: Manifest, plan: MergePlan | None,
                    progress: Progress) -> tuple[Mapping[str, str], Mapping[str, str]]:  # fmt: skip
    """Return the digests computed now, by name, and those in the manifest."""
    device = manifest.options.get("device", "cpu")
    if manifest.converted:
        conversion = plan_conversion(base, _storage_change(manifest), plan)
        return compute_converted(conversion, device=device, progress=progress).after, manifest.tensors
    digests = stream(
        plan.targets if plan else (),
        lambda target: Merge(target, choose_device(device)),
        {},
        progress=progress,
    )
    after = {name: pair.after for name, pair in digests.items()}
    return after, {name: pair.after for name, pair in manifest.changed.items()}


def _storage_change(manifest: Manifest) -> StorageChange:
    try:
        change = StorageChange.from_options(manifest.options)
    except (KeyError, ValueError, LoratoolError):
        change = None
    if change is None:
        raise VerificationError("the manifest does not record the model's storage; it was changed")
    return change


def replay_undo(manifest: Manifest, way: Restoration, progress: Progress = lambda count: None) -> None:
    """Take the merge out, in memory only, and compare the result with the base's recorded digests.

    Raises:
        RestoreError: a tensor differs. The message names the first.
    """
    digests = stream(way.targets, way.change, {}, progress=progress)
    check_restored(digests, manifest, way)


def _compare(name: str, found: str, recorded: str, where: Path) -> None:
    if found != recorded:
        raise VerificationError(
            f"{quoted(name)} of {quoted(where)} differs from what the manifest says: "
            f"expected {recorded[:12]}…, found {found[:12]}…"
        )
