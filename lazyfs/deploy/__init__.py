"""What `lazyfs install` puts on a node and `lazyfs uninstall` takes back: units, settings, containerd's configuration.

Nothing here decides to write: `install` and `uninstall` give plans, which the commands show before they carry them out.
"""
