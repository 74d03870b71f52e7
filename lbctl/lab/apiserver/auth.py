"""Who asks: static bearer tokens, ServiceAccount tokens (JWT, ES256), and the review APIs.

Authorization is coarse on purpose: whoever is authenticated may do everything, an anonymous caller
nothing but health checks and /version. (RBAC is tried on the real cluster.)
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)

from lbctl.lab.apiserver import status
from lbctl.lab.apiserver.resources import Obj
from lbctl.lab.cluster.pki import Pki, load_private_key, read_tokens

AUDIENCE: Final = "https://kubernetes.default.svc"
ANONYMOUS: Final = "system:anonymous"
_HALF: Final = 32  # bytes of r and of s in an ES256 signature
_LONGEST_S: Final = 1 << 32


@dataclass(frozen=True, slots=True)
class User:
    """An authenticated caller, or the anonymous one."""

    name: str
    uid: str = ""
    groups: tuple[str, ...] = ()
    extra: dict[str, list[str]] = field(default_factory=dict)

    @property
    def info(self) -> Obj:
        """As authentication.k8s.io/v1 UserInfo."""
        found: Obj = {"username": self.name, "groups": list(self.groups)}
        if self.uid:
            found["uid"] = self.uid
        if self.extra:
            found["extra"] = self.extra
        return found


NOBODY: Final = User(ANONYMOUS, groups=("system:unauthenticated",))


class Tokens:
    """The tokens of a cluster. `account` looks a ServiceAccount up and returns its uid, or None."""

    def __init__(self, pki: Pki, account: Callable[[str, str], str | None]) -> None:
        self._key = load_private_key(pki.sa_key)
        self._account = account
        self._static = {
            token: User(user, uid, (*groups, "system:authenticated"))
            for token, user, uid, groups in read_tokens(pki.token_file)
        }
        self._checked: dict[str, Obj] = {}  # claims of tokens whose signature was right

    def user(self, token: str) -> User | None:
        """Whose token it is; None if it is nobody's, expired, or of an account that is gone."""
        found = self._static.get(token)
        if found is not None:
            return found
        claims = self._claims(token)
        if claims is None or claims.get("exp", 0) < time.time():
            return None
        about = claims.get("kubernetes.io", {})
        account, namespace = about.get("serviceaccount", {}), about.get("namespace", "")
        name = account.get("name", "")
        if not name or self._account(namespace, name) != account.get("uid"):
            return None
        groups = (
            "system:serviceaccounts",
            f"system:serviceaccounts:{namespace}",
            "system:authenticated",
        )
        extra = {"authentication.kubernetes.io/credential-id": [f"JTI={claims.get('jti', '')}"]}
        return User(f"system:serviceaccount:{namespace}:{name}", account["uid"], groups, extra)

    def audiences(self, token: str) -> tuple[str, ...]:
        """Whom a token is meant for; static ones are for the API server."""
        claims = self._claims(token)
        return tuple(claims.get("aud", ())) if claims else (AUDIENCE,)

    def issue(self, account: Obj, request: Obj, jti: str) -> Obj:
        """Answer a TokenRequest for a ServiceAccount: `request` with its status."""
        spec = request.setdefault("spec", {})
        meta = account["metadata"]
        audiences = spec.get("audiences") or [AUDIENCE]
        seconds = int(spec.get("expirationSeconds") or 3600)
        if not 600 <= seconds <= _LONGEST_S:
            raise status.bad_request(
                "spec.expirationSeconds: may not specify a duration less than 10 minutes"
            )
        issued = int(time.time())
        claims: Obj = {
            "aud": audiences,
            "exp": issued + seconds,
            "iat": issued,
            "nbf": issued,
            "iss": AUDIENCE,
            "jti": jti,
            "kubernetes.io": {
                "namespace": meta["namespace"],
                "serviceaccount": {"name": meta["name"], "uid": meta["uid"]},
            },
            "sub": f"system:serviceaccount:{meta['namespace']}:{meta['name']}",
        }
        bound = spec.get("boundObjectRef")
        if bound and bound.get("kind") == "Pod":
            claims["kubernetes.io"]["pod"] = {"name": bound.get("name"), "uid": bound.get("uid")}
        expires = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(issued + seconds))
        request["spec"] = {**spec, "audiences": audiences, "expirationSeconds": seconds}
        request["status"] = {"token": self._sign(claims), "expirationTimestamp": expires}
        request["metadata"] = {"name": meta["name"], "namespace": meta["namespace"]}
        request["metadata"]["creationTimestamp"] = time.strftime(
            "%Y-%m-%dT%H:%M:%SZ", time.gmtime(issued)
        )
        return request

    def _sign(self, claims: Obj) -> str:
        header = _encode(msgspec.json.encode({"alg": "ES256", "typ": "JWT"}))
        body = f"{header}.{_encode(msgspec.json.encode(claims))}"
        r, s = decode_dss_signature(self._key.sign(body.encode(), ec.ECDSA(hashes.SHA256())))
        return f"{body}.{_encode(r.to_bytes(_HALF, 'big') + s.to_bytes(_HALF, 'big'))}"

    def _claims(self, token: str) -> Obj | None:
        found = self._checked.get(token)
        if found is not None:
            return found
        body, _, signature = token.rpartition(".")
        try:
            raw = _decode(signature)
            if len(raw) != 2 * _HALF:
                return None
            der = encode_dss_signature(
                int.from_bytes(raw[:_HALF], "big"), int.from_bytes(raw[_HALF:], "big")
            )
            self._key.public_key().verify(der, body.encode(), ec.ECDSA(hashes.SHA256()))
            claims: Obj = msgspec.json.decode(_decode(body.partition(".")[2]))
        except (InvalidSignature, ValueError, msgspec.DecodeError):
            return None
        if len(self._checked) > 10_000:
            self._checked.clear()
        self._checked[token] = claims
        return claims


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def token_review(tokens: Tokens, review: Obj) -> Obj:
    """Answer a TokenReview."""
    spec = review.get("spec") or {}
    token = spec.get("token", "")
    user = tokens.user(token)
    wanted = spec.get("audiences") or [AUDIENCE]
    common = [audience for audience in wanted if user and audience in tokens.audiences(token)]
    if user is None or not common:
        error = "invalid bearer token"
        return {**review, "status": {"user": {}, "error": error}}
    state = {"authenticated": True, "user": user.info, "audiences": common}
    return {**review, "status": state}


def access_review(review: Obj, user: User | None) -> Obj:
    """Answer a SubjectAccessReview, or with `user` a SelfSubjectAccessReview."""
    spec = review.get("spec") or {}
    if user is not None:
        name, groups = user.name, list(user.groups)
    else:
        name, groups = spec.get("user", ""), spec.get("groups") or []
    allowed = bool(name or groups) and name != ANONYMOUS and "system:unauthenticated" not in groups
    state: dict[str, Any] = {"allowed": allowed}
    if allowed:
        state["reason"] = "the embedded API server allows whoever is authenticated"
    return {**review, "status": state}
