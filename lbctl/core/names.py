"""Every fixed name, port, mark and table number, in one place.

Names are DESIGN.md's. Numbers stay clear of what kube-proxy (marks 0x4000, 0x8000), Calico (takes
its mark bits from 0xffff0000, the lowest first: 0x001f0000; tables 1-250; rule 99; VXLAN 4789, VNI
4096), Cilium (marks 0x0f00, tables 2004, 2005, rules 9-111, VXLAN 8472) and flannel (mark 0x4000,
VXLAN 8472, VNI 1) document. tests/unit/test_clash.py holds them to it.
"""

from __future__ import annotations

from typing import Final

NAMESPACE: Final = "lbctl-system"
CONFIG_MAP: Final = "lbctl"
ACCEPTED_CONFIG_MAP: Final = "lbctl-accepted"
HISTORY_CONFIG_MAPS: Final = tuple(f"lbctl-history-{n}" for n in range(10))  # by generation
CONFIG_KEY: Final = "config.yaml"
LEASE: Final = "lbctl-manager"
PROBE_SECRET: Final = "lbctl-probe-keys"
MANAGER_APP: Final = "lbctl-manager"  # value of the label app.kubernetes.io/name
AGENT_APP: Final = "lbctl-agent"
MANAGER_ACCOUNT: Final = "lbctl-manager"  # ServiceAccounts
AGENT_ACCOUNT: Final = "lbctl-agent"
VIEWER_ACCOUNT: Final = "lbctl-viewer"  # whose token may read /v1/state

GROUP: Final = "lbctl.io"
EIP_VERSION: Final = "v1"
EIP_PLURAL: Final = "eips"
EIP_KIND: Final = "EIP"
LOAD_BALANCER_CLASS: Final = "lbctl.io/bgp"
FINALIZER: Final = "service.kubernetes.io/load-balancer-cleanup"
CONDITION_ANNOUNCED: Final = "lbctl.io/Announced"
ANNOTATION_BOUND_AT: Final = "lbctl.io/bound-at"  # of an EIP: a rebind always changes it
ANNOTATION_DRAIN: Final = "lbctl.io/drain"
ANNOTATION_NEXT_HOP: Final = "lbctl.io/next-hop"
ANNOTATION_POOL: Final = "lbctl.io/pool"  # on a Service: where its addresses came from
LABEL_EXCLUDE: Final = "node.kubernetes.io/exclude-from-external-load-balancers"
TAINT_OUT_OF_SERVICE: Final = "node.kubernetes.io/out-of-service"
STATE_TOKEN_HEADER: Final = "Lbctl-Authorization"  # the API server's pod proxy strips Authorization

MANAGER_HTTP_PORT: Final = 7480  # /healthz /readyz /metrics /v1/state
AGENT_HTTP_PORT: Final = 7481  # /healthz /readyz /metrics
PROBE_PORT: Final = 7482  # UDP, the agent listens
# Of SO_PRIORITY and of nft's `meta priority`: what goes first in a host's own queue (tc-prio(8),
# interactive), as high as it goes without privileges.
FIRST: Final = 6
MANAGER_PEER_PORT: Final = 7483  # UDP, manager to manager
SPEAKER_PEER_PORT: Final = 7484  # UDP, manager to the other speakers' relays
TUNNEL_PORT: Final = 7485  # UDP, VXLAN between nodes in different subnets

NFT_TABLE: Final = "lbctl"
TUNNEL_DEVICE: Final = "lbctl0"
TUNNEL_VNI: Final = 76
MARK_BASE: Final = 0x4C000000  # + this node's own number for the node to steer to
MARK_MASK: Final = 0xFF000000
NODE_BITS: Final = 0x00E030FF  # that a node's number may have: 8,191 nodes, no bit of the others'
ROUTE_TABLE_BASE: Final = 0x4C000000  # table of node number n is base + n
RULE_PRIORITY: Final = 130  # to + 4; after the local table, also where Cilium moves that to 100
AGENT_SNAPSHOT_DIR: Final = "/run/lbctl"
MANAGER_SNAPSHOT_DIR: Final = "/run/lbctl-manager"
SPEAKER_SOCKET_DIR: Final = "/run/lbctl-speaker"
KEYS_DIR: Final = "/run/lbctl-keys"
