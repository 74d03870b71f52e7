"""Session affinity in rules: pins, and questions about them.

Rules:
- A pin (`pins`: client and port → a pod's number) is kept on the node that delivers, and decides
  there before the bucket does. It is renewed by each packet from the client of a flow that the pod
  has answered (of TCP: a whole handshake), so that forged senders make none, and for a pod that
  takes new flows only. `ct mark` holds the pod's number for that. There are `PINS` at most.
- nft 1.0.6 stops at keys of more than 16 bytes here: so a pin's is the end of the client's address
  and a hash of all that it belongs to. Two clients that share one share a pod.
- The owner of a bucket that was another node's (`prev`) asks that node about clients without a pin:
  it sends it their first packet, untracked, for what comes back must be new to conntrack. Of UDP
  every packet, for nothing says which is the first.
- Who is asked delivers what it knows, by conntrack or a pin, and sends the rest back to the
  bucket's owner. Few hops left say that a packet is a question, and fewer that it is an answer: so
  it is asked about once, and answered once.
"""

from __future__ import annotations

from typing import Final

from lbctl.core import maglev
from lbctl.core.names import MARK_BASE, MARK_MASK
from lbctl.core.nftfamily import BUCKET_BASE, HANDOVER_TTL, NOT_NODE, NOT_SYN, Family
from lbctl.core.sticky import KINDS, PINNED, TAKING, TIMEOUTS_S

ANSWER_TTL: Final = 3  # enough for the way to the pod
PINS: Final = 131_072  # clients of all ports of a family; further ones have none
_KIND: Final = MARK_MASK | KINDS
PINNED_MARK: Final = f"mark & {_KIND:#x} == {BUCKET_BASE + PINNED:#x}"
_TAKING: Final = f"meta mark & {_KIND:#x} == {BUCKET_BASE + TAKING:#x}"


def pin_chain(timeout_s: int) -> str:
    """Return the name of the chain that pins a client for so long, one of `TIMEOUTS_S`."""
    return f"pin{timeout_s}"


def _client(family: Family) -> str:
    """What a pin belongs to, when the mark is the hash."""
    return f"{family.tail} . meta mark"


def _hashed(family: Family) -> str:
    """The rule that makes a client and its port the mark, below all other marks."""
    whole = f"{family.ip} saddr . {family.key}"
    return f"meta mark set jhash {whole} mod {MARK_BASE:#x} seed {maglev.SEED:#x}"


def _sought(family: Family) -> str:
    """The rules that make a client's pin the mark, or some hash where there is none."""
    return f"{_hashed(family)}\n    meta mark set {_client(family)} map @pins"


def pin_sets(family: Family) -> str:
    """Return the maps of pins, of who asks, of pins' timeouts, and of pods' numbers."""
    key = f"{family.address} . inet_proto . inet_service"
    return f"""  map pins {{
    typeof {_client(family)} : meta mark; flags dynamic,timeout; size {PINS};
  }}
  map asks {{ type {key} : verdict; }}
  map pin {{ type {key} : verdict; }}
  map holders {{ type {key} . mark : mark; }}
"""


def questions(family: Family) -> str:
    """Return the chains `ask`, for first packets at the bucket's owner, and `answer`."""
    key, left = family.key, f"{family.ip} {family.hops}"
    return f"""  chain known {{
    {_sought(family)}
    meta {PINNED_MARK} meta mark set {key} . meta mark map @holders
  }}
  chain ask {{
    {key} vmap @asks
    meta mark 0 accept
    {left} <= {HANDOVER_TTL} meta mark set 0 accept
    jump known
    {_TAKING} meta mark set 0 accept
    {key} vmap @asks
    meta mark set {key} . meta mark map @prev
    {NOT_NODE} meta mark set 0 accept
    meta mark set {key} . meta mark map @holders \
      {left} set {HANDOVER_TTL} counter name asked notrack accept
    meta mark set 0
  }}
  chain answer {{
    {left} <= {ANSWER_TTL} return
    {NOT_SYN} return
    {key} vmap @asks
    meta mark 0 return
    jump known
    {_TAKING} meta mark set 0 accept
    {family.raw_key} vmap @svc
    {family.owner} \
      {left} set {ANSWER_TTL} counter name answered accept
    meta mark set 0 accept
  }}
"""


def pinning(family: Family) -> str:
    """Return the chains `refresh`, for packets of answered flows, and `client`, for new ones.

    A pin to a pod that takes no new flows is deleted: to renew it would not change it.
    """
    key = family.key
    lasting = "".join(
        f"  chain {pin_chain(seconds)} {{\n"
        f"    update @pins {{ {_client(family)} timeout {seconds}s : ct mark }}\n"
        "  }\n"
        for seconds in TIMEOUTS_S
    )
    number = f"meta mark set {key} . meta mark map @holders ct mark set meta mark xor {KINDS:#x}"
    return f"""{lasting}  chain refresh {{
    meta l4proto tcp ct status & assured != assured accept
    meta mark set {key} . ct mark map @holders
    meta mark 0 accept
    {_hashed(family)}
    {key} vmap @pin
    meta mark set 0
  }}
  chain forget {{
    {_hashed(family)}
    delete @pins {{ {_client(family)} : meta mark }}
  }}
  chain client {{
    {_sought(family)}
    meta {PINNED_MARK} {number} counter name pinned
    {family.delivered}
    meta {PINNED_MARK} jump forget
    {family.raw_key} vmap @svc
    {number}
    {family.delivered}
  }}
"""
