"""What flags, environment and the files of containerd, podman and Docker say about registries and logins."""
