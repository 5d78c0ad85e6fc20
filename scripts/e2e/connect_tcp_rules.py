#!/usr/bin/env python3
"""The rules of CONNECT-TCP, tried on a daemon: connect_tcp_rules.py HOST:PORT --token-file F --pid N [--only TEXT]

Each rule is a conversation with a target of its own on loopback. Prints a line a rule; exit code 1 if one was broken.
--pid is the daemon's, whose memory is looked at; its --ping-interval has to be 1s. Section numbers without a name are
those of draft-ietf-httpbis-connect-tcp-12.

With --through-proxy an HTTP proxy is in front. Such a proxy gives refusals of its own, and it passes a reset on to the
client as a FIN: that FINAL_DATA is missing still tells it.
"""

import argparse
import hashlib
import os
import random
import re
import socket
import struct
import sys
import threading
import time

from connect_tcp import DATA, FINAL_DATA, UPGRADE, Broken, Capsules, Proxy, Refused, capsule, integer, read_answer

LIMIT = 20  # seconds that anything may take on a loaded machine
LARGEST = (1 << 62) - 1
RULES = []
is_direct = True


def rule(function):
    RULES.append(function)
    return function


def direct_rule(function):
    """What a proxy in front may answer by itself."""
    function.is_direct = True
    return rule(function)


def wants(condition, what):
    if not condition:
        raise Broken(what)


class Target:
    """A listener, and the one connection that the proxy makes to it."""

    def __init__(self, family=socket.AF_INET):
        self.listener = socket.create_server(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0), family=family)
        self.listener.settimeout(LIMIT)
        self.host, self.port = self.listener.getsockname()[:2]

    def accept(self):
        peer = self.listener.accept()[0]
        peer.settimeout(LIMIT)
        return peer


def reset(connection):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def read_to_end(connection):
    """Everything that comes, and how it ended: "fin" or "reset"."""
    received = bytearray()
    try:
        while more := connection.recv(1 << 18):
            received += more
    except ConnectionResetError:
        return bytes(received), "reset"
    return bytes(received), "fin"


class Tunnel:
    """The client's end, byte for byte, and the target's."""

    def __init__(self, proxy, family=socket.AF_INET, **changes):
        target = Target(family)
        self.connection, self.received, self.fields = proxy.open(target.host, target.port, **changes)
        self.connection.settimeout(LIMIT)
        self.target = target.accept()
        self.capsules = Capsules()

    def send(self, *parts):
        for part in parts:
            self.connection.sendall(part)

    def read(self):
        """The TCP payload of the next bytes, or None at the end."""
        received, self.received = self.received or self.connection.recv(1 << 18), b""
        return self.capsules.feed(received) if received else None

    def wants_to_read(self, wanted):
        payload = b""
        while len(payload) < len(wanted):
            more = self.read()
            wants(more is not None, "the stream ended")
            payload += more
        wants(payload == wanted, f"{payload[:40]} came, not {wanted[:40]}")

    def read_until_final(self):
        payload = b""
        while not self.capsules.has_final:
            more = self.read()
            wants(more is not None, "the stream ended without FINAL_DATA")
            payload += more
        return payload

    def wants_orderly_end(self):
        """Section 3.4: the TCP connection has closed gracefully, so the stream is closed gracefully."""
        while self.read() is not None:
            pass
        self.capsules.end()
        self.connection.close()

    def wants_abrupt_end(self):
        """Section 3.4: over HTTP/1.1 without TLS, a TCP RST."""
        try:
            while self.read() is not None:
                pass
        except ConnectionResetError:
            return
        wants(not is_direct, "the client's stream was closed in order")
        wants(not self.capsules.has_final, "FINAL_DATA has come")

    def wants_target_to_see(self, payload, end):
        seen, how = read_to_end(self.target)
        wants(seen == payload, f"the target saw {len(seen)} bytes and not the {len(payload)} that were sent")
        wants(how == end, f"the target saw a {how}, not a {end}")

    def ends_in_order(self):
        self.send(capsule(FINAL_DATA))
        self.target.shutdown(socket.SHUT_WR)
        self.wants_orderly_end()


def carries(proxy, *stream, payload):
    """A stream, sent as these parts, reaches the target as this payload and a FIN; and the tunnel ends in order."""
    tunnel = Tunnel(proxy)
    tunnel.send(*stream)
    tunnel.wants_target_to_see(payload, "fin")
    tunnel.target.shutdown(socket.SHUT_WR)
    tunnel.wants_orderly_end()


def is_broken_off(proxy, *stream, payload=b"", then=lambda connection: None):
    """A stream is invalid: the target sees at most this payload and then a reset, and so does the client."""
    tunnel = Tunnel(proxy)
    tunnel.send(*stream)
    then(tunnel.connection)
    seen, how = read_to_end(tunnel.target)
    wants(payload.startswith(seen), f"the target saw {seen[:40]}")
    wants(how == "reset", f"the target saw a {how}, not a reset")
    tunnel.wants_abrupt_end()


def refused(proxy, host, port, /, **changes):
    """Status, fields and body of an answer that has to be a refusal."""
    try:
        proxy.open(host, port, **changes)
    except Refused as refusal:
        return refusal
    raise Broken("it was not refused")


def closed_port():
    """A port that is bound and not listening, and its owner."""
    owner = socket.socket()
    owner.bind(("127.0.0.1", 0))
    return owner, owner.getsockname()[1]


def proxy_status(fields):
    """RFC 9209, section 2: the members' parameters, by name."""
    values = fields.get("proxy-status")
    wants(values, "there is no Proxy-Status")
    string, token = r'"(?:[ !#-\[\]-~]|\\["\\])*"', r"[A-Za-z*][!#$%&'*+.^_`|~0-9A-Za-z:/-]*"
    item = rf"({token}|{string})((?: *; *[a-z*][a-z0-9_.*-]*(?:=(?:{string}|{token}|[0-9.?-]+))?)*)"
    match = re.fullmatch(item, ", ".join(values))
    wants(match, f"Proxy-Status {values} is no list of one item by RFC 8941")
    return dict(re.findall(rf"; *([a-z*][a-z0-9_.*-]*)=({string}|{token}|[0-9.?-]+)", match[2]))


# --- the request and its answer -----------------------------------------------------------------------


@rule
def the_101_has_its_fields(proxy):
    """Section 3.1, and section 4.2 for Proxy-Status."""
    tunnel = Tunnel(proxy)
    wants(tunnel.fields.get("capsule-protocol") == ["?1"], "Capsule-Protocol is not ?1")
    wants("error" not in proxy_status(tunnel.fields), "the Proxy-Status of the 101 has an error")
    for unwanted in "content-length", "transfer-encoding":  # RFC 9110, section 8.6, RFC 9112, section 6.1
        wants(unwanted not in tunnel.fields, f"the 101 has {unwanted}")
    tunnel.ends_in_order()


@rule
def both_templates_lead_to_names_and_addresses(proxy):
    for default_template in False, True:
        template = Proxy(proxy.authority, proxy.token, default_template)
        Tunnel(template).ends_in_order()
        if socket.has_ipv6 and os.path.exists("/proc/net/if_inet6"):
            Tunnel(template, family=socket.AF_INET6).ends_in_order()
        target = Target()
        connection, _, _ = template.open("localhost", target.port)
        target.accept()
        connection.close()


@rule
def names_of_fields_and_protocols_have_no_case(proxy):
    """RFC 9110, sections 5.1, 7.6.1, 7.8; Capsule-Protocol is a SHOULD."""
    Tunnel(proxy, connection="upgrade").ends_in_order()
    Tunnel(proxy, connection="keep-alive, UPGRADE").ends_in_order()
    Tunnel(proxy, upgrade=UPGRADE.title()).ends_in_order()
    Tunnel(proxy, capsule_protocol=None).ends_in_order()


@rule
def a_bearer_token_is_as_good(proxy):
    bearer = {"x_access_token": None, "authorization": f"Bearer {proxy.token}"}
    Tunnel(proxy, **bearer).ends_in_order()
    Tunnel(proxy, **bearer | {"authorization": f"bearer {proxy.token}"}).ends_in_order()  # RFC 9110, section 11.1
    for wrong in ({"x_access_token": "wrong"}, {"authorization": "Bearer wrong"}, {"authorization": "Basic Og=="}):
        refusal = refused(proxy, "localhost", 1, **bearer | wrong)
        wants(refusal.status == 401, f"{wrong} is answered with {refusal.status}")
        wants("bearer" in refusal.fields.get("www-authenticate", [""])[0].lower(), "a 401 without WWW-Authenticate")
        wants("proxy-authenticate" not in refusal.fields, "a 401 with Proxy-Authenticate")


@direct_rule
def a_refusal_has_its_status_and_proxy_status(proxy):
    """Section 3.1: malformed or impermissible is 4xx, a failed connection no switch. RFC 9209, section 2.3."""
    owner, closed = closed_port()
    with owner:
        cases = [
            (("127.0.0.1", closed), {}, [502], ["connection_refused"]),
            (("no-such-name.invalid", 80), {}, [502], ["dns_error"]),
            (("localhost", 0), {}, [400], ["http_request_error"]),
            (("localhost", 65536), {}, [400], ["http_request_error"]),
            (("localhost", "http"), {}, [400], ["http_request_error"]),
            (("localhost", 1), {"x_access_token": None}, [401], ["http_request_denied", "http_request_error"]),
            (("localhost", 1), {"upgrade": "connect-udp"}, [426], ["http_request_error"]),
            (("localhost", 1), {"upgrade": None, "connection": None}, [426], ["http_request_error"]),
            (("localhost", 1), {"method": "POST"}, [405], ["http_request_error"]),
            (("localhost", 1), {"host": None}, [400], ["http_request_error"]),
            (("localhost", 1), {"version": "HTTP/1.0"}, range(400, 506), None),
        ]
        for (host, port), changes, statuses, errors in cases:
            case = f"{host}:{port} {changes}"
            refusal = refused(proxy, host, port, **changes)
            wants(refusal.status in statuses, f"{case} is answered with {refusal.status}")
            status = proxy_status(refusal.fields)
            wants(errors is None or status.get("error") in errors, f"{case} has Proxy-Status {status}")
            if refusal.status == 426:
                offered = ", ".join(refusal.fields.get("upgrade", []))
                wants({"websocket", UPGRADE} <= set(offered.split(", ")), f"426 offers {offered!r}")


@rule
def nothing_is_dialed_by_a_request_that_is_refused(proxy):
    target = Target()
    refused(proxy, target.host, target.port, x_access_token="wrong")
    refused(proxy, target.host, target.port, upgrade="connect-udp")
    target.listener.setblocking(False)
    try:
        target.listener.accept()
    except BlockingIOError:
        return
    raise Broken("the target was dialed")


@direct_rule
def expect_is_answered_with_100_unless_it_is_refused(proxy):
    """Section 4.2."""
    owner, closed = closed_port()
    target = Target()
    expect = {"expect": "100-continue"}
    with owner:
        cases = [
            (target.port, expect, [100, 101]),
            (target.port, {"expect": "100-Continue"}, [100, 101]),
            (target.port, {}, [101]),
            (closed, expect, [100, 502]),
            (0, expect, [400]),
            (target.port, expect | {"x_access_token": "wrong"}, [401]),
            (target.port, expect | {"upgrade": "connect-udp"}, [426]),
        ]
        for port, changes, wanted in cases:
            connection = proxy.connect()
            connection.sendall(proxy.request(target.host, port, **changes))
            status, _, rest = read_answer(connection)
            statuses = [status]
            while status == 100:
                status, _, rest = read_answer(connection, rest)
                statuses.append(status)
            wants(statuses == wanted, f"port {port} with {changes} is answered with {statuses}")
            connection.close()


@rule
def a_head_in_single_bytes_is_a_head(proxy):
    target = Target()
    connection = proxy.connect()
    for byte in proxy.request(target.host, target.port):
        connection.sendall(bytes([byte]))
    wants(read_answer(connection)[0] == 101, "it is refused")


# --- capsules -----------------------------------------------------------------------------------------


@rule
def every_form_of_an_integer_is_read(proxy):
    """RFC 9000, section 16: an encoding need not be the shortest."""
    stream, payload = [], b""
    for type_size in 4, 8:
        for length_size in 1, 2, 4, 8:
            for length in 0, 1, 63, 64, 16383, 16384, 70000:
                if length < 1 << (8 * length_size - 2):
                    piece = os.urandom(length)
                    stream.append(capsule(DATA, piece, type_size, length_size))
                    payload += piece
    for type_size in 4, 8:
        for length_size in 1, 2, 4, 8:
            carries(proxy, *stream, capsule(FINAL_DATA, b"end", type_size, length_size), payload=payload + b"end")


@rule
def a_stream_may_arrive_in_any_pieces(proxy):
    stream = b"".join([
        capsule(DATA, b"one"), capsule(7, b"unknown"), capsule(DATA), capsule(DATA, b"two", 8, 8),
        capsule(LARGEST, b"?" * 100), capsule(FINAL_DATA, b"three", 8, 4),
    ])
    carries(proxy, *(bytes([byte]) for byte in stream), payload=b"onetwothree")
    for at in range(1, len(stream)):
        tunnel = Tunnel(proxy)
        tunnel.send(stream[:at])
        time.sleep(0.002)  # so that it arrives in two pieces, mostly
        tunnel.send(stream[at:])
        tunnel.wants_target_to_see(b"onetwothree", "fin")


@rule
def payload_goes_on_before_its_capsule_is_whole(proxy):
    """Section 3: forwarded without waiting; section 3.4.1: very large capsules are valid."""
    tunnel = Tunnel(proxy)
    tunnel.send(integer(DATA), integer(LARGEST))
    for piece in (b"a", b"bc" * 5, b"d" * 300_000):
        tunnel.send(piece)
        received = b""
        while len(received) < len(piece):
            received += tunnel.target.recv(1 << 18)
        wants(received == piece, "the target saw other bytes")
    tunnel.target.sendall(b"answer")
    tunnel.wants_to_read(b"answer")
    tunnel.connection.shutdown(socket.SHUT_WR)
    tunnel.wants_target_to_see(b"", "reset")


@rule
def unknown_capsules_are_skipped_wherever_they_stand(proxy):
    """Section 3, RFC 9297, section 3.2."""
    def unknown():
        return b"".join(
            capsule(kind, os.urandom(length))
            for kind in (0, 1, 63, 64, 0x1F, 16384, DATA - 1, FINAL_DATA + 1, LARGEST)
            for length in (0, 1, 100, 20_000)
        )
    tunnel = Tunnel(proxy)
    tunnel.send(unknown(), capsule(DATA, b"abc"), unknown(), capsule(DATA, b"def"), unknown())
    tunnel.send(capsule(FINAL_DATA, b"ghi"), unknown())
    tunnel.wants_target_to_see(b"abcdefghi", "fin")
    tunnel.target.sendall(b"answer")
    tunnel.send(unknown())
    tunnel.wants_to_read(b"answer")
    tunnel.target.shutdown(socket.SHUT_WR)
    tunnel.wants_orderly_end()


def resident(pid):
    return int(re.search(r"VmRSS:\s+(\d+)", open(f"/proc/{pid}/status").read())[1]) << 10


def floods(proxy, pid, pieces, head=b""):
    """Pieces that carry no payload change neither the memory nor the other direction."""
    tunnel = Tunnel(proxy)
    before = resident(pid)
    tunnel.send(head)
    for piece in pieces:
        tunnel.send(piece)
    grown = resident(pid) - before
    wants(grown < 16 << 20, f"the daemon has grown by {grown >> 20} MiB")
    tunnel.target.sendall(b"answer")
    tunnel.wants_to_read(b"answer")
    return tunnel


@rule
def an_endless_unknown_capsule_takes_no_memory(proxy, pid):
    tunnel = floods(proxy, pid, (bytes(1 << 20) for _ in range(128)), integer(1 << 40) + integer(LARGEST))
    tunnel.connection.shutdown(socket.SHUT_WR)
    tunnel.wants_target_to_see(b"", "reset")


@rule
def a_flood_of_empty_capsules_takes_no_memory(proxy, pid):
    tunnel = floods(proxy, pid, ((capsule(DATA) + capsule(5)) * 20_000 for _ in range(50)))
    tunnel.send(capsule(FINAL_DATA, b"end"))
    tunnel.wants_target_to_see(b"end", "fin")
    tunnel.target.shutdown(socket.SHUT_WR)
    tunnel.wants_orderly_end()


@rule
def a_target_that_reads_nothing_holds_the_client(proxy, pid):
    tunnel = Tunnel(proxy)
    tunnel.connection.settimeout(2)
    before, sent = resident(pid), 0
    try:
        while sent < 256 << 20:
            sent += tunnel.connection.send(capsule(DATA, bytes(1 << 16)))
    except TimeoutError:
        pass
    wants(sent < 256 << 20, "256 MiB were taken")
    wants(resident(pid) - before < 16 << 20, "the daemon has kept them")
    reset(tunnel.connection)


@rule
def random_conversations_carry_every_byte(proxy):
    for seed in range(40):
        chance = random.Random(seed)
        stream, payload = b"", b""
        for _ in range(chance.randrange(40)):
            kind = chance.choice([DATA, DATA, DATA, 0, 77, LARGEST])
            piece = chance.randbytes(chance.choice([0, 1, 2, 63, 64, 300, 16384, 65536, 200_000]))
            stream += capsule(kind, piece, chance.choice([None, 8]), chance.choice([None, 8]))
            payload += piece if kind == DATA else b""
        last = chance.randbytes(chance.randrange(100))
        stream += capsule(FINAL_DATA, last)
        parts = []
        while stream:
            at = chance.choice([1, 3, 10, 1000, 30_000, 1 << 20])
            parts.append(stream[:at])
            stream = stream[at:] if len(parts) < 500 else parts.append(stream[at:])
        try:
            carries(proxy, *parts, payload=payload + last)
        except (Broken, OSError) as problem:
            raise Broken(f"seed {seed}: {problem}") from problem


@rule
def both_directions_carry_at_once(proxy):
    tunnel = Tunnel(proxy)
    down, up = os.urandom(8 << 20), os.urandom(8 << 20)
    digests = {}

    def collect(name, chunks):
        digest = hashlib.sha256()
        for chunk in chunks:
            digest.update(chunk)
        digests[name] = digest.digest()

    def send_up():
        for at in range(0, len(up), 50_000):
            tunnel.send(capsule(DATA, up[at:at + 50_000]), capsule(9, b"between"))
        tunnel.send(capsule(FINAL_DATA))

    def send_down():
        tunnel.target.sendall(down)
        tunnel.target.shutdown(socket.SHUT_WR)

    jobs = [
        (send_up,), (send_down,),
        (collect, "up", iter(lambda: tunnel.target.recv(1 << 18), b"")),
        (collect, "down", iter(tunnel.read, None)),
    ]
    threads = [threading.Thread(target=job, args=arguments) for job, *arguments in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(3 * LIMIT)
    tunnel.capsules.end()
    wants(digests == {"up": hashlib.sha256(up).digest(), "down": hashlib.sha256(down).digest()}, "the bytes differ")


# --- ends ---------------------------------------------------------------------------------------------


@rule
def the_client_may_end_first(proxy):
    tunnel = Tunnel(proxy)
    tunnel.send(capsule(DATA, b"request"), capsule(FINAL_DATA))
    tunnel.wants_target_to_see(b"request", "fin")
    time.sleep(2.5)  # half-closed, and pinged meanwhile
    answer = os.urandom(1 << 20)
    tunnel.target.sendall(answer)
    tunnel.target.shutdown(socket.SHUT_WR)
    wants(tunnel.read_until_final() == answer, "the answer differs")
    tunnel.wants_orderly_end()


@rule
def the_target_may_end_first(proxy):
    tunnel = Tunnel(proxy)
    tunnel.target.sendall(b"bye")
    tunnel.target.shutdown(socket.SHUT_WR)
    wants(tunnel.read_until_final() == b"bye", "the target's bytes differ")
    # Section 3: nothing of DATA follows FINAL_DATA, not even the empty DATA of the keepalive.
    tunnel.connection.settimeout(2.5)
    try:
        received = tunnel.connection.recv(100)
        raise Broken(f"{received} came behind FINAL_DATA")
    except TimeoutError:
        tunnel.connection.settimeout(LIMIT)
    upload = os.urandom(1 << 20)
    tunnel.send(capsule(DATA, upload), capsule(FINAL_DATA, b"end"))
    tunnel.wants_target_to_see(upload + b"end", "fin")
    tunnel.wants_orderly_end()


@rule
def the_client_may_close_its_stream_once_both_have_ended(proxy):
    tunnel = Tunnel(proxy)
    tunnel.target.shutdown(socket.SHUT_WR)
    tunnel.read_until_final()
    tunnel.send(capsule(FINAL_DATA, b"end"))
    tunnel.connection.shutdown(socket.SHUT_WR)
    tunnel.wants_target_to_see(b"end", "fin")
    tunnel.wants_orderly_end()


@rule
def empty_data_keeps_an_idle_tunnel_open(proxy):
    tunnel = Tunnel(proxy)
    until = time.monotonic() + LIMIT
    while tunnel.capsules.data_capsules < 2:
        wants(time.monotonic() < until, "no empty DATA came")
        wants(tunnel.read() == b"", "payload came")
    tunnel.ends_in_order()


@rule
def a_stream_that_ends_without_final_data_breaks_the_upload_off(proxy):
    """Section 3.4, and section 3.4.1 for the truncated capsules."""
    close = lambda connection: connection.shutdown(socket.SHUT_WR)
    is_broken_off(proxy, then=close)
    is_broken_off(proxy, capsule(DATA, b"abc"), payload=b"abc", then=close)
    is_broken_off(proxy, integer(DATA) + integer(10) + b"abc", payload=b"abc", then=close)
    is_broken_off(proxy, integer(FINAL_DATA) + integer(10) + b"abc", payload=b"abc", then=close)
    is_broken_off(proxy, integer(FINAL_DATA) + integer(1), then=close)
    is_broken_off(proxy, integer(77) + integer(10) + b"abc", then=close)
    for header in (capsule(DATA, b"", 8, 8), capsule(FINAL_DATA, b"", 8, 8), capsule(FINAL_DATA)):
        for at in range(1, len(header)):
            is_broken_off(proxy, header[:at], then=close)


@rule
def data_behind_final_data_breaks_both_off(proxy):
    """Section 3.4.1."""
    for behind in (capsule(DATA, b"more"), capsule(DATA), capsule(FINAL_DATA), capsule(FINAL_DATA, b"more")):
        for pause in 0, 0.2:
            tunnel = Tunnel(proxy)
            tunnel.send(capsule(DATA, b"abc"), capsule(FINAL_DATA, b"def"))
            time.sleep(pause)
            tunnel.send(behind)
            tunnel.wants_abrupt_end()
            # Its bytes and FIN may have come before; the reset is seen by who writes.
            seen, _ = read_to_end(tunnel.target)
            wants(b"abcdef".startswith(seen), f"the target saw {seen}")
            wants_reset(tunnel.target)


def wants_reset(connection):
    until = time.monotonic() + LIMIT
    while time.monotonic() < until:
        try:
            connection.send(b"x")
        except OSError:
            return
        time.sleep(0.05)
    raise Broken("the target may go on writing")


@rule
def a_reset_of_the_target_is_an_abrupt_end(proxy):
    for said in (b"", b"half an answer"):
        for is_half_closed in False, True:
            tunnel = Tunnel(proxy)
            tunnel.send(capsule(FINAL_DATA) if is_half_closed else capsule(DATA, b"request"))
            tunnel.target.recv(100)
            tunnel.target.sendall(said)
            tunnel.wants_to_read(said)
            reset(tunnel.target)
            tunnel.wants_abrupt_end()
            wants(not tunnel.capsules.has_final, "FINAL_DATA came, and the target had sent no FIN")


@rule
def a_reset_of_the_client_is_a_reset_for_the_target(proxy):
    tunnel = Tunnel(proxy)
    tunnel.send(capsule(DATA, b"abc"))
    wants(tunnel.target.recv(100) == b"abc", "the target saw other bytes")
    reset(tunnel.connection)
    tunnel.wants_target_to_see(b"", "reset")


@rule
def a_reset_of_the_client_gets_through_two_blocked_directions(proxy):
    tunnel = Tunnel(proxy)
    tunnel.connection.settimeout(1)
    tunnel.target.settimeout(1)
    for end, piece in ((tunnel.connection, capsule(DATA, bytes(1 << 20))), (tunnel.target, bytes(1 << 20))):
        try:
            while True:
                end.sendall(piece)
        except TimeoutError:
            pass
    reset(tunnel.connection)
    tunnel.target.settimeout(LIMIT)
    wants(read_to_end(tunnel.target)[1] == "reset", "the target saw a FIN")


@rule
def a_target_that_stops_reading_is_told_to_the_client(proxy):
    """Its EOF has passed, and then it closes: what the client still sends can't be delivered."""
    tunnel = Tunnel(proxy)
    tunnel.target.close()
    tunnel.read_until_final()
    try:
        for _ in range(LIMIT * 20):
            tunnel.send(capsule(DATA, b"more"))
            time.sleep(0.05)
    except ConnectionError:
        return
    raise Broken("the client may go on writing")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("proxy")
    parser.add_argument("--token-file", required=True)
    parser.add_argument("--pid", type=int, required=True)
    parser.add_argument("--only", default="")
    parser.add_argument("--through-proxy", action="store_true")
    arguments = parser.parse_args()
    global is_direct
    is_direct = not arguments.through_proxy
    proxy = Proxy(arguments.proxy, open(arguments.token_file).readline().strip())
    broken = 0
    for function in RULES:
        name = function.__name__.replace("_", " ")
        if arguments.only not in name or (hasattr(function, "is_direct") and not is_direct):
            continue
        has_pid = "pid" in function.__code__.co_varnames[:function.__code__.co_argcount]
        try:
            function(proxy, arguments.pid) if has_pid else function(proxy)
            print(f"ok      {name}", flush=True)
        except (Broken, Refused, OSError) as problem:
            broken += 1
            print(f"BROKEN  {name}: {type(problem).__name__}: {problem}", flush=True)
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
