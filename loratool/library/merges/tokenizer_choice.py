"""Choice of a merged model's tokenizer and chat template: the base's, or those that an adapter was trained with.

The adapter's are chosen if it trained token embeddings, or if they differ from the base's. A vocabulary is taken whole: its
files replace all of the base's, since parts of two vocabularies do not fit together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Final, Literal

from loratool.architecture import Role, architecture_of
from loratool.checkpoint.model import Checkpoint
from loratool.errors import AdapterError, quoted
from loratool.formats.adapter_folder import folder_of
from loratool.formats.tokenizer import TEMPLATE_NAME, TokenizerFiles, damaged
from loratool.library.resolving.resolve import ResolvedAdapter
from loratool.merging.changed_files import FileChanges
from loratool.merging.plan import MergePlan

TokenizerOf = Literal["base", "adapter"]
TOKENIZERS_OF: Final[tuple[TokenizerOf, ...]] = ("base", "adapter")


@dataclass(frozen=True, slots=True)
class TokenizerChoice:
    """The choice of a merged model's tokenizer.

    Attributes:
        files: the files that are written or removed.
        source: the adapter's reference; None for the base's tokenizer.
        differences: descriptions of how the adapter's differs from the base's.
        notes: notes for the user.
    """

    files: FileChanges = field(default_factory=FileChanges)
    source: str | None = None
    differences: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the choice for ``--json``."""
        return {
            "from": "base" if self.source is None else self.source,
            "files": sorted(self.files.written),
            "left_out": sorted(self.files.removed),
            "differences": list(self.differences),
        }


def choose_tokenizer(
    adapters: Sequence[ResolvedAdapter], plan: MergePlan, wanted: TokenizerOf | None
) -> TokenizerChoice:
    """Choose the tokenizer of the merged model. If given, `wanted` decides.

    Raises:
        AdapterError: adapters have different tokenizers and `wanted` is None; an adapter's tokenizer cannot be read, or has
            tokens beyond the model's embeddings; or no adapter has the wanted tokenizer.
    """
    own = TokenizerFiles.of(plan.base.folder) if plan.base.path.is_dir() else TokenizerFiles(plan.base.folder, ())
    brought = [
        (found, TokenizerFiles.of(folder)) for found in adapters if (folder := folder_of(found.adapter)) is not None
    ]
    brought = [(found, files) for found, files in brought if files.names]
    if wanted == "base" or not brought:
        if wanted == "adapter":
            raise AdapterError("no adapter has a tokenizer of its own; leave --tokenizer adapter out")
        return TokenizerChoice()
    for found, files in brought:
        problem = damaged(files)
        if problem is not None:
            raise AdapterError(
                f"the tokenizer of {quoted(found.adapter.name)} cannot be read ({problem}); give --tokenizer base to leave it out"
            )
    if damaged(own) is not None:
        own = TokenizerFiles(own.folder, ())
    if wanted is None:
        _refuse_different(brought)
    found, files = brought[0]
    differences = tuple(files.differences(own))
    if wanted is None and not differences and not (files.is_whole and _trains_embeddings(plan)):
        return TokenizerChoice()
    return _taken(found, files, own, plan, differences)


def _taken(found: ResolvedAdapter, files: TokenizerFiles, own: TokenizerFiles, plan: MergePlan,
           differences: tuple[str, ...]) -> TokenizerChoice:  # fmt: skip
    name = found.adapter.name
    how = f" ({', '.join(differences)})" if differences else ""
    if files.is_whole:
        _refuse_too_many(name, files, plan.base)
        written = {each: files.folder / each for each in files.names}
        changes = FileChanges(written, dict.fromkeys(written, name), frozenset(own.names) - frozenset(files.names))
        what = "tokenizer and chat template are" if files.template is not None else "the tokenizer is"
        note = f"{what} those of {quoted(name)}{how}: --tokenizer base keeps the base's"
        return TokenizerChoice(changes, found.reference, differences, (note,))
    if files.template is None or files.template == own.template:
        return TokenizerChoice(notes=(f"the tokenizer files of {quoted(name)} have no vocabulary and are left out",))
    content = files.folder / TEMPLATE_NAME if TEMPLATE_NAME in files.names else files.template.encode()
    changes = FileChanges({TEMPLATE_NAME: content}, {TEMPLATE_NAME: name})
    note = f"the chat template is that of {quoted(name)}: --tokenizer base keeps the base's"
    return TokenizerChoice(changes, found.reference, ("another chat template",), (note,))


def _refuse_different(brought: Sequence[tuple[ResolvedAdapter, TokenizerFiles]]) -> None:
    first, files = brought[0]
    for other, others in brought[1:]:
        difference = next(chain(others.differences(files), files.differences(others)), None)
        if difference is not None:
            raise AdapterError(
                f"{quoted(first.adapter.name)} and {quoted(other.adapter.name)} were trained with different tokenizers "
                f"({difference}); give --tokenizer base, or --tokenizer adapter for that of {quoted(first.adapter.name)}"
            )


def _refuse_too_many(name: str, files: TokenizerFiles, base: Checkpoint) -> None:
    """Raise AdapterError if the tokenizer has tokens beyond the base's rows of embeddings."""
    tokens = architecture_of(base.config, base.tensors).weights(Role.TOKENS)
    rows = max((base.tensors[each].shape[0] for each in tokens), default=None)
    if rows is not None and files.highest >= rows:
        raise AdapterError(
            f"the tokenizer of {quoted(name)} has tokens up to number {files.highest:,}, and the base has embeddings for "
            f"{rows:,}; resize the base as it was for the training, or give --tokenizer base"
        )


def _trains_embeddings(plan: MergePlan) -> bool:
    architecture = architecture_of(plan.base.config, plan.base.tensors)
    return any(architecture.role(target.name) in (Role.TOKENS, Role.HEAD) for target in plan.targets)
