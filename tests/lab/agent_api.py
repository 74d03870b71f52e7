"""Speaks to the API server from inside a namespace: one JSON request per line, one answer each.

{"op": "create" | "replace" | "patch" | "delete" | "get", "path": …, "body": …}
"""

from __future__ import annotations

import asyncio
import json
import sys

from lbctl.errors import LbctlError
from lbctl.kube.client import Client


async def main() -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async with await Client.from_environment(sys.argv[1], timeout_s=30.0) as client:
        while line := await reader.readline():
            request = json.loads(line)
            arguments = [request["path"]]
            if "body" in request:
                arguments.append(request["body"])
            try:
                result = await getattr(client, request["op"])(*arguments)
            except LbctlError as error:
                result = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps({"result": result}), flush=True)


asyncio.run(main())
