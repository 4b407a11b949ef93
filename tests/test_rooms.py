"""How the files of loratool depend on one another; the direction between rooms is import-linter's (`pyproject.toml`)."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
MOST_FILES = 10


def test_no_files_import_one_another_in_a_circle():
    graph = grimp.build_graph("loratool", "registry", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(imports) > 300

    circle = None
    try:
        tuple(TopologicalSorter(imports).static_order())
    except CycleError as error:
        circle = " -> ".join(reversed(error.args[1]))
    assert circle is None, circle


def code_of(file: Path) -> Iterator[str]:
    """The tokens of a file, without its comments and docstrings."""
    text = file.read_text(encoding="utf-8")
    said = set()
    for node in ast.walk(ast.parse(text)):
        for each in getattr(node, "body", ()) if isinstance(getattr(node, "body", ()), list) else ():
            if (
                isinstance(each, ast.Expr)
                and isinstance(each.value, ast.Constant)
                and isinstance(each.value.value, str)
            ):
                said.update(range(each.lineno, (each.end_lineno or each.lineno) + 1))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        is_said = token.type == tokenize.COMMENT or (token.type == tokenize.STRING and token.start[0] in said)
        if not is_said:
            yield token.string


@pytest.mark.parametrize("name", ["adalora", "dylora", "kohya", "nf4"])
def test_a_kind_a_format_and_a_storage_are_named_in_few_files(name: str) -> None:
    """Its own files, its tables, the trainer that makes it, and the command that is for it alone."""
    files = [file for top in ("loratool", "registry") for file in sorted((ROOT / top).rglob("*.py"))]
    naming = [file for file in files if name in file.stem or any(name in token.lower() for token in code_of(file))]
    assert 2 <= len(naming) <= MOST_FILES, [str(file.relative_to(ROOT)) for file in naming]


def test_readers_and_writers_name_no_kind_and_no_format() -> None:
    from loratool.formats.kinds import KINDS, LORA
    from loratool.formats.table import FORMATS

    named = {kind.name for kind in KINDS.values()} - {LORA, "full", "mixed"} | {row.name for row in FORMATS} - {"peft"}
    for name in ("read", "write", "adapter_draft", "lora_config"):
        words = {token.strip("\"'").lower() for token in code_of(ROOT / "loratool" / "formats" / f"{name}.py")}
        assert not words & named, name


def test_no_room_but_those_of_updates_and_formats_names_a_kind_that_nothing_trains() -> None:
    from loratool.formats.kinds import COMPUTED, LORA

    named = COMPUTED - {LORA, "dylora", "adalora", "full"}
    for file in sorted((ROOT / "loratool").rglob("*.py")):
        if file.parent.name not in ("updates", "formats"):
            words = {token.strip("\"'").lower() for token in code_of(file)}
            assert not words & named, file
