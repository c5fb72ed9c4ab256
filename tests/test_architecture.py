"""The house rules that a machine can check: the direction of imports, file sizes, no machine's own
paths.
"""

from __future__ import annotations

import ast
import os
import subprocess
from pathlib import Path

import pytest

import sparse_kernels

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sparse_kernels"

# From the ground up; a module imports its own room and the rooms below it, nothing above.
ROOMS = (
    ("_load", "_version"),
    ("pattern", "layout", "geometry"),
    ("backends",),
    ("plan", "plan_cache", "plan_measure", "plan_variants"),
    ("ops",),
    ("nn",),
    ("training",),
    ("workbench",),
    ("info",),
    ("cli", "__main__"),
)
OPEN_TO_ALL = ("_native", "__version__")  # the compiled module, and a string
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
SOURCE_SUFFIXES = {".py", ".cpp", ".h", ".cu", ".cuh", ".cmake"}
# Written with gaps so that this file does not contain what it looks for.
MACHINE_PATHS = ("/" + "work/", "/" + "root/", "/" + "home/", "/" + "Users/")
NATIVE_FLAG = "march" + "=native"


def project_files() -> list[Path]:
    """Files of the project: what git tracks or would track; every file outside build products
    without git.
    """
    listing = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listing.returncode == 0:
        names = [name for name in listing.stdout.decode().split("\0") if name]
    else:
        skipped = {"build", "dist", ".venv", ".git", "__pycache__"}
        names = [
            str(path.relative_to(ROOT))
            for path in ROOT.rglob("*")
            if path.is_file() and not skipped & set(path.parts)
        ]
    return [path for name in sorted(set(names)) if (path := ROOT / name).is_file()]


def sources() -> list[Path]:
    return [path for path in project_files() if path.suffix in SOURCE_SUFFIXES]


def package_modules() -> list[Path]:
    return [path for path in sources() if path.suffix == ".py" and PACKAGE in path.parents]


def room_of(path: Path, package: Path = PACKAGE) -> str:
    """`nn/linear.py` -> "nn", `plan.py` -> "plan"; `_pattern_index.py` is a private part of
    "pattern".
    """
    return public_room(path.relative_to(package).parts[0].removesuffix(".py"))


def public_room(name: str) -> str:
    """`_pattern_index` -> "pattern"; a name that is a room of its own (`_load`) stays."""
    if name in LEVEL or name in OPEN_TO_ALL or not name.startswith("_"):
        return name
    return name[1:].split("_")[0]


def imported_rooms(path: Path, root: Path = PACKAGE) -> list[tuple[int, str]]:
    """(line, room) of every import of this package in `path`, imports inside functions included."""
    package = ["sparse_kernels", *path.relative_to(root).parent.parts]
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            # `from sparse_kernels import nn` names the room in the alias.
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
    return [
        (line, public_room(name.split(".")[1]) if "." in name else "")
        for line, name in found
        if name.split(".")[0] == "sparse_kernels"
    ]


def upward_imports(path: Path, package: Path = PACKAGE) -> list[str]:
    room = room_of(path, package)
    level = LEVEL.get(room)
    assert level is not None, f"{path}: room {room!r} is not in ROOMS: give it a place"
    return [
        f"{path.relative_to(package)}:{line} imports {target or 'sparse_kernels'}"
        for line, target in imported_rooms(path, package)
        if target not in OPEN_TO_ALL and LEVEL.get(target, len(ROOMS)) > level
    ]


def test_imports_point_downwards() -> None:
    modules = [path for path in package_modules() if path != PACKAGE / "__init__.py"]
    assert modules, "no module found: the test looks in the wrong place"
    assert [fault for path in modules for fault in upward_imports(path)] == []


def test_an_upward_import_is_found(tmp_path: Path) -> None:
    package = tmp_path / "sparse_kernels"
    module = package / "backends" / "cpu.py"
    module.parent.mkdir(parents=True)
    for statement in (
        "from ..nn.linear import SparseLinear",
        "from .. import plan",
        "import sparse_kernels.training.rules",
        "from sparse_kernels import SparseLinear",
        "def f():\n    from sparse_kernels.ops import linear",
    ):
        module.write_text(statement)
        assert len(upward_imports(module, package)) == 1, statement
    module.write_text(
        "from ..pattern import SparsityPattern\nfrom . import reference\nimport torch.nn"
    )
    assert upward_imports(module, package) == []


def test_files_are_under_400_lines() -> None:
    long = [
        f"{path.relative_to(ROOT)}: {count} lines"
        for path in sources()
        if (count := len(path.read_text(encoding="utf-8").splitlines())) >= 400
    ]
    assert long == []


def is_triton_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(ast.unparse(decorator) == "triton.jit" for decorator in node.decorator_list)


def function_lengths(path: Path) -> list[tuple[str, int, int]]:
    """(name, lines of code, limit) of each function: docstring, comments and blank lines do not
    count; kernels may be twice as long.
    """
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    lengths = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        code = lines[body[0].lineno - 1 : node.end_lineno] if body else []
        count = sum(1 for line in code if line.strip() and not line.strip().startswith("#"))
        lengths.append((node.name, count, 80 if is_triton_kernel(node) else 40))
    return lengths


def test_functions_are_under_40_lines() -> None:
    long = [
        f"{path.relative_to(ROOT)}: {name} has {count} lines"
        for path in package_modules()
        for name, count, limit in function_lengths(path)
        if count >= limit
    ]
    assert long == []


def text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:  # a picture or a data file
        return ""


def test_no_file_names_a_path_of_one_machine() -> None:
    faults = [
        f"{path.relative_to(ROOT)}: {needle}"
        for path in project_files()
        for needle in MACHINE_PATHS
        if needle in text_of(path)
    ]
    assert faults == []


def test_no_build_is_tied_to_the_machine_it_runs_on() -> None:
    assert [str(path) for path in sources() if NATIVE_FLAG in text_of(path)] == []
    assert NATIVE_FLAG not in text_of(ROOT / "Makefile") + text_of(ROOT / "pyproject.toml")


@pytest.mark.skipif(
    os.environ.get("SPARSE_KERNELS_INSTALLED") != "1",
    reason="only `make test` promises that the installed package is under test",
)
def test_the_installed_package_is_under_test() -> None:
    path = Path(sparse_kernels.__file__).resolve()
    assert "site-packages" in path.parts, (
        f"expected sparse_kernels from site-packages, got {path}: "
        "the source tree shadows the installed package"
    )
    from sparse_kernels import _load

    assert "site-packages" in Path(_load.native().__file__).resolve().parts


def test_every_test_file_has_a_name_of_its_own() -> None:
    """Of two files of one name, pytest imports the first and refuses the second."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
