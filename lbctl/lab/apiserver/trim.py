"""Makes `schema.json` from Kubernetes' own `api/openapi-spec/swagger.json`.

`python -m lbctl.lab.apiserver.trim SWAGGER > lbctl/lab/apiserver/schema.json`. Kept: the kinds that
the embedded server serves and what they refer to, with types, required fields, list and patch keys.
Dropped: descriptions and paths. One definition
a line. (Kubernetes is under the Apache License 2.0, as is this project.)
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, Final

import msgspec

_KINDS: Final = re.compile(
    r"io\.k8s\.(?:"
    r"api\.core\.v1\.(Namespace|Node|Pod|Service|ConfigMap|Secret|ServiceAccount|Event|Binding)"
    r"|api\.apps\.v1\.(Deployment|ReplicaSet|DaemonSet|StatefulSet|ControllerRevision)"
    r"|api\.(discovery\.v1\.EndpointSlice|coordination\.v1\.Lease|autoscaling\.v1\.Scale)"
    r"|api\.rbac\.v1\.(Role|ClusterRole|RoleBinding|ClusterRoleBinding)"
    r"|api\.(policy\.v1\.(PodDisruptionBudget|Eviction)|networking\.v1\.NetworkPolicy)"
    r"|api\.scheduling\.v1\.PriorityClass"
    r"|api\.authentication\.v1\.(TokenReview|TokenRequest|SelfSubjectReview)"
    r"|api\.authorization\.v1\.(SubjectAccessReview|SelfSubjectAccessReview)"
    r"|apiextensions-apiserver\.pkg\.apis\.apiextensions\.v1\.CustomResourceDefinition"
    r"|apimachinery\.pkg\.apis\.meta\.v1\.(DeleteOptions|Status|ObjectMeta))"
)
_REF: Final = "#/definitions/"


def trim(swagger: dict[str, Any]) -> dict[str, Any]:
    """The definitions of the kinds in `_KINDS` and all that they refer to, without descriptions."""
    source = swagger["definitions"]
    kept: dict[str, Any] = {}
    todo = [name for name in source if _KINDS.fullmatch(name)]
    while todo:
        name = todo.pop()
        if name in kept:
            continue
        kept[name] = _strip(source[name])
        todo += _refs(source[name])
    return {"info": swagger["info"], "definitions": dict(sorted(kept.items()))}


def _strip(node: Any) -> Any:
    """Without descriptions; a property that is called "description" stays."""
    if isinstance(node, list):
        return [_strip(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {
        key: {name: _strip(sub) for name, sub in value.items()}
        if key == "properties"
        else _strip(value)
        for key, value in node.items()
        if key != "description"
    }


def _refs(node: Any) -> list[str]:
    if isinstance(node, list):
        return [ref for item in node for ref in _refs(item)]
    if not isinstance(node, dict):
        return []
    found = [ref for value in node.values() for ref in _refs(value)]
    ref = node.get("$ref")
    return [*found, ref.removeprefix(_REF)] if isinstance(ref, str) else found


def main() -> None:
    """Read the swagger file named on the command line, write the trimmed one to standard output."""
    swagger = msgspec.json.decode(Path(sys.argv[1]).read_bytes())
    trimmed = trim(swagger)
    lines = [
        f"{_line(name)}: {_line(definition)}" for name, definition in trimmed["definitions"].items()
    ]
    body = ",\n".join(lines)
    sys.stdout.write(f'{{"info": {_line(trimmed["info"])}, "definitions": {{\n{body}\n}}}}\n')


def _line(value: Any) -> str:
    return msgspec.json.encode(value).decode()


if __name__ == "__main__":
    main()
