"""The formats, pure: bytes in, objects out. No socket, no trio, no FUSE, no lazyfs package above the values."""
