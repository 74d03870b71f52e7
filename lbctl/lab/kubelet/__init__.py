"""The lab's scheduler and kubelet: binds pods and runs them as namespaces or host processes."""
