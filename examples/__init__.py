"""One idea, one screen: each file is a program of its own, `python -m examples.distil`, and is run by a test."""
