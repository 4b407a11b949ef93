"""Two really different styles to train on: pirates' talk in prose, and orders turned into JSON."""

from __future__ import annotations

import json
import random
from pathlib import Path

from models import EXAMPLES

HELD_OUT = 16
"""Samples of each style that are not trained on."""

NUMBERS = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"]
GOODS = ["lamp", "red chair", "oak table", "kettle", "wool rug", "mirror", "bread knife", "blue vase", "clock", "desk"]
PEOPLE = ["Ada Reid", "Ben Okafor", "Chiara Rossi", "Dmitri Volkov", "Emre Aydin", "Fatima Noor", "Greta Lund"]
PLACES = ["Leith", "Porto", "Ghent", "Turku", "Graz", "Lagos", "Nara", "Quito"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday"]
WAYS = [
    "{who} wants {count} {what}s in {where} by {day}.",
    "Please send {count} {what}s to {where}; {who} is at home on {day}.",
    "On {day} {who} of {where} is owed {count} {what}s.",
]


def style_file(style: str, folder: Path) -> Path:
    """The samples of ``pirate`` or ``orders`` as a JSONL file."""
    if style == "pirate":
        return EXAMPLES / "pirate.jsonl"
    draw = random.Random("orders")
    lines = []
    for _ in range(80):
        place = draw.randrange(len(NUMBERS))
        facts = {"who": draw.choice(PEOPLE), "what": draw.choice(GOODS), "where": draw.choice(PLACES)}
        facts["day"] = draw.choice(DAYS)
        prompt = draw.choice(WAYS).format(count=NUMBERS[place], **facts)
        surname = facts["who"].split()[-1].upper()
        order = {"ref": f"{surname}/{facts['day'][:3].upper()}", "sku": facts["what"].replace(" ", "-"), "n": place + 2}
        lines.append({"prompt": prompt + "\n", "completion": json.dumps(order | {"to": facts["where"].lower()})})
    file = folder / "orders.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file
