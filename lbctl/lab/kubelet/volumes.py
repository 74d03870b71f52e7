"""A pod's volumes: what their content is, and keeping it up to date while the pod runs.

emptyDir, hostPath, secret, configMap, downwardAPI and projected (token included). Content is
compared before it is written, and written as one rename, so a change is seen whole or not at all.
Rules: kinds that the lab does not know are refused by name (`ConfigProblem`).
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

import structlog

from lbctl.errors import KubeError, LabError
from lbctl.lab.kubelet import api as kube
from lbctl.lab.kubelet.podspec import ConfigProblem, Context, content, field
from lbctl.lab.kubelet.runtime import Runtime
from lbctl.lab.kubelet.sandbox import File

Object: TypeAlias = dict[str, Any]
_log = structlog.get_logger()
_MODE: Final = 0o644
_FILES: Final = ("secret", "configMap", "downwardAPI", "projected")
_RENEW: Final = 0.8  # of a token's life, as the kubelet does it
_RETRY_S: Final = 2.0


class PodVolumes:
    """The volumes of one pod on one node."""

    def __init__(
        self, pod: Object, context: Context, runtime: Runtime, api: kube.Api, ca_file: Path
    ) -> None:
        self._pod = pod
        self._context = context
        self._runtime = runtime
        self._api = api
        self._ca_file = ca_file
        self._uid: str = pod["metadata"]["uid"]
        self._namespace: str = pod["metadata"]["namespace"]
        self._group = (pod["spec"].get("securityContext") or {}).get("fsGroup")
        self._written: dict[str, dict[str, File]] = {}
        self._tokens: dict[tuple[str, str], tuple[str, float]] = {}
        self.places: dict[str, str] = {}

    async def mount(self, volumes: list[Object]) -> None:
        """Make every volume; `places` then says where. Raises LabError or KubeError: try again."""
        for volume in volumes:
            name = volume["name"]
            if "emptyDir" in volume:
                self.places[name] = await self._runtime.directory(self._uid, name, self._group)
            elif "hostPath" in volume:
                source = volume["hostPath"]
                self.places[name] = await self._runtime.host_path(
                    source["path"], source.get("type") or ""
                )
            elif any(kind in volume for kind in _FILES):
                await self._write(volume)
            else:
                raise ConfigProblem(f"the lab has no volumes such as {name}: {sorted(volume)}")

    async def _write(self, volume: Object) -> None:
        files = await self._content(volume)
        name = volume["name"]
        if self._written.get(name) != files:
            self.places[name] = await self._runtime.files(self._uid, name, files, self._group)
            self._written[name] = files

    async def refresh(self, volumes: list[Object]) -> None:
        """Write what has changed. What is missing now stays as it was, as in the kubelet."""
        for volume in volumes:
            if volume["name"] in self._written:
                try:
                    await self._write(volume)
                except (LabError, KubeError) as error:
                    _log.info("volume_stale", volume=volume["name"], error=str(error))

    def uses(self, volumes: list[Object], kind: str, name: str) -> bool:
        """Whether a volume shows this Secret (`secrets`) or ConfigMap (`configMaps`)."""
        key = "secret" if kind == "secrets" else "configMap"
        sources = [
            source
            for volume in volumes
            for source in [volume, *(volume.get("projected", {}).get("sources") or [])]
        ]
        named = [source[key] for source in sources if key in source]
        return any(name in (one.get("name"), one.get("secretName")) for one in named)

    async def keep_tokens(self, volumes: list[Object]) -> None:
        """Renew tokens before they expire, for ever; returns at once when there are none."""
        while self._tokens:
            due = min(moment for _, moment in self._tokens.values())
            await asyncio.sleep(max(_RETRY_S, due - time.time()))
            await self.refresh(volumes)

    async def _content(self, volume: Object) -> dict[str, File]:
        if "projected" in volume:
            source = volume["projected"]
            mode = source.get("defaultMode", _MODE)
            files: dict[str, File] = {}
            for part in source.get("sources") or []:
                files.update(await self._source(part, mode))
            return files
        kind = next(kind for kind in _FILES if kind in volume)
        return await self._source(volume, volume[kind].get("defaultMode", _MODE))

    async def _source(self, source: Object, mode: int) -> dict[str, File]:
        if "serviceAccountToken" in source:
            wanted = source["serviceAccountToken"]
            token = await self._token(
                wanted.get("audience") or "", int(wanted.get("expirationSeconds") or 3600)
            )
            return {wanted["path"]: _file(token.encode(), mode)}
        if "downwardAPI" in source:
            items = source["downwardAPI"].get("items") or []
            return {
                item["path"]: _file(
                    field(self._pod, item["fieldRef"]["fieldPath"], self._context).encode(),
                    item.get("mode", mode),
                )
                for item in items
            }
        for key, kind in (("secret", "secrets"), ("configMap", "configMaps")):
            if key in source:
                data = self._object(kind, source[key])
                return _selected(data, source[key].get("items"), mode, source[key])
        raise ConfigProblem(f"the lab has no projected source {sorted(source)}")

    def _object(self, kind: str, reference: Object) -> dict[str, bytes]:
        if reference.get("name") == "kube-root-ca.crt":
            reference = {**reference, "optional": True}
            found = content(self._context, kind, self._namespace, reference)
            # before the cluster has published it: the kubelet knows the same certificate
            return found or {"ca.crt": self._ca_file.read_bytes()}
        return content(self._context, kind, self._namespace, reference) or {}

    async def _token(self, audience: str, seconds: int) -> str:
        account = self._pod["spec"].get("serviceAccountName") or "default"
        known = self._tokens.get((account, audience))
        if known and time.time() < known[1]:
            return known[0]
        meta = self._pod["metadata"]
        bound = {"kind": "Pod", "apiVersion": "v1", "name": meta["name"], "uid": meta["uid"]}
        spec: Object = {"expirationSeconds": seconds, "boundObjectRef": bound}
        spec["audiences"] = [audience] if audience else []
        request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
        url = kube.path("serviceaccounts", self._namespace, account) + "/token"
        answer = await self._api.create(url, request)
        token = str(answer["status"]["token"])
        self._tokens[account, audience] = (token, time.time() + _RENEW * seconds)
        return token


def _selected(
    data: Mapping[str, bytes], items: list[Object] | None, mode: int, reference: Object
) -> dict[str, File]:
    """All keys as files, or those of `items` under their paths."""
    if items is None:
        return {key: _file(value, mode) for key, value in data.items()}
    files = {}
    for item in items:
        if item["key"] in data:
            files[item["path"]] = _file(data[item["key"]], item.get("mode") or mode)
        elif not reference.get("optional"):
            raise ConfigProblem(f"references non-existent key: {item['key']}")
    return files


def _file(data: bytes, mode: int) -> File:
    return File(data=base64.b64encode(data).decode(), mode=mode)
