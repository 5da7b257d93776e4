"""Container images that start at once: mounted from their registry, read as they are needed."""

__version__ = "0.1.0"
