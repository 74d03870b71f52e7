"""The cluster behind a lab: `embedded` or `kubernetes`, behind one handle."""
