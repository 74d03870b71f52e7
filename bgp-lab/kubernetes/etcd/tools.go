//go:build tools

// Package etcd pins the etcd server that the lab builds from its own main package.
package etcd

import _ "go.etcd.io/etcd/server/v3"
