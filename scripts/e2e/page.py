#!/usr/bin/env python3
"""A web page as a client: page.py PORT TARGET_PORT TUNNELD_PORT serves it, prints what it reports, and ends.

The target is target.py. The daemon allows the page's origin, http://127.0.0.1:PORT, or takes the token in
TUNNELD_ACCESS_TOKEN.
"""

import http.server
import json
import os
import sys

port, target, tunneld = sys.argv[1:4]
token = json.dumps(os.environ.get("TUNNELD_ACCESS_TOKEN"))

PAGE = f"""<!doctype html><title>tunnel</title><script>
const url = "ws://127.0.0.1:{tunneld}/tunnel?port={target}";
const token = {token};
const base64url = (text) => btoa(text).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
const protocols = token ? ["binary", "base64url.bearer.authorization.k8s.io." + base64url(token)] : [];
function tunnel(what, opened = () => {{}}, arrived = () => {{}}) {{
  return new Promise((resolve) => {{
    const socket = new WebSocket(url, protocols);
    socket.binaryType = "arraybuffer";
    const chunks = [];
    let length = 0;
    socket.onopen = () => {{ socket.send(new TextEncoder().encode(what)); opened(socket); }};
    socket.onmessage = (event) => {{ chunks.push(event.data); arrived(socket, length += event.data.byteLength); }};
    socket.onclose = async (event) => resolve([await new Blob(chunks).arrayBuffer(), event.code]);
  }});
}}
async function digest(data) {{ return new Uint8Array(await crypto.subtle.digest("SHA-256", data)).join(); }}
async function main() {{
  const data = new Uint8Array(50 << 20);
  for (let at = 0; at < data.length; at += 65536) crypto.getRandomValues(data.subarray(at, at + 65536));
  const send = (socket) => {{
    for (let at = 0; at < data.length; at += 65536) socket.send(data.subarray(at, at + 65536));
  }};
  const lines = [];
  let [received, code] = await tunnel("E", send, (socket, length) => length === data.length && socket.close(1000));
  const same = received.byteLength === data.length && await digest(received) === await digest(data);
  lines.push(`50 MiB each way, then our close: ${{same ? code : "the bytes differ"}}`);
  const text = (data) => new TextDecoder().decode(data);
  [received, code] = await tunnel("B");
  lines.push(`the target's end: ${{text(received)}} ${{code}}`);
  [received, code] = await tunnel("R");
  lines.push(`the target's reset: ${{text(received)}} ${{code}}`);
  return lines.join("\\n");
}}
main().catch(String).then((report) => fetch("/report", {{ method: "POST", body: report }}));
</script>"""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(PAGE.encode())

    def do_POST(self):
        print(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self.answer(b"")
        self.server.is_over = True

    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


with http.server.HTTPServer(("127.0.0.1", int(port)), Handler) as server:
    server.is_over = False
    while not server.is_over:
        server.handle_request()
