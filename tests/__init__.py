"""Tests.

`unit` is pure, `kube` speaks to both lab clusters, `lab` moves packets between namespaces.
"""
