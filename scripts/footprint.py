#!/usr/bin/env python3
"""What a tunneld binary costs at rest: its size, its start-up, its memory.

    scripts/footprint.py BINARY...

Start-up is from just before the fork to READY=1, the median of 20. Memory is VmRSS, before any client, the median too.
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


def run(binary, manager, environment):
    """One run: milliseconds to READY=1, and KiB resident."""
    began = time.monotonic()
    daemon = subprocess.Popen([binary, "--listen", "127.0.0.1:0"], env=environment, stderr=subprocess.DEVNULL)
    try:
        assert manager.recv(4096).startswith(b"READY=1")
        started = time.monotonic() - began
        with open(f"/proc/{daemon.pid}/status") as status:
            resident = int(re.search(r"VmRSS:\s+(\d+)", status.read())[1])
        daemon.send_signal(signal.SIGTERM)
        assert manager.recv(4096).startswith(b"STOPPING=1")
        assert daemon.wait(10) == 0
    finally:
        daemon.kill()
    return started * 1000, resident


def main(binaries):
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        path = os.path.join(directory, "notify")
        manager.bind(path)
        manager.settimeout(10)
        environment = {"NOTIFY_SOCKET": path, "PATH": os.environ["PATH"]}
        for binary in binaries:
            started, resident = zip(*(run(binary, manager, environment) for _ in range(20)))
            print(f"{binary}: {os.path.getsize(binary) / 1e6:.2f} MB, ready in {statistics.median(started):.1f} ms, "
                  f"{statistics.median(resident) / 1024:.1f} MiB resident")


main(sys.argv[1:] or sys.exit(__doc__))
