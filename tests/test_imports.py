"""Imports point one way, and heavy libraries stay where they belong: read from our own import statements."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "selfemo_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))

MAY_IMPORT = {
    "algo": set(),
    "model": set(),
    "data": set(),
    "config": set(),
    "appendlog": set(),
    "allocator": set(),
    "checksums": set(),
    "distributed": {"config"},
    "runlog": {"config", "appendlog"},
    "phases": {"config", "appendlog", "distributed"},
    "checkpoint": {"model", "config", "appendlog", "checksums", "distributed", "phases", "train_step"},
    "train_step": {"algo", "model", "data", "config"},
    "scoring": {"algo", "data", "config", "rollout"},
    "rollout": {
        "algo",
        "allocator",
        "model",
        "data",
        "config",
        "appendlog",
        "distributed",
        "phases",
        "checkpoint",
        "scoring",
    },
    "experts": {"data", "config", "appendlog", "rollout"},
    "selfplay": {"algo", "model", "data", "config", "appendlog", "phases", "rollout", "scoring", "experts"},
    "reporting": set(),
}
"""Part -> the parts it may use beside itself. What is not named here is a page and may use every part."""

GROUPS = {
    "config_io": "config",
    "config_check": "config",
    "settings": "config",
    "run_note": "config",
    "sinks": "runlog",
    "optimizer": "train_step",
    "compile_ahead": "train_step",
}
ALGO_LIBRARIES = {"jax", "jaxtyping", "numpy"}
"""numpy for what is decided once on the host, as the weight of each target."""
SIDECAR_ONLY = {"torch", "vllm"}


def part_of(module: str) -> str:
    """`selfemo_jax.model.decoder` -> model; `selfemo_jax.config_io` -> config; a `__main__` is a page."""
    if module.endswith(".__main__"):
        return module
    name = (module.split(".") + ["", ""])[1]
    return GROUPS.get(name, name)


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(source: str, module: str, is_package: bool) -> Iterator[tuple[str, bool]]:
    """(imported module, whether the statement stands at the top level) of every import in the source."""
    tree = ast.parse(source)
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join(package[: len(package) - node.level + 1] + ([base] if base else []))
            if base == "selfemo_jax":
                for alias in node.names:
                    yield f"{base}.{alias.name}", id(node) in top
            else:
                yield base, id(node) in top


def of(path: Path) -> list[tuple[str, bool]]:
    return list(imports(path.read_text(encoding="utf-8"), module_name(path), path.name == "__init__.py"))


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_one_way(path):
    part = part_of(module_name(path))
    for target, _ in of(path):
        if target.split(".")[0] != "selfemo_jax" or part not in MAY_IMPORT:
            continue
        used = part_of(target)
        assert used in MAY_IMPORT[part] | {part, ""}, f"{part} must not import {target}"


def test_no_module_imports_itself_through_others():
    names = {module_name(path) for path in MODULES}
    uses: dict[str, set[str]] = {}
    for path in MODULES:
        targets = {target for target, top in of(path) if top}
        uses[module_name(path)] = {name for name in names if name in targets}
    remaining = dict(uses)
    while ready := [name for name, used in remaining.items() if not used & remaining.keys()]:
        for name in ready:
            del remaining[name]
    assert not remaining, f"a circle of imports among {sorted(remaining)}"


def test_nothing_imports_a_page():
    parts = set(MAY_IMPORT) | {""}
    for path in MODULES:
        if part_of(module_name(path)) not in parts:
            continue
        for target, _ in of(path):
            if target.startswith("selfemo_jax."):
                assert part_of(target) in parts, f"{module_name(path)} imports the page {target}"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_libraries_stay_where_they_belong(path):
    module = module_name(path)
    part = part_of(module)
    sidecar = module.startswith("selfemo_jax.rollout.sidecar")
    for target, top in of(path):
        library = target.split(".")[0]
        assert sidecar or library not in SIDECAR_ONLY, f"{module} imports {library}"
        if sidecar:
            own = target.startswith("selfemo_jax.rollout.sidecar.")
            assert own or library != "selfemo_jax", f"{module} runs in its own environment, imports {target}"
        if part == "algo":
            ours = library == "selfemo_jax"
            standard = library in sys.stdlib_module_names
            assert ours or standard or library in ALGO_LIBRARIES, f"{module} imports {library}"
        if part == "data":
            assert library not in ("jax", "jaxlib"), f"{module} imports {library}"
            if library == "grain":
                assert module == "selfemo_jax.data.pipeline" and not top, f"{module} imports grain"
        if part in ("config", "runlog"):
            assert library != "jax" or not top, f"{module} imports jax when it is imported"


def test_hf_convert_reads_weights_without_jax():
    path = PACKAGE / "model" / "hf_convert.py"
    assert not [target for target, top in of(path) if top and target.split(".")[0] in ("jax", "jaxlib")]


NOT_INSTALLED = {"bench_refresh", "report_picture", "train_tokenizer"}
"""Tools of those who work on the project: they measure it, or make again what it ships."""


def scripts() -> dict[str, str]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


@pytest.mark.parametrize("command", scripts())
def test_a_console_script_has_its_function(command):
    module, function = scripts()[command].split(":")
    path = ROOT / Path(*module.removeprefix("selfemo_jax.tools.").split(".")).with_suffix(".py")
    if module.startswith("selfemo_jax.tools."):
        path = ROOT / "tools" / path.name
    body = ast.parse(path.read_text(encoding="utf-8")).body
    assert function in [node.name for node in body if isinstance(node, ast.FunctionDef)]


def test_every_tool_that_a_user_runs_is_a_console_script_too():
    tools = {path.stem for path in (ROOT / "tools").glob("*.py")} - NOT_INSTALLED - {"__init__"}
    found = (target for target in scripts().values() if ".tools." in target)
    named = [target.removeprefix("selfemo_jax.tools.") for target in found]
    assert sorted(named) == [f"{name}:main" for name in sorted(tools)], "see NOT_INSTALLED"
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert '"selfemo_jax.tools": "tools"' in setup, "the scripts find the tools inside the package"


def test_no_name_says_nothing():
    assert not [path for path in MODULES if path.stem in ("utils", "helpers", "misc", "common")]


def test_the_reader_of_imports_sees_every_spelling():
    source = (
        "import torch.nn as nn\nfrom . import rewards\nfrom ..data import grammar\n"
        "from selfemo_jax import train\ndef f():\n    import vllm\n"
    )
    assert list(imports(source, "selfemo_jax.algo.losses", False)) == [
        ("torch.nn", True),
        ("selfemo_jax.algo", True),
        ("selfemo_jax.data", True),
        ("selfemo_jax.train", True),
        ("vllm", False),
    ]
    assert list(imports("from .x import y", "selfemo_jax.algo", True)) == [("selfemo_jax.algo.x", True)]
