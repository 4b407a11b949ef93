"""Options of a push besides its adapter and its repository. Options that contradict each other are refused."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from loratool.errors import HubError, LoratoolError, quoted
from loratool.formats.alpha import Alpha
from loratool.hub.push import Remote


@dataclass(frozen=True, slots=True)
class PushOptions:
    """The options of one push.

    Attributes:
        merged: push a merged model instead of an adapter.
        files: with `merged`, files to send that were added to the folder after the merge.
        all_files: with `merged`, send all added files.
        alpha: alpha of a bare file that does not state it.
        private: make the repository private if it is created.
        create_pr: propose the files in a pull request.
        revision: the branch; None for the main branch.
        message: of the commit; None for the default one.
        dry_run: send nothing.
    """

    merged: bool
    files: Sequence[str | os.PathLike[str]]
    all_files: bool
    alpha: Alpha | None
    private: bool
    create_pr: bool
    revision: str | None
    message: str | None
    dry_run: bool

    def check(self) -> None:
        """Raise LoratoolError if the options do not fit together."""
        if self.message is not None and not self.message.strip():
            raise LoratoolError("the commit message is empty; give a text to --message, or leave it out")
        if self.merged and self.alpha is not None:
            raise LoratoolError("--alpha is for an adapter, and --merged pushes a model; leave one of them out")
        if not self.merged and (self.files or self.all_files):
            raise LoratoolError("--file and --all-files are for the folder of a merged model; give --merged as well")

    def check_for(self, remote: Remote) -> None:
        """Raise HubError if the options do not fit the repository."""
        if self.create_pr and not remote.exists:
            raise HubError(
                f"there is no repository {quoted(remote.repository)} to propose anything to; leave --create-pr out"
            )
        if self.create_pr and remote.head is None:
            raise HubError(
                f"{quoted(remote.repository)} has no branch {quoted(remote.revision)} to propose anything to; leave "
                "--revision out"
            )
        if self.private and remote.exists and not remote.private:
            raise HubError(
                f"{quoted(remote.repository)} exists already and is public; leave --private out, make it private on the Hub, or "
                "choose another name"
            )
