"""Contract tests on both clusters of the lab, and tests of our own parts against an API server."""
