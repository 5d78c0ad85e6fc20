#!/usr/bin/env bash
# Measures tunneld and its peers on the same work, in turns, and prints a Markdown table.
#
#   scripts/bench.sh                  everything; about eight minutes
#   scripts/bench.sh --quick          less of it, within two minutes once the peers are installed
#   scripts/bench.sh --only TEXT      only the rows whose name holds TEXT
#
# The peers: HAProxy by apt (as root), websocat 1.14 by cargo, websockify by pip in a venv under target/. A peer
# that can't be installed is left out. TUNNELD=PATH measures another build of tunneld.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v haproxy >/dev/null && [ "$(id -u)" = 0 ]; then
    { timeout 300 apt-get update -qq && timeout 300 apt-get install -qq -y --no-install-recommends haproxy; } >&2 || true
fi
if ! [ -x target/tools/bin/websocat ]; then
    timeout 1500 cargo install --quiet --locked --root target/tools websocat --version 1.14.1 >&2 || true
fi
if ! [ -x target/venv/bin/websockify ] && [[ " $* " != *" --quick "* ]]; then
    { python3 -m venv target/venv && timeout 300 target/venv/bin/pip install --quiet websockify; } >&2 || true
fi
cargo build --quiet --release --locked --bin tunneld --example bench
exec timeout 3000 target/release/examples/bench "$@"
