"""Session affinity in rules: pins. And questions to the node that had a bucket before.

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
- Without session affinity it asks about SYNs for some seconds (`SYN_MEMORY_S`): a repeated one is
  of a connection that the former owner's pod has half made, and is still answering.
- Who is asked delivers what it knows, by conntrack or a pin, and sends the rest back to who asked
  (`callers`, by MAC): its own table may be an older one. Few hops left say that a packet is a
  question, and fewer that it is an answer: so it is asked about once, and answered once. Both go
  first in a node's own queue.
"""

from __future__ import annotations

from typing import Final

from lbctl.core import maglev
from lbctl.core.names import FIRST, MARK_BASE, MARK_MASK
from lbctl.core.nftfamily import (
    BUCKET_BASE,
    HANDOVER_TTL,
    LAST_LOOKUP_TTL,
    NODE,
    NOT_NODE,
    NOT_SYN,
    SYN,
    Family,
)
from lbctl.core.sticky import KINDS, PINNED, TAKING, TIMEOUTS_S

ANSWER_TTL: Final = 5  # enough for the way to the pod, over a node or two; less than a question's
# A SYN is repeated after 1 and 3 s (RFC 6298), and so is the answer to it.
SYN_MEMORY_S: Final = 4
_QUESTIONS: Final = 1000  # in one second, of this node's, that go first
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
    """Return the maps of pins, of who asks and whom, of pins' timeouts, and of pods' numbers."""
    key = f"{family.address} . inet_proto . inet_service"
    return f"""  map pins {{
    typeof {_client(family)} : meta mark; flags dynamic,timeout; size {PINS};
  }}
  map asks {{ type {key} : verdict; }}
  map callers {{ type ether_addr : mark; }}
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
    {left} != {LAST_LOOKUP_TTL} return
    {NOT_SYN} return
    {key} vmap @asks
    meta mark 0 meta l4proto != tcp return
    jump known
    {_TAKING} meta mark set 0 accept
    meta mark set ether saddr map @callers \
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


def questions_first(family: Family) -> str:
    """Return the rule that lets questions and answers past the data in this node's own queue.

    A full uplink would lose them. So many a second, for who fills it may send such packets too.
    """
    few = f"{family.ip} {family.hops} < {HANDOVER_TTL}"
    limit = f"limit rate {_QUESTIONS}/second burst {_QUESTIONS} packets"
    return f"{SYN} {NODE} {few} {limit} meta priority set 0:{FIRST}"
