"""A README on the Hub: front matter and text, of which loratool renews its own part and keeps what people wrote.

The managed part stands between two comments. Everything outside them, and every key of the front matter that loratool
does not manage, stays as it is, byte for byte where nothing has to change.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from loratool.errors import HubError, quoted

README: Final = "README.md"
BEGIN: Final = "<!-- loratool: from here to the end mark this is written anew by every 'loratool push' -->"
END: Final = "<!-- loratool: end -->"
_BEGINS: Final = re.compile(r"<!-- loratool: from here [^\n]*-->")

_TEMPLATE_GAPS: Final = 20
"""PEFT and transformers save a README of a template with more gaps than this; who fills it in leaves fewer."""

_GAP: Final = "[More Information Needed]"


@dataclass(frozen=True, slots=True)
class FrontMatter:
    """What loratool puts into the front matter.

    Attributes:
        managed: keys that are renewed, whatever they were; None takes one away.
        defaults: keys that are set where a person has not set them.
        tags: words that are among the tags; others stay.
    """

    managed: Mapping[str, Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    tags: Sequence[str] = ()

    def into(self, card: Mapping[str, Any]) -> dict[str, Any]:
        """The keys of `card` with these."""
        merged = {key: self.managed.get(key, value) for key, value in card.items()}
        merged |= self.managed
        merged = {key: value for key, value in merged.items() if key not in self.managed or value is not None}
        merged |= {key: value for key, value in self.defaults.items() if value and not merged.get(key)}
        before = merged.get("tags") or []
        # Those that begin so the Hub derives itself; what others wrote may name a folder of somebody's machine.
        before = [
            tag
            for tag in (before if isinstance(before, list) else [before])
            if not (isinstance(tag, str) and tag.startswith("base_model:"))
        ]
        tags = [*before, *(tag for tag in self.tags if tag not in before)]
        return merged | ({"tags": tags} if tags else {})


def renewed(existing: str | None, title: str, front: FrontMatter, body: str) -> str:
    """The README with its front matter and its managed part renewed; a new one where `existing` is None.

    `body` is the text of the managed part, `title` the heading of a new README.

    Raises:
        HubError: the existing one has broken front matter, or the mark at one end of the managed part only.
    """
    managed = f"{BEGIN}\n\n{body.strip()}\n\n{END}\n"
    if existing is None or is_template(existing):
        return f"{_front_matter(front.into({}))}\n# {title}\n\n{managed}"
    line_break = "\r\n" if "\r\n" in existing else "\n"
    block, card, text = _split(existing)
    wanted = front.into(card)
    head = block if wanted == card else _front_matter(wanted)
    if not block and text:
        head += "\n"
    return (head + _with_managed_part(text, managed)).replace("\r\n", "\n").replace("\n", line_break)


def front_matter(text: str | None) -> dict[str, Any]:
    """The front matter of a README; empty where there is none or it is broken."""
    try:
        return _split(text)[1] if text else {}
    except HubError:
        return {}


def is_template(text: str) -> bool:
    """Whether a README is the template that PEFT or transformers saves, which nobody has filled in."""
    return text.count(_GAP) >= _TEMPLATE_GAPS


def _split(text: str) -> tuple[str, dict[str, Any], str]:
    """The block of front matter with its lines of dashes, what it says, and the text below it."""
    import yaml
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    text = text.removeprefix("\ufeff")
    found = REGEX_YAML_BLOCK.match(text)
    if found is None:
        return "", {}, text
    try:
        card = yaml.safe_load(found[2])
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        line = str(error).split("\n")[0]
        raise HubError(f"the front matter of {README} cannot be read ({line}); mend it on the Hub") from None
    if not isinstance(card, dict | None):
        raise HubError(
            f"the front matter of {README} is {quoted(card, 40)} and no keys with values; mend it on the Hub"
        )
    return found[0], card or {}, text[found.end() :]


def _front_matter(card: Mapping[str, Any]) -> str:
    import yaml

    return f"---\n{yaml.safe_dump(dict(card), sort_keys=False, allow_unicode=True).strip()}\n---\n"


def _with_managed_part(text: str, managed: str) -> str:
    begins = list(_BEGINS.finditer(text))
    if not begins and END not in text:
        gap = "" if not text or text.endswith(("\n\n", "\r\n\r\n")) else "\n" if text.endswith("\n") else "\n\n"
        return text + gap + managed
    end = text.find(END, begins[0].end()) if begins else -1
    if len(begins) != 1 or end < 0 or text.count(END) != 1:
        raise HubError(
            f"{README} has one of the two marks of loratool's part without the other, or one twice; mend it: {BEGIN} and {END}"
        )
    return text[: begins[0].start()] + managed.rstrip("\n") + text[end + len(END) :]
