"""lazyfs install: have systemd keep lazyfs on this node, and containerd use it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from lazyfs.cli import common, consent, exit_codes
from lazyfs.cli.output import Output, count
from lazyfs.errors import UsageError

if TYPE_CHECKING:
    from lazyfs.deploy.installation import Options, Plan
    from lazyfs.deploy.node import Node

_EPILOG = """\
examples:
  lazyfs install --dry-run
  lazyfs install
  lazyfs install --yes --restart-containerd
  lazyfs install --no-default --lazy-from 'registry.example:5000/team/*'
  lazyfs install --yes --root-prefix /mnt/image --prefix /opt/lazyfs

It writes two systemd units and containerd's configuration, and shows the whole change first. Run it again after an
upgrade: what is right already stays. `lazyfs uninstall` takes everything back."""


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "install",
        description="Install the systemd units of lazyfs and make it containerd's snapshotter; shows the change first.",
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add("--containerd-config", metavar="FILE", default="/etc/containerd/config.toml", help="containerd's main file")
    add("--prefix", metavar="DIR", help="where lazyfs is installed on the node: DIR/bin; otherwise where this one is")
    add(
        "--default-snapshotter",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="have CRI (Kubernetes) make new containers with it; existing ones keep theirs",
    )
    add("--no-default", dest="default_snapshotter", action="store_false", help="short for --no-default-snapshotter")
    add("--snapshotter-name", metavar="NAME", default="lazyfs", help="its name in containerd (lazyfs)")
    add("--image-service", action="store_true", help="pass CRI's image service through, to learn kubelet's logins")
    add("--metrics", action="store_true", help="serve Prometheus metrics on this machine's own address")
    add(
        "--lazy-from",
        metavar="PATTERN",
        action="append",
        default=[],
        help="repositories whose layers are used before they were checked whole (repeatable)",
    )
    add(
        "--restart-containerd", action="store_true", help="restart it where its configuration changed; containers go on"
    )
    add_node(parser)
    common.add_json(parser)
    parser.set_defaults(run=run)


def add_node(parser: argparse.ArgumentParser) -> None:
    """Add what install and uninstall share: --root-prefix, --dry-run, --yes."""
    parser.add_argument(
        "--root-prefix", metavar="DIR", default="/", help="the node's file system, where it is not this machine's own"
    )
    parser.add_argument("--dry-run", action="store_true", help="only show the change")
    parser.add_argument("--yes", action="store_true", help="don't ask")


def node_of(args: argparse.Namespace) -> Node:
    """Return the node that the flags name. Raise UsageError."""
    import os
    from pathlib import Path

    from lazyfs.deploy.node import Node

    root = Path(args.root_prefix).absolute()
    if not root.is_dir():
        raise UsageError(f"--root-prefix {args.root_prefix} is no directory")
    if os.geteuid() != 0 and root == Path("/"):
        raise UsageError("this needs root", hint="sudo lazyfs …, or --root-prefix to look at another directory")
    return Node(root)


def run(args: argparse.Namespace, out: Output) -> int:
    """Show the change, ask, carry it out. Blocking. Raise LazyfsError."""
    from lazyfs.cli import idmapped
    from lazyfs.deploy import installation, manifest, services

    node = node_of(args)
    options = _options(args)
    planned = installation.plan(node, options, idmapped.problem)
    living = node.is_this and services.systemd_runs()
    restart = args.restart_containerd and bool(planned.about_containerd)
    steps = services.steps_to_start(planned.changed_units, restart) if living else []
    for one in planned.changes:
        out.line(one.diff().rstrip("\n"))
    for note in planned.notes:
        out.note(note)
    for step in steps:
        out.note(f"then: {step}")
    done = False
    if not planned.changes and not steps:
        out.line("nothing to change: everything is as it should be")
    elif consent.ask(f"Change {count(len(planned.changes), 'file')}?", out, yes=args.yes, dry_run=args.dry_run):
        before = manifest.load(node)
        installation.carry_out(node, options, planned)
        out.line(f"{count(len(planned.changes), 'file')} written")
        with installation.starting(node, planned, before):
            for step in steps:
                services.perform(step)
                out.line(f"done: {step}")
        done = True
        _tell_the_rest(planned, living, args.restart_containerd, out)
    out.json(
        {
            "changes": [{"path": one.path, "made": one.before is None} for one in planned.changes],
            "steps": [str(step) for step in steps],
            "notes": planned.notes,
            "done": done,
        }
    )
    return exit_codes.OK


def _tell_the_rest(planned: Plan, living: bool, restarted: bool, out: Output) -> None:
    from lazyfs.deploy import units

    if not living:
        out.note(
            f"at the node, when it runs: systemctl daemon-reload && systemctl enable --now {' '.join(units.NAMES)}"
        )
    if planned.about_containerd and not (living and restarted):
        out.note(
            "containerd reads its configuration at its next start: systemctl restart containerd (containers go on)"
        )
    if living and units.NAMES[0] in planned.changed_units:
        out.note("a lazyfsd that ran before goes on as it was: its containers need it; it is a new one after a reboot")


def _options(args: argparse.Namespace) -> Options:
    import re
    import sys
    from pathlib import Path

    from lazyfs.deploy.installation import Options

    if not re.fullmatch(r"[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*", args.snapshotter_name):
        raise UsageError(f"{args.snapshotter_name!r} can't be a snapshotter's name", hint="letters, digits and . _ -")
    for pattern in args.lazy_from:
        if not pattern or not pattern.isprintable():
            raise UsageError(f"--lazy-from {pattern!r} is no pattern")
    containerd = Path(args.containerd_config)
    if not containerd.is_absolute():
        raise UsageError("--containerd-config has to be a path from the node's root: it begins with /")
    prefix = Path(args.prefix) if args.prefix else None
    if prefix is not None and not prefix.is_absolute():
        raise UsageError("--prefix has to be a path from the node's root: it begins with /")
    return Options(
        programs=prefix / "bin" if prefix is not None else Path(sys.executable).parent,
        containerd=containerd,
        name=args.snapshotter_name,
        default=args.default_snapshotter,
        image_service=args.image_service,
        metrics=args.metrics,
        lazy_from=tuple(args.lazy_from),
        root=Path(args.root).absolute() if getattr(args, "root", None) else None,
    )
