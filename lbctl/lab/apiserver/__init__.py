"""A small Kubernetes API server of the lab's own: `python -m lbctl.lab.apiserver --help`.

It speaks the API as far as kubectl, this project's own programs and the lab's kubelet need, holds
everything in memory, and starts in a fraction of a second. The contract suite in `tests/kube/` runs
against it and against a real kube-apiserver, so that it cannot drift.
"""
