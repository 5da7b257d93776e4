"""A client of containerd's API: its content store, its images, its leases. Stands on values alone."""
