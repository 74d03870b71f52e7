"""Failure drills: faults on a timeline under real traffic, with a verdict."""
