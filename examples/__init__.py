"""Whole programs to read and to run, from the root of the checkout: `python -m examples.NAME --help`."""
