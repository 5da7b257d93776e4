"""`python -m lazyfs`: the command line without an installed script."""

from lazyfs.cli.main import entry

if __name__ == "__main__":
    entry()
