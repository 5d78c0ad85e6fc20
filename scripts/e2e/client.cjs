// Node's ws as a client: client.cjs URL [MEGABYTES], the token in $TUNNELD_ACCESS_TOKEN, the target target.py.
// Prints what it saw, a line a check.

const WebSocket = require("ws");
const { randomBytes } = require("node:crypto");

const [url, megabytes = "50"] = process.argv.slice(2);
const headers = { "X-Access-Token": process.env.TUNNELD_ACCESS_TOKEN };

// Opens a tunnel, says what the target is to do, and resolves with the bytes and the code it ended with.
function tunnel(what, opened = () => {}, arrived = () => {}) {
  return new Promise((resolve, reject) => {
    const socket = new WebSocket(url, { headers, perMessageDeflate: false });
    const chunks = [];
    let length = 0;
    socket.on("open", () => { socket.send(Buffer.from(what)); opened(socket); });
    socket.on("message", (data) => { chunks.push(data); length += data.length; arrived(socket, length); });
    socket.on("close", (code) => resolve([Buffer.concat(chunks), code]));
    socket.on("error", reject);
  });
}

async function main() {
  const data = randomBytes(Number(megabytes) << 20);
  const send = (socket) => {
    for (let at = 0; at < data.length; at += 65536) socket.send(data.subarray(at, at + 65536));
  };
  const closeAtEnd = (socket, length) => { if (length === data.length) socket.close(1000); };
  let [received, code] = await tunnel("E", send, closeAtEnd);
  if (!received.equals(data)) throw new Error(`${received.length} bytes came back, or others`);
  console.log(`${megabytes} MiB each way, then our close: ${code}`);

  [received, code] = await tunnel("A", (socket) => { socket.send(Buffer.from("xyz")); socket.close(1000); });
  console.log(`our close, then the target's answer: ${received} ${code}`);

  [received, code] = await tunnel("B");
  console.log(`the target's end: ${received} ${code}`);
  [received, code] = await tunnel("R");
  console.log(`the target's reset: ${received} ${code}`);

  const refused = new WebSocket(url, { headers: { "X-Access-Token": "wrong" } });
  refused.on("unexpected-response", (request, response) => {
    console.log(`a wrong token: ${response.statusCode}`);
    process.exit(0);
  });
}

main().catch((error) => { console.error(error); process.exit(1); });
