#!/usr/bin/env python3
"""Python's websockets as a client: client.py URL [MEGABYTES], the token in $TUNNELD_ACCESS_TOKEN, the target target.py.

Prints what it saw, a line a check. It is the asyncio client, as the threaded one holds a lock while it sends and so
can't receive what would let its peer read on: much in both directions at once stops it.
"""

import asyncio
import os
import sys

from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

url, megabytes = sys.argv[1], int((sys.argv[2:] or ["50"])[0])


def tunnel(token=os.environ["TUNNELD_ACCESS_TOKEN"]):
    return connect(url, additional_headers={"X-Access-Token": token}, compression=None, max_size=None)


async def send(websocket, data):
    for at in range(0, len(data), 65536):
        await websocket.send(data[at:at + 65536])


async def both_ways():
    data = os.urandom(megabytes << 20)
    async with tunnel() as websocket:
        await websocket.send(b"E")
        sending = asyncio.create_task(send(websocket, data))
        received = bytearray()
        while len(received) < len(data):
            received += await websocket.recv()
        await sending
        await websocket.close()
        assert received == data
        print(f"{megabytes} MiB each way, then our close: {websocket.close_code}")


async def half_close():
    async with tunnel() as websocket:
        await websocket.send(b"Axyz")
        await websocket.close()
        print("our close, then the target's answer:", (await websocket.recv()).decode())


async def failure():
    """A program that fails inside its block, in the middle of an upload: websockets sends a Close 1011."""
    try:
        async with tunnel() as websocket:
            await send(websocket, b"L" + bytes(1 << 20))
            raise RuntimeError
    except RuntimeError:
        print("a program that failed:", websocket.close_code)


async def end(what):
    """What comes until the end, and the end's code."""
    received = b""
    async with tunnel() as websocket:
        await websocket.send(what)
        try:
            while True:
                received += await websocket.recv()
        except ConnectionClosed as closed:
            return f"{received.decode()} {closed.rcvd.code if closed.rcvd else None}"


async def main():
    await both_ways()
    await half_close()
    await failure()
    print("the target's end:", await end(b"B"))
    print("the target's reset:", await end(b"R"))
    try:
        async with tunnel("wrong"):
            pass
    except InvalidStatus as refused:
        print(f"a wrong token: {refused.response.status_code} {refused.response.body.decode()}")


asyncio.run(main())
