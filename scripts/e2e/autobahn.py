"""Autobahn's cases, as kosoku runs them, against the daemon or against the client: autobahn.py daemon|client TUNNELD.

Behind the tunnel is an echo of bytes. A case either passes, or it is in DIFFERS and fails in just that way: one that
passes although it is there, or fails in another way, is an error. So the list stays true."""

import asyncio
import collections
import fnmatch
import re
import sys

from kosoku import FailureError, run_fuzzingclient, run_fuzzingserver

AT_ONCE = 8
GOOD = ("OK", "INFORMATIONAL")


def refused_as_text(result):
    return result.remote_close_code == 1003


def cut_up(result):
    """Bytes came, but not as one message; where all were waited for, they are those that were sent."""
    sent = "".join(text(event[1]) for event in (result.expected or {}).get("OK", []))
    came = "".join(text(event[1]) for event in result.received or [])
    return result.remote_close_code in (None, 1000) and (not sent or sent == came)


def text(payload):
    return payload if isinstance(payload, str) else payload.decode("latin-1")


def nothing_came(result):
    return not result.received and result.remote_close_code is None


def no_compression(result):
    return result.behavior.value == "UNIMPLEMENTED" and result.behavior_close.value == "OK"


# Why, what it must look like, and which cases. A text message means that somebody takes the tunnel for something else.
TEXT = """1.1.* 3.2 3.3 3.4 4.1.3 4.1.4 4.1.5 4.2.3 4.2.4 4.2.5 5.3 5.4 5.5 5.6 5.7 5.8 5.15 5.18 5.19 5.20 6.* 7.1.1
    7.1.5 9.1.* 9.3.* 9.5.* 9.7.* 10.1.1""".split()
BOUNDARIES = "1.2.6 1.2.7 1.2.8 9.2.* 9.4.* 9.6.*".split()
DIFFERS = [
    ("text is refused with 1003", refused_as_text, TEXT),
    ("a message over 32 KiB comes back as several", cut_up, BOUNDARIES),
    ("an empty message has no bytes that come back", nothing_came, ["1.2.1"]),
    ("permessage-deflate is neither offered nor accepted", no_compression, ["12.*", "13.*"]),
]
# 9.8.1 waits a minute for empty messages. Up to timing are whether 4 KiB come back as one message (9.8.6), and whether
# a ping behind a Close comes before ours goes (7.1.3): it is answered then, as it may keep a half-closed tunnel alive.
# Of the compressed cases, which all end in the handshake, one group each is enough.
LEFT_OUT = "7.1.3 9.8.1 9.8.6 12.2.* 12.3.* 12.4.* 12.5.* 13.2.* 13.3.* 13.4.* 13.5.* 13.6.* 13.7.*".split()


# The second that the suite gives these is what the client waits for more of stdin once the server has closed, so its
# Close comes in time or a moment too late.
TIGHT = "1.2.* 2.* 7.*".split()


def a_moment_too_late(result):
    return (is_one_of(TIGHT, result) and result.behavior.value == "OK" and result.behavior_close.value == "UNCLEAN"
            and result.remote_close_code is None)


def is_one_of(globs, result):
    return any(fnmatch.fnmatchcase(result.case_id, glob) for glob in globs)


async def echo(reader, writer):
    """Never waits for the writer: kosoku sends a message as a whole before it reads."""
    try:
        while piece := await reader.read(65536):
            writer.write(piece)
    except OSError:
        pass
    writer.close()


async def results_of_daemon(tunneld):
    target = await asyncio.start_server(echo, "127.0.0.1", 0)
    daemon = await asyncio.create_subprocess_exec(
        tunneld, "--listen", "127.0.0.1:0", stderr=asyncio.subprocess.PIPE)
    try:
        port, log = await listening_port(daemon)
        target_port = target.sockets[0].getsockname()[1]
        results = await outcome(run_fuzzingclient(
            f"ws://127.0.0.1:{port}/tunnel?port={target_port}", None, LEFT_OUT, concurrency=AT_ONCE))
    finally:
        daemon.terminate()
    assert b"panic" not in await log and await daemon.wait() == 0
    return results


async def results_of_client(tunneld):
    turns = asyncio.Semaphore(AT_ONCE)

    async def run(url):
        async with turns:
            pipes = dict.fromkeys(("stdin", "stdout", "stderr"), asyncio.subprocess.PIPE)
            client = await asyncio.create_subprocess_exec(tunneld, "connect", url, **pipes)
            await echo(client.stdout, client.stdin)
            errors = await client.stderr.read()
            assert await client.wait() in (0, 1) and b"panic" not in errors, (url, errors)

    async with run_fuzzingserver(None, LEFT_OUT, port=0) as server:
        base = f"ws://{server.address}:{server.port}"
        count = await case_count(server)
        await asyncio.gather(*(run(f"{base}/runCase?case={n}&agent=tunneld&port=1") for n in range(1, count + 1)))
        await run(f"{base}/updateReports?agent=tunneld&port=1")
        return await outcome(server.get_result())


async def listening_port(process):
    """Where it listens; and what it logs from then on, until its end."""
    line = b""
    while b"listening on" not in line:
        line = await process.stderr.readline()
        assert line, "it has ended"
    port = re.search(rb"listening on 127\.0\.0\.1:(\d+)", line)[1]
    return int(port), asyncio.create_task(process.stderr.read())


async def case_count(server):
    reader, writer = await asyncio.open_connection(server.address, server.port)
    writer.write(
        b"GET /getCaseCount HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
    await reader.readuntil(b"\r\n\r\n")
    _, length = await reader.readexactly(2)
    count = int(await reader.readexactly(length))
    writer.close()
    return count


async def outcome(run):
    try:
        return await run
    except FailureError as failure:
        return failure.results


def judge(side, results):
    counts, wrong = collections.Counter(), 0
    for result in results:
        passes = result.behavior.value in GOOD and result.behavior_close.value in GOOD
        reason, looks = next(
            ((reason, looks) for reason, looks, globs in DIFFERS if is_one_of(globs, result)), (None, None))
        if reason is None and (passes or side == "client" and a_moment_too_late(result)):
            counts["as the suite expects" if passes else "the Close came a moment too late"] += 1
        elif reason and not passes and looks(result):
            counts[reason] += 1
        else:
            wrong += 1
            print(f"{result.case_id}: {result.behavior.value}/{result.behavior_close.value}, "
                  f"close code {result.remote_close_code}, expected {reason or 'to pass'}: "
                  f"{result.result} {result.result_close}")
    for reason, count in counts.most_common():
        print(f"{count} cases: {reason}")
    unused = [glob for _, _, globs in DIFFERS for glob in globs
              if not any(is_one_of([glob], result) for result in results)]
    assert len(results) > 330 and not unused, (len(results), unused)
    return wrong == 0


side, tunneld = sys.argv[1:]
found = asyncio.run({"daemon": results_of_daemon, "client": results_of_client}[side](tunneld))
sys.exit(0 if judge(side, found) else 1)
