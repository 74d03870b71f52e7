"""The probe keys: read from the Secret, refused when weak, derived per node.

The Secret holds `current` and, while a rotation goes on, `previous`. Both are accepted. What is
sent is signed with `previous` while there is one: everybody has that one for certain, whereas a
mounted Secret reaches an agent up to a minute after the managers. Once `previous` is taken out of
the Secret, everybody has seen `current`. Derived keys are `HMAC-SHA256(secret, purpose)`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field

from lbctl.errors import ConfigError, MessageError

MIN_BYTES = 32
# 32 random bytes have fewer than 16 different values about once in 10^15; typed text often does.
MIN_DISTINCT = 16


@dataclass(frozen=True, slots=True)
class Key:
    """One derived key. `id` tells a receiver which of two secrets it comes from."""

    id: int
    secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class KeyRing:
    """The keys of one purpose: `signing` for what is sent, `accepted` for what is received."""

    signing: Key
    accepted: tuple[Key, ...]

    def find(self, key_id: int) -> Key | None:
        """Return the accepted key of this id."""
        return next((key for key in self.accepted if key.id == key_id), None)

    def to_text(self) -> str:
        """Return the ring as text, to hand it to another process of the same pod."""
        return ",".join(
            f"{key.id:08x}:{key.secret.hex()}" for key in (self.signing, *self.accepted)
        )

    @classmethod
    def from_text(cls, text: str) -> KeyRing:
        """Parse `to_text`; raises MessageError."""
        try:
            pairs = [item.split(":") for item in text.split(",")]
            keys = tuple(Key(int(number, 16), bytes.fromhex(secret)) for number, secret in pairs)
        except ValueError as error:
            raise MessageError("a key ring's text is malformed") from error
        if len(keys) < 2 or any(len(key.secret) < MIN_BYTES for key in keys):
            raise MessageError("a key ring's text is incomplete")
        return cls(keys[0], keys[1:])


@dataclass(frozen=True, slots=True)
class Keys:
    """The secrets themselves, 32 random bytes or more each."""

    current: bytes = field(repr=False)
    previous: bytes | None = field(default=None, repr=False)

    def node(self, name: str) -> KeyRing:
        """Return the keys between the managers and the agent of node `name`."""
        return self._ring(b"node:" + name.encode())

    def managers(self) -> KeyRing:
        """Return the keys of the managers among each other."""
        return self._ring(b"managers")

    def _ring(self, purpose: bytes) -> KeyRing:
        secrets = (self.current,) if self.previous is None else (self.previous, self.current)
        keys = tuple(
            Key(
                int.from_bytes(hashlib.sha256(b"id:" + secret).digest()[:4], "big"),
                hmac.digest(secret, purpose, "sha256"),
            )
            for secret in secrets
        )
        return KeyRing(keys[0], keys)


def parse_keys(values: Mapping[str, str | bytes]) -> Keys:
    """Read `current` and `previous`, each base64 of at least 32 random bytes.

    `values` are the Secret's values as a mounted file has them (through the API, undo the API's own
    base64 first). Raises ConfigError for a missing key, a short one, a placeholder or plain text.
    """
    if not values.get("current"):
        raise ConfigError(("the probe Secret has no key 'current'",))
    previous = values.get("previous")
    return Keys(
        _secret("current", values["current"]),
        _secret("previous", previous) if previous and previous.strip() else None,
    )


def _secret(name: str, text: str | bytes) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode()
    try:
        value = base64.b64decode(b"".join(raw.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ConfigError((f"the probe Secret's key '{name}' is not base64",)) from error
    if len(value) < MIN_BYTES:
        raise ConfigError(
            (f"the probe Secret's key '{name}' has {len(value)} bytes; {MIN_BYTES} are the least",)
        )
    if len(set(value)) < MIN_DISTINCT or all(32 <= byte < 127 for byte in value):
        raise ConfigError((f"the probe Secret's key '{name}' is a placeholder: use random bytes",))
    return value
