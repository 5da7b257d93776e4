"""Measurements and the demo: one script a question, run as `python -m perf.NAME` from the root of the tree."""
