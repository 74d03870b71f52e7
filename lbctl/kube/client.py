"""HTTP to the API server: authentication by the official client, bytes by msgspec.

Rules: every request has a timeout; every failure is an `lbctl.errors.KubeError`. Configuration,
certificates and tokens come from the official client's loader (kubeconfig, exec plugins, in-cluster
token re-read every minute); the session is our own because its typed models are slow and reject a
whole list for one odd object (FACTS.md, "Kubernetes").
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import aiohttp
import msgspec
from kubernetes.aio import config as official
from kubernetes.aio.client.configuration import Configuration

from lbctl import errors
from lbctl.core import names

MERGE: Final = "application/merge-patch+json"
STRATEGIC: Final = "application/strategic-merge-patch+json"
JSON_PATCH: Final = "application/json-patch+json"

_MAX_ERROR_BODY: Final = 4096


@dataclass(frozen=True, slots=True)
class Resource:
    """A kind of object, as a URL. `api` is "v1" or "GROUP/VERSION"."""

    api: str
    plural: str
    namespaced: bool = True

    def path(self, namespace: str = "", name: str = "", sub: str = "") -> str:
        """URL path of a collection, an object (name given) or its subresource (sub given)."""
        parts = ["api" if "/" not in self.api else "apis", self.api]
        if self.namespaced and namespace:
            parts += ["namespaces", quote(namespace, safe="")]
        parts.append(self.plural)
        parts += [quote(part, safe="") for part in (name, sub) if part]
        return "/" + "/".join(parts)


SERVICES: Final = Resource("v1", "services")
NODES: Final = Resource("v1", "nodes", namespaced=False)
NAMESPACES: Final = Resource("v1", "namespaces", namespaced=False)
PODS: Final = Resource("v1", "pods")
CONFIG_MAPS: Final = Resource("v1", "configmaps")
SECRETS: Final = Resource("v1", "secrets")
EVENTS: Final = Resource("v1", "events")
ENDPOINT_SLICES: Final = Resource("discovery.k8s.io/v1", "endpointslices")
LEASES: Final = Resource("coordination.k8s.io/v1", "leases")
EIPS: Final = Resource(f"{names.GROUP}/{names.EIP_VERSION}", names.EIP_PLURAL, namespaced=False)
TOKEN_REVIEWS: Final = Resource("authentication.k8s.io/v1", "tokenreviews", namespaced=False)
ACCESS_REVIEWS: Final = Resource(
    "authorization.k8s.io/v1", "subjectaccessreviews", namespaced=False
)


class ListMeta(msgspec.Struct):
    """metadata of a list."""

    resourceVersion: str = ""


class RawList(msgspec.Struct):
    """A list whose items are decoded one by one, so that one odd object spoils only itself."""

    metadata: ListMeta = msgspec.field(default_factory=ListMeta)
    items: list[msgspec.Raw] | None = None


class _Status(msgspec.Struct):
    message: str | None = None
    reason: str | None = None


def error_of(code: int, message: str) -> errors.KubeError:
    """The exception for an HTTP or Status code."""
    text = f"{code}: {message}"
    match code:
        case 401 | 403:
            return errors.Forbidden(text)
        case 404:
            return errors.NotFound(text)
        case 409:
            return errors.Conflict(text)
        case 410:
            return errors.Gone(text)
        case 429:
            return errors.Unreachable(text)
        case _ if code >= 500:
            return errors.Unreachable(text)
    return errors.KubeError(text)


def _socket(info: Any) -> socket.socket:
    """A socket on which a dead API server shows within about 15 s, also under a silent watch."""
    made = socket.socket(family=info[0], type=info[1], proto=info[2])
    made.setblocking(False)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 15_000)
    return made


class Client:
    """Requests to one API server. Use as an async context manager, or `close()` it.

    Every method raises `errors.NotFound`, `Conflict`, `Gone`, `Forbidden`, `Unreachable`, or plain
    `KubeError` for any other refusal. `timeout_s` bounds each request wholly.
    """

    def __init__(self, configuration: Any, timeout_s: float = 5.0) -> None:
        self._configuration = configuration
        self._timeout_s = timeout_s
        self._session: aiohttp.ClientSession | None = None
        self._ssl: ssl.SSLContext | bool = True
        self.url: str = configuration.host.rstrip("/")
        if self.url.startswith("https"):
            self._ssl = _tls(configuration)

    @classmethod
    async def from_environment(
        cls, kubeconfig: str | Path | None = None, timeout_s: float = 5.0
    ) -> Client:
        """From a kubeconfig (argument, else $KUBECONFIG), else in-cluster, else ~/.kube/config.

        Raises `errors.KubeError` if none of them works.
        """
        configuration = Configuration()
        chosen = kubeconfig or os.environ.get("KUBECONFIG")
        try:
            if chosen is None and "KUBERNETES_SERVICE_HOST" in os.environ:
                official.load_incluster_config(client_configuration=configuration)
            else:
                await official.load_kube_config(
                    config_file=str(chosen) if chosen else None,
                    client_configuration=configuration,
                    persist_config=False,
                )
            return cls(configuration, timeout_s)
        except (official.ConfigException, OSError, ValueError, TypeError) as error:
            raise errors.KubeError(f"no usable Kubernetes configuration: {error}") from error

    @classmethod
    def with_token(
        cls, url: str, token: str, ca_file: str | Path | None = None, timeout_s: float = 5.0
    ) -> Client:
        """To `url` with a bearer token; `ca_file` signs the server's certificate."""
        configuration = Configuration(
            host=url, api_key={"BearerToken": token}, api_key_prefix={"BearerToken": "Bearer"}
        )
        configuration.ssl_ca_cert = str(ca_file) if ca_file else None
        return cls(configuration, timeout_s)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close every connection."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def get(
        self,
        path: str,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """GET: one object (or anything else that is JSON), as plain dicts and lists.

        headers: sent besides our own, for what lies behind a proxy subresource.
        """
        return _decode(await self._request("GET", path, params=params, headers=headers))

    async def list(
        self, path: str, params: Mapping[str, str] | None = None, timeout_s: float = 60.0
    ) -> RawList:
        """GET a collection, whole. Without `resourceVersion` the read is consistent (quorum)."""
        body = await self._request("GET", path, params=params, timeout_s=timeout_s)
        try:
            return msgspec.json.decode(body, type=RawList)
        except msgspec.MsgspecError as error:
            raise errors.KubeError(f"{path}: not a list: {error}") from error

    async def create(self, path: str, body: Mapping[str, Any]) -> Any:
        """POST to a collection; the object as stored. `Conflict`: the name exists."""
        return _decode(await self._request("POST", path, body))

    async def would_create(self, path: str, body: Mapping[str, Any]) -> Any:
        """As `create`, but nothing is stored (dryRun): the object as it would be."""
        return _decode(await self._request("POST", path, body, params={"dryRun": "All"}))

    async def replace(self, path: str, body: Mapping[str, Any]) -> Any:
        """PUT; with metadata.resourceVersion in it, `Conflict` if it has changed since."""
        return _decode(await self._request("PUT", path, body))

    async def patch(self, path: str, body: Any, content_type: str = MERGE) -> Any:
        """PATCH. A metadata.resourceVersion inside a merge patch guards it like `replace`."""
        return _decode(await self._request("PATCH", path, body, content_type=content_type))

    async def delete(
        self, path: str, *, uid: str | None = None, resource_version: str | None = None
    ) -> None:
        """DELETE, guarded by preconditions if given (`Conflict`). Gone already is success."""
        conditions = {"uid": uid, "resourceVersion": resource_version}
        given = {key: value for key, value in conditions.items() if value}
        body = {"kind": "DeleteOptions", "apiVersion": "v1", "preconditions": given}
        try:
            await self._request("DELETE", path, body if given else None)
        except errors.NotFound:
            return

    async def watch(
        self, path: str, params: Mapping[str, str], silence_s: float
    ) -> AsyncGenerator[bytes, None]:
        """Lines of a watch, as they come; ends when the server ends it.

        silence_s: without a byte for so long, headers included, `Unreachable`.
        """
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10.0, sock_read=silence_s)
        rest = b""
        async with AsyncExitStack() as stack:
            try:
                response = await stack.enter_async_context(
                    (await self._open()).get(
                        self.url + path,
                        params={**params, "watch": "true"},
                        headers=await self._headers(),
                        timeout=timeout,
                        **self._transport(),
                    )
                )
                if response.status >= 400:
                    raise await _refusal(response)
                async for chunk in response.content.iter_any():
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in lines:
                        if line.strip():
                            yield line
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                raise errors.Unreachable(f"watch {path}: {_text(error)}") from error

    async def _request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        params: Mapping[str, str] | None = None,
        content_type: str = "application/json",
        timeout_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> bytes:
        data = None if body is None else msgspec.json.encode(body)
        try:
            sent = {**(headers or {}), **await self._headers()}
            if data is not None:
                sent["Content-Type"] = content_type
            async with (await self._open()).request(
                method,
                self.url + path,
                params=params or None,
                data=data,
                headers=sent,
                timeout=aiohttp.ClientTimeout(total=timeout_s or self._timeout_s),
                **self._transport(),
            ) as response:
                if response.status >= 400:
                    raise await _refusal(response)
                return await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise errors.Unreachable(f"{method} {path}: {_text(error)}") from error

    async def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(ssl=self._ssl, limit=100, socket_factory=_socket)
            self._session = aiohttp.ClientSession(connector=connector)
        return self._session

    async def _headers(self) -> dict[str, str]:
        headers = {"Accept": "application/json", "User-Agent": "lbctl"}
        try:
            key = await self._configuration.get_api_key_with_prefix("BearerToken")
        except official.ConfigException as error:
            raise errors.Unreachable(f"no token: {error}") from error
        if key:
            headers["Authorization"] = key
        elif self._configuration.username:
            headers["Authorization"] = self._configuration.get_basic_auth_token()
        return headers

    def _transport(self) -> dict[str, Any]:
        proxy = self._configuration.proxy
        return {"proxy": proxy} if proxy else {}


def _tls(configuration: Any) -> ssl.SSLContext:
    context = ssl.create_default_context(
        cafile=configuration.ssl_ca_cert, cadata=configuration.ca_cert_data
    )
    if configuration.cert_file:
        context.load_cert_chain(configuration.cert_file, keyfile=configuration.key_file)
    if not configuration.verify_ssl:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _decode(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body) if body else None
    except msgspec.MsgspecError as error:
        raise errors.KubeError(f"the answer is not JSON: {error}") from error


async def _refusal(response: aiohttp.ClientResponse) -> errors.KubeError:
    body = await response.content.read(_MAX_ERROR_BODY)
    try:
        message = msgspec.json.decode(body, type=_Status).message or ""
    except msgspec.MsgspecError:
        message = body.decode(errors="replace").strip()
    return error_of(response.status, message or (response.reason or "no reason given"))


def _text(error: BaseException) -> str:
    return str(error) or type(error).__name__
