"""Subresources that are no part of the object: scale, binding, eviction, token, finalize, proxy."""

from __future__ import annotations

import io
import uuid
from typing import Any, Final, Protocol

import aiohttp
import msgspec
from aiohttp import web
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from lbctl.lab.apiserver import patch, status
from lbctl.lab.apiserver.api import Api, Options, now
from lbctl.lab.apiserver.auth import Tokens
from lbctl.lab.apiserver.deletion import DeleteOptions
from lbctl.lab.apiserver.resources import Obj, Resource
from lbctl.lab.apiserver.store import Item

# RFC 9110, 7.6.1, and what must not leak from the API server's client to a Pod.
_HOP: Final = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "authorization",
        "host",
        "content-length",
    }
)


class Place(Protocol):
    """What a request path names (`server.Target`)."""

    @property
    def resource(self) -> Resource:
        """The resource."""

    @property
    def namespace(self) -> str:
        """Its namespace, or ""."""

    @property
    def name(self) -> str:
        """The object's name."""

    @property
    def sub(self) -> str:
        """The subresource."""

    @property
    def rest(self) -> str:
        """The path after it."""


def answer(
    api: Api,
    tokens: Tokens,
    place: Place,
    method: str,
    body: Any,
    patch_kind: str,
    options: Options,
) -> tuple[Obj, int]:
    """Body and status code of a request to scale, token, binding or eviction. Raises ApiRefusal."""
    if place.sub == "scale":
        return _scale(api, place, method, body, patch_kind, options), 200
    if method != "POST":
        raise status.method_not_allowed()
    if place.sub == "token":
        account = api.get(place.resource, place.namespace, place.name)
        return tokens.issue(account.obj, body, str(uuid.uuid4())), 201
    if place.sub == "binding":
        return _bind(api, place, body), 201
    if place.sub == "eviction":
        wanted = body.get("deleteOptions") or {}
        grace = DeleteOptions(grace_s=wanted.get("gracePeriodSeconds"))
        api.delete(place.resource, place.namespace, place.name, grace)
        return _success(), 201
    raise status.no_such_path()


def _success() -> Obj:
    return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201}


def _bind(api: Api, place: Place, body: Obj) -> Obj:
    item = api.get(place.resource, place.namespace, place.name)
    node = (body.get("target") or {}).get("name")
    uid = (body.get("metadata") or {}).get("uid")
    if not node:
        cause = status.required("target.name")
        raise status.invalid(Resource("", "v1", "bindings", "Binding"), place.name, [cause])
    bound = item.obj["spec"].get("nodeName")
    if bound:
        why = f'pod {place.name} is already assigned to node "{bound}"'
        raise status.conflict(Resource("", "v1", "pods/binding", "Binding"), place.name, why)
    if uid and uid != item.obj["metadata"]["uid"]:
        raise status.conflict(place.resource, place.name, "the UID in the binding is another Pod's")
    obj = item.copy()
    obj["spec"]["nodeName"] = node
    obj["status"].setdefault("conditions", []).append(
        {
            "type": "PodScheduled",
            "status": "True",
            "lastProbeTime": None,
            "lastTransitionTime": now(),
        }
    )
    api.store.put(place.resource.key, obj)
    return _success()


def _scale(
    api: Api, place: Place, method: str, body: Any, patch_kind: str, options: Options
) -> Obj:
    item = api.get(place.resource, place.namespace, place.name)
    current = _scale_of(item)
    if method == "GET":
        return current
    if method == "PUT":
        wanted = body
    elif method == "PATCH" and patch_kind in {"merge", "strategic", "json"}:
        change = patch.json_patch if patch_kind == "json" else patch.merge_patch
        wanted = change(current, body)
    else:
        raise status.method_not_allowed()
    version = (wanted.get("metadata") or {}).get("resourceVersion")
    if version and version != item.obj["metadata"]["resourceVersion"]:
        raise status.conflict(place.resource, place.name)
    replicas = (wanted.get("spec") or {}).get("replicas", 0)
    if not isinstance(replicas, int) or replicas < 0:
        detail = "must be greater than or equal to 0"
        cause = status.invalid_value("spec.replicas", replicas, detail)
        raise status.invalid(Resource("autoscaling", "v1", "scales", "Scale"), place.name, [cause])
    obj = item.copy()
    obj["spec"]["replicas"] = replicas
    return _scale_of(api.write(place.resource, item, obj, options))


def _scale_of(item: Item) -> Obj:
    obj = item.obj
    meta = obj["metadata"]
    kept = ("name", "namespace", "uid", "resourceVersion", "creationTimestamp")
    labels = (obj["spec"].get("selector") or {}).get("matchLabels") or {}
    return {
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": {key: meta[key] for key in kept if key in meta},
        "spec": {"replicas": obj["spec"].get("replicas", 0)},
        "status": {
            "replicas": obj.get("status", {}).get("replicas", 0),
            "selector": ",".join(f"{key}={value}" for key, value in sorted(labels.items())),
        },
    }


def finalize(api: Api, name: str, body: Obj) -> Item:
    """PUT namespaces/NAME/finalize: the only way to change spec.finalizers."""
    resource = api.registry.key("namespaces")
    item = api.get(resource, "", name)
    obj = item.copy()
    obj["spec"] = {"finalizers": (body.get("spec") or {}).get("finalizers") or []}
    meta = obj["metadata"]
    if "deletionTimestamp" in meta and not obj["spec"]["finalizers"] and not meta.get("finalizers"):
        return api.store.remove("namespaces", "", name, obj)
    return api.store.put("namespaces", obj)


def decode_yaml(data: bytes) -> Any:
    """YAML or JSON to plain objects. Raises ApiRefusal 400."""
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        pass
    try:
        plain = YAML(typ="safe", pure=True).load(io.BytesIO(data))
        return msgspec.json.decode(msgspec.json.encode(plain))
    except (YAMLError, TypeError, UnicodeDecodeError) as error:
        raise status.bad_request(f"error decoding YAML: {error}") from error


async def proxy(
    api: Api, session: aiohttp.ClientSession, request: web.Request, place: Place
) -> web.StreamResponse:
    """GET forwarded to a Pod: `pods/[http:]NAME[:PORT]/proxy/PATH`. Raises ApiRefusal."""
    if request.method not in {"GET", "HEAD"} or place.resource.key != "pods":
        raise status.method_not_allowed()
    parts = place.name.split(":")
    if len(parts) == 3:
        parts = parts[1:]
    name, port = parts[0], parts[1] if len(parts) > 1 else ""
    pod = api.get(place.resource, place.namespace, name).obj
    host = (pod.get("status") or {}).get("podIP")
    if not host:
        raise status.fail(400, "BadRequest", "address not allowed: the pod has no address yet")
    number = _port(pod, port)
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{number}/{place.rest}"
    if request.query_string:
        url += f"?{request.query_string}"
    headers = [(k, v) for k, v in request.headers.items() if k.lower() not in _HOP]
    try:
        async with session.request(
            request.method, url, headers=headers, allow_redirects=False
        ) as upstream:
            body = await upstream.read()
            kept = [(k, v) for k, v in upstream.headers.items() if k.lower() not in _HOP]
            return web.Response(body=body, status=upstream.status, headers=dict(kept))
    except (aiohttp.ClientError, TimeoutError) as error:
        message = f"error trying to reach service: {error}"
        raise status.fail(503, "ServiceUnavailable", message) from error


def _port(pod: Obj, wanted: str) -> int:
    ports = [
        port
        for container in pod["spec"].get("containers", ())
        for port in container.get("ports") or ()
    ]
    if wanted.isdigit():
        return int(wanted)
    for port in ports:
        if not wanted or port.get("name") == wanted:
            return int(port["containerPort"])
    if not wanted:
        return 80
    raise status.bad_request(f'no port named "{wanted}" in the pod')
