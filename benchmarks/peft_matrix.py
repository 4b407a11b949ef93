"""Every tuner of PEFT, with the configurations of PEFT's own tests, merged by PEFT and by loratool.

    python benchmarks/peft_matrix.py [--tuner LORA] [--model llama] [--dtype bf16] [--sample 200] [--json FILE] [--record]

Prints a line for each case: EQUAL, REFUSED and why, DIFFERENT and by how many units in the last place, CRASH and where; then a
table by tuner. `peft_configurations.json` lists the configurations: the models, PEFT's class, and what is passed to it.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import against_peft
import peft
import transformers
from against_peft import DTYPES, MEANING, STATES, Fault, Outcome
from case_workers import run_cases
from peft_models import build, task_type
from results import report, table

CONFIGURATIONS: Final = Path(__file__).parent / "peft_configurations.json"
SECONDS: Final = 60.0
"""How long one case may take."""

FAULTS: Final = {
    ("LoraConfig", "MHA"): Fault(re.compile(r"out_proj\.weight$"), "PEFT adds the update of out_proj twice"),
    ("LNTuningConfig", "MLP_LayerNorm"): Fault(
        re.compile(r"^layernorm1\."), "PEFT leaves modules_to_save in the names of its merge"
    ),
}


@dataclass(frozen=True, slots=True)
class Case:
    """A configuration of PEFT's, its settings as JSON, for one model and type of numbers."""

    model: str
    config_class: str
    settings: str
    dtype: str

    @property
    def tuner(self) -> str:
        return self.config_class.removesuffix("Config")

    def __str__(self) -> str:
        return f"{self.tuner} | {self.model} | {self.dtype} | {self.settings}"

    def config(self) -> peft.PeftConfig:
        settings = {key: _value(each) for key, each in json.loads(self.settings).items()}
        return getattr(peft, self.config_class)(task_type=task_type(self.model), **settings)


def _value(setting: Any) -> Any:
    """Return a setting; one with ``class`` is a configuration inside the configuration."""
    if isinstance(setting, dict) and "class" in setting:
        inside = {key: each for key, each in setting.items() if key != "class"}
        return _class(setting["class"])(**inside)
    return setting


def _class(name: str) -> Any:
    import peft.tuners.lora.config as lora

    return getattr(peft, name, None) or getattr(lora, name)


def cases() -> Iterator[Case]:
    for models, config_class, settings in json.loads(CONFIGURATIONS.read_text()):
        for model in models:
            for dtype in DTYPES:
                yield Case(model, config_class, json.dumps(settings), dtype)


def outcome(case: Case) -> Outcome:
    return against_peft.compare(
        lambda: build(case.model), case.config, case.dtype, FAULTS.get((case.config_class, case.model))
    )


def summary(found: dict[Case, Outcome]) -> str:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for case, each in found.items():
        counts[case.tuner][each.state] += 1
    rows = [[tuner, *(str(count[state] or "") for state in STATES)] for tuner, count in sorted(counts.items())]
    total = Counter(each.state for each in found.values())
    rows.append(["all of them", *(str(total[state]) for state in STATES)])
    return table(["tuner", *(state.lower() for state in STATES)], rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tuner", help="only this tuner, such as Lora or LoKr")
    parser.add_argument("--model", help="only this model")
    parser.add_argument("--dtype", choices=DTYPES, help="only this type of numbers")
    parser.add_argument("--sample", type=int, help="this many cases, the same ones each time")
    parser.add_argument("--limit", type=int, help="only the first cases")
    parser.add_argument("--json", type=Path, help="write each case and its outcome to this file")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--record", action="store_true", help="write the table to RESULTS.md")
    return parser.parse_args()


def chosen(asked: argparse.Namespace) -> list[Case]:
    """Return the cases that the command line asks for."""
    wanted = [
        case
        for case in cases()
        if (not asked.tuner or case.tuner.lower() == asked.tuner.lower())
        and (not asked.model or case.model == asked.model)
        and (not asked.dtype or case.dtype == asked.dtype)
    ]
    if asked.sample and asked.sample < len(wanted):
        wanted = random.Random(0).sample(wanted, asked.sample)
    return wanted[: asked.limit]


def lost(case: Case, why: str) -> Outcome:
    return Outcome("CRASH", why)


def main() -> None:
    asked = arguments()
    transformers.utils.logging.set_verbosity_error()
    start = time.monotonic()
    found: dict[Case, Outcome] = {}
    for case, each in run_cases(chosen(asked), outcome, lost, workers=asked.workers, seconds=SECONDS):
        found[case] = each
        print(f"{case}: {each}", flush=True)
    if asked.json:
        facts = [asdict(case) | {"tuner": case.tuner} | each.to_json() for case, each in found.items()]
        asked.json.write_text(json.dumps(facts, indent=1))
    body = (
        f"{len(found)} cases: {len({case.tuner for case in found})} tuners, each with the configurations of PEFT's tests, "
        f"in fp32, bf16 and fp16; {(time.monotonic() - start) / 60:.0f} minutes. {MEANING}\n\n"
    )
    report("peft_matrix", "Merges of every tuner against PEFT's", body + summary(found))
    sys.exit(any(each.state in ("DIFFERENT", "CRASH") for each in found.values()))


if __name__ == "__main__":
    main()
