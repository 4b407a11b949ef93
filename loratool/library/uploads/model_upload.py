"""A merged or quantized model's files for the Hub: its weights, the files that the manifest lists, manifest and card."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loratool.checkpoint.fingerprint import file_digest, fingerprint, tensor_digests
from loratool.checkpoint.model import Checkpoint
from loratool.errors import VerificationError, quoted, to_paste
from loratool.hub.card import task_of
from loratool.hub.model_card import Ingredient, ModelCard
from loratool.hub.push import Content, Remote, is_public
from loratool.hub.readme import README, renewed
from loratool.library.places.holding import hold
from loratool.library.places.home_folder import digest_cache
from loratool.library.reporting.progress import Progress
from loratool.library.resolving.resolve import resolve_merged
from loratool.library.uploads.model_files import choose_files
from loratool.library.uploads.upload import Upload, Wishes, hub_base
from loratool.merging.manifest import KINDS, MANIFEST_NAME, Manifest, read_manifest
from loratool.weights.storages import described
from registry import Registry


@dataclass(frozen=True, slots=True)
class MergedModel:
    """A model that loratool made, with its manifest."""

    path: Path
    checkpoint: Checkpoint
    manifest: Manifest


def open_model(name: str, catalogue: Registry, watcher: Progress) -> MergedModel:
    """Find a merged or quantized model, and check its tensors against its manifest.

    Raises:
        NotFoundError: there is no such folder, or loratool did not make it.
        VerificationError: its tensors differ from those in the manifest.
    """
    path = resolve_merged(name, catalogue)
    manifest = read_manifest(path, KINDS)
    with hold(path, exclusive=False):
        checkpoint = Checkpoint.open(path)
        watcher.begin("checking the model", checkpoint.nbytes)
        digests = tensor_digests(checkpoint, digest_cache(), progress=watcher.advance)
    if fingerprint(checkpoint.tensors, digests) != manifest.fingerprint:
        raise VerificationError(
            f"{quoted(path)} differs from its manifest; see {to_paste('loratool verify PATH', path)}, and push the model "
            "once it is restored"
        )
    return MergedModel(path, checkpoint, manifest)


def prepare_model(model: MergedModel, catalogue: Registry, remote: Remote, wishes: Wishes, *,
                  files: Sequence[str | os.PathLike[str]] = (), all_files: bool = False) -> Upload:  # fmt: skip
    """Choose the model's files for the Hub (`choose_files`), and make its card. The sent manifest records the sent files.

    Raises:
        LoratoolError: the Hub id of its base is unknown, a file is missing, or the README on the Hub is broken.
    """
    from huggingface_hub import constants

    manifest = model.manifest
    owners = catalogue.bases.find_by_fingerprint(manifest.base_fingerprint)
    owner = owners[0] if owners else None
    base, notes = hub_base(manifest.base_fingerprint, owner, None, remote, wishes, catalogue)
    config = model.checkpoint.config
    architectures = config.get("architectures")
    architecture = str(architectures[0]) if isinstance(architectures, list) and architectures else None
    storage, storage_tags = described(config) or (None, ())
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
        storage=storage,
        storage_tags=storage_tags,
        options={key: value for key, value in manifest.options.items() if key == "seed"},
        architecture=architecture,
        task=task_of({}, architecture),
        license=wishes.license,
    )
    text = renewed(remote.readme, card.name, card.front_matter(), card.body())
    chosen = choose_files(model.checkpoint, manifest, files, all_files=all_files)
    weights = {header.file.name for header in model.checkpoint.headers}
    beside = {name: file_digest(model.path / name) for name in chosen.names if name not in weights}
    elsewhere = manifest.for_others(base or manifest.base_name, beside)
    contents = [
        *(Content(name, model.path / name) for name in chosen.names),
        Content(MANIFEST_NAME, elsewhere.to_json().encode()),
        Content(README, text.encode()),
    ]
    return Upload(str(model.path), None, tuple(sorted(contents, key=lambda each: each.path)), (*notes, *chosen.notes))


def _public_url(sha256: str, catalogue: Registry, wishes: Wishes) -> str | None:
    """Return the URL of an adapter that is public on the Hub, as far as the catalogue knows; None if it is not."""
    from huggingface_hub import constants

    places = [place.repo for record in catalogue.adapters.find_by_sha256(sha256) for place in record.locations]
    named = next((repository for repository in places if repository is not None), None)
    return f"{constants.ENDPOINT}/{named}" if named and wishes.online and is_public(named) else None
