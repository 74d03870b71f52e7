"""The `lbctl` command."""
