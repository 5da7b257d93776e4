"""The bounds stand in one place, each is used, and docs/limits.md lists them all."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from lazyfs import limits
from tests.helpers import limits_doc

ROOT = Path(__file__).parents[2]
UNITS = {"KiB", "MiB", "GiB"}
BOUNDS = re.compile(r"_?MAX_|TIMEOUT|PATIENCE|_WAIT$|LONGEST|SLOWEST")
WAITS = {"settimeout", "move_on_after", "fail_after"}

# Values that others give: the kernel, a format, a protocol. Nothing is chosen there.
_GIVEN = {
    "indexer.rewrite": {"_MAX_OCTAL_ID", "_MAX_OCTAL_SIZE"},  # what a field of a tar header holds
    "lazyfs.chunks.catalog": {"MAX_NUMBER"},  # what a node id has beside a row
    "lazyfs.container.mounts": {"_MAX_DATA"},  # a page of options is what mount(2) copies
    "lazyfs.container.users": {"_MAX_ID"},  # the kernel's and docker's
    "lazyfs.containerd.address": {"_MAX_NAME", "_MAX_SOCKET"},  # containerd's; sockaddr_un
    "lazyfs.format.columns": {"_MAX_COLUMNS"},  # of our own form of tables
    "lazyfs.format.entry": {"MAX_NAME", "MAX_PATH"},  # the kernel's, named in the page's head
    "lazyfs.format.erofs_layout": {"MAX_BLOCKS"},
    "lazyfs.format.erofs_xattrs": {"_MAX_NAME", "_MAX_SHARED", "_MAX_VALUE"},
    "lazyfs.format.footer": {"MAX_FOOTER"},
    "lazyfs.format.inflate": {"LONGEST_MAGIC"},
    "lazyfs.format.table_build": {"_MAX_XATTRS"},  # what the count of an entry holds
    "lazyfs.format.tar": {"MAX_OWNER", "MAX_XATTR_VALUE"},  # the kernel's
    "lazyfs.format.toc_json": {"MAX_ID", "MAX_MAJOR", "MAX_MINOR"},  # the kernel's
    "lazyfs.format.trace": {"_MAX_NUMBER", "_MAX_TIME"},  # what eight bytes hold, and some arithmetic with it
    "lazyfs.mount.erofs_mount": {"_MAX_MESSAGE", "_MAX_STRING"},  # fsconfig(2)
    "lazyfs.mount.greeting": {"MAX_READAHEAD", "MAX_READ_PAGES", "MAX_WRITE", "_MAX_PAGES"},  # of FUSE's INIT
    "lazyfs.registry.http.transport": {"_MAX_DIGITS"},  # of a number of 63 bits
    "snapshotter.overlay": {"_MAX_ID"},  # the kernel's
    "snapshotter.sockets": {"_MAX_PATH"},  # sockaddr_un
}
# Numbers by which an algorithm is tuned, and what only shares a name with bounds.
_TUNED = {
    "indexer.source": {"timeout=_POLL"},  # between looks, whoever waits goes on waiting
    "indexer.threads": {"timeout=_POLL"},
    "lazyfs.cli.waterfall_text": {"MAX_WIDTH"},  # of a picture
    "lazyfs.format.table": {"_LONGEST_RUN"},  # how far one look goes
    "lazyfs.mount.chain_layers": {"move_on_after(_TAILS_FIRST)"},  # an order
    "lazyfs.mount.connection": {"_LONGEST_TURN"},  # of one request that others wait for
    "lazyfs.mount.filling": {"move_on_after(_LOOK)"},
    "lazyfs.mount.holder": {"_LONGEST_AGAIN"},  # a pause between tries
    "lazyfs.registry.health": {"_LONGEST_DISTRUST", "_LONGEST_PAUSE"},  # pauses between tries
    "lazyfs.registry.http.ranges": {"MAX_READ"},  # the size of a step
    "snapshotter.image_service": {"_LONGEST"},  # a deadline beyond it is none
}


def test_the_page_lists_every_bound_as_it_is() -> None:
    page = (ROOT / "docs/limits.md").read_text("utf-8")
    assert page == limits_doc.document(), "python -m tests.helpers.limits_doc > docs/limits.md"
    told = [name for section in limits_doc.sections() for name, _ in section.bounds]
    defined = [name for name in vars(limits) if name.isupper()]
    assert told == defined and len(set(told)) == len(told)


def test_each_bound_is_used() -> None:
    used = set()
    for path in sources():
        for names in re.findall(
            r"^ *from lazyfs\.limits import (\([^)]*\)|.*)$", path.read_text("utf-8"), re.MULTILINE
        ):
            used |= set(re.findall(r"\w+", names))
    assert used == {name for name in vars(limits) if name.isupper()}


def test_no_bound_stands_anywhere_else() -> None:
    found: dict[str, set[str]] = {}
    for path in sources():
        if path != Path(limits.__file__) and (names := set(bounds_of(ast.parse(path.read_bytes(), str(path))))):
            found[".".join(path.relative_to(ROOT).with_suffix("").parts)] = names
    known: dict[str, set[str]] = {}
    for each in (_GIVEN, _TUNED):
        for module, names in each.items():
            assert not names & known.get(module, set()), f"{module}: on two lists"
            known[module] = known.get(module, set()) | names
    new = {module: more for module, names in found.items() if (more := names - known.get(module, set()))}
    assert not new, f"bounds stand in lazyfs/limits.py: {new}"
    gone = {module: less for module, names in known.items() if (less := names - found.get(module, set()))}
    assert not gone, f"these are not there any more: {gone}"


def test_what_the_scan_finds() -> None:
    code = """
_MAX_A = 64 << 10
_MAX_DERIVED = 2 * MAX_NAMES
B_WAIT: float = 1.0
MAX_C, _D = 8 * KiB, 3
_LOOK = 0.5
_OTHER = 7
def wait(sock, patience=3.0, *, timeout: float = 4.0, tries=2):
    sock.settimeout(5)
    with trio.move_on_after(_LOOK), trio.fail_after(HOLDER_TIMEOUT):
        ask(timeout=2 * 3.0)
        ask(timeout=None)
"""
    assert sorted(bounds_of(ast.parse(code))) == [
        "B_WAIT", "MAX_C", "_MAX_A", "move_on_after(_LOOK)", "patience=3.0", "settimeout(5)",
        "timeout=2 * 3.0", "timeout=4.0",
    ]  # fmt: skip


def sources() -> list[Path]:
    return [path for top in ("lazyfs", "indexer", "snapshotter") for path in sorted((ROOT / top).rglob("*.py"))]


def bounds_of(tree: ast.Module) -> Iterator[str]:
    """Yield what looks like a bound and has a number: names of the module, defaults of parameters, waits."""
    numbers = {name: value for name, value in _defined(tree) if _is_number(value)}
    yield from (name for name in numbers if BOUNDS.search(name))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            waits = [(f"{called}(%s)", node.args[0])] if called in WAITS and node.args else []
            waits += [("timeout=%s", each.value) for each in node.keywords if each.arg == "timeout"]
            for form, value in waits:
                name = value.id if isinstance(value, ast.Name) else ""
                if _is_number(value) or name in numbers:
                    yield form % ast.unparse(value)
        elif isinstance(node, ast.arguments):
            named = [*node.posonlyargs, *node.args]
            pairs = [*zip(named[len(named) - len(node.defaults) :], node.defaults, strict=True)]
            pairs += [(one, value) for one, value in zip(node.kwonlyargs, node.kw_defaults, strict=True) if value]
            for one, value in pairs:
                if re.search("timeout|patience", one.arg) and _is_number(value):
                    yield f"{one.arg}={ast.unparse(value)}"


def _defined(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        value = getattr(node, "value", None)
        for target in targets:
            if isinstance(target, ast.Name) and value is not None:
                yield target.id, value
            elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                yield from zip((ast.unparse(one) for one in target.elts), value.elts, strict=True)


def _is_number(value: ast.expr) -> bool:
    """Whether an expression has numbers and units alone: `8 * MiB`, not `2 * MAX_NAMES`."""
    inside = list(ast.walk(value))
    if any(
        not isinstance(one, ast.BinOp | ast.UnaryOp | ast.operator | ast.unaryop | ast.Constant | ast.Name | ast.Load)
        for one in inside
    ):
        return False
    names = {one.id for one in inside if isinstance(one, ast.Name)}
    numbers = [one.value for one in inside if isinstance(one, ast.Constant)]
    return names <= UNITS and bool(numbers or names) and all(type(one) in (int, float) for one in numbers)
