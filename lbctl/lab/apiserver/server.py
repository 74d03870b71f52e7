"""HTTP: from a request to a verb of `Api`, and from its result or refusal to an answer.

One handler for every path; `Target` is what a path means. Bodies are JSON (YAML for server-side
apply); protobuf is refused with 415, which clients take as "speak JSON".
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
import msgspec
import structlog
from aiohttp import web

from lbctl.errors import ApiRefusal
from lbctl.lab.apiserver import auth, discovery, lists, protobuf, status, subresources, tables
from lbctl.lab.apiserver.api import Api, Options
from lbctl.lab.apiserver.deletion import DeleteOptions
from lbctl.lab.apiserver.resources import REVIEWS, Obj, Resource
from lbctl.lab.apiserver.store import Item, decode

log = structlog.get_logger()
_MAX_BODY: Final = 16 * 1024 * 1024
_OPEN: Final = frozenset({"/healthz", "/livez", "/readyz", "/version"})
_PATCHES: Final = {
    "application/json-patch+json": "json",
    "application/merge-patch+json": "merge",
    "application/strategic-merge-patch+json": "strategic",
    "application/apply-patch+yaml": "apply",
}
_USER: Final = web.RequestKey("user", auth.User)


@dataclass(frozen=True, slots=True)
class Target:
    """What a path names. `rest` is what follows a proxy subresource."""

    resource: Resource
    namespace: str
    name: str
    sub: str
    rest: str


class Server:
    """The aiohttp application around an `Api`."""

    def __init__(self, api: Api, tokens: auth.Tokens, address: str) -> None:
        self.api = api
        self.tokens = tokens
        self.lists = lists.Lists(api.store)
        self._protobuf = protobuf.Decoder(api.schemas)
        self._address = address
        self.proxy: aiohttp.ClientSession | None = None

    def application(self) -> web.Application:
        """To be run with `web.AppRunner`."""
        app = web.Application(client_max_size=_MAX_BODY)
        app.router.add_route("*", "/{path:.*}", self.handle)
        app.cleanup_ctx.append(self._proxy_session)
        return app

    async def _proxy_session(self, _: web.Application) -> Any:
        timeout = aiohttp.ClientTimeout(total=30, connect=5)
        async with aiohttp.ClientSession(timeout=timeout, auto_decompress=False) as session:
            self.proxy = session
            yield

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer any request."""
        try:
            request[_USER] = self._authenticate(request)
            return await self._route(request)
        except ApiRefusal as refusal:
            return answer(refusal.status, int(str(refusal.status["code"])))
        except (asyncio.CancelledError, web.HTTPException, ConnectionError):
            raise
        except Exception as error:  # a task root: one request must not end the server
            log.exception("request_failed", method=request.method, path=request.path)
            message = f"Internal error occurred: {error!r}"
            return answer(status.fail(500, "InternalError", message).status, 500)

    def _authenticate(self, request: web.Request) -> auth.User:
        header = request.headers.get("Authorization", "")
        if header.lower().startswith("bearer "):
            user = self.tokens.user(header[7:].strip())
            if user is None:
                raise status.unauthorized()
            return user
        if request.path in _OPEN:
            return auth.NOBODY
        raise status.fail(
            403,
            "Forbidden",
            f'forbidden: User "{auth.ANONYMOUS}" cannot {request.method.lower()} path '
            f'"{request.path}"',
            {},
        )

    async def _route(self, request: web.Request) -> web.StreamResponse:
        path = request.path
        if path in {"/healthz", "/livez", "/readyz"}:
            return web.Response(text="ok")
        fixed = self._discover(path)
        if fixed is not None:
            return fixed
        target = self._target(path)
        if target is None:
            raise status.no_such_path()
        if target.sub == "proxy":
            return await self._proxy(request, target)
        if target.resource in REVIEWS:
            return answer(self._review(request, target, await self._body(request)), 201)
        if not target.name:
            return await self._collection(request, target)
        return await self._single(request, target)

    def _discover(self, path: str) -> web.Response | None:
        registry, schemas = self.api.registry, self.api.schemas
        parts = path.strip("/").split("/")
        found: Any = None
        match parts:
            case ["version"]:
                found = discovery.VERSION
            case ["api"]:
                found = discovery.api_versions(self._address)
            case ["apis"]:
                found = discovery.api_groups(registry)
            case ["api", "v1"]:
                found = discovery.api_resources(registry, "", "v1")
            case ["apis", group]:
                versions = [v for g, v in registry.group_versions() if g == group]
                found = discovery.api_group(group, versions[0]) if versions else None
            case ["apis", group, version]:
                found = discovery.api_resources(registry, group, version)
            case ["openapi", "v2"]:
                found = discovery.openapi_v2(registry, schemas)
            case ["openapi", "v3"]:
                found = discovery.openapi_v3_index(registry, schemas)
            case ["openapi", "v3", "api", version]:
                found = discovery.openapi_v3(registry, schemas, "", version)
            case ["openapi", "v3", "apis", group, version]:
                found = discovery.openapi_v3(registry, schemas, group, version)
        if found is None:
            return None
        return answer(found, 200)

    def _target(self, path: str) -> Target | None:
        parts = path.strip("/").split("/")
        if parts[0] == "api" and len(parts) > 2:
            group, version, rest = "", parts[1], parts[2:]
        elif parts[0] == "apis" and len(parts) > 3:
            group, version, rest = parts[1], parts[2], parts[3:]
        else:
            return None
        namespace = ""
        if rest[0] == "namespaces" and len(rest) > 2 and rest[2] not in {"status", "finalize"}:
            namespace, rest = rest[1], rest[2:]
        resource = self.api.registry.find(group, version, rest[0])
        if resource is None or (namespace and not resource.namespaced):
            return None
        name = rest[1] if len(rest) > 1 else ""
        sub = rest[2] if len(rest) > 2 else ""
        if sub and not _has(resource, sub):
            return None
        if sub != "proxy" and len(rest) > 3:
            return None
        return Target(resource, namespace, name, sub, "/".join(rest[3:]))

    def _review(self, request: web.Request, target: Target, body: Obj) -> Obj:
        kind = target.resource.kind
        body.setdefault("metadata", {})["creationTimestamp"] = None
        user = request[_USER]
        if kind == "TokenReview":
            return auth.token_review(self.tokens, body)
        if kind == "SelfSubjectReview":
            return {**body, "status": {"userInfo": user.info}}
        return auth.access_review(body, user if kind.startswith("Self") else None)

    async def _collection(self, request: web.Request, target: Target) -> web.StreamResponse:
        resource = target.resource
        if request.method == "POST":
            if resource.namespaced and not target.namespace:
                raise status.method_not_allowed()
            options = _options(request)
            body = await self._body(request)
            item = self.api.create(resource, target.namespace, body, options)
            return self._item(request, target, item, 201, options)
        if request.method not in {"GET", "DELETE"}:
            raise status.method_not_allowed()
        accept = request.headers.get("Accept", "")
        query = lists.parse(resource, target.namespace, request.query, accept)
        if request.method == "DELETE":
            return await self._delete_all(request, query)
        if request.query.get("watch") in {"true", "1"}:
            return await lists.watch(self.api.store, query, request)
        return _raw(self.lists.answer(query), 200)

    async def _delete_all(self, request: web.Request, query: lists.Query) -> web.Response:
        body = await self._body(request) if request.can_read_body else {}
        options = _delete_options(request, body)
        gone = []
        for item in self.api.store.items(query.resource.key, query.namespace):
            if query.match is None or query.match(item.obj):
                meta = item.obj["metadata"]
                self.api.delete(query.resource, meta.get("namespace", ""), meta["name"], options)
                gone.append(item)
        meta = {"resourceVersion": str(self.api.store.version)}
        return _raw(lists.encode_list(query, gone, meta), 200)

    async def _single(self, request: web.Request, target: Target) -> web.StreamResponse:
        method = request.method
        if target.sub and target.sub not in {"status", "finalize"}:
            body = await self._body(request) if request.can_read_body else {}
            found, code = subresources.answer(
                self.api, self.tokens, target, method, body, _patch_kind(request), _options(request)
            )
            return answer(found, code)
        if method == "GET":
            if request.query.get("watch") in {"true", "1"}:
                raise status.method_not_allowed()
            item = self.api.get(target.resource, target.namespace, target.name)
            return self._item(request, target, item, 200)
        if method == "PUT":
            options = _options(request)
            body = await self._body(request)
            if target.sub == "finalize":
                item = subresources.finalize(self.api, target.name, body)
            else:
                item = self.api.update(
                    target.resource, target.namespace, target.name, body, options, target.sub
                )
            return self._item(request, target, item, 200, options)
        if method == "PATCH":
            return await self._patch(request, target)
        if method == "DELETE" and not target.sub:
            return await self._delete(request, target)
        raise status.method_not_allowed()

    async def _patch(self, request: web.Request, target: Target) -> web.Response:
        kind = _patch_kind(request)
        if not kind:
            raise status.unsupported_media_type(request.content_type, tuple(_PATCHES))
        options = _options(request)
        data = await request.read()
        place = (target.resource, target.namespace, target.name)
        if kind == "apply":
            body = subresources.decode_yaml(data)
            item, created = self.api.apply(*place, body, options, target.sub)
            return self._item(request, target, item, 201 if created else 200, options)
        item = self.api.patch(*place, kind, decode(data), options, target.sub)
        return self._item(request, target, item, 200, options)

    async def _delete(self, request: web.Request, target: Target) -> web.Response:
        body = await self._body(request) if request.can_read_body else {}
        options = _delete_options(request, body)
        item, gone = self.api.delete(target.resource, target.namespace, target.name, options)
        if not gone or target.resource.key in {"pods", "services"}:
            return _raw(item.raw, 200)
        details: Obj = {"name": target.name, "kind": target.resource.plural}
        if target.resource.group:
            details["group"] = target.resource.group
        details["uid"] = item.obj["metadata"]["uid"]
        done = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Success",
            "details": details,
        }
        return answer(done, 200)

    async def _body(self, request: web.Request) -> Any:
        """The object in a request's body: JSON, YAML or protobuf. Raises ApiRefusal 400 or 415."""
        data, kind = await request.read(), request.content_type
        if kind == protobuf.MEDIA_TYPE:
            return self._protobuf.body(data)
        if kind == "application/yaml":
            return subresources.decode_yaml(data)
        if kind not in {"application/json", "application/octet-stream", *_PATCHES}:
            raise status.unsupported_media_type(kind, ("application/json", "application/yaml"))
        return decode(data)

    def _item(
        self,
        request: web.Request,
        target: Target,
        item: Item,
        code: int,
        options: Options | None = None,
    ) -> web.Response:
        if "as=Table" in request.headers.get("Accept", "") and request.method == "GET":
            meta = {"resourceVersion": item.obj["metadata"].get("resourceVersion", "")}
            include = request.query.get("includeObject", "Metadata")
            return answer(tables.table(target.resource, [item.obj], meta, include), code)
        response = _raw(item.raw, code)
        for warning in options.warnings if options else ():
            quoted = warning.replace("\\", "\\\\").replace('"', '\\"')
            response.headers.add("Warning", f'299 - "{quoted}"')
        return response

    async def _proxy(self, request: web.Request, target: Target) -> web.StreamResponse:
        if self.proxy is None:
            raise status.fail(503, "ServiceUnavailable", "the server is stopping")
        return await subresources.proxy(self.api, self.proxy, request, target)


def _has(resource: Resource, sub: str) -> bool:
    if sub in {"status", "scale"}:
        return resource.status if sub == "status" else resource.scale
    return sub in resource.other


def answer(body: Any, code: int) -> web.Response:
    """A JSON answer; bytes are sent as they are."""
    return _raw(body if isinstance(body, bytes) else msgspec.json.encode(body), code)


def _raw(data: bytes, code: int) -> web.Response:
    return web.Response(body=data, status=code, content_type="application/json")


def _patch_kind(request: web.Request) -> str:
    return _PATCHES.get(request.content_type, "")


def _options(request: web.Request) -> Options:
    query = request.query
    dry_run = query.getall("dryRun", [])
    if dry_run and dry_run != ["All"]:
        raise status.bad_request(f"Invalid value: {dry_run}: dryRun must be All")
    agent = request.headers.get("User-Agent", "unknown").partition("/")[0] or "unknown"
    applies = request.content_type == "application/apply-patch+yaml"
    return Options(
        manager=query.get("fieldManager", "") or ("" if applies else agent),
        dry_run=bool(dry_run),
        validation=query.get("fieldValidation", "") or "Warn",
        force=query.get("force") in {"true", "1"},
    )


def _delete_options(request: web.Request, body: Obj) -> DeleteOptions:
    query = request.query
    grace = body.get("gracePeriodSeconds")
    if grace is None and query.get("gracePeriodSeconds"):
        grace = int(query["gracePeriodSeconds"])
    propagation = body.get("propagationPolicy") or query.get("propagationPolicy") or "Background"
    if body.get("orphanDependents") is True:
        propagation = "Orphan"
    conditions = body.get("preconditions") or {}
    return DeleteOptions(
        grace_s=grace,
        propagation=propagation,
        uid=conditions.get("uid"),
        version=conditions.get("resourceVersion"),
        dry_run="All" in (body.get("dryRun") or ()) or query.get("dryRun") == "All",
    )
