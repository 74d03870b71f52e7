"""Tests in network namespaces: real switches, real packets. Root only."""
