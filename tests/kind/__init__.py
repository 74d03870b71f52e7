"""Tests on kind: `pytest -m kind`, on a machine with a container engine."""
