"""The Deployment: allocates EIPs, announces routes, probes nodes, serves its state."""
