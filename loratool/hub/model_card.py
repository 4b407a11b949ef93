"""The model card of a model that loratool merged or quantized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from loratool.hub.card import TASKS
from loratool.hub.markdown import code, plain, sections, table
from loratool.hub.readme import FrontMatter


@dataclass(frozen=True, slots=True)
class Ingredient:
    """An adapter in a merge. `url` is its page on the Hub, if it is public."""

    name: str
    kind: str
    rank: int | None
    weight: float
    sha256: str
    url: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """The facts about a model to push.

    Attributes:
        name, repository: the title of the README, and the repository's id on the Hub.
        relation: ``merge``, or ``quantized`` if nothing was merged.
        base, base_url, base_fingerprint: the model that it was made from.
        fingerprint: the fingerprint of its content.
        ingredients: the adapters, in the order in which they were merged.
        storage: its storage, if it differs from the base's.
        storage_tags: the Hub's tags for that storage.
        options: the other options that decided its bytes.
        architecture: its transformers class.
        task: PEFT's ``task_type``, if known.
        license: the Hub's identifier of its license.
    """

    name: str
    repository: str
    relation: Literal["merge", "quantized"]
    base: str | None
    base_url: str | None
    base_fingerprint: str
    fingerprint: str
    ingredients: Sequence[Ingredient] = ()
    storage: str | None = None
    storage_tags: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    architecture: str | None = None
    task: str | None = None
    license: str | None = None

    def front_matter(self) -> FrontMatter:
        """Return the front matter, which the Hub reads."""
        managed: dict[str, Any] = {
            "base_model": self.base,
            "base_model_relation": self.relation if self.base else None,
            "library_name": "transformers",
        }
        if self.license:
            managed["license"] = self.license
        pipeline = TASKS[self.task].pipeline if self.task in TASKS else None
        words = [
            "loratool",
            *(["merge"] if self.ingredients else []),
            *self.storage_tags,
        ]
        return FrontMatter(managed, {"pipeline_tag": pipeline}, words)

    def body(self) -> str:
        """Return the text: what the model is made from, how to load it, and how to check it."""
        return sections(
            self._introduction(),
            self._ingredients(),
            table(
                [
                    ("base, fingerprint", code(self.base_fingerprint)),
                    ("this model, fingerprint", code(self.fingerprint)),
                    ("stored as", plain(self.storage or "")),
                    *((plain(key), code(value)) for key, value in sorted(self.options.items())),
                ]
            ),
            "## Use it",
            self._use(),
            "## Check it",
            self._check(),
        )

    def _introduction(self) -> str:
        base = f"[{plain(self.base)}]({self.base_url})" if self.base else "a base model that is not on the Hub"
        if not self.ingredients:
            return f"{base} in {plain(self.storage or 'another storage')}, quantized by loratool."
        count = len(self.ingredients)
        what = "one adapter" if count == 1 else f"{count} adapters"
        stored = f", stored as {plain(self.storage)}" if self.storage else ""
        return f"{base} with {what} merged into its weights by loratool{stored}."

    def _ingredients(self) -> str:
        rows = []
        for each in self.ingredients:
            name = f"[{plain(each.name)}]({each.url})" if each.url else code(each.name)
            rank = "" if each.rank is None else f" of rank {each.rank}"
            rows.append((name, f"weight {each.weight:g}, {each.kind}{rank}, sha256 {code(each.sha256)}"))
        return table(rows, ("adapter", ""))

    def _use(self) -> str:
        auto = TASKS[self.task].auto_class if self.task in TASKS else "AutoModel"
        return f"""```python
from transformers import {", ".join(sorted([auto, "AutoTokenizer"]))}

tokenizer = AutoTokenizer.from_pretrained("{self.repository}")
model = {auto}.from_pretrained("{self.repository}")
```"""

    def _check(self) -> str:
        text = (
            "`loratool.json` is the manifest: the base, the adapters, and a digest of every tensor. In a copy of this "
            "repository, `loratool verify FOLDER` compares every byte with it"
        )
        if not self.ingredients:
            return f"{text}."
        return f"{text}. If you have the base, `loratool unmerge FOLDER` restores it bit for bit."
