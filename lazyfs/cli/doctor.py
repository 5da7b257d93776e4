"""`lazyfs doctor`: what this machine has and lacks, and whether a registry can serve lazily."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from lazyfs.cli import common, exit_codes

if TYPE_CHECKING:
    from lazyfs.cli.host_checks import Check
    from lazyfs.cli.output import Output

_EPILOG = """\
examples:
  lazyfs doctor
  lazyfs doctor docker://registry.example:5000/app:1    is that registry reachable, does it answer ranges?
  lazyfs doctor --json | jq '.checks[] | select(.state != "ok")'

It exits 8 when something is missing that `run` or `mount` needs, 0 with warnings alone."""


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "doctor",
        description="Check what this machine has and lacks, with the way to mend it; with IMAGE also its registry.",
        epilog=_EPILOG,
    )
    common.add_image(parser, optional=True)
    common.add_usual(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: Output) -> int:
    """Run every check and print one line each. Blocking. Return 8 when one fails, else 0."""
    from lazyfs.cli import host_checks, registry_checks

    settings = common.settings(args)
    # The host's checks fork: they come before the registry's, which start threads.
    checks = host_checks.all_checks(settings)
    if args.image:
        checks += registry_checks.all_checks(args, settings)
    width = max(len(check.name) for check in checks)
    for check in checks:
        _print(check, width, out)
    worst = {check.state for check in checks}
    failed = host_checks.State.FAIL in worst
    out.line("something is missing that run or mount needs" if failed else "all that run and mount need is there")
    out.json(
        {
            "ok": not failed,
            "checks": [{"name": c.name, "state": str(c.state), "text": c.text, "mend": c.mend} for c in checks],
        }
    )
    return exit_codes.MOUNT if failed else exit_codes.OK


def _print(check: Check, width: int, out: Output) -> None:
    out.line(f"{check.state.value:<4}  {check.name:<{width}}  {check.text}")
    if check.mend:
        out.line(f"{'':<4}  {'':<{width}}  -> {check.mend}")
