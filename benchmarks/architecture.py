"""Compare the tables of loratool.architecture with every model class that transformers builds.

Each class of transformers' auto mappings is built with its default configuration and few layers, on the meta device. Name model
types to see in what they differ: ``python benchmarks/architecture.py vit swin``.
"""

from __future__ import annotations

import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import transformers
from results import report, table
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from model_facts import ModelFacts, built

from loratool.architecture.tables import FOLDER

SUBJECTS = ("roles", "orientation", "names", "matrices", "ties", "quantization")
SECONDS = 40
"""How long a class may take."""

LAYERS = 3
COUNTS = {
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_decoder_layers",
    "num_encoder_layers", "depth", "encoder_num_hidden_layers", "decoder_num_hidden_layers",
}  # fmt: skip
"""Numbers of a configuration that are cut down to `LAYERS`."""

SPARSE = {"first_k_dense_replace": 1, "moe_layer_start_index": 1, "encoder_sparse_step": 2}
"""Numbers that put experts into one of the layers that are left."""


def pairs() -> Iterator[tuple[str, str]]:
    """Yield each model type and class of the auto mappings once."""
    mappings = (getattr(modeling_auto, name) for name in dir(modeling_auto) if name.startswith("MODEL"))
    found = {
        (model_type, name): None
        for mapping in mappings
        if type(mapping).__name__ == "OrderedDict"
        for model_type, names in mapping.items()
        for name in (names if isinstance(names, tuple | list) else [names])
    }
    yield from found


def small(config_class: type[Any], depth: int = 0) -> dict[str, Any]:
    """Return what a configuration needs so that a model of it has few layers."""
    default = config_class()
    keys = set(default.to_dict()) | set(config_class.attribute_map)
    changes: dict[str, Any] = {key: LAYERS for key in COUNTS & keys if _is_more(getattr(default, key, None))}
    changes |= {key: number for key, number in SPARSE.items() if key in keys}
    for key in config_class.sub_configs:
        inside = getattr(default, key, None)
        if hasattr(inside, "to_dict") and depth < 3:
            changes[key] = {**small(type(inside), depth + 1), "model_type": type(inside).model_type}
    return changes


def _is_more(number: object) -> bool:
    return isinstance(number, int) and number > LAYERS


def differences(model_type: str, name: str) -> dict[str, set[str]]:
    """Build a model and return in what the tables differ from it."""
    config_class, model_class = CONFIG_MAPPING[model_type], getattr(transformers, name)
    try:
        model = built(model_class, config_class(**small(config_class)))
    except TimeoutError:
        raise
    except Exception:
        model = built(model_class, config_class())
    return ModelFacts.of(model).differences()


def too_slow(signum: int, frame: FrameType | None) -> None:
    raise TimeoutError


def main(wanted: set[str]) -> None:
    transformers.utils.logging.set_verbosity_error()
    signal.signal(signal.SIGALRM, too_slow)
    built_types: set[str] = set()
    failed = 0
    unlike: dict[str, dict[tuple[str, str], set[str]]] = defaultdict(dict)
    count, start = 0, time.monotonic()
    for model_type, name in pairs():
        if wanted and model_type not in wanted:
            continue
        signal.alarm(SECONDS)
        try:
            found = differences(model_type, name)
        except Exception as error:
            failed += 1
            if wanted:
                print(f"{name}: not built ({type(error).__name__}: {str(error)[:120]})")
            continue
        finally:
            signal.alarm(0)
        count += 1
        built_types.add(model_type)
        for subject, lines in found.items():
            unlike[subject][model_type, name] = lines
            if wanted:
                print(f"{name}, {subject}:", *sorted(lines)[:20], sep="\n  ")
    rows = []
    for subject in SUBJECTS:
        types = sorted({model_type for model_type, _ in unlike[subject]})
        rows.append([subject, f"{count - len(unlike[subject])}", f"{len(unlike[subject])}", ", ".join(types) or "–"])
    different = {pair for each in unlike.values() for pair in each}
    rows.append(["all of them", f"{count - len(different)}", f"{len(different)}", ""])
    body = (
        f"{count} classes of {len(built_types)} model types, built by transformers on the meta device with few layers; {failed} "
        f"more need another package or a configuration of their own. {len(list(FOLDER.glob('*.json')))} tables; "
        f"{(time.monotonic() - start) / 60:.0f} minutes.\n\n"
        + table(["what the tables say", "classes alike", "classes unlike", "model types of these"], rows)
    )
    report("architecture", "What models are, against the models that transformers builds", body)


if __name__ == "__main__":
    main({each for each in sys.argv[1:] if not each.startswith("--")})
