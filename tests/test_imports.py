"""Modules of the package import each other in one direction: in a circle none can be read, tested or changed alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import rnnfast

ROOT = Path(rnnfast.__file__).parent
MODULES = {
    ".".join((ROOT.name, *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in (*ROOT.rglob("*.py"), *ROOT.glob("*.pyi"))
}
KNOWN = [("rnnfast._autograd.vmap", "rnnfast._autograd.op")]  # to go


def imports(tree: ast.AST) -> Iterator[str]:
    """Modules of ours that are imported anywhere, in functions, too, but not for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: a relative import"
            names = ((f"{node.module}.{alias.name}", node.module) for alias in node.names)
            found = (full if full in MODULES else base for full, base in names)
            yield from (name for name in found if name in MODULES)
        else:
            yield from imports(node)


def graph(texts: dict[str, str]) -> dict[str, set[str]]:
    return {name: set(imports(ast.parse(text))) - {name} for name, text in texts.items()}


def test_no_circles() -> None:
    imported = graph({name: path.read_text(encoding="utf-8") for name, path in MODULES.items()})
    assert len(imported) > 20
    try:
        TopologicalSorter(imported).prepare()
    except CycleError as circle:
        pytest.fail("a circle of imports: " + " <- ".join(circle.args[1]))


@pytest.mark.parametrize("back", ["import rnnfast.modules", "def f():\n    from rnnfast import modules"])
def test_a_circle_is_found(back: str) -> None:
    texts = {"rnnfast.modules": "from rnnfast._autograd.op import recurrent", "rnnfast._autograd.op": back}
    with pytest.raises(CycleError):
        TopologicalSorter(graph(texts)).prepare()
    texts["rnnfast._autograd.op"] = "if TYPE_CHECKING:\n    " + back.replace("\n", "\n    ")
    TopologicalSorter(graph(texts)).prepare()
