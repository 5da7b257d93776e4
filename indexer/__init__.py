"""Tar in, converted layer and image out: what `lazyfs convert` does."""
