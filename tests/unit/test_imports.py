"""Who imports whom: the arrows of docs/architecture.md, read off the syntax trees of the whole code."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VALUES = (
    "errors", "answer", "digest", "units", "limits", "oci", "reference", "config", "log", "notify", "stats", "scrape",
    "exposition", "process", "private", "versions",
)  # fmt: skip
PACKAGES = ("format", "containerd", "registry", "chunks", "mount", "container", "deploy", "cli")
MODULES = ("tree", "child", "control_client", "database")

# Each part and the parts that it may import; itself always. `import lazyfs` (the version) counts as "values".
ARROWS: dict[str, set[str]] = {
    "values": set(),
    "format": {"values"},
    "containerd": {"values"},
    "registry": {"values", "format", "containerd"},
    "chunks": {"values", "format", "registry", "child", "database"},
    "tree": {"values", "format"},
    "database": {"values"},
    "child": {"values", "format", "tree"},
    "mount": {"values", "format", "registry", "chunks", "tree", "child", "container", "control_client"},
    "control_client": {"values"},
    "container": {"values"},
    "deploy": {"values", "container"},
    "indexer": {"values", "format", "registry"},
    "snapshotter": {"values", "control_client", "containerd", "database"},  # of containerd its protocol's messages
    "cli": {
        "values", "format", "registry", "chunks", "tree", "child", "mount", "control_client", "container", "indexer",
        "containerd", "snapshotter", "deploy",
    },
}  # fmt: skip

# Foreign libraries and the only parts that may know them.
OWNERS: dict[str, set[str]] = {
    "pyfuse3": {"mount"},
    "trio": {"chunks", "mount"},
    "requests": {"registry"},
    "urllib3": {"registry"},
    "grpc": {"containerd", "snapshotter"},
    "google": {"containerd", "snapshotter"},
    "lru": {"chunks"},
    "sqlite3": {"database", "chunks", "snapshotter"},
    "argparse": {"cli", "mount", "child", "snapshotter"},
    "prometheus_client": {"values"},  # exposition alone, and only when asked
}
PURE_BANS = {"socket", "subprocess", "threading", "http", "urllib", "tempfile", "shutil", "sqlite3"}


def part_of(module: str) -> str:
    """Return the part of the code that `module` (dotted) belongs to; "" for foreign ones."""
    words = module.split(".")
    if words[0] in ("indexer", "snapshotter"):
        return words[0]
    if words[0] != "lazyfs":
        return ""
    if len(words) == 1 or words[1] in VALUES or words[1].startswith("__"):
        return "values"
    assert words[1] in PACKAGES + MODULES, f"{module} belongs to no part that docs/architecture.md names"
    return words[1]


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted module) of every import in a file, those inside functions and TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_bytes(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative imports hide who imports whom"
            module = node.module or ""
            if (ROOT / module.replace(".", "/")).is_dir():
                for alias in node.names:  # modules of a package, or a name that its __init__ defines
                    yield node.lineno, module if alias.name.startswith("__") else f"{module}.{alias.name}"
            else:
                yield node.lineno, module


def sources() -> list[Path]:
    found = [p for top in ("lazyfs", "indexer", "snapshotter") for p in sorted((ROOT / top).rglob("*.py"))]
    found = [path for path in found if not path.name.endswith("_pb2.py")]  # generated
    assert len(found) > 20
    return found


def name_of(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_arrows(path: Path) -> None:
    name = name_of(path)
    here = "cli" if name == "lazyfs.__main__" else part_of(name)
    wrong = []
    for line, module in imports_of(path):
        there = part_of(module)
        if there and there != here and there not in ARROWS[here]:
            wrong.append(f"line {line}: {name} ({here}) imports {module} ({there})")
        top = module.split(".")[0]
        if top in OWNERS and here not in OWNERS[top]:
            wrong.append(f"line {line}: {name} ({here}) imports {module}, which only {sorted(OWNERS[top])} may")
        if here == "format" and top in PURE_BANS:
            wrong.append(f"line {line}: {name} is pure: bytes in, objects out; it imports {module}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_no_vague_module_names(path: Path) -> None:
    assert not {"manager", "helper", "helpers", "util", "utils"} & set(name_of(path).split("."))


def test_the_daemon_takes_of_containers_only_mounts_and_the_sweep() -> None:
    """What a container is made of is the command line's business; the daemon mounts, and sweeps what crashes left."""
    for path in sorted((ROOT / "lazyfs" / "mount").rglob("*.py")):
        taken = {module for _, module in imports_of(path) if module.startswith("lazyfs.container")}
        assert taken <= {"lazyfs.container.mounts", "lazyfs.container.sweep"}, f"{path} imports {taken}"


def test_the_holder_loads_nothing_that_can_break() -> None:
    """It outlives upgrades of all else, and starts where no library of ours is installed."""
    names = "m for m in sys.modules if m.partition('.')[0] not in sys.stdlib_module_names"
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import lazyfs.mount.holder; print(*({names}))"
    words = [sys.executable, "-I", "-S", "-c", code]  # -S: nothing of site-packages can be found
    told = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, timeout=60).stdout.split()
    ours = {"children", "deaths", "greeting", "holder", "premises"}
    values = {"lazyfs", "lazyfs.errors", "lazyfs.limits", "lazyfs.mount", "lazyfs.notify", "lazyfs.units"}
    assert set(told) == {"__main__", *values, *(f"lazyfs.mount.{name}" for name in ours)}


def test_the_document_names_every_part() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    for part in (*PACKAGES, *MODULES, *VALUES):
        assert part in text, f"docs/architecture.md does not tell of {part}"


def test_importing_any_module_starts_nothing() -> None:
    """At import a module defines things; statements with effects belong into functions."""
    allowed = (
        ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign,
        ast.If, ast.Try,
    )  # fmt: skip
    for path in sources():
        for node in ast.parse(path.read_bytes()).body:
            is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            assert is_docstring or isinstance(node, allowed), f"{path}:{node.lineno}: work at import time"
