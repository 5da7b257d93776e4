"""Fuzzing of everything that reads what strangers wrote: `python -m tests.fuzz`. See docs/fuzzing.md."""
