"""Rules that the package's own source keeps."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.utils._device import _device_constructors

import rnnfast

PACKAGE = Path(rnnfast.__file__).parent

# What torch makes on its default device, which users set for tensors of their own; frombuffer makes some that cannot
# be resized. Types count where they are called: they are in annotations, too.
FACTORIES = {function.__name__.removeprefix("fft_") for function in _device_constructors()} | {"frombuffer"}
TYPES = {
    "Generator",
    "Tensor",
    *(f"{kind}Tensor" for kind in ("Bool", "Byte", "Char", "Double", "Float", "Half", "Int", "Long", "Short")),
}


def factories_without_device(source: str) -> Iterator[tuple[int, str]]:
    """Line and name wherever a factory of torch's is called without `device`, or passed on to be called."""
    tree = ast.parse(source)
    imported = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = {"torch"} | {
        alias.asname for node in imported for alias in node.names if alias.name == "torch" and alias.asname
    }
    own = {
        alias.asname or alias.name: alias.name
        for node in imported
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch"
        for alias in node.names
    }

    def name_of(node: ast.AST) -> str | None:
        """zeros, for torch.zeros, t.zeros after `import torch as t`, or o after `from torch import zeros as o`."""
        if isinstance(node, ast.Name):
            return own.get(node.id)
        root = node
        while isinstance(root, ast.Attribute):
            root = root.value
        is_torchs = isinstance(root, ast.Name) and (root.id in modules or root.id in own)
        return node.attr if isinstance(node, ast.Attribute) and is_torchs else None

    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    placed = {id(call.func) for call in calls if any(keyword.arg == "device" for keyword in call.keywords)}
    called = {id(call.func) for call in calls}
    for node in ast.walk(tree):
        name = name_of(node)
        if id(node) not in placed and (name in FACTORIES or (name in TYPES and id(node) in called)):
            yield node.lineno, str(name)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_tensor_is_made_on_the_default_device(path: Path) -> None:
    """Every tensor says where it is made: with the data, or on the CPU."""
    assert list(factories_without_device(path.read_text())) == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.zeros(3)",
        "torch.zeros(3, dtype=torch.int64).to(x.device)",
        "torch.tensor([1.0])",
        "torch.Tensor([1.0])",
        "torch.Generator()",
        "torch.fft.fftfreq(3)",
        "torch.frombuffer(memory, dtype=torch.uint8)",
        "t.arange(3)",
        "Tensor([1.0])",
        "o(3)",
        "map(torch.ones, sizes)",
    ],
)
def test_the_rule_finds(line: str) -> None:
    imports = "import torch\nimport torch as t\nfrom torch import Tensor, ones as o\n"
    assert [found for found, _ in factories_without_device(imports + line)] == [4]


@pytest.mark.parametrize(
    "line",
    [
        "torch.zeros(3, device=x.device)",
        "torch.zeros_like(x)",
        "x.new_zeros(3)",
        "np.zeros(3)",
        "range(3)",
        "torch.from_numpy(a)",
        "isinstance(x, torch.Tensor)",
        "def f(x: torch.Tensor, g: torch.Generator | None) -> torch.Tensor: ...",
    ],
)
def test_the_rule_lets_pass(line: str) -> None:
    assert list(factories_without_device(f"import numpy as np\nimport torch\n{line}")) == []
