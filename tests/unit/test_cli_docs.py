"""What users read is complete: every setting, every command, every option."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from lazyfs.cli.main import COMMANDS, build_parser
from lazyfs.config import Settings, load
from lazyfs.units import parse_size

DOCS = Path(__file__).parents[2] / "docs"
README = DOCS.parent / "README.md"


def parser_of(command: str) -> argparse.ArgumentParser:
    (subparsers,) = (
        action for action in build_parser(command)._actions if isinstance(action, argparse._SubParsersAction)
    )
    found = subparsers.choices[command]
    assert isinstance(found, argparse.ArgumentParser)
    return found


def settings_rows() -> dict[str, str]:
    return dict(re.findall(r"^\| `(\w+)` \| (.+?) \| .+? \|$", (DOCS / "config.md").read_text("utf-8"), re.M))


def test_every_setting_is_documented_and_nothing_else() -> None:
    assert set(settings_rows()) == {field.name for field in fields(Settings)}


def test_the_documented_defaults_are_the_defaults() -> None:
    rows = settings_rows()
    for field in fields(Settings):
        told = rows[field.name].strip("`")
        if field.default is MISSING:
            continue  # root and run depend on the user; their rows are prose
        if field.default is None:
            continue  # so does what is derived from them
        if field.name.endswith("_size") or field.name == "small_layer":
            assert parse_size(told) == field.default, field.name
        elif isinstance(field.default, bool):
            assert told == str(field.default).lower(), field.name
        elif isinstance(field.default, str):
            assert told == (field.default or "none"), field.name
        elif isinstance(field.default, Path):
            assert told == str(field.default), field.name
        elif isinstance(field.default, tuple):
            assert told == '["*"]' and field.default == ("*",), field.name
        else:
            assert float(told) == float(str(field.default)), field.name


def test_the_documented_example_is_a_config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", (DOCS / "config.md").read_text("utf-8"), re.S)
    path = tmp_path / "config.toml"
    path.write_text(example, "utf-8")
    monkeypatch.setenv("LAZYFS_CONFIG", str(path))
    assert load().store_size == parse_size("50GiB")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_description_examples_and_a_section(command: str) -> None:
    parser = parser_of(command)
    assert parser.description
    assert parser.epilog and "examples:" in parser.epilog and "exit codes" in parser.epilog
    headings = re.findall(r"^## (.+)$", (DOCS / "cli.md").read_text("utf-8"), re.M)
    assert command in [word for heading in headings for word in heading.split(", ")]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_help_text(command: str) -> None:
    for action in parser_of(command)._actions:
        assert action.help, action


def examples() -> Iterator[tuple[str, str]]:
    for path in (README, DOCS / "cli.md"):
        for block in re.findall(r"```(?:sh|console)?\n(.*?)```", path.read_text("utf-8"), re.S):
            for line in block.splitlines():
                line = line.removeprefix("$ ").removeprefix("# ")
                if line.startswith("lazyfs ") and "COMMAND" not in line:
                    yield path.name, line.split(" | ")[0].split("   ")[0]


@pytest.mark.parametrize(("where", "line"), list(examples()))
def test_every_example_parses(where: str, line: str) -> None:
    words = [word.strip("'\"") for word in line.split()[1:]]
    name = next(word for word in words if word in COMMANDS)
    args, unknown = build_parser(name).parse_known_args(words)
    assert not unknown, f"{where}: {line}"
    assert callable(args.run)
