"""Images on this machine: OCI layouts, archives, and containerd's content store, as Repositories."""
