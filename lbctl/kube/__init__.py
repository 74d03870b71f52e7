"""The Kubernetes edge: list+watch caches, leader election, object and Event writes."""
