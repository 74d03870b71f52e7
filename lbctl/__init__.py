"""Load balancers for bare-metal Kubernetes. `core` is pure; `kube`, `cli`, `lab` are edges."""
