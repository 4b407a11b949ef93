"""What the Hub checks in the front matter of a README, as far as models are concerned."""

from __future__ import annotations

import re
from typing import Any

import yaml

FRONT_MATTER = re.compile(r"^(\s*---(?:\r\n|\r|\n))([\S\s]*?)((?:\r\n|\r|\n)---[ \t]*(\r\n|\n|$))")
REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
RELATIONS = {"adapter", "finetune", "merge", "quantized"}
LICENSES = {"afl-3.0", "agpl-3.0", "apache-2.0", "artistic-2.0", "bigscience-bloom-rail-1.0", "bigscience-openrail-m",
            "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "bsl-1.0", "c-uda", "cc", "cc-by-2.0",
            "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-3.0",
            "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0",
            "cc-by-sa-4.0", "cc0-1.0", "creativeml-openrail-m", "deepfloyd-if-license", "ecl-2.0", "epl-1.0", "epl-2.0",
            "etalab-2.0", "eupl-1.1", "gemma", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "isc", "lgpl", "lgpl-2.1", "lgpl-3.0",
            "lgpl-lr", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "lppl-1.3c", "mit", "mpl-2.0",
            "ms-pl", "ncsa", "odbl", "odc-by", "ofl-1.1", "open-mdw", "openrail", "openrail++", "osl-3.0", "other",
            "pddl", "postgresql", "unknown", "unlicense", "wtfpl", "zlib"}  # fmt: skip


def problems(content: str) -> tuple[list[str], list[str]]:
    """The errors and the warnings for a README."""
    found = FRONT_MATTER.match(content)
    if found is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        card = yaml.safe_load(found[2])
    except yaml.YAMLError as error:
        return [f"YAML Metadata Error: {str(error).splitlines()[0]}"], []
    if not isinstance(card, dict):
        return ['"value" must be of type object'], []
    return _errors(card), []


def _errors(card: dict[str, Any]) -> list[str]:
    words = ("license", "pipeline_tag", "library_name", "base_model_relation")
    errors = [f'"{key}" must be a string' for key in words if key in card and not isinstance(card[key], str)]
    for key, known in (("license", LICENSES), ("base_model_relation", RELATIONS)):
        if isinstance(card.get(key), str) and card[key] not in known:
            errors.append(f'"{key}" must be one of [{", ".join(sorted(known))}]')
    for key, kind in (("base_model", "model"), ("datasets", "dataset")):
        given = card.get(key, [])
        unfit = [value for value in (given if isinstance(given, list) else [given]) if not _is_id(value)]
        use = f"Use a {kind} id from https://hf.co/{kind}s."
        errors += [f'"{key}" with value "{value}" is not valid. {use}' for value in unfit]
    if not isinstance(card.get("tags", []), list) or not all(isinstance(tag, str) for tag in card.get("tags", [])):
        errors.append('"tags" must be an array of strings')
    return errors


def _is_id(value: object) -> bool:
    return isinstance(value, str) and REPOSITORY.fullmatch(value) is not None
