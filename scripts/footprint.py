#!/usr/bin/env python3
"""What a tunneld binary costs at rest: its size, its start-up, its memory, and that of an idle tunnel.

    scripts/footprint.py BINARY...
    scripts/footprint.py --check BINARY...      exits with 1 if one costs more than it may, or the tree has too many crates

Start-up is from just before the fork to READY=1, the median of 20. Memory is VmRSS, before any client, the median too; a
tunnel's is what 100 add, each of which has carried a byte.
"""

import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time


# What src/reference.md says, and room for other compilers and machines; start-up has much, as the machine may be busy.
BOUNDS = {"MB": 5, "ms to READY=1": 100, "MiB resident": 6, "KiB a tunnel": 64}
CRATES = 112
TUNNELS = 100


def resident(daemon):
    """KiB."""
    with open(f"/proc/{daemon.pid}/status") as status:
        return int(re.search(r"VmRSS:\s+(\d+)", status.read())[1])


def open_tunnel(port, target):
    """A tunnel that has carried a byte: its client's socket and its target's."""
    client = socket.create_connection(("127.0.0.1", port), 10)
    head = (f"GET /tunnel?port={target.getsockname()[1]} HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n"
            "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
    client.sendall(head.encode())
    server, _ = target.accept()
    answer = b""
    while b"\r\n\r\n" not in answer:
        received = client.recv(4096)
        assert received, answer
        answer += received
    assert b" 101 " in answer, answer
    client.sendall(b"\x82\x81\0\0\0\0x")
    server.settimeout(10)
    assert server.recv(1) == b"x"
    return client, server


def tunnel_memory(binary, manager, environment):
    """KiB that each of 100 idle tunnels adds."""
    daemon = subprocess.Popen([binary, "--listen", "127.0.0.1:0"], env=environment, stderr=subprocess.DEVNULL)
    try:
        ready = manager.recv(4096).decode()
        port = int(re.search(r"listening on 127\.0\.0\.1:(\d+)", ready)[1])
        before = resident(daemon)
        with socket.create_server(("127.0.0.1", 0)) as target:
            target.settimeout(10)
            tunnels = [open_tunnel(port, target) for _ in range(TUNNELS)]
            each = (resident(daemon) - before) / TUNNELS
            for end in (end for tunnel in tunnels for end in tunnel):
                end.close()
        return each
    finally:
        daemon.kill()
        daemon.wait()


def crates():
    """How many crates the binary is made of, this one among them."""
    tree = subprocess.run(["cargo", "tree", "-e", "normal", "--prefix", "none", "--locked"],
                          check=True, capture_output=True, text=True).stdout
    return len({line.split(" (")[0] for line in tree.splitlines()})


def run(binary, manager, environment):
    """One run: milliseconds to READY=1, and KiB resident."""
    began = time.monotonic()
    daemon = subprocess.Popen([binary, "--listen", "127.0.0.1:0"], env=environment, stderr=subprocess.DEVNULL)
    try:
        assert manager.recv(4096).startswith(b"READY=1")
        started = time.monotonic() - began
        memory = resident(daemon)
        daemon.send_signal(signal.SIGTERM)
        assert manager.recv(4096).startswith(b"STOPPING=1")
        assert daemon.wait(10) == 0
    finally:
        daemon.kill()
    return started * 1000, memory


def measure(binary, manager, environment):
    """The figures, under the names of BOUNDS."""
    started, memory = zip(*(run(binary, manager, environment) for _ in range(20)))
    return {
        "MB": os.path.getsize(binary) / 1e6,
        "ms to READY=1": statistics.median(started),
        "MiB resident": statistics.median(memory) / 1024,
        "KiB a tunnel": tunnel_memory(binary, manager, environment),
    }


def main(arguments):
    is_check = arguments[0] == "--check"
    over = []
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        path = os.path.join(directory, "notify")
        manager.bind(path)
        manager.settimeout(10)
        environment = {"NOTIFY_SOCKET": path, "PATH": os.environ["PATH"]}
        for binary in arguments[is_check:]:
            figures = measure(binary, manager, environment)
            print(f"{binary}: " + ", ".join(f"{figure:.2f} {name}" for name, figure in figures.items()))
            over += [f"{binary}: {figure:.2f} {name}, and {BOUNDS[name]} is the bound"
                     for name, figure in figures.items() if figure > BOUNDS[name]]
    if is_check:
        count = crates()
        print(f"{count} crates")
        over += [f"{count} crates, and {CRATES} is the bound"] if count > CRATES else []
    sys.exit("\n".join(over) or 0)


main(sys.argv[1:] or sys.exit(__doc__))
