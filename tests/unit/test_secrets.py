"""What a command says, at its most talkative, holds no password, no token and no signature; nor do files it writes."""

from __future__ import annotations

import ast
import base64
from pathlib import Path

import pytest

from lazyfs.cli.main import main
from tests.helpers.blobs import zstd_chunked_layer
from tests.helpers.fake_registry import FakeRegistry
from tests.helpers.tars import file, tar_of

PASSWORD = "correct-horse-7"
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("command", ["inspect", "verify", "convert"])
@pytest.mark.parametrize("auth", ["basic", "bearer"])
@pytest.mark.parametrize("right", [True, False])
def test_nothing_said_or_written_holds_a_secret(
    command: str, auth: str, right: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name in ("DOCKER_CONFIG", "XDG_CACHE_HOME", "TMPDIR"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("LAZYFS_CONFIG", str(tmp_path / "none.toml"))
    layer = zstd_chunked_layer(tar_of(file("a", b"x" * 5000)))
    with FakeRegistry(auth=auth, users={"alice": PASSWORD if right else "another"}, redirect=True) as registry:
        image = registry.add_image("app", "1", [(layer.blob, layer.annotations, layer.media_type)])
        login = tmp_path / "login"
        login.write_text(f"alice:{PASSWORD}\n")
        words = [command, "-vv", f"--{'src-' if command == 'convert' else ''}creds-file", str(login), image.reference]
        if command == "convert":
            words.append(f"oci:{tmp_path / 'layout'}:1")
        assert (main(words) == 0) is right
        said = "".join(capsys.readouterr())
        secrets = {PASSWORD, base64.b64encode(f"alice:{PASSWORD}".encode()).decode()}
        secrets |= {*registry.tokens, *registry.signatures}
        assert len(secrets) > 2 or not right
        written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path != login)
        for secret in secrets:
            assert secret not in said and secret.encode() not in written
        assert right or "alice" in said or "login" in said  # who was refused is told


def test_no_program_is_called_through_a_shell() -> None:
    calls = 0
    for path in (path for part in ("lazyfs", "indexer", "snapshotter") for path in (ROOT / part).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes(), str(path))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            calls += name.startswith("subprocess.")
            place = f"{path.name}:{node.lineno}"
            assert name not in ("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"), place
            assert name not in ("eval", "exec", "pickle.load", "pickle.loads", "marshal.loads"), place
            assert not any(word.arg == "shell" for word in node.keywords), place
            if name.startswith("subprocess.") and node.args:  # a list: a text would be one word, or a shell's
                assert not isinstance(node.args[0], (ast.Constant, ast.JoinedStr)), place
    assert calls > 10
