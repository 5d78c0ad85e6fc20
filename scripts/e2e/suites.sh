# Other people's suites: Autobahn's cases for WebSockets, and the attacks of slowhttptest. Sourced by ../e2e.sh.

autobahn_daemon() { timeout 59 target/venv/bin/python scripts/e2e/autobahn.py daemon target/release/tunneld; }

autobahn_client() { timeout 59 target/venv/bin/python scripts/e2e/autobahn.py client target/release/tunneld; }

slow_clients() { # three attacks at once, each with more connections than there is room for, and a client that is served
    local slow_port attack attacks=() served=0
    once start_upper || return
    start slow target/release/tunneld --listen 127.0.0.1:0 --max-connections 100 --head-timeout 2s
    slow_port=$(listening_port slow) || return
    for attack in "-H -u http://127.0.0.1:$slow_port/health" "-B -u http://127.0.0.1:$slow_port/health" \
        "-X -k 3 -u http://127.0.0.1:$slow_port/openapi.yaml"; do
        # shellcheck disable=SC2086
        timeout 40 slowhttptest $attack -c 200 -r 100 -i 1 -l 10 -p 3 >"$work/slow${attack:0:2}" 2>&1 </dev/null &
        attacks+=($!)
    done
    while kill -0 "${attacks[0]}" 2>/dev/null; do
        upper_through "ws://127.0.0.1:$slow_port/tunnel" || return
        served=$((served + 1))
        sleep 0.2
    done
    wait "${attacks[@]}"
    echo "$served tunnels were served beside the attacks"
    [ "$served" -ge 3 ] || return
    for attack in -H -B -X; do # what it says of its own probe
        grep -aq 'service available: *.*YES' "$work/slow$attack" && ! grep -aq 'service available: *.*NO' "$work/slow$attack" ||
            { echo "slowhttptest $attack:"; cat "$work/slow$attack"; return 1; }
    done
}

check "Autobahn: its cases against the daemon, and those that are to differ do" autobahn_daemon
check "Autobahn: its cases against the client, and those that are to differ do" autobahn_client
check "slowhttptest: slow heads, bodies and reads leave a client served" slow_clients
