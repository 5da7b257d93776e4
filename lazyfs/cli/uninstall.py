"""lazyfs uninstall: take back exactly what lazyfs install did."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from lazyfs.cli import common, consent, exit_codes
from lazyfs.cli.install import add_node, node_of
from lazyfs.cli.output import Output, count
from lazyfs.errors import SnapshotUnfit, StoreBroken, StoreError, UsageError

if TYPE_CHECKING:
    from lazyfs.config import Settings
    from lazyfs.deploy.node import Node

_EPILOG = """\
examples:
  lazyfs uninstall --dry-run
  lazyfs uninstall
  lazyfs uninstall --yes --restart-containerd --purge

Remove the pods and images that use lazyfs first (drain the node): without lazyfsd their files can't be read. A file
that somebody changed after the installation stays, and is named."""
_SHOWN = 10  # containers that are named


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "uninstall",
        description="Take back what lazyfs install wrote, as it was before; shows the change first. The store stays.",
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add(
        "--force",
        action="store_true",
        help="also while containers use its snapshots: they lose their files; or a file that stays names it",
    )
    add("--purge", action="store_true", help="remove the store, too: layers, snapshots, what containers wrote")
    add("--restart-containerd", action="store_true", help="restart containerd, so that it forgets the snapshotter")
    add_node(parser)
    common.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: Output) -> int:
    """Show the change, ask, carry it out. Blocking. Raise SnapshotUnfit while containers need it, or LazyfsError."""
    from lazyfs.deploy import changes, installation, manifest, purging, services

    node = node_of(args)
    known = manifest.load(node)
    if known is None:
        raise UsageError("nothing was installed here by lazyfs install", hint=f"there is no {manifest.PATH}")
    settings = installation.settings_of(node)
    users = _users_if_known(node, settings, args.force, out)
    if users:
        shown = ", ".join(users[:_SHOWN]) + (f" and {len(users) - _SHOWN} more" if len(users) > _SHOWN else "")
        if not args.force:
            raise SnapshotUnfit(users[0], f"in use: {shown}", hint="remove these containers first, or --force")
        out.warn(f"these lose their files: {shown}")
    plan = changes.plan_taking_back(node, known)
    living = node.is_this and services.systemd_runs()
    steps = services.steps_to_stop(args.restart_containerd) if living else []
    for one in plan.changes:
        out.line(one.diff().rstrip("\n"))
    for path, reason in plan.left.items():
        out.warn(f"{path} stays as it is: {reason}")
    _check_left(node, settings, known, plan, args.force, out)
    for step in steps:
        out.note(f"then: {step}")
    if args.purge:
        purging.check(node, settings, stops=living)
        out.note(f"then: everything below {settings.root} is removed")
    done = consent.ask(f"Change {count(len(plan.changes), 'file')}?", out, yes=args.yes, dry_run=args.dry_run)
    if done:
        _carry_out(node, settings, plan, known, steps, args, out)
    out.json(
        {
            "changes": [{"path": one.path, "removed": one.after is None} for one in plan.changes],
            "left": {str(path): reason for path, reason in plan.left.items()},
            "steps": [str(step) for step in steps],
            "done": done,
        }
    )
    return exit_codes.OK


def _carry_out(node: Node, settings: Settings, plan: Any, known: Any, steps: Any, args: Any, out: Output) -> None:
    from lazyfs.deploy import changes, purging, services

    # The units go last: systemd stops a service by what its unit says.
    unit_changes, others = purging.split(plan.changes)
    changes.write_all(node, others)
    for step in steps:
        services.perform(step)
        out.line(f"done: {step}")
    changes.write_all(node, unit_changes)
    changes.finish_taking_back(node, plan, known)
    if steps:
        services.perform(services.RELOAD)
    out.line(f"{count(len(plan.changes), 'file')} put back")
    if args.purge:
        purging.purge(node, settings)
        out.line(f"{settings.root} is removed")
    if not args.restart_containerd:
        out.warn(
            "until its next start containerd tries to make containers with lazyfs, and fails: "
            "systemctl restart containerd (containers go on)"
        )


def _check_left(node: Node, settings: Settings, known: Any, plan: Any, force: bool, out: Output) -> None:
    """Raise UsageError where a file that stays has CRI make containers with what is about to go."""
    from pathlib import Path

    from lazyfs.deploy import containerd_config

    written = [Path(entry.path) for entry in known.files]
    for path in containerd_config.still_naming(node, written, list(plan.left), settings.snapshotter_address):
        said = f"{path} still makes lazyfs the snapshotter of new containers: none would start"
        if not force:
            raise UsageError(said, hint="set another snapshotter there first, or --force")
        out.warn(said)


def _users_if_known(node: Node, settings: Settings, force: bool, out: Output) -> list[str]:
    try:
        return _users(node, settings)
    except StoreError as error:
        if not force:
            hint = "--force goes on without knowing which containers need it"
            raise StoreBroken(error.message, hint=hint) from None
        out.warn(f"which containers lose their files is not known: {error.message}")
        return []


def _users(node: Node, settings: Settings) -> list[str]:
    """Return the names of the containers (NAMESPACE/NAME) whose root file systems lie on snapshots of ours."""
    from snapshotter.model import Kind
    from snapshotter.records import open_records

    path = node.real(settings.root / "snapshots.db")
    if not path.exists():
        return []
    records = open_records(path)
    try:
        keys = [one.key for one in records.snapshots() if one.kind is not Kind.COMMITTED]
    finally:
        records.close()
    return [_shown(key) for key in keys]


def _shown(key: str) -> str:
    """Return containerd's key NAMESPACE/NUMBER/NAME without its number."""
    parts = key.split("/", 2)
    return f"{parts[0]}/{parts[2]}" if len(parts) == 3 else key
