"""The containerd proxy snapshotter: snapshots of ordinary layers on disk, and of lazy ones that lazyfsd shows."""
