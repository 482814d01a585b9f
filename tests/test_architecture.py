"""The layers, held by reading imports: data flows one way, and torch is not loaded for nothing."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from infogrowth.cli import VERBS

GROUND = {
    "errors",
    "files",
    "remote",
    "annotations",
    "config",
    "randomness",
    "rows",
    "distributed",
    "threads",
}
# Lowest first; packages in one layer may not import each other, except where a pair is named below.
LAYERS = [
    GROUND,
    {"neighbors"},
    {"data", "growth"},
    {"blip"},
    {"encoders"},
    {"training", "evaluation", "report"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
PAIRS_ALLOWED = {("training", "evaluation")}  # the loop evaluates while it trains
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
PACKAGE = Path(__file__).parents[1] / "infogrowth"


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def package_of(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if parts[0] == "infogrowth" and len(parts) > 1 else None


MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def test_every_module_belongs_to_a_layer():
    packages = {p.relative_to(PACKAGE).parts[0].removesuffix(".py") for p in MODULES}
    assert packages == set(LEVEL)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_lower_layers_do_not_import_higher_ones(path):
    package = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imported(path):
        other = package_of(name)
        if other is None or other == package or other == "__version__":
            continue
        same_layer_is_fine = package in GROUND or (package, other) in PAIRS_ALLOWED
        allowed = LEVEL[other] < LEVEL[package]
        allowed |= LEVEL[other] == LEVEL[package] and same_layer_is_fine
        assert allowed, f"{path.name} in {package} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_distributed_calls_torch_distributed(path):
    if path.name != "distributed.py":
        assert not [n for n in imported(path) if n.startswith("torch.distributed")]


def test_programs_use_the_installed_package(repository):
    """No path tricks in scripts/ and train/."""
    for program in [*repository.glob("scripts/*.py"), *repository.glob("train/*.py")]:
        assert "sys.path" not in program.read_text(), f"{program.name} meddles with sys.path"


LOADS_TORCH = {"torch", "torchvision", "timm", "transformers", "fairscale", "torchmetrics"}
PROGRAMS = [
    path
    for folder in ("scripts", "train", "benchmarks")
    for path in sorted((PACKAGE.parent / folder).rglob("*.py"))
]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda p: str(p.relative_to(PACKAGE.parent)))
def test_programs_import_the_package_before_torch(path):
    """How threads wait is read when torch is loaded; `import infogrowth` sets it (threads.py)."""
    body = ast.parse(path.read_text()).body
    packages = [
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).partition(".")[0]
        for node in body
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    torch_at = [number for number, name in enumerate(packages) if name in LOADS_TORCH]
    assert not torch_at or "infogrowth" in packages[: torch_at[0]], (
        "put `import infogrowth.threads  # noqa: F401` first"
    )


@pytest.mark.parametrize(
    "statement",
    [
        "import infogrowth",
        "from infogrowth import load_annotations",
        f"import {', '.join(f'infogrowth.commands.{verb}' for verb in VERBS)}",
    ],
)
def test_light_imports_stay_light(statement):
    check = f"{statement}; import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


def test_no_module_is_too_long_to_be_one_idea():
    lengths = {p.name: len(p.read_text().splitlines()) for p in MODULES}
    assert {n: length for n, length in lengths.items() if length > 400} == {}
