"""The command line's frame: what the user typed reaches the right command, and what went wrong becomes a sentence."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lazyfs import __version__, errors
from lazyfs.cli import common, exit_codes
from lazyfs.cli import main as frame
from lazyfs.cli.output import Output

Run = Callable[[argparse.Namespace, Output], int]
seen: list[argparse.Namespace] = []


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Run], None]]:
    """Add a command `probe` whose `run` the test chooses."""
    module = types.ModuleType("lazyfs.cli.probe")
    seen.clear()

    def put(run: Run) -> None:
        def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
            parser = subparsers.add_parser("probe", epilog="examples:\n  lazyfs probe")
            common.add_json(parser)
            common.add_platform(parser)
            common.add_plain_http(parser)
            parser.add_argument("-v", "--volume", action="append", default=[])
            parser.add_argument("words", nargs="*")
            parser.set_defaults(run=run)

        module.add_parser = add_parser  # type: ignore[attr-defined]

    monkeypatch.setitem(sys.modules, "lazyfs.cli.probe", module)
    monkeypatch.setitem(frame.COMMANDS, "probe", "a command of the tests")
    yield put
    seen.clear()


def remember(args: argparse.Namespace, out: Output) -> int:
    seen.append(args)
    return 0


def failing(error: BaseException) -> Run:
    def run(args: argparse.Namespace, out: Output) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["run"], "run"),
        (["--root", "/x", "run", "mount"], "run"),
        (["--root=/x", "-vq", "mount"], "mount"),
        (["--config", "run", "verify"], "verify"),
        (["--help"], ""),
        ([], ""),
    ],
)
def test_finding_the_command(argv: list[str], expected: str) -> None:
    assert frame.command_of(argv) == expected


@pytest.mark.parametrize(
    "argv",
    [
        ["--root", "/x", "--verbose", "-q", "probe"],
        ["probe", "--root", "/x", "--verbose", "-q"],
        ["--root", "/x", "probe", "-q", "--verbose"],
    ],
)
def test_global_flags_stand_before_or_behind_the_command(probe: Callable[[Run], None], argv: list[str]) -> None:
    probe(remember)
    assert frame.main(argv) == 0
    assert (seen[0].root, seen[0].verbose, seen[0].quiet) == ("/x", 1, True)


def test_a_commands_own_short_flag_wins_over_the_global_one(probe: Callable[[Run], None]) -> None:
    probe(remember)
    assert frame.main(["-v", "probe", "-v", "a:b"]) == 0
    assert (seen[0].verbose, seen[0].volume) == (1, ["a:b"])


def test_the_command_returns_the_exit_code(probe: Callable[[Run], None]) -> None:
    probe(lambda args, out: 42)
    assert frame.main(["probe"]) == 42


def test_an_error_is_one_sentence_a_hint_and_its_code(
    probe: Callable[[Run], None], capsys: pytest.CaptureFixture[str]
) -> None:
    probe(failing(errors.Unauthorized("r.test", "r.test refuses the credentials", hint="log in again")))
    assert frame.main(["probe"]) == 4
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "lazyfs: r.test refuses the credentials\nlazyfs: hint: log in again\n"


def test_an_error_with_json_is_an_object_too(probe: Callable[[Run], None], capsys: pytest.CaptureFixture[str]) -> None:
    probe(failing(errors.StoreFull("no room")))
    assert frame.main(["probe", "--json"]) == 9
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {
        "error": {"class": "StoreFull", "message": "no room", "hint": "", "exit_code": 9}
    }
    assert printed.err == "lazyfs: no room\n"


def test_so_is_one_in_the_arguments_themselves(
    probe: Callable[[Run], None], capsys: pytest.CaptureFixture[str]
) -> None:
    probe(remember)
    assert frame.main(["probe", "--json", "--platform", "amd64"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["class"] == "UsageError"


def test_a_bug_says_so_and_shows_its_traceback_only_when_asked(
    probe: Callable[[Run], None], capsys: pytest.CaptureFixture[str]
) -> None:
    probe(failing(KeyError("spam")))
    assert frame.main(["probe"]) == exit_codes.INTERNAL
    printed = capsys.readouterr().err
    assert printed.startswith("lazyfs: this is a bug in lazyfs: KeyError: 'spam'\n")
    assert "Traceback" not in printed
    assert frame.main(["-v", "probe"]) == exit_codes.INTERNAL
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt(), 130), (frame.Terminated(), 143), (errors.Interrupted("stopped"), 130), (SystemExit(7), 7)],
)
def test_being_stopped(probe: Callable[[Run], None], error: BaseException, code: int) -> None:
    probe(failing(error))
    assert frame.main(["probe"]) == code


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["isnpect", "x"], ["'isnpect'", "did you mean inspect?"]),
        (["xyzzy"], ["'xyzzy'", "lazyfs --help"]),
        ([], ["no command given"]),
        (["probe", "--platfrom", "x"], ["--platfrom", "lazyfs probe --help"]),
        (["probe", "--platform", "amd64"], ["'amd64' is not a platform"]),
        (["--config", "/does/not/exist", "probe"], ["/does/not/exist does not exist"]),
    ],
)
def test_usage_errors_exit_2_with_a_way_on(
    probe: Callable[[Run], None], capsys: pytest.CaptureFixture[str], argv: list[str], words: list[str]
) -> None:
    probe(remember)
    assert frame.main(argv) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert all(word in printed.err for word in words), printed.err
    assert not seen


def test_runs_own_usage_errors_stay_apart_from_the_containers_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert frame.main(["run", "--no-such-flag", "image"]) == exit_codes.RUN_FAILED
    assert "lazyfs run --help" in capsys.readouterr().err


def test_a_locale_without_our_characters_is_no_reason_to_fail() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lazyfs", "--help"], capture_output=True, timeout=60, check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"COMMAND \\u2026" in done.stdout


def test_shared_arguments(probe: Callable[[Run], None]) -> None:
    probe(remember)
    assert frame.main(["probe", "--platform", "linux/arm/v7", "--no-plain-http"]) == 0
    assert frame.main(["probe", "--plain-http"]) == 0
    assert frame.main(["probe"]) == 0
    assert [args.plain_http for args in seen] == [False, True, None]
    assert common.platform(seen[0]) == "linux/arm/v7"
    assert common.platform(seen[2]).startswith("linux/")


def test_the_config_flag_reaches_the_settings_and_a_daemon_started_by_them(
    probe: Callable[[Run], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LAZYFS_CONFIG", "/nowhere")
    config = tmp_path / "c.toml"
    config.write_text('store_size = "1GiB"\n')
    probe(remember)
    assert frame.main(["--config", str(config), "--root", str(tmp_path / "store"), "probe"]) == 0
    found = common.settings(seen[0])
    assert (found.store_size, found.root) == (1 << 30, tmp_path / "store")
    assert os.environ["LAZYFS_CONFIG"] == str(config)


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert frame.main(["--version"]) == 0
    assert capsys.readouterr().out == f"lazyfs {__version__}\n"
    assert frame.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in frame.COMMANDS)


def test_help_keeps_the_examples_and_names_the_exit_codes(
    probe: Callable[[Run], None], capsys: pytest.CaptureFixture[str]
) -> None:
    probe(remember)
    assert frame.main(["probe", "--help"]) == 0
    text = capsys.readouterr().out
    assert "a command of the tests" in text
    assert "examples:\n  lazyfs probe\n" in text
    assert "docs/exit-codes.md" in text
    assert "--root DIR" in text


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHONWARNINGS": "error"},
    )  # fmt: skip


def test_help_imports_no_command() -> None:
    code = (
        "import sys\n"
        "from lazyfs.cli.main import main\n"
        "main(['--help'])\n"
        "print(sorted(m for m in sys.modules if m in ('requests', 'trio', 'zstandard', 'msgspec', 'pyfuse3', 'sqlite3')"
        " or m.startswith('lazyfs.cli.')), file=sys.stderr)\n"
    )
    done = _python(code)
    assert done.returncode == 0
    assert done.stderr == "['lazyfs.cli.exit_codes', 'lazyfs.cli.main', 'lazyfs.cli.output']\n"


def test_run_loads_nothing_heavy() -> None:
    """The time to the container's first instruction is the product; what the daemon needs is the daemon's to load."""
    code = (
        "import sys\n"
        "from lazyfs.cli.main import main\n"
        "main(['run', '--help'])\n"
        "import lazyfs.config, lazyfs.control_client, lazyfs.container.launch, lazyfs.container.directory\n"
        "import lazyfs.container.runtime\n"
        "heavy = {'requests', 'urllib3', 'ssl', 'trio', 'pyfuse3', 'zstandard', 'msgspec', 'sqlite3', 'asyncio'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    done = _python(code)
    assert (done.returncode, done.stderr) == (0, "[]\n")


def test_a_reader_that_goes_away_is_no_error() -> None:
    """`lazyfs --help | true`: quiet, whatever the moment at which the pipe breaks."""
    end, start = os.pipe()
    os.close(end)
    with os.fdopen(start, "w") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "lazyfs", "--help"], stdout=pipe, stderr=subprocess.PIPE, timeout=60, check=False,
            env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        )  # fmt: skip
    assert done.stderr == b""
    assert done.returncode == exit_codes.BROKEN_PIPE


def test_sigterm_ends_a_command_with_143() -> None:
    code = (
        "import sys, types, signal, threading\n"
        "from lazyfs.cli import main\n"
        "module = types.ModuleType('lazyfs.cli.probe')\n"
        "def run(args, out):\n"
        "    out.line('ready')\n"
        "    threading.Event().wait(50)\n"
        "    return 0\n"
        "module.add_parser = lambda sub: sub.add_parser('probe').set_defaults(run=run)\n"
        "sys.modules['lazyfs.cli.probe'] = module\n"
        "main.COMMANDS['probe'] = ''\n"
        "sys.argv = ['lazyfs', 'probe']\n"
        "main.entry()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stderr is not None
        assert child.stdout.readline() == b"ready\n"
        child.send_signal(signal.SIGTERM)
        assert child.wait(30) == exit_codes.TERMINATED
        assert child.stderr.read() == b""
