"""docs/limits.md, made from lazyfs/limits.py: `python -m tests.helpers.limits_doc > docs/limits.md`."""

from __future__ import annotations

import io
import tokenize
from dataclasses import dataclass, field
from pathlib import Path

from lazyfs import limits

HEAD = """\
# Limits

What strangers can make lazyfs hold, do or wait for, and what it takes of a node, in the units that each line names.
The page is made from `lazyfs/limits.py`, where all of this stands; a bound is changed there. What an operator sets
(the store's size, memory for chunks, connections, how long a read may take) is in [config.md](config.md).

Two bounds are the kernel's and everywhere: a path has fewer than 4096 bytes, a name 255 at most. What is larger than a
bound is refused with an error that names it, where it is input; a cache forgets what was used longest ago, and a queue
makes whoever comes next wait.

Under memory pressure the cache of decoded chunks (`memory_size`) gives way: while the kernel says that lazyfsd's
cgroup, or the whole node, is short of memory (PSI; `memory.high` and `memory.max` of the cgroup), it is halved every
two seconds down to 6 MiB; once there was no pressure for 30 s, it grows back by an eighth every ten seconds.
"""


@dataclass(frozen=True, slots=True)
class Section:
    """Bounds that belong together: (name, what it counts and why) each."""

    title: str
    bounds: list[tuple[str, str]] = field(default_factory=list)


def sections() -> list[Section]:
    """Read the module's source: headings are comments that begin with "--", reasons those behind or above a bound."""
    found: list[Section] = []
    name = above = ""
    source = Path(limits.__file__).read_text("utf-8")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME and token.start[1] == 0 and token.string.isupper():
            name = token.string
        elif token.type == tokenize.COMMENT:
            words = token.string.removeprefix("#").strip()
            if words.startswith("-- "):
                found.append(Section(words.removeprefix("-- ")))
            elif token.start[1] == 0:
                above = words
            else:
                above, name = _add(found, name, words), ""
        elif token.type == tokenize.NEWLINE and name:
            above, name = _add(found, name, above), ""
    return found


def _add(found: list[Section], name: str, words: str) -> str:
    assert name and words, f"lazyfs/limits.py: {name or words} has no unit and reason"
    found[-1].bounds.append((name, words))
    return ""


def shown(value: float, words: str) -> str:
    """Return a value as a reader takes it in: "8 MiB", "50,000", "0.2 s"."""
    first, second = words.split(None, 2)[:2]
    if "bytes" in (first, second):
        assert isinstance(value, int)
        for name, scale in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
            if value >= scale and value % scale == 0:
                return f"{value // scale:,} {name}"
    if first.rstrip(";") == "seconds":
        return f"{value:,.0f} s" if value == int(value) else f"{value:g} s"
    return f"{value:,}"


def document() -> str:
    """Return the page."""
    out = [HEAD]
    for section in sections():
        out.append(f"\n## {section.title}\n| bound | | of what, and why |\n|---|---|---|\n")
        for name, words in section.bounds:
            out.append(f"| `{name}` | {shown(getattr(limits, name), words)} | {words} |\n")
    return "".join(out)


if __name__ == "__main__":
    print(document(), end="")
