"""The repositories of the stand-in: files, commits, branches, tags, pull requests, accounts."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import yaml

LARGE_FILES = ("*.7z", "*.arrow", "*.bin", "*.bz2", "*.ckpt", "*.gguf", "*.gz", "*.h5", "*.joblib", "*.model", "*.npy",
               "*.npz", "*.onnx", "*.parquet", "*.pb", "*.pickle", "*.pkl", "*.pt", "*.pth", "*.rar", "*.safetensors",
               "*.tar", "*.tflite", "*.tgz", "*.zip", "*.zst", "*tfevents*")  # fmt: skip
"""What the ``.gitattributes`` of a new repository stores by git-lfs."""

LARGE_SIZE = 10 * 1024 * 1024
GIT_ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LARGE_FILES).encode()
FIRST_DAY = datetime(2025, 1, 1, tzinfo=UTC)


class RefusedError(Exception):
    """What a request is refused with: an HTTP status, the Hub's code for it, and a message."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code


def is_large(path: str, size: int, sample: bytes) -> bool:
    """Whether the Hub stores a file by git-lfs: by its name, its size, or as binary data that git does not take."""
    name = path.rsplit("/", 1)[-1]
    by_name = any(fnmatch.fnmatch(name, pattern) for pattern in LARGE_FILES)
    return size > 0 and (by_name or size > LARGE_SIZE or b"\0" in sample)


@dataclass(frozen=True)
class Blob:
    """The content of one file."""

    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        """The id of the git object, which for a large file is a pointer."""
        stored = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def pointer(self) -> bytes:
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        return text.encode()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    def describe(self, path: str) -> dict[str, Any]:
        """The entry of a file in a tree."""
        entry = {"type": "file", "path": path, "size": len(self.data), "oid": self.oid}
        large = {"oid": self.sha256, "size": len(self.data), "pointerSize": len(self.pointer)}
        return entry | ({"lfs": large} if self.lfs else {})


@dataclass(frozen=True)
class Commit:
    """One commit: the whole tree after it."""

    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    date: datetime
    files: Mapping[str, Blob]


@dataclass(frozen=True)
class Account:
    """Who a token belongs to, and what it may do: ``write`` or ``read``."""

    name: str
    organizations: tuple[str, ...] = ()
    role: str = "write"

    def may_write(self, namespace: str) -> bool:
        return self.role == "write" and self.belongs_to(namespace)

    def belongs_to(self, namespace: str) -> bool:
        return namespace in {self.name, *self.organizations}


@dataclass
class Repository:
    """A model repository."""

    id: str
    private: bool = False
    gated: str | bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    """What was uploaded for git-lfs, by sha256; committed or not."""
    allowed: set[str] = field(default_factory=set)
    """Who was let into a gated repository."""
    pull_requests: dict[int, str] = field(default_factory=dict)
    """``open`` or ``closed``, by their numbers."""

    def __post_init__(self) -> None:
        if not self.refs:
            self.commit("refs/heads/main", "initial commit", {".gitattributes": GIT_ATTRIBUTES}, author=self.namespace)

    @property
    def namespace(self) -> str:
        return self.id.partition("/")[0]

    @property
    def head(self) -> Commit:
        return self.commits[self.refs["refs/heads/main"]]

    @property
    def history(self) -> list[Commit]:
        """The commits of the main branch, the newest first."""
        return self.log(self.head)

    def log(self, commit: Commit) -> list[Commit]:
        found = [commit]
        while found[-1].parent is not None:
            found.append(self.commits[found[-1].parent])
        return found

    def find_ref(self, revision: str) -> str | None:
        """The full name of a branch, tag or pull request."""
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((name for name in names if name in self.refs), None)

    def find(self, revision: str) -> Commit:
        """The commit of a branch, a tag, a pull request or a commit's own id.

        Raises RefusedError.
        """
        ref = self.find_ref(revision)
        oid = self.refs[ref] if ref else revision
        if oid not in self.commits:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def file(self, revision: str, path: str) -> tuple[Commit, Blob]:
        """Raises RefusedError."""
        commit = self.find(revision)
        if path not in commit.files:
            raise RefusedError(404, "Entry not found", "EntryNotFound")
        return commit, commit.files[path]

    def put(self, files: Mapping[str, bytes], title: str = "Upload files", revision: str = "main") -> Commit:
        """Commit files past the API, under any names at all."""
        return self.commit(f"refs/heads/{revision}", title, files, author=self.namespace)

    def commit(
        self,
        ref: str,
        title: str,
        files: Mapping[str, bytes | Blob],
        *,
        author: str,
        message: str = "",
        deleted: Iterable[str] = (),
        parent: Commit | None = None,
    ) -> Commit:
        """Add a commit to a branch; on top of `parent` where the branch is new."""
        if ref in self.refs:
            parent = self.commits[self.refs[ref]]
        tree = dict(parent.files) if parent else {}
        for path in deleted:
            del tree[path]
        for path, content in files.items():
            if isinstance(content, bytes):
                content = Blob(content, is_large(path, len(content), content[:512]))
            if content.lfs:
                self.objects[content.sha256] = content.data
            tree[path] = content
        listing = sorted((path, blob.oid) for path, blob in tree.items())
        facts = json.dumps([ref, len(self.commits), parent and parent.oid, title, message, listing])
        date = FIRST_DAY + timedelta(minutes=len(self.commits))
        oid = hashlib.sha1(facts.encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent and parent.oid, title, message, author, date, tree)
        self.refs[ref] = oid
        return self.commits[oid]

    def card(self, commit: Commit) -> dict[str, Any]:
        """The front matter of the README; empty where there is none."""
        readme = commit.files.get("README.md")
        text = readme.data.decode(errors="replace") if readme else ""
        try:
            data = yaml.safe_load(text[4:].partition("\n---")[0]) if text.startswith("---\n") else None
        except yaml.YAMLError:
            data = None
        return data if isinstance(data, dict) else {}

    def tags(self, commit: Commit) -> list[str]:
        """What the Hub finds the repository by: the card's tags and what its other keys imply."""
        card = self.card(commit)
        found = [*([card["library_name"]] if "library_name" in card else []), *card.get("tags", [])]
        if any(path.endswith(".safetensors") for path in commit.files):
            found.append("safetensors")
        for base in _listed(card.get("base_model")):
            found.append(f"base_model:{base}")
            if "base_model_relation" in card:
                found.append(f"base_model:{card['base_model_relation']}:{base}")
        found += [f"dataset:{name}" for name in _listed(card.get("datasets"))]
        found += [f"license:{name}" for name in _listed(card.get("license"))]
        return list(dict.fromkeys(found))

    def describe(self, commit: Commit, *, blobs: bool = False) -> dict[str, Any]:
        """What the Hub says of a model."""
        card = self.card(commit)
        siblings = []
        for path, blob in sorted(commit.files.items()):
            entry: dict[str, Any] = {"rfilename": path}
            if blobs:
                entry |= {"size": len(blob.data), "blobId": blob.oid}
                if blob.lfs:
                    size = len(blob.data)
                    entry["lfs"] = {"sha256": blob.sha256, "size": size, "pointerSize": len(blob.pointer)}
            siblings.append(entry)
        return {
            "_id": hashlib.sha1(self.id.encode()).hexdigest()[:24],
            "id": self.id,
            "modelId": self.id,
            "author": self.namespace,
            "sha": commit.oid,
            "lastModified": _stamp(commit.date),
            "createdAt": _stamp(self.history[-1].date),
            "private": self.private,
            "gated": self.gated,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": self.tags(commit),
            "cardData": card,
            "siblings": siblings,
            **{key: card[key] for key in ("pipeline_tag", "library_name") if key in card},
        }


def describe_commit(commit: Commit) -> dict[str, Any]:
    """The entry of a commit in a list of commits."""
    authors = [{"user": commit.author}]
    facts = {"id": commit.oid, "title": commit.title, "message": commit.message, "date": _stamp(commit.date)}
    return facts | {"authors": authors}


def tree(commit: Commit, folder: str, *, recursive: bool) -> list[dict[str, Any]]:
    """The files and folders below a folder, as the Hub lists them.

    Raises RefusedError.
    """
    prefix = f"{folder}/" if folder else ""
    inside = {path: blob for path, blob in commit.files.items() if path.startswith(prefix)}
    if folder and not inside:
        raise RefusedError(404, f"{folder} does not exist on this revision", "EntryNotFound")
    entries = {}
    for path, blob in inside.items():
        steps = path.removeprefix(prefix).split("/")
        for depth in range(1, len(steps)):
            name = prefix + "/".join(steps[:depth])
            if depth == 1 or recursive:
                oid = hashlib.sha1(name.encode()).hexdigest()
                entries[name] = {"type": "directory", "path": name, "size": 0, "oid": oid}
        if len(steps) == 1 or recursive:
            entries[path] = blob.describe(path)
    return [entries[name] for name in sorted(entries)]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _stamp(date: datetime) -> str:
    return date.strftime("%Y-%m-%dT%H:%M:%S.000Z")
