"""How the files of loratool depend on one another; the direction between rooms is import-linter's (`pyproject.toml`)."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter

import grimp


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
