"""A merged or quantized model as it goes to the Hub: its weights, the files that the manifest lists, manifest and card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loratool.checkpoint.fingerprint import fingerprint, tensor_digests
from loratool.checkpoint.model import UNDO_FOLDER, Checkpoint, has_file
from loratool.errors import CheckpointError, VerificationError, quoted
from loratool.hub.card import task_of
from loratool.hub.model_card import Ingredient, ModelCard
from loratool.hub.push import Content, Remote, is_public
from loratool.hub.readme import README, renewed
from loratool.library.merge import hold
from loratool.library.progress import Progress
from loratool.library.resolve import digest_cache, resolve_merged
from loratool.library.upload import Upload, Wishes, hub_base
from loratool.merging.manifest import KINDS, MANIFEST_NAME, Manifest, read_manifest
from registry import Registry


@dataclass(frozen=True, slots=True)
class MergedModel:
    """A model that loratool made, and its manifest; `fingerprint` is that of its content."""

    path: Path
    checkpoint: Checkpoint
    manifest: Manifest


def open_model(name: str, catalogue: Registry, watcher: Progress) -> MergedModel:
    """Find a merged or quantized model, and check that it is what its manifest says.

    Raises:
        NotFoundError: there is no such folder, or loratool did not make it.
        VerificationError: its tensors are not those of the manifest.
    """
    path = resolve_merged(name, catalogue)
    manifest = read_manifest(path, KINDS)
    with hold(path, exclusive=False):
        checkpoint = Checkpoint.open(path)
        watcher.begin("checking the model", checkpoint.nbytes)
        digests = tensor_digests(checkpoint, digest_cache(), progress=watcher.advance)
    if fingerprint(checkpoint.tensors, digests) != manifest.fingerprint:
        raise VerificationError(
            f"{quoted(path)} is not what its manifest says; see 'loratool verify {path}', and push what it should be"
        )
    return MergedModel(path, checkpoint, manifest)


def prepare_model(model: MergedModel, catalogue: Registry, remote: Remote, wishes: Wishes) -> Upload:
    """The files of the model as they are to be on the Hub, with its card.

    The undo file stays here: it holds the adapters themselves. What else lies in the folder without being of the model
    stays here, too.

    Raises:
        LoratoolError: the Hub id of its base is not known, a file is missing, or the README there is broken.
    """
    from huggingface_hub import constants

    manifest = model.manifest
    owners = catalogue.bases.find_by_fingerprint(manifest.base_fingerprint)
    owner = owners[0] if owners else None
    base, notes = hub_base(manifest.base_fingerprint, owner, None, remote, wishes, catalogue)
    config = model.checkpoint.config
    architectures = config.get("architectures")
    architecture = str(architectures[0]) if isinstance(architectures, list) and architectures else None
    card = ModelCard(
        name=remote.repository.rpartition("/")[2],
        repository=remote.repository,
        relation="merge" if manifest.adapters else "quantized",
        base=base,
        base_url=f"{constants.ENDPOINT}/{base}" if base else None,
        base_fingerprint=manifest.base_fingerprint,
        fingerprint=manifest.fingerprint,
        ingredients=[
            Ingredient(a.name, a.kind, a.rank, a.weight, a.sha256, _public_url(a.sha256, catalogue, wishes))
            for a in manifest.adapters
        ],
        storage="NF4" if "quantization_config" in config else None,
        options={key: value for key, value in manifest.options.items() if key == "seed"},
        architecture=architecture,
        task=task_of({}, architecture),
        license=wishes.license,
    )
    text = renewed(remote.readme, card.name, card.front_matter(), card.body())
    contents = [
        *_model_files(model),
        Content(MANIFEST_NAME, manifest.for_others(base or manifest.base_name).to_json().encode()),
        Content(README, text.encode()),
    ]
    return Upload(str(model.path), None, tuple(sorted(contents, key=lambda each: each.path)), (*notes, *_left(model)))


def _model_files(model: MergedModel) -> list[Content]:
    """The weights, and every other file that the manifest lists."""
    checkpoint, folder = model.checkpoint, model.path
    names = {header.file.name for header in checkpoint.headers} | set(model.manifest.files) - {README}
    found = []
    for name in sorted(names):
        file = folder / name
        if ".." in Path(name).parts or Path(name).is_absolute() or not has_file(file):
            raise CheckpointError(
                f"the file {quoted(name)}, which the manifest lists, is not in {quoted(folder)}; merge again"
            )
        if not file.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(
                f"{quoted(file)} is a link that leaves its folder; put the file itself there to push it"
            )
        found.append(Content(name, file))
    return found


def _left(model: MergedModel) -> list[str]:
    """Notes on what lies in the folder and is not pushed."""
    others = [str(name) for name in model.checkpoint.other_files()]
    undo = [name for name in others if name.startswith(f"{UNDO_FOLDER}/")]
    known = {*model.manifest.files, *undo, MANIFEST_NAME, README}
    more = [name for name in others if name not in known]
    notes = []
    if undo:
        notes.append(
            f"the undo file stays here ({UNDO_FOLDER}/): it holds the adapters; whoever has the base can do without it"
        )
    if more:
        notes.append(
            f"{quoted(more[0])} is no part of the model and stays here"
            + (f", as do {len(more) - 1} others" if more[1:] else "")
        )
    return notes


def _public_url(sha256: str, catalogue: Registry, wishes: Wishes) -> str | None:
    """The address of an adapter that the catalogue knows to lie on the Hub, where everybody may see it."""
    from huggingface_hub import constants

    places = [place.repo for record in catalogue.adapters.find_by_sha256(sha256) for place in record.locations]
    named = next((repository for repository in places if repository is not None), None)
    return f"{constants.ENDPOINT}/{named}" if named and wishes.online and is_public(named) else None
