"""A tokenizer and its chat template as files in a folder, and the differences between two tokenizers.

transformers saves a tokenizer with every model and with an adapter at each checkpoint. Its files differ between versions even if
their meaning is the same, so the meaning is compared: the vocabulary, the added tokens, the special tokens and the chat
template. What only one of the two has is not compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from blake3 import blake3

from loratool.checkpoint.file_role import FileRole, role_of
from loratool.checkpoint.fingerprint import file_digest
from loratool.checkpoint.json_text import LARGEST_LISTING, read_json_object, read_limited
from loratool.checkpoint.links import leads_outside
from loratool.errors import CheckpointError, quoted

TOKENIZER_NAME: Final = "tokenizer.json"
CONFIG_NAME: Final = "tokenizer_config.json"
TEMPLATE_NAME: Final = "chat_template.jinja"
_AROUND: Final = frozenset({CONFIG_NAME, "special_tokens_map.json", "added_tokens.json", "merges.txt"})
"""Files of a tokenizer that contain no vocabulary."""

SPECIAL_TOKENS: Final = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
LARGEST_TEMPLATE: Final = 1 << 20


@dataclass(frozen=True)
class TokenizerFiles:
    """The files of a tokenizer in `folder`, by their names there, chat templates among them."""

    folder: Path
    names: tuple[str, ...]

    @classmethod
    def of(cls, folder: Path) -> TokenizerFiles:
        """Find the files in a folder; links that lead out of it are ignored."""
        try:
            names = sorted(entry.name for entry in folder.iterdir() if _is_of_tokenizer(entry))
        except OSError:
            names = []
        return cls(folder, tuple(names))

    @property
    def is_whole(self) -> bool:
        """Whether they include a vocabulary."""
        return any(role_of(name) is FileRole.TOKENIZER and name not in _AROUND for name in self.names)

    @cached_property
    def vocabulary(self) -> str | None:
        """A digest of the vocabulary and its merges; None if no file has them."""
        if self._tokenizer:
            model = dict(self._tokenizer.get("model") or {})
            merges = model.get("merges")
            if isinstance(merges, list):
                model["merges"] = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
            kept = {key: model.get(key) for key in ("type", "vocab", "merges")}
            return str(blake3(json.dumps(kept, sort_keys=True).encode()).hexdigest())
        names = [name for name in self.names if role_of(name) is FileRole.TOKENIZER and name not in _AROUND]
        digests = [file_digest(self.folder / name) for name in names]
        return str(blake3("".join([*names, *digests]).encode()).hexdigest()) if names else None

    @cached_property
    def added(self) -> dict[str, int] | None:
        """The added tokens and their numbers; None if no file could list them."""
        listed = self._tokenizer.get("added_tokens")
        if isinstance(listed, list):
            entries = [each for each in listed if isinstance(each, dict)]
            return {each["content"]: each["id"] for each in entries if _is_token(each.get("content"), each.get("id"))}
        numbered = self._config.get("added_tokens_decoder")
        found = self._json("added_tokens.json") if "added_tokens.json" in self.names else {}
        if isinstance(numbered, dict):
            found |= {
                each["content"]: int(number)
                for number, each in numbered.items()
                if isinstance(each, dict) and isinstance(each.get("content"), str) and number.isdecimal()
            }
        elif not found and "added_tokens.json" not in self.names:
            return None
        return {token: number for token, number in found.items() if _is_token(token, number)}

    @cached_property
    def special(self) -> dict[str, str]:
        """The special tokens by their roles."""
        mapped = self._json("special_tokens_map.json") if "special_tokens_map.json" in self.names else {}
        said = {role: _content(self._config.get(role)) or _content(mapped.get(role)) for role in SPECIAL_TOKENS}
        return {role: token for role, token in said.items() if token}

    @cached_property
    def template(self) -> str | None:
        """The chat template, or JSON of several named ones; None if there is none."""
        if TEMPLATE_NAME in self.names:
            return read_limited(self.folder / TEMPLATE_NAME, LARGEST_TEMPLATE).decode(errors="replace")
        found = self._config.get("chat_template")
        if found is None and "chat_template.json" in self.names:
            found = self._json("chat_template.json").get("chat_template")
        return found if isinstance(found, str) or found is None else json.dumps(found, sort_keys=True)

    @cached_property
    def highest(self) -> int:
        """The highest number of any token; -1 if no file gives one."""
        model = self._tokenizer.get("model")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        if vocabulary is None and "vocab.json" in self.names:
            vocabulary = self._json("vocab.json")
        if isinstance(vocabulary, dict):
            numbers = [number for number in vocabulary.values() if type(number) is int]
        else:
            numbers = [len(vocabulary) - 1] if isinstance(vocabulary, list) else []
        return max([*numbers, *(self.added or {}).values()], default=-1)

    def differences(self, other: TokenizerFiles) -> Iterator[str]:
        """Yield phrases that describe how this tokenizer differs from `other`."""
        if None not in (self.vocabulary, other.vocabulary) and self.vocabulary != other.vocabulary:
            yield "another vocabulary"
        if self.added is not None and other.added is not None and self.added != other.added:
            more = [token for token in self.added if self.added[token] != other.added.get(token)]
            names = ", ".join(quoted(token, 40) for token in more[:3]) + (", ..." if more[3:] else "")
            yield (
                f"other added tokens ({names})" if more else f"{len(other.added) - len(self.added)} added tokens fewer"
            )
        if self._says_special and other._says_special:
            for role in SPECIAL_TOKENS:
                if self.special.get(role) != other.special.get(role):
                    yield f"another {role} ({quoted(self.special.get(role, 'none'), 40)})"
        if self.template is not None and self.template != other.template:
            yield "another chat template"

    @property
    def _says_special(self) -> bool:
        return not {CONFIG_NAME, "special_tokens_map.json"}.isdisjoint(self.names)

    @cached_property
    def _tokenizer(self) -> Mapping[str, Any]:
        return self._json(TOKENIZER_NAME) if TOKENIZER_NAME in self.names else {}

    @cached_property
    def _config(self) -> Mapping[str, Any]:
        return self._json(CONFIG_NAME) if CONFIG_NAME in self.names else {}

    def _json(self, name: str) -> dict[str, Any]:
        return read_json_object(self.folder / name, LARGEST_LISTING)


def _is_of_tokenizer(file: Path) -> bool:
    is_named_so = role_of(file.name) in (FileRole.TOKENIZER, FileRole.CHAT_TEMPLATE)
    return is_named_so and file.is_file() and not leads_outside(file, file.parent)


def _is_token(content: object, number: object) -> bool:
    return isinstance(content, str) and type(number) is int


def _content(token: object) -> str | None:
    """Return a special token's text, which files give directly or in an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and text else None


def damaged(tokenizer: TokenizerFiles) -> str | None:
    """Return why the files of a tokenizer cannot be read; None if they can."""
    try:
        _ = tokenizer.vocabulary, tokenizer.added, tokenizer.special, tokenizer.template, tokenizer.highest
    except (CheckpointError, OSError, ValueError, TypeError, AttributeError) as error:
        return str(error)
    return None
