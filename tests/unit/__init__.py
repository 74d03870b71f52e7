"""Tests of pure code, with no more than the standard library and hypothesis."""
