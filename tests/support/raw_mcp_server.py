"""An MCP server in plain Python, which starts fast and misbehaves as its argument and its tools say."""

import json
import os
import subprocess
import sys
import time

OBJECT = {"type": "object", "properties": {}}
TOOLS = ("ok", "structured", "image", "fails", "dies", "hangs", "junk", "huge", "child.pid", "pid", "slow")


def send(message):
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def text(value, **more):
    return {"content": [{"type": "text", "text": value}], **more}


def call(name, number):
    if name == "structured":
        return {"content": [], "structuredContent": {"degrees": 21}}
    if name == "image":
        blocks = [
            {"type": "image", "data": "AAAA", "mimeType": "image/png"},
            {
                "type": "resource",
                "resource": {"uri": "file:///a", "mimeType": "text/plain", "text": "inside"},
            },
            {"type": "resource_link", "name": "b", "uri": "file:///b"},
        ]
        return {"content": blocks}
    if name == "fails":
        return text("no such city", isError=True)
    if name == "dies":
        sys.stderr.write("out of luck\n")
        sys.stderr.flush()
        os._exit(3)
    if name == "huge":
        head = {"jsonrpc": "2.0", "id": number, "result": {"content": [{"type": "text", "text": ""}]}}
        sys.stdout.write(json.dumps(head).removesuffix('"}]}}'))
        while True:
            sys.stdout.write("x" * 2**20)
    if name == "junk":
        sys.stdout.write("this is no JSON\n{}\n")
        return text("after junk")
    if name == "child.pid":
        return text(str(subprocess.Popen(["sleep", "1000"]).pid))
    if name == "pid":
        return text(str(os.getpid()))
    if name == "slow":
        time.sleep(0.2)
    return text("done")


def main(kind):
    if kind == "deaf":
        time.sleep(1000)
    for line in sys.stdin:
        request = json.loads(line)
        method, number = request["method"], request.get("id")
        if number is None:
            continue
        if method == "initialize":
            info = {"name": "raw", "version": "1"}
            version = "2025-06-18"
            result = {"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": info}
        elif method == "tools/list" and kind == "endless":
            result = {"tools": [], "nextCursor": "more"}
        elif method == "tools/list":
            schema = {"type": "object", "properties": {"a": {"type": 5}}} if kind == "bad_schema" else OBJECT
            result = {"tools": [{"name": name, "inputSchema": schema} for name in TOOLS]}
        elif method == "tools/call":
            if (name := request["params"]["name"]) == "hangs":
                continue
            result = call(name, number)
        else:
            send({"jsonrpc": "2.0", "id": number, "error": {"code": -32601, "message": "unknown method"}})
            continue
        send({"jsonrpc": "2.0", "id": number, "result": result})
    if kind == "stubborn":
        time.sleep(1000)


main(sys.argv[1] if len(sys.argv) > 1 else "")
