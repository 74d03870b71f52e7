"""The whole system in a lab: real switches, real daemons of ours, traffic from a client."""
