"""Runs a topology of `bgp-lab/` in network namespaces: switches, nodes, faults, traffic."""
