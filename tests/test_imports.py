"""Which modules may import which, checked in the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "titan_fast"

# Modules that may import only these of the project's own modules. Those that are not named here may import anything
# except `loop`, which only `train` imports.
LEAVES: dict[str, set[str]] = {
    "redaction": set(),
    "errors": {"redaction"},
    "flavors": set(),
    "command_line": {"errors"},
    "config": {"command_line", "errors", "flavors"},
    "flops": {"command_line", "errors", "flavors", "config"},
    "distributed": {"errors", "config"},
    "tokenizer": {"errors", "config"},
    "float8": {"errors", "config", "flavors"},
    "documents": {"errors"},
    "ops": {"documents", "errors", "config", "flavors", "float8", "wide_products"},
    "shards": set(),
    "model": {"flavors", "ops", "shards"},
    "wide_products": set(),
    "loss": {"ops", "wide_products"},
    "masters": {"config", "shards"},
    "optim": {"config", "errors", "masters", "shards"},
    "compilation": {"config", "errors", "loss", "model", "ops"},
    "hf": {"command_line", "flavors", "errors", "model", "hf_convert"},
    "hf_files": {"errors", "flavors", "hf"},
    "meta_files": {"errors", "flavors", "hf", "hf_files"},
    "hf_tokenizer": {"tokenizer"},
    "activation_checkpoint": {"config", "documents", "errors", "model"},
    "direct_fsdp": {"errors"},
    "wide_gradients": {"config", "errors", "loss", "model"},
    "parallel": {
        "activation_checkpoint",
        "compilation",
        "config",
        "direct_fsdp",
        "documents",
        "errors",
        "flavors",
        "float8",
        "loss",
        "masters",
        "model",
        "wide_gradients",
    },
}


def imported(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def own_modules(names: set[str]) -> set[str]:
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    return {name.split(".")[1] for name in names if name.startswith("titan_fast.")} & modules


@pytest.mark.parametrize("room", LEAVES)
def test_room_imports_only_what_it_may(room: str) -> None:
    found = own_modules(imported(PACKAGE / f"{room}.py"))
    assert found <= LEAVES[room], f"{room} imports {found - LEAVES[room]}"


def test_only_train_imports_the_loop() -> None:
    importers = {path.stem for path in PACKAGE.glob("*.py") if "loop" in own_modules(imported(path))}
    assert importers == {"train"}


def test_only_ops_imports_kernels() -> None:
    importers = {
        path.stem
        for path in PACKAGE.glob("*.py")
        if any(name.split(".")[0] == "titan_kernels" for name in imported(path))
    }
    assert importers == {"ops"}


def test_kernels_know_nothing_of_the_project() -> None:
    for path in (ROOT / "kernels" / "titan_kernels").glob("*.py"):
        assert not any(name.split(".")[0] == "titan_fast" for name in imported(path)), path


@pytest.mark.parametrize("module", ["config", "flavors", "errors", "train", "flops"])
def test_starting_does_not_wait_for_torch(module: str) -> None:
    names = {name.split(".")[0] for name in imported(PACKAGE / f"{module}.py", top_level_only=True)}
    assert "torch" not in names
