"""Options that several commands share, documented once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

json_option: Decorator = click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")
force_option: Decorator = click.option("--force", is_flag=True, help="Replace an output that loratool wrote before.")
device_option: Decorator = click.option(
    "--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:N]", help="Where to compute."
)
alpha_option: Decorator = click.option(
    "--alpha", type=float, metavar="X", help="lora_alpha of a bare file that does not say its own."
)


def epilog(text: str) -> str:
    """What a command's help ends with: an example, its lines kept as they are."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in text.split("\n"))


def example(text: str) -> dict[str, Any]:
    """Settings of a command whose help ends with an example."""
    return {"epilog": epilog(text)}
