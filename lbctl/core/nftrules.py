"""The tables without elements: sets, maps, chains and rules, one text for both address families.

Rules:
- Two tables of the same shape, `ip lbctl` and `ip6 lbctl`. What differs between them is a field of
  `Family`; nothing else here asks for the version.
- A handful of chains whatever the number of Services; everything that grows is an element of a flat
  map, keyed `address . protocol . port . bucket`.
- Hooks: raw prerouting steers (before conntrack) and asks about pins (`nftpins`), mangle - 5 gives
  the second chance, dstnat - 5 delivers before kube-proxy, dstnat + 5 clears the bucket's mark.
  Nothing for a pool's address is ever routed on unsteered or given to a host socket.

Source: nft(8), libnftables of nftables 1.0.6; FACTS.md, "Forwarding, tried beside real kube-proxy".
"""

from __future__ import annotations

from typing import Final

from lbctl.core import maglev
from lbctl.core.names import FIRST, MARK_BASE, MARK_MASK, PROBE_PORT, TUNNEL_DEVICE, TUNNEL_PORT
from lbctl.core.nftfamily import (
    BUCKET,
    BUCKET_BASE,
    HANDOVER_TTL,
    LAST_LOOKUP_TTL,
    NODE,
    NOT_NODE,
    SYN,
    Family,
)
from lbctl.core.nftpins import ANSWER_TTL, PINNED_MARK, pin_sets, pinning, questions
from lbctl.core.nodeview import SPARES

# A UDP flow that says something within this time stays with its pod when buckets move; so long do
# new flows follow their bucket's former owner. As the kernel's own nf_conntrack_udp_timeout.
UDP_MEMORY_S: Final = 30
COUNTERS: Final = (
    "steered",  # packets sent on to the node of their connection
    "errors",  # ICMP errors sent on to the node of the connection that they speak of
    "delivered",  # new flows given to a pod of this node
    "sent_on",  # new connections that a node steered here, where no pod is, to this one's owner
    "second_chance",  # packets of established flows handed to the flow's last owner
    "asked",  # first packets sent to the bucket's last owner, who may know the client
    "answered",  # … and sent back by that one: it does not
    "pinned",  # new flows given to the pod that their client was with
    "pings",  # echo requests answered
    # The rest is dropped or refused.
    "refused",  # to what no Service offers
    "sources",  # from outside a Service's source ranges
    "odd",  # with IP options or extension headers
    "flood",  # new flows, or echo requests, over the limit of their EIP
    "forged",  # tunnel packets from no current node
    "stray",  # steered here, but nothing here takes them
)
# Of a connection that is over, in ct timeout's words: a new one from its port must not meet it.
_OVER: Final = "fin_wait : 1, close_wait : 1, last_ack : 1, time_wait : 1, close : 1"
TUNNEL_HEADERS: Final = {4: 40, 6: 60}  # bytes of IP and TCP header, not part of an MSS
PINGS_PER_SECOND: Final = 50  # answered by one node for one EIP
_RATES: Final = (
    65_535  # EIPs whose rate is kept at a time, each for a minute since it was last used
)


# What `nft --check` says of it tells whether the tables can have timeouts of their own.
TIMEOUT_TRIAL: Final = """table ip lbctl_trial {
  ct timeout trial { protocol udp; l3proto ip; policy = { unreplied : 10 }; }
}
"""


def skeleton(family: Family, timeouts: bool = True) -> str:
    """Return the table without elements: sets, maps, chains and rules.

    timeouts: whether conntrack entries get other ones than the kernel's.
    """
    parts = (
        "".join(f"  counter {name} {{ }}\n" for name in COUNTERS),
        _timeouts(family) if timeouts else "",
        _sets(family),
        pin_sets(family),
        _hash_chains(family),
        _icmp(family),
        _brought(family),
        _steering(family),
        _elsewhere(family),
        questions(family),
        pinning(family),
        _handover(family),
        _chance(family),
        _arrivals(family),
        _delivery(family),
        _guards(family),
        _outgoing(family),
    )
    lines = "".join(parts).splitlines(keepends=True)
    kept = "".join(line for line in lines if timeouts or "ct timeout set" not in line)
    return f"table {family.table} {{\n{kept}}}\n"


def refusals(family: Family) -> str:
    """Return the rules that answer instead of dropping; `refuse` ends in a drop from the start."""
    chain = f"insert rule {family.table} refuse"
    # Inserted one before the other: read them from the last to the first.
    return (
        f"{chain} meta l4proto udp reject with {family.icmp} type port-unreachable\n"
        f"{chain} meta l4proto tcp reject with tcp reset\n"
        f"{chain} limit rate over 500/second burst 500 packets drop\n"
        f"{chain} counter name refused\n"
    )


def hash_chain(size: int, by_client: bool) -> str:
    """Return the name of the chain that gives a packet its bucket of `size`."""
    return f"{'client' if by_client else 'flow'}{size}"


def _hash_chains(family: Family) -> str:
    """Chains that set a packet's bucket as its mark; an ICMP error has its connection's bucket."""
    lines = []
    for size in maglev.SIZES:
        for by_client in (False, True):
            own, inner = f"{family.ip} saddr", family.client
            if not by_client:
                own, inner = f"{own} . th sport", f"{inner} . {family.client_port}"
            bucket = f"mod {size} seed {maglev.SEED:#x} offset {BUCKET_BASE:#x}"
            lines.append(
                f"  chain {hash_chain(size, by_client)} {{\n"
                f"    meta mark set jhash {own} {bucket}\n"
                f"    meta l4proto {family.icmp_number} meta mark set jhash {inner} {bucket}\n"
                "  }\n"
            )
    return "".join(lines)


def _timeouts(family: Family) -> str:
    """What is not yet answered leaves conntrack soon: a flood's entries are rate times these.

    A SYN that met a pod that had just gone is chosen for anew when the client repeats it, 1 s later
    at the earliest (RFC 6298).
    So does the memory of a flow that was handed over and says no more: a new connection from the
    same client port would follow it. A flow that goes on renews it. What was only passed on has no
    note, so that a new connection would end here: it is forgotten at once. `syn_sent` is what a
    first packet gets, whatever it is (nft_ct.c, nft_ct_timeout_obj_eval).
    """
    return f"""  ct timeout brief_tcp {{
    protocol tcp; l3proto {family.ip};
    policy = {{ syn_sent : 1, syn_recv : 10 }};
  }}
  ct timeout handed_tcp {{
    protocol tcp; l3proto {family.ip};
    policy = {{ syn_sent : 30, established : 30, unack : 30, {_OVER} }};
  }}
  ct timeout passed_tcp {{
    protocol tcp; l3proto {family.ip};
    policy = {{ syn_sent : 1, established : 1, unack : 1, {_OVER} }};
  }}
  ct timeout brief_udp {{
    protocol udp; l3proto {family.ip};
    policy = {{ unreplied : 10 }};
  }}
  ct timeout handed_udp {{
    protocol udp; l3proto {family.ip};
    policy = {{ unreplied : {UDP_MEMORY_S} }};
  }}
"""


def _sets(family: Family) -> str:
    """`steer` and `svc` are asked by a packet's own header and by the one inside an ICMP error: nft
    lets only raw payload expressions share a map.
    """
    address = family.address
    key = f"{address} . inet_proto . inet_service"
    return f"""  set gen {{ type mark; }}
  set uplinks {{ type ifname; }}
  set peers {{ type ether_addr; }}
  set silent {{ type mark; }}
  set tunnel_peers {{ type {address}; }}
  set ranges {{ type {address}; flags interval; }}
  set restricted {{ type {address}; }}
  set sources {{ type {address} . {address}; flags interval; }}
  set pingable {{ type {address}; }}
  set external {{ type {address}; }}
  set closed {{ type {key}; }}
  set homed {{ type {key}; }}
  set rate {{ type {address}; flags dynamic,timeout; size {_RATES}; timeout 60s; }}
  set ping_rate {{ type {address}; flags dynamic,timeout; size {_RATES}; timeout 60s; }}
  map clamp {{ typeof oifname : tcp option maxseg size; }}
  map svc {{ typeof {family.raw_key} : verdict; }}
  map past {{ type {key} : verdict; }}
  map steer {{ typeof {family.raw_key} . meta mark : meta mark; }}
  map prev {{ type {key} . mark : mark; }}
  map deliver {{ type {key} . mark : {address} . inet_service; }}
  map spare {{ type {key} . mark : {address} . inet_service; }}
"""


def _icmp(family: Family) -> str:
    """Errors go the way of the connection that they speak of; pings are for whoever gets them."""
    over = f"limit rate over {PINGS_PER_SECOND}/second burst {PINGS_PER_SECOND} packets"
    return f"""  chain errors {{
    {family.odd_inner} counter name odd drop
    {family.raw_error_key} vmap @svc
    meta mark 0 counter name stray drop
    meta mark set {family.raw_error_key} . meta mark map @steer counter name errors notrack accept
    meta mark set 0 accept
  }}
  chain ping {{
    update @ping_rate {{ {family.ip} daddr {over} }} counter name flood drop
    counter name pings accept
  }}
"""


def _steering(family: Family) -> str:
    """From outside: refuse, or find the bucket, and mark and untrack what is another node's."""
    ip, icmp, key = family.ip, family.icmp, family.key
    return f"""  chain refuse {{
    drop
  }}
  chain outside {{
    {icmp} type {{ {family.errors} }} goto errors
    {icmp} type echo-request {ip} daddr @pingable goto ping
    {SYN} {key} @closed goto refuse
    meta l4proto != tcp {key} @closed goto refuse
    {family.raw_key} vmap @svc
    meta mark 0 goto refuse
    {family.owner} counter name steered notrack accept
    meta mark set 0
    goto ours
  }}
  chain permitted {{
    {icmp} type {{ {family.errors} }} return
    {ip} daddr . {ip} saddr != @sources counter name sources drop
  }}
  chain ingress {{
    type filter hook prerouting priority raw; policy accept;
    iifname != @uplinks goto elsewhere
    {ip} daddr != @ranges goto elsewhere
    meta mark set 0
    {family.odd} counter name odd drop
    {ip} daddr @restricted jump permitted
    iifname "{TUNNEL_DEVICE}" goto brought
    ether saddr @peers goto brought
    goto outside
  }}
"""


def _brought(family: Family) -> str:
    """What another node brought stays here if a pod of the port is here.

    Else a new connection goes on to the owner by our table: pods came to us, or left, and one of
    the two nodes has not heard of it. With so few hops left that one delivers it, or drops it.
    """
    left = f"{family.ip} {family.hops}"
    return f"""  chain ours {{
    {SYN} goto ask
    meta l4proto udp goto ask
  }}
  chain sent_on {{
    {family.raw_key} vmap @svc
    {family.owner} \
      {left} set {ANSWER_TTL} counter name sent_on notrack accept
    meta mark set 0
    goto ours
  }}
  chain brought {{
    {SYN} {left} > {HANDOVER_TTL} {family.key} != @homed goto sent_on
    goto ours
  }}
"""


def _elsewhere(family: Family) -> str:
    """What is for no EIP: nobody brings our marks along, and tunnels lead from node to node only.

    Tunnel packets of this node come from the kernel, which owns no socket that sends.
    """
    ip = family.ip
    return f"""  chain tunnel {{
    iifname @uplinks {ip} saddr @tunnel_peers notrack accept
    fib daddr type != local {ip} daddr != @tunnel_peers accept
    counter name forged drop
  }}
  chain elsewhere {{
    meta mark & {MARK_MASK:#x} == {{ {MARK_BASE:#x}, {BUCKET_BASE:#x} }} meta mark set 0
    iifname "{TUNNEL_DEVICE}" counter name forged drop
    udp dport {TUNNEL_PORT} goto tunnel
  }}
  chain own {{
    type filter hook output priority raw; policy accept;
    udp dport {TUNNEL_PORT} {ip} daddr @tunnel_peers meta skuid >= 0 counter name forged drop
    udp dport {TUNNEL_PORT} {ip} daddr @tunnel_peers notrack
  }}
"""


def _handover(family: Family) -> str:
    """Hand a flow to the node that is its mark, or pass on what was handed to us.

    What was handed over is looked up first, and only then goes by what the flow left in conntrack:
    two nodes' notes may lead to each other. Last comes the owner by our table, which may be older.
    """
    ip, key = family.ip, family.key
    return f"""  chain handover {{
    {ip} {family.hops} < 2 counter name stray drop
    {ip} {family.hops} <= {HANDOVER_TTL} goto handed_on
    ct mark set meta mark
    {ip} {family.hops} set {HANDOVER_TTL}
    meta l4proto tcp ct timeout set "handed_tcp"
    meta l4proto udp ct timeout set "handed_udp"
    counter name second_chance accept
  }}
  chain handed_on {{
    meta l4proto tcp ct timeout set "passed_tcp"
    counter name second_chance accept
  }}
  chain passed {{
    {key} vmap @past
    meta mark set {key} . meta mark map @prev goto handover
    ct mark & {MARK_MASK:#x} == {MARK_BASE:#x} meta mark set ct mark goto handover
    meta mark set 0
    {family.raw_key} vmap @svc
    {family.owner} goto handover
    counter name stray drop
  }}
"""


def _chance(family: Family) -> str:
    """Flows that conntrack does not know here go to their last owner, but for new ones of TCP.

    What was handed over has few hops left: of TCP it is looked up once more, and then goes by notes
    alone until no hops are left. Our pod would reset what another node takes for ours. What nobody
    had before here goes to its owner by our table: the node that sent it has another one, and if
    ours is older (its agent is away), that is who has the flow; of UDP only without a pod here, who
    takes it else. A note that leads to a silent node is left for who else may have the flow, if
    there is anyone.
    """
    ip, key = family.ip, family.key
    few = f"{{ {LAST_LOOKUP_TTL}, {HANDOVER_TTL} }}"
    return f"""  chain lookup {{
    {ip} {family.hops} {few} tcp flags & (syn|rst) == 0 goto passed
    ct mark @silent tcp flags & (syn|rst) == 0 jump instead
    ct mark & {MARK_MASK:#x} == {MARK_BASE:#x} meta mark set ct mark goto handover
    {ip} {family.hops} <= {HANDOVER_TTL} jump answer
    tcp flags & (syn|rst) != 0 accept
    meta l4proto tcp {ip} {family.hops} <= {HANDOVER_TTL} counter name stray drop
    {ip} {family.hops} <= {HANDOVER_TTL} accept
    {key} vmap @past
    meta mark set {key} . meta mark map @prev goto handover
    meta mark set 0
    meta l4proto udp {key} @homed accept
    {family.raw_key} vmap @svc
    {family.owner} goto handover
    meta mark set 0
  }}
  chain instead {{
    {key} vmap @past
    meta mark set {key} . meta mark map @prev goto handover
  }}
"""


def _arrivals(family: Family) -> str:
    """What came in from an uplink, or from another node, and is not established here."""
    ip = family.ip
    return f"""  chain arrived {{
    ct state related ct mark & {MARK_MASK:#x} == {MARK_BASE:#x} meta mark set ct mark
    ct state established ct {PINNED_MARK} goto refresh
    ct state != new accept
    ct status dnat accept
    meta l4proto udp ct timeout set "brief_udp"
    meta l4proto tcp ct timeout set "brief_tcp"
    meta l4proto {{ tcp, udp }} goto lookup
  }}
  chain chance {{
    type filter hook prerouting priority mangle - 5; policy accept;
    iifname @uplinks {ip} daddr @ranges goto arrived
  }}
"""


def _delivery(family: Family) -> str:
    """Buckets of ours: to the pod, before kube-proxy; then the bucket's mark goes."""
    ip, key = family.ip, family.key
    to_spare = f"dnat {ip} to {key} . meta mark map @spare"
    return f"""  chain enough {{
  }}

  chain deliver_new {{
    {family.icmp} type echo-request {ip} daddr @pingable redirect
    jump enough
    {NODE} dnat to {ip} daddr
    {family.raw_key} vmap @svc
    {family.delivered}
    jump client
    meta mark set meta mark & {MARK_MASK | SPARES - 1:#x}
    {SYN} {to_spare}
    meta l4proto {{ udp, sctp }} {to_spare}
    counter name stray drop
  }}
  chain delivery {{
    type nat hook prerouting priority dstnat - 5; policy accept;
    iifname @uplinks {ip} daddr @ranges goto deliver_new
  }}
  chain cleanup {{
    type filter hook prerouting priority dstnat + 5; policy accept;
    {BUCKET} counter name delivered meta mark set 0
  }}
"""


def limiter(family: Family, per_second: int) -> str:
    """Return the commands that limit new flows of each EIP to this rate; 0: no limit."""
    text = f"flush chain {family.table} enough\nflush set {family.table} rate\n"
    if not per_second:
        return text
    over = f"limit rate over {per_second}/second burst {per_second} packets"
    rule = f"update @rate {{ {family.ip} daddr {over} }} counter name flood drop"
    return f"{text}add rule {family.table} enough {rule}\n"


def _guards(family: Family) -> str:
    """Nothing for the pools is routed on or reaches the host; no ICMP redirects about our hops."""
    ip = family.ip
    return f"""  chain onward {{
    type filter hook forward priority filter - 5; policy accept;
    iifname @uplinks {ip} daddr @ranges {NOT_NODE} counter name stray drop
  }}
  chain host {{
    type filter hook input priority filter - 5; policy accept;
    iifname @uplinks {ip} daddr @ranges counter name stray drop
  }}
  chain redirects {{
    type filter hook output priority filter; policy accept;
    {family.icmp} type {family.redirect} drop
  }}
"""


def _outgoing(family: Family) -> str:
    """What leaves: external endpoints see this node, clients learn the tunnel's MSS.

    A tunnel routes its outer packets by the mark too: with ours on it they would go in again.
    In this host's own queue SYN-ACKs go first: behind the data of a
    full uplink they are lost, and a client that repeats itself while its bucket moves is answered
    by two pods. So does the kernel's answer to a manager that asks whether it lives.
    """
    ip, answer = family.ip, "tcp flags & (syn|rst|ack) == (syn|ack)"
    return f"""  chain outbound {{
    type nat hook postrouting priority srcnat - 5; policy accept;
    {ip} daddr @external ct original {ip} daddr @ranges masquerade
  }}
  chain leaving {{
    type filter hook postrouting priority srcnat + 5; policy accept;
    oifname "{TUNNEL_DEVICE}" meta mark set 0
    {answer} {ip} saddr @ranges meta priority set 0:{FIRST}
    tcp sport {PROBE_PORT} tcp flags & rst == rst meta priority set 0:{FIRST}
    {answer} {ip} saddr @ranges tcp option maxseg size set oifname map @clamp
  }}
"""
