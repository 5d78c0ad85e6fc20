#!/usr/bin/env python3
"""A TCP target for test clients: target.py PORT

What it does with a connection is its first byte: E sends back everything that comes, and its end; A answers once
the input has ended; B says bye and ends; L prints how its input ended; R resets.
"""

import socket
import struct
import sys
import threading


def serve(peer):
    with peer:
        match peer.recv(1):
            case b"E":
                while data := peer.recv(1 << 18):
                    peer.sendall(data)
            case b"A":
                received = 0
                while data := peer.recv(1 << 18):
                    received += len(data)
                peer.sendall(b"%d bytes came" % received)
            case b"B":
                peer.sendall(b"bye")
                peer.shutdown(socket.SHUT_WR)
                while peer.recv(1 << 18):
                    pass
            case b"L":
                try:
                    while peer.recv(1 << 18):
                        pass
                    print("the input ended", flush=True)
                except ConnectionResetError:
                    print("the input was reset", flush=True)
            case b"R":
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


with socket.create_server(("127.0.0.1", int(sys.argv[1]))) as listener:
    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
