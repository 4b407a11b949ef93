"""The model card of an adapter: the front matter for the Hub and the text for people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from loratool.formats.kinds import kind_named
from loratool.hub.address import is_repository
from loratool.hub.markdown import code, plain, sections, table
from loratool.hub.readme import FrontMatter


@dataclass(frozen=True, slots=True)
class Task:
    """A task of a model: the transformers class that loads the model, and the Hub's pipeline tag."""

    auto_class: str
    pipeline: str | None


TASKS: Final = {
    "CAUSAL_LM": Task("AutoModelForCausalLM", "text-generation"),
    "SEQ_2_SEQ_LM": Task("AutoModelForSeq2SeqLM", None),
    "SEQ_CLS": Task("AutoModelForSequenceClassification", "text-classification"),
    "TOKEN_CLS": Task("AutoModelForTokenClassification", "token-classification"),
    "QUESTION_ANS": Task("AutoModelForQuestionAnswering", "question-answering"),
    "FEATURE_EXTRACTION": Task("AutoModel", "feature-extraction"),
}
"""The tasks by PEFT's ``task_type``."""

_ARCHITECTURES: Final = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}

_SAID_ABOVE: Final = frozenset({"alpha", "base", "base_fingerprint", "data_sha256", "rank", "targets"})
"""Keys of a recipe that the card leaves out, because it shows them elsewhere or few people need them."""

_FIRST: Final = ("method", "data", "samples", "steps", "epochs", "batch_size", "lr", "schedule", "quantize", "seed")
"""Keys of a recipe that the card shows first."""

MOST_TARGETS: Final = 24
MOST_FIGURES: Final = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterCard:
    """The facts about an adapter to push.

    Attributes:
        name: the title of the README.
        repository: the repository's id on the Hub.
        kind: the word for its kind (`formats.kinds`).
        modules: the number of modules that it changes without replacing them.
        ranks: the rank of each module that has one.
        alpha: ``lora_alpha`` of the configuration.
        scalings: the scalings of the modules' updates, each value once.
        target_modules, replaced: the targets of its modules; the number of tensors it replaces whole.
        parameters, dtype, size_bytes, sha256: facts about its weights.
        base: the Hub id of its base, or None if it has none.
        base_url: the base's page on the Hub.
        base_fingerprint: the fingerprint of the base's content, if known.
        task: PEFT's ``task_type``, if known.
        recipe, metrics: the recipe and metrics of its training, as recorded.
        lineage: pairs of an operation and the names of the parents it took, the nearest first.
        tags: its tags on the Hub.
        license: the Hub's identifier of its license.
        picture: the path of its loss plot in the repository.
    """

    name: str
    repository: str
    kind: str
    modules: int
    ranks: Mapping[str, int]
    alpha: float | None
    scalings: Sequence[float]
    target_modules: Sequence[str]
    replaced: int
    parameters: int
    dtype: str
    size_bytes: int
    sha256: str
    base: str | None
    base_url: str | None
    base_fingerprint: str | None
    task: str | None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    lineage: Sequence[tuple[str, Sequence[str]]] = ()
    tags: Sequence[str] = ()
    license: str | None = None
    picture: str | None = None

    @property
    def rank(self) -> str:
        """``8``, or ``4 to 16`` if modules differ. A DyLoRA has every rank up to its largest."""
        if not self.ranks:
            return ""
        least, most = min(self.ranks.values()), max(self.ranks.values())
        if kind_named(self.kind).nested:
            return f"1 to {most}" if most > 1 else "1"
        return str(most) if least == most else f"{least} to {most}"

    def front_matter(self) -> FrontMatter:
        """Return the front matter, which the Hub reads."""
        datasets = dataset_ids(self.recipe)
        pipeline = TASKS[self.task].pipeline if self.task in TASKS else None
        managed: dict[str, Any] = {
            "base_model": self.base,
            "base_model_relation": "adapter" if self.base else None,
            "library_name": "peft",
        }
        if self.license:
            managed["license"] = self.license
        words = [*(["lora"] if kind_named(self.kind).is_lora else []), self.kind, "loratool", *self.tags]
        return FrontMatter(managed, {"pipeline_tag": pipeline, "datasets": datasets}, tuple(dict.fromkeys(words)))

    def body(self) -> str:
        """Return the text: what the adapter is, how to use it, how it was trained, and its metrics."""
        return sections(
            self._introduction(),
            table(self._facts()),
            "## Use it",
            self._with_peft(),
            self._with_loratool(),
            *self._training(),
            *self._results(),
        )

    def _introduction(self) -> str:
        base = f"[{plain(self.base)}]({self.base_url})" if self.base else "a base model that is not on the Hub"
        kind = kind_named(self.kind)
        of_rank = f" of rank {self.rank}" if self.rank else ""
        text = f"{kind.article.capitalize()} {kind.title} adapter{of_rank} for {base}."
        if kind.advice:
            text += f" {kind.advice}"
        for operation, parents in self.lineage[:1]:
            made_by, made_of = code(f"loratool {operation}"), ", ".join(map(code, parents[:MOST_TARGETS]))
            text += f" Made by {made_by} from {made_of}." if made_of else f" Made by {made_by}."
        return text

    def _facts(self) -> list[tuple[str, str]]:
        extremes = dict.fromkeys(extreme(self.scalings) for extreme in (min, max) if self.scalings)
        scaling = " to ".join(f"{value:g}" for value in extremes)
        names = [code(name) for name in self.target_modules[:MOST_TARGETS]]
        more = f" and {len(self.target_modules) - MOST_TARGETS} more" if len(self.target_modules) > MOST_TARGETS else ""
        whole = f"{self.replaced} tensors of the base's own are replaced whole" if self.replaced else ""
        return [
            ("rank", self.rank),
            ("alpha", "" if self.alpha is None else f"{self.alpha:g} (scaling {scaling})"),
            ("target modules", f"{', '.join(names)}{more} ({self.modules} modules)"),
            ("modules to save", whole),
            ("parameters", f"{self.parameters:,}, {self.dtype}, {_size(self.size_bytes)}"),
            ("weights, sha256", code(self.sha256)),
            ("base, fingerprint", code(self.base_fingerprint) if self.base_fingerprint else ""),
        ]

    def _with_peft(self) -> str:
        auto = TASKS[self.task].auto_class if self.task in TASKS else "AutoModelForCausalLM"
        lines = [
            "from peft import PeftModel",
            f"from transformers import {', '.join(sorted([auto, 'AutoTokenizer']))}",
            "",
            f'base = "{self.base or "path/to/the/base"}"',
            "tokenizer = AutoTokenizer.from_pretrained(base)",
            f"model = {auto}.from_pretrained(base)",
            f'model = PeftModel.from_pretrained(model, "{self.repository}")',
        ]
        if auto == "AutoModelForCausalLM":
            lines += [
                "",
                'prompt = tokenizer("Once upon a time", return_tensors="pt")',
                "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=40)[0]))",
            ]
        code_block = "\n".join(lines)
        return f"With PEFT:\n\n```python\n{code_block}\n```"

    def _with_loratool(self) -> str:
        name = self.repository.rpartition("/")[2]
        base = self.base or "path/to/the/base"
        cut = (
            f"\nloratool truncate {name} --rank {max(1, max(self.ranks.values()) // 2)}"
            if kind_named(self.kind).nested
            else ""
        )
        return f"""With loratool, which checks that it is merged into the right base:

```
loratool pull {self.repository}{cut}
loratool merge {name} --into {base}
```"""

    def _training(self) -> list[str]:
        """The section about training: the main choices, and a folded table with all others."""
        said = {key: value for key, value in _flat(self.recipe).items() if key not in _SAID_ABOVE}
        first = table(_rows({key: said[key] for key in _FIRST if key in said}), ("trained", ""))
        more = table(_rows({key: value for key, value in sorted(said.items()) if key not in _FIRST}), ("recipe", ""))
        if first and more:
            more = f"<details><summary>Every other choice</summary>\n\n{more}\n\n</details>"
        return ["## Training", first, more] if said else []

    def _results(self) -> list[str]:
        by_rank = self.metrics.get("loss_by_rank")
        others = {key: value for key, value in self.metrics.items() if key != "loss_by_rank"}
        parts = [table(_rows(dict(sorted(_flat(others).items()))), ("figure", ""))]
        if isinstance(by_rank, Mapping):
            ranked = sorted(by_rank.items(), key=lambda pair: (len(str(pair[0])), str(pair[0])))
            parts.append(table(_rows(dict(ranked)), ("at rank", "loss")))
        if self.picture:
            parts.append(f"![The loss of the training]({self.picture})")
        said = [part for part in parts if part]
        return ["## Results", *said] if said else []


def task_of(config: Mapping[str, Any], architecture: str | None) -> str | None:
    """Return the ``task_type`` of a PEFT configuration, else that of the base's architecture, else None."""
    recorded = config.get("task_type")
    if recorded in TASKS:
        return str(recorded)
    return next((task for ending, task in _ARCHITECTURES.items() if (architecture or "").endswith(ending)), None)


def dataset_ids(recipe: Mapping[str, Any]) -> list[str]:
    """Return the Hub ids of data sets in a recipe's ``data``. Files are left out."""
    from pathlib import PurePosixPath

    given = recipe.get("data")
    names = given if isinstance(given, list) else [given]
    found = [str(name).partition("@")[0] for name in names if isinstance(name, str)]
    return [name for name in found if is_repository(name) and not PurePosixPath(name).suffix]


def _rows(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """One row for each figure. Sizes in bytes are shown as kB, MB or GB."""
    rows = []
    for key, value in list(figures.items())[:MOST_FIGURES]:
        in_bytes = key.endswith("_bytes") and isinstance(value, int)
        shown = _size(value) if in_bytes else _figure(value)
        rows.append((plain((key.removesuffix("_bytes") if in_bytes else key).replace("_", " ")), code(shown)))
    return rows


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested figures by joining their keys; values that are None are left out."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{key} {inner}": item for inner, item in value.items() if not isinstance(item, Mapping | list)}
        elif value is not None:
            flat[str(key)] = value
    return flat


def _figure(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.4f}".rstrip("0").rstrip(".") if math.isfinite(value) and abs(value) >= 0.001 else f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def _size(nbytes: int) -> str:
    value, unit = float(nbytes), "B"
    for bigger in ("kB", "MB", "GB"):
        if value < 999.5:
            break
        value, unit = value / 1000, bigger
    return f"{value:.3g} {unit}"
