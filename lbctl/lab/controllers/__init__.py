"""The few controllers of kube-controller-manager that the lab needs.

They run as tasks in the embedded API server's process and write through
`lbctl.lab.apiserver.api.Api`, as every client does. The real ones' rules, without what only large
clusters need.
"""
