"""The DaemonSet: programs the node's forwarding and answers probes."""
