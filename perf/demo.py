"""Show what lazyfs is for: one real image, one slow link, a lazy start beside a full pull.

    make demo                 a Debian image with Python, made here
    make demo IMAGE=debian:12 another image that has python3 or a shell

Ends with 1 when a promise is not kept: the first output in less than a third of the full pull's time, and less than a
quarter of the image moved on demand and by prefetch until then.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lazyfs.units import format_size
from perf import debian
from perf.shaper import Shaper, Traffic
from perf.start import StartFailed, drop_caches, lazyfs, lazyfs_env, scratch, start, until_gone
from tests.helpers import real

RTT, MBIT = 0.020, 200.0  # the link: seconds, 10**6 bits a second each way
TIME_SHARE, BYTE_SHARE = 1 / 3, 1 / 4
# The container waits for the end of its input, so that the figures are those of the first output.
_PYTHON = ("python3", "-c", "import sys; print('hello from', sys.version.split()[0], flush=True); sys.stdin.read()")
_SHELL = (
    "/bin/sh",
    "-c",
    f'command -v python3 >/dev/null && exec python3 -c "{_PYTHON[2]}"; echo hello from a shell; read line; exit 0',
)


@dataclass(slots=True)
class Run:
    """One start: `seconds` until the first output and the `traffic` on the link until then."""

    seconds: float = 0.0
    traffic: Traffic = field(default_factory=lambda: Traffic(0, 0, 0))
    status: dict[str, Any] = field(default_factory=dict)
    output: str = ""


@dataclass(frozen=True, slots=True)
class Scene:
    """Where a run happens: a scratch directory, the link, the registry's two images and what to run in them."""

    directory: Path
    shaper: Shaper
    command: tuple[str, ...]

    def image(self, tag: str) -> str:
        return f"127.0.0.1:{self.shaper.port}/demo:{tag}"


def lazy_start(scene: Scene, name: str) -> Run:
    """Start the converted image with `lazyfs run`. `name` is the store: a new one is cold."""
    root, run, env = scene.directory / name, Run(), lazyfs_env(scene.directory)
    before = scene.shaper.traffic()

    def look() -> None:
        run.traffic = scene.shaper.traffic().since(before)
        asked = subprocess.run(
            lazyfs(root, "status", "--json"), check=False, capture_output=True, text=True, timeout=60, env=env
        )
        if asked.returncode == 0:
            run.status = json.loads(asked.stdout)

    words = lazyfs(root, "run", "-i", f"docker://{scene.image('lazy')}", *scene.command)
    started = start(words, scene.directory / "lazyfs.log", look, env)
    run.seconds, run.output = started.first_output, started.output.strip()
    until_gone(root)
    return run


def pull_and_run_containerd(scene: Scene, running: real.Containerd) -> Run:
    """Pull, unpack (overlayfs) and run the original image the ordinary way."""
    image, run = scene.image("original"), Run()
    before, began = scene.shaper.traffic(), time.monotonic()
    running.pull(image)
    pulled = time.monotonic() - began
    words = running.words("run", "--rm", image, "demo", *scene.command)
    started = start(words, scene.directory / "ctr.log")
    run.seconds, run.output = pulled + started.first_output, started.output.strip()
    run.traffic = scene.shaper.traffic().since(before)
    return run


def pull_and_run_umoci(scene: Scene) -> Run:
    """The same with skopeo, umoci and runc, where there is no containerd."""
    layout, bundle, run = scene.directory / "layout", scene.directory / "bundle", Run()
    before, began = scene.shaper.traffic(), time.monotonic()
    real.copy_image(f"docker://{scene.image('original')}", f"oci:{layout}:original")
    real.call("umoci", "unpack", "--image", f"{layout}:original", bundle)
    config = json.loads((bundle / "config.json").read_text())
    config["process"].update(args=list(scene.command), terminal=False)
    (bundle / "config.json").write_text(json.dumps(config))
    pulled = time.monotonic() - began
    words = [real.tool("runc"), "--root", str(scene.directory / "runc"), "run", "--bundle", str(bundle), "lazyfs-demo"]
    started = start(words, scene.directory / "runc.log")
    run.seconds, run.output = pulled + started.first_output, started.output.strip()
    run.traffic = scene.shaper.traffic().since(before)
    return run


def full_start(scene: Scene) -> tuple[str, Run]:
    """Return the reference's name and its run. Starting containerd itself is not counted."""
    if real.have("containerd", "ctr"):
        with real.containerd(scene.directory / "c") as running:
            drop_caches()
            return "containerd: pull, unpack, run", pull_and_run_containerd(scene, running)
    drop_caches()
    return "skopeo, umoci, runc", pull_and_run_umoci(scene)


def manifest_of(reference: str) -> dict[str, Any]:
    """Return the image's manifest (this machine's platform is the only one: skopeo copied one)."""
    found: dict[str, Any] = json.loads(real.call("skopeo", "inspect", "--raw", "--tls-verify=false", reference))
    return found


def layers_size(manifest: dict[str, Any]) -> int:
    """Return the bytes of the manifest's layer blobs."""
    return sum(int(layer["size"]) for layer in manifest["layers"])


def say(text: str = "") -> None:
    print(text, flush=True)


def demo(wanted: str) -> int:
    """Run the whole show; return the exit status."""
    with scratch() as directory, real.docker_registry(directory / "r") as registry:
        say("lazyfs: the same image, started lazily and by a full pull")
        say()
        original, lazy = registry.image("demo", "original"), registry.image("demo", "lazy")
        if wanted:
            source = wanted if ":/" in wanted or wanted.startswith("oci:") else f"docker://{wanted}"
            say(f"  image      {wanted}, copied to a registry on this machine")
        else:
            source = debian.layout()
            say(
                f"  image      Debian {debian.SUITE}, minimal, with Python; in Debian's docker-registry on this machine"
            )
        real.copy_image(source, original)
        began = time.monotonic()
        convert(directory, original, lazy)
        converted = time.monotonic() - began
        size, lazy_size = layers_size(manifest_of(original)), layers_size(manifest_of(lazy))
        say(f"  converted  {format_size(size)} gzip → {format_size(lazy_size)} zstd:chunked in {converted:.1f} s")
        say(f"  link       {RTT * 1000:.0f} ms round trip, {MBIT:.0f} Mbit/s; page caches dropped before each start")
        with Shaper(("127.0.0.1", registry.port), rtt=RTT, mbit=MBIT) as shaper:
            scene = Scene(directory, shaper, _SHELL if wanted else _PYTHON)
            say(f"  command    {' '.join(scene.command[:2])} …")
            say()
            drop_caches()
            cold = lazy_start(scene, "s")
            say(f"  lazyfs run, nothing cached   {cold.seconds:6.2f} s   {cold.output}")
            drop_caches()
            again = lazy_start(scene, "s")
            say(f"  lazyfs run, a second time    {again.seconds:6.2f} s   {again.output}")
            name, full = full_start(scene)
            say(f"  {name:<28} {full.seconds:6.2f} s   {full.output}")
        say()
        return verdict(cold, full, size, lazy_size)


def convert(directory: Path, source: str, destination: str) -> None:
    """Convert with the command that users have. Raise StartFailed with its words."""
    words = lazyfs(directory / "s", "convert", source, destination)
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=1800, env=lazyfs_env(directory))
    if done.returncode:
        raise StartFailed(f"{' '.join(words)} ended with {done.returncode}: {done.stderr[-2000:]}")


def verdict(cold: Run, full: Run, size: int, lazy_size: int) -> int:
    """Print the comparison and return 0 when both promises are kept."""
    moved = cold.status.get("bytes", {})
    asked = int(moved.get("demand", 0)) + int(moved.get("prefetch", 0))
    say(f"  {'until the first output':<28} {'lazyfs':>12} {'full pull':>12}")
    faster = f"{full.seconds / cold.seconds:.1f} times faster"
    say(f"  {'time':<28} {cold.seconds:>10.2f} s {full.seconds:>10.2f} s   {faster}")
    say(f"  {'bytes asked for by the start':<28} {format_size(asked):>12} {format_size(size):>12}   "
        f"{asked / lazy_size:.1%} of the image")  # fmt: skip
    say(f"  {'bytes over the link':<28} {format_size(cold.traffic.down):>12} {format_size(full.traffic.down):>12}   "
        "with the background fill")  # fmt: skip
    say(f"  {'connections':<28} {cold.traffic.connections:>12} {full.traffic.connections:>12}")
    say()
    broken = []
    if not cold.seconds < full.seconds * TIME_SHARE:
        broken.append(f"first output took {cold.seconds / full.seconds:.0%} of the full pull's time, not under a third")
    if not 0 < asked < lazy_size * BYTE_SHARE:
        broken.append(f"the start asked for {asked / lazy_size:.1%} of the image, not under a quarter")
    if cold.output != full.output:
        broken.append(f"the outputs differ: {cold.output!r} and {full.output!r}")
    for line in broken:
        say(f"  NOT KEPT: {line}")
    if not broken:
        say("  kept: first output in under a third of the time, under a quarter of the image, the same output.")
    return 1 if broken else 0


def main() -> int:
    if os.geteuid() != 0:
        print("the demo starts containers and drops caches: run it as root", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return demo(os.environ.get("IMAGE", ""))
    except (real.ToolFailed, StartFailed) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
