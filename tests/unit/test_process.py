"""What a service of ours does to its own process first."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import os, resource, sys
hard = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
from lazyfs.process import harden
harden()
print(*resource.getrlimit(resource.RLIMIT_CORE), oct(os.umask(0)))
"""


@pytest.mark.parametrize(("hard", "soft"), [(1 << 20, 1), (1, 1), (0, 0)])
def test_no_core_is_left_nor_sent_to_a_program(hard: int, soft: int) -> None:
    # A limit of 1 is the one that core_pattern's programs don't get round, and below any core's size.
    words = [sys.executable, "-c", SCRIPT, str(hard)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == [str(soft), str(hard), "0o77"]


def test_a_command_leaves_no_core_either_and_a_container_gets_its_limits_back() -> None:
    script = """
import resource
resource.setrlimit(resource.RLIMIT_CORE, (1 << 20, resource.RLIM_INFINITY))
from lazyfs.cli import main
from lazyfs.container import host
main.main = lambda words: print(resource.getrlimit(resource.RLIMIT_CORE), host.look().core, host.look(1).core) or 0
main.entry()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "(1, -1) (1048576, -1) (1048576, -1)"
