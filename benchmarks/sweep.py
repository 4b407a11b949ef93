"""Every model class of transformers, small, with a LoRA on all its linear layers, merged by PEFT and by loratool.

    python benchmarks/sweep.py [--family llama] [--class-name LlamaForCausalLM] [--dtype bf16] [--sample 50] [--resume] [--record]

Prints a line for each class: EQUAL, REFUSED and why, DIFFERENT, CRASH; then a table of the reasons. The outcomes are also
appended to a file, from which ``--resume`` continues.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import against_peft
import peft
import transformers
from against_peft import DTYPES, MEANING, STATES, Outcome
from case_workers import run_cases
from results import report, table
from small_models import NotBuiltError, classes, small_model

OUTCOMES: Final = Path(__file__).parent / ".data" / "sweep.jsonl"
NOT_BUILT: Final = "NOT BUILT"
SECONDS: Final = 150.0
"""How long one class may take."""

LENGTH: Final = 120
"""Characters of a reason in the table."""

MANY: Final = 12
"""Model types that a row of the table names."""


@dataclass(frozen=True, slots=True)
class Case:
    """A model type and one of its classes."""

    model_type: str
    class_name: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.model_type} | {self.class_name} | {self.dtype}"


def outcome(case: Case) -> Outcome:
    try:
        model = small_model(case.model_type, case.class_name)
    except NotBuiltError as error:
        return Outcome(NOT_BUILT, str(error))
    return against_peft.compare(
        lambda: model, lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear"), case.dtype
    )


def lost(case: Case, why: str) -> Outcome:
    return Outcome("CRASH", why)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", help="only this model type")
    parser.add_argument("--class-name", help="only this class")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--sample", type=int, help="this many classes, the same ones each time")
    parser.add_argument("--outcomes", type=Path, default=OUTCOMES, help="the file of outcomes")
    parser.add_argument("--resume", action="store_true", help="leave out the classes whose outcome is in that file")
    parser.add_argument(
        "--again", metavar="STATE", choices=[*STATES, NOT_BUILT], help="with --resume: but for these, run again"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--record", action="store_true", help="write the table to RESULTS.md")
    return parser.parse_args()


def chosen(asked: argparse.Namespace) -> list[Case]:
    """Return the cases that the command line asks for."""
    wanted = [
        Case(model_type, class_name, asked.dtype)
        for model_type, class_name in classes()
        if asked.family in (None, model_type) and asked.class_name in (None, class_name)
    ]
    if asked.sample and asked.sample < len(wanted):
        wanted = random.Random(0).sample(wanted, asked.sample)
    return wanted


def known(file: Path) -> Iterator[tuple[Case, Outcome]]:
    """Yield the cases of a file of outcomes."""
    for line in file.read_text().splitlines() if file.exists() else ():
        facts = json.loads(line)
        yield Case(*(facts.pop(key) for key in ("model_type", "class_name", "dtype"))), Outcome(**facts)


def reasons(found: Mapping[Case, Outcome]) -> str:
    """Return a table of why classes are not equal."""
    types: dict[tuple[str, str], set[str]] = defaultdict(set)
    count: Counter[tuple[str, str]] = Counter()
    for case, each in found.items():
        if each.state not in ("EQUAL", "PEFT FAILS", NOT_BUILT):
            reason = each.state, re.sub(r"'[^']*'|\b\d+\b", "…", each.detail)[:LENGTH].replace("|", "/")
            count[reason] += 1
            types[reason].add(case.model_type)
    rows = []
    for (state, reason), number in sorted(count.items(), key=lambda item: (STATES.index(item[0][0]), -item[1])):
        names = sorted(types[state, reason])
        more = f" and {len(names) - MANY} more" if len(names) > MANY else ""
        rows.append([state.lower(), str(number), reason, ", ".join(names[:MANY]) + more])
    return table(["outcome", "classes", "reason", "model types"], rows)


def main() -> None:
    asked = arguments()
    transformers.utils.logging.set_verbosity_error()
    wanted = chosen(asked)
    found = {case: each for case, each in known(asked.outcomes) if each.state != asked.again} if asked.resume else {}
    found = {case: each for case, each in found.items() if case in set(wanted)}
    asked.outcomes.parent.mkdir(exist_ok=True)
    with asked.outcomes.open("a" if asked.resume else "w") as file:
        rest = [case for case in wanted if case not in found]
        for case, each in run_cases(rest, outcome, lost, workers=asked.workers, seconds=SECONDS):
            found[case] = each
            file.write(json.dumps(asdict(case) | each.to_json()) + "\n")
            file.flush()
            print(f"{case}: {each}", flush=True)
    count = Counter(each.state for each in found.values())
    columns = [*STATES, NOT_BUILT]
    states = table([state.lower() for state in columns], [[str(count[state]) for state in columns]])
    body = (
        f"{len(found)} classes of {len({case.model_type for case in found})} model types, {asked.dtype}, a LoRA on all linear "
        f"layers. {MEANING} not built: small sizes for it were not found.\n\n{states}\n\n{reasons(found)}"
    )
    report("sweep", "Merges into every model class against PEFT's", body)
    sys.exit(bool(count["DIFFERENT"] or count["CRASH"]))


if __name__ == "__main__":
    main()
