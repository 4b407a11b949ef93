"""A README on the Hub, in which loratool rewrites its own part and keeps the rest.

The managed part stands between two comments. The text outside them and the front matter's other keys stay as they are. If
no managed key changes, the front matter stays the same byte for byte.
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
"""The README template that PEFT and transformers save has at least this many gaps; a filled-in one has fewer."""

_GAP: Final = "[More Information Needed]"


@dataclass(frozen=True, slots=True)
class FrontMatter:
    """The keys that loratool sets in the front matter.

    Attributes:
        managed: keys that are always set; the value None removes the key.
        defaults: keys that are set only if nobody has set them.
        tags: tags to add; other tags stay.
    """

    managed: Mapping[str, Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    tags: Sequence[str] = ()

    def into(self, card: Mapping[str, Any]) -> dict[str, Any]:
        """Return the front matter `card` with these keys applied."""
        merged = {key: self.managed.get(key, value) for key, value in card.items()}
        merged |= self.managed
        merged = {key: value for key, value in merged.items() if key not in self.managed or value is not None}
        merged |= {key: value for key, value in self.defaults.items() if value and not merged.get(key)}
        before = merged.get("tags") or []
        # The Hub derives these tags itself, and PEFT may have written a local folder into them.
        before = [
            tag
            for tag in (before if isinstance(before, list) else [before])
            if not (isinstance(tag, str) and tag.startswith("base_model:"))
        ]
        tags = [*before, *(tag for tag in self.tags if tag not in before)]
        return merged | ({"tags": tags} if tags else {})


def renewed(existing: str | None, title: str, front: FrontMatter, body: str) -> str:
    """Return the README with new front matter and a new managed part; a new README if `existing` is None.

    `body` is the text of the managed part, `title` the heading of a new README.

    Raises:
        HubError: `existing` has invalid front matter, or its marks of the managed part are not exactly one pair.
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
    """Return the front matter of a README; empty if it is missing or invalid."""
    try:
        return _split(text)[1] if text else {}
    except HubError:
        return {}


def is_template(text: str) -> bool:
    """Whether a README is the template of PEFT or transformers and nobody has filled it in."""
    return text.count(_GAP) >= _TEMPLATE_GAPS


def _split(text: str) -> tuple[str, dict[str, Any], str]:
    """Split a README into its block of front matter with the dashed lines, the parsed keys, and the text below."""
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
        raise HubError(f"the front matter of {README} cannot be read ({line}); correct it on the Hub") from None
    if not isinstance(card, dict | None):
        raise HubError(
            f"the front matter of {README} is {quoted(card, 40)} instead of keys with values; correct it on the Hub"
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
            f"{README} must have each of the two marks of loratool's part once, or neither; correct it: {BEGIN} and {END}"
        )
    return text[: begins[0].start()] + managed.rstrip("\n") + text[end + len(END) :]
