"""Runs a command in the process that listens at a socket (server.py); exits with its code.

python client.py SOCKET python|torchrun|accelerate ARGUMENT...
"""

from __future__ import annotations

import array
import json
import os
import socket
import sys


def main() -> int:
    server, tool, *arguments = sys.argv[1:]
    request = {"tool": tool, "arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(server)
        message = json.dumps(request).encode() + b"\n"
        streams = array.array("i", [1, 2])
        sent = connection.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
        connection.sendall(message[sent:])
        code = connection.recv(16)
    return int(code) if code else 1


if __name__ == "__main__":
    sys.exit(main())
