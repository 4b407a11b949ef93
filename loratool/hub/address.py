"""Addresses on the Hub, as a person writes them: ``owner/name``, ``owner/name@revision``, ``owner/name/path/inside``."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from loratool.errors import HubError, NotFoundError, printable, quoted

NAME: Final = re.compile(r"(?!.*(?:--|\.\.|\.git$))\w(?:[\w.-]{0,94}\w)?", re.ASCII)
"""A part of ``owner/name``, by huggingface_hub's own rules."""

LINK_HOSTS: Final = ("https://huggingface.co/", "https://hf.co/", "hf://")
LINK_WORDS: Final = frozenset({"tree", "blob", "resolve"})


@dataclass(frozen=True, slots=True)
class HubAddress:
    """A repository on the Hub, optionally with a revision (branch, tag or commit) and a folder or file inside it."""

    repo: str
    revision: str | None = None
    path: str | None = None

    @classmethod
    def parse(cls, text: str, path: str | None = None) -> HubAddress:
        """Parse ``owner/name[/path/inside][@revision]`` or a link to a repository. `path` may give the path inside it.

        Raises:
            NotFoundError: `text` is neither, the path is given twice, or it would leave the repository.
        """
        place, at, revision = _without_host(text).partition("@")
        owner, name, *inside = [*place.rstrip("/").split("/"), ""]
        inside = [step for step in inside if step]
        if len(inside) > 1 and inside[0] in LINK_WORDS and _is_link(text):
            _, revision, *inside = inside
            revision, at = unquote(revision), "@"
        if not is_repository(f"{owner}/{name}"):
            raise NotFoundError(
                f"{quoted(text)} is not a repository on the Hub; write owner/name, owner/name@revision or "
                "owner/name/path/inside"
            )
        if path is not None and inside:
            raise NotFoundError(f"{quoted(text)} already holds a path inside the repository; leave --path out")
        within = path.strip("/") if path is not None else "/".join(inside)
        if within and not is_safe(within):
            raise NotFoundError(f"{quoted(within)} is not a path inside a repository; write it as the Hub shows it")
        if at and not (revision and is_safe(revision)):
            raise NotFoundError(f"{quoted(revision)} is not a revision; write a branch, a tag or a commit after the @")
        return cls(f"{owner}/{name}", revision or None, within or None)

    def at(self, revision: str | None) -> HubAddress:
        """Return the same address at another revision."""
        return replace(self, revision=revision)

    def __str__(self) -> str:
        inside = "" if self.path is None else f"/{self.path}"
        return f"{self.repo}{inside}" + ("" if self.revision is None else f"@{self.revision}")

    @property
    def name(self) -> str:
        """The last word of it: the repository's name, or that of what is inside."""
        return (self.repo.rpartition("/")[2], *self.steps)[-1]

    @property
    def steps(self) -> list[str]:
        """The names on the way to what is inside the repository, without the endings of safetensors files."""
        steps = (self.path or "").split("/")
        steps = [step for step in steps if step and not step.startswith(("adapter_model.", "adapter_config."))]
        return [step.removesuffix(".safetensors").removesuffix(".st") for step in steps]


def is_repository(name: str) -> bool:
    """Whether `name` has the form ``owner/name`` and the Hub allows it."""
    owner, slash, last = name.partition("/")
    return bool(slash and NAME.fullmatch(owner) and NAME.fullmatch(last))


def repository_id(text: str) -> str:
    """Return the ``owner/name`` in `text`, which is that or a link to the repository.

    Raises:
        HubError: `text` is neither.
    """
    name = _without_host(text).rstrip("/")
    if not is_repository(name):
        raise HubError(f"{quoted(text)} is not the name of a repository on the Hub; write owner/name")
    return name


def is_hub_id(name: str) -> bool:
    """Whether `name`, from a configuration or a card, has the form ``owner/name`` and is not a path on this disk."""
    return is_repository(name) and not Path(name).exists()


def is_safe(path: str) -> bool:
    """Whether a path from outside stays in its folder on every operating system, and prints exactly as it is."""
    steps = path.split("/")
    return (
        0 < len(path) <= 1024
        and not any(step in {"", ".", ".."} or len(step.encode(errors="replace")) > 255 for step in steps)
        and not set(path) & set('\\:*?"<>|')
        and printable(path) == path
    )


def leaves_its_folder(path: str) -> bool:
    """Whether a path that a repository lists is absolute or has ``..``, on any operating system. git allows no such path."""
    steps = path.replace("\\", "/").split("/")
    return steps[0] == "" or ".." in steps or steps[0].endswith(":")


def _without_host(text: str) -> str:
    host = next((host for host in _hosts() if text.startswith(host)), None)
    return text if host is None else re.split("[?#]", text.removeprefix(host))[0]


def _is_link(text: str) -> bool:
    return text.startswith(_hosts())


def _hosts() -> tuple[str, ...]:
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/")
    return (*LINK_HOSTS, *([f"{endpoint}/"] if endpoint else []))
