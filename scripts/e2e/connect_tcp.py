#!/usr/bin/env python3
"""A client of draft-ietf-httpbis-connect-tcp over HTTP/1.1, written from the draft and not from this project's code.

    connect_tcp.py HOST:PORT[/PATH] TARGET_HOST TARGET_PORT [--token-file F] [--default-template] [--ca-file F]

carries stdin and stdout. Exit code 0 only if both FINAL_DATA have passed and the connection was then closed in order;
else 1 and a sentence. With --ca-file the connection is TLS. connect_tcp_rules.py builds on it.
"""

import argparse
import os
import select
import socket
import ssl
import sys
import urllib.parse

UPGRADE = "connect-tcp-12"  # the draft, section 8.1.1
DATA, FINAL_DATA = 0x2028D7F2, 0x2028D7F3  # section 8.3.1


class Broken(Exception):
    """The peer has broken a rule, or the stream ended where it must not."""


class Refused(Exception):
    def __init__(self, status, fields, body):
        super().__init__(f"refused with {status}: {body.decode(errors='replace').strip()}")
        self.status, self.fields, self.body = status, fields, body


def integer(value, size=None):
    """RFC 9000, section 16; `size` asks for a longer form than needed."""
    size = size or next(size for size in (1, 2, 4, 8) if value < 1 << (8 * size - 2))
    return (value | {1: 0, 2: 1, 4: 2, 8: 3}[size] << (8 * size - 2)).to_bytes(size, "big")


def capsule(kind, payload=b"", type_size=None, length_size=None):
    """RFC 9297, section 3.2."""
    return integer(kind, type_size) + integer(len(payload), length_size) + payload


class Capsules:
    """What comes in: payload as it arrives, and whether FINAL_DATA has ended it. Anything invalid raises Broken."""

    def __init__(self):
        self.header = b""
        self.kind = None  # of the capsule whose payload is due
        self.left = 0
        self.has_final = False
        self.is_final = False  # the capsule whose payload is due is the FINAL_DATA
        self.data_capsules = 0

    def feed(self, received):
        """The TCP payload in these bytes."""
        payload = []
        while received or (self.kind is not None and not self.left):
            if self.kind is None:
                received = self._take_header(received)
            else:
                taken, received = received[:self.left], received[self.left:]
                self.left -= len(taken)
                if self.kind in (DATA, FINAL_DATA):
                    payload.append(taken)
                if not self.left:
                    self.has_final |= self.kind == FINAL_DATA
                    self.kind = None
        return b"".join(payload)

    def _take_header(self, received):
        self.header += received[:16]
        at, numbers = 0, []
        while len(numbers) < 2 and at < len(self.header):
            size = 1 << (self.header[at] >> 6)
            if at + size > len(self.header):
                break
            number = int.from_bytes(self.header[at:at + size], "big") & ((1 << (8 * size - 2)) - 1)
            numbers.append(number)
            at += size
        if len(numbers) < 2:
            return received[16:]
        unused = len(self.header) - at
        self.kind, self.left = numbers
        self.header = b""
        if self.kind in (DATA, FINAL_DATA):
            self.data_capsules += 1
            if self.has_final:
                raise Broken(f"a capsule of type {self.kind:#x} behind FINAL_DATA")
        return received[min(len(received), 16) - unused:]

    def end(self):
        """The stream has ended in order: was that allowed?"""
        if self.header or self.kind is not None:
            raise Broken("the stream ended in the middle of a capsule")
        if not self.has_final:
            raise Broken("the stream ended without FINAL_DATA")


class Proxy:
    """Where the proxy is, and what is shown to it."""

    def __init__(self, address, token=None, default_template=False, ca_file=None):
        authority, slash, path = address.partition("/")
        self.authority = authority
        host, _, port = authority.rpartition(":")
        self.address = host.strip("[]"), int(port)
        self.path = slash + path or "/tunnel"
        self.token, self.default_template = token, default_template
        self.tls = ssl.create_default_context(cafile=ca_file) if ca_file else None

    def target(self, host, port):
        host = urllib.parse.quote(host, safe="")
        if self.default_template:
            return f"/.well-known/masque/tcp/{host}/{port}/"
        return f"{self.path}?host={host}&port={port}"

    def connect(self):
        connection = socket.create_connection(self.address, 10)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.tls:
            connection = self.tls.wrap_socket(connection, server_hostname=self.address[0], suppress_ragged_eofs=False)
        return connection

    def request(self, host, port, /, method="GET", version="HTTP/1.1", **changes):
        """The request head; `changes` are fields to add, to change, or with None to leave out, `_` for `-`."""
        fields = {
            "host": self.authority,
            "connection": "Upgrade",
            "upgrade": UPGRADE,
            "capsule-protocol": "?1",
            "x-access-token": self.token,
        } | {name.replace("_", "-"): value for name, value in changes.items()}
        lines = [f"{name.title()}: {value}" for name, value in fields.items() if value is not None]
        return "\r\n".join([f"{method} {self.target(host, port)} {version}", *lines, "", ""]).encode()

    def open(self, host, port, /, **changes):
        """A connection that carries capsules, what has already come of them, and the answer's fields."""
        connection = self.connect()
        connection.sendall(self.request(host, port, **changes))
        status, fields, rest = read_answer(connection)
        while status == 100:
            status, fields, rest = read_answer(connection, rest)
        if status != 101:
            raise Refused(status, fields, read_body(connection, fields, rest))
        for name, value in ("upgrade", UPGRADE), ("connection", "upgrade"):
            if [found.lower() for found in fields.get(name, [])] != [value]:
                raise Broken(f"the 101 has {name} {fields.get(name)}, not {value}")
        return connection, rest, fields


def read_answer(connection, received=b""):
    """Status, fields (name in lower case: list of values) and what came behind the head."""
    while b"\r\n\r\n" not in received:
        more = connection.recv(65536)
        if not more or len(received) > 65536:
            raise Broken(f"no answer to the request, but {received[:200]}")
        received += more
    head, _, rest = received.partition(b"\r\n\r\n")
    start, *lines = head.decode("latin-1").split("\r\n")
    version, status = start.split(" ")[:2]
    if version != "HTTP/1.1" and (version != "HTTP/1.0" or status == "101"):
        raise Broken(f"the answer is {version}")
    fields = {}
    for line in lines:
        name, _, value = line.partition(":")
        fields.setdefault(name.lower(), []).append(value.strip())
    return int(status), fields, rest


def read_body(connection, fields, rest):
    length = int(fields.get("content-length", ["0"])[0])
    while len(rest) < length and (more := connection.recv(65536)):
        rest += more
    return rest[:length]


def carry(connection, received, source, sink):
    """Until both have ended, and the peer has closed in order behind it."""
    capsules, to_send, is_source_open, is_open = Capsules(), b"", True, True
    connection.setblocking(False)
    while True:
        write_all(sink, capsules.feed(received))
        if capsules.has_final and sink is not None:
            os.close(sink)
            sink = None
        have_both_ended = capsules.has_final and not is_source_open and not to_send
        if have_both_ended or not is_open:
            break
        readers = [connection] + ([source] if is_source_open and not to_send else [])
        readable, writable, _ = select.select(readers, [connection] if to_send else [], [])
        if source in readable:
            chunk = os.read(source, 1 << 18)
            is_source_open = bool(chunk)
            to_send = capsule(DATA, chunk) if chunk else capsule(FINAL_DATA)
        try:
            if writable:
                to_send = to_send[connection.send(to_send):]
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        received, is_open = read_what_is_there(connection)
    close_in_order(connection, capsules, is_open)
    if not have_both_ended:
        raise Broken("the stream was closed before this side had ended")


def read_what_is_there(connection):
    """A bounded part of it, and whether more may come."""
    received = []
    for _ in range(16):
        try:
            chunk = connection.recv(1 << 16)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            break
        received.append(chunk)
        if not chunk:
            return b"".join(received), False
    else:
        # What TLS has taken from the socket select does not see.
        while getattr(connection, "pending", lambda: 0)():
            received.append(connection.recv(1 << 16))
    return b"".join(received), True


def close_in_order(connection, capsules, is_open):
    """Section 3.4: both directions have ended, so each side closes its stream.

    The peer's end is waited for, as nginx sends no close_notify once it has received one.
    """
    connection.settimeout(10)
    while is_open:
        more = connection.recv(65536)
        capsules.feed(more)
        is_open = bool(more)
    capsules.end()
    if isinstance(connection, ssl.SSLSocket):
        connection.unwrap()
    connection.close()


def write_all(sink, data):
    view = memoryview(data)
    while view:
        view = view[os.write(sink, view):]


def main():
    parser = argparse.ArgumentParser(description="stdin and stdout to a TCP target, by CONNECT-TCP")
    parser.add_argument("proxy", metavar="HOST:PORT[/PATH]")
    parser.add_argument("host", metavar="TARGET_HOST")
    parser.add_argument("port", metavar="TARGET_PORT", type=int)
    parser.add_argument("--token-file", help="its first line is shown as X-Access-Token")
    parser.add_argument("--default-template", action="store_true", help="/.well-known/masque/tcp/HOST/PORT/")
    parser.add_argument("--ca-file", help="speak TLS, and trust these certificates alone")
    arguments = parser.parse_args()
    token = open(arguments.token_file).readline().strip() if arguments.token_file else None
    proxy = Proxy(arguments.proxy, token, arguments.default_template, arguments.ca_file)
    try:
        connection, received, _ = proxy.open(arguments.host, arguments.port)
        carry(connection, received, 0, 1)
    except (Broken, Refused, OSError) as problem:
        sys.exit(f"connect_tcp.py: {type(problem).__name__}: {problem}")


if __name__ == "__main__":
    main()
