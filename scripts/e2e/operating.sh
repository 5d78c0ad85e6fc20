# What those who run it have: proxies over a Unix socket, systemd's sockets, Prometheus, and the clients that an open
# daemon once refused. Sourced by ../e2e.sh.

nginx_unix() { # nginx reaches the daemon over a Unix socket, and says who its client is
    local socket=$work/nginx.sock unix_port
    TUNNELD_ACCESS_TOKEN=$token start unix target/release/tunneld --listen "unix:$socket" --trust-forwarded unix \
        --ping-interval 1s
    wait_for "tunneld listens" grep -q "listening on unix:$socket" "$work/unix.log" || return
    [ "$(stat -c %a "$socket")" = 660 ] || { stat "$socket"; return 1; }
    unix_port=$(free_port)
    {
        [ "$(id -u)" -ne 0 ] || echo 'user root;'
        printf 'daemon off; pid %s/nginx-unix.pid; error_log %s/nginx-unix.err; events {}\nhttp { access_log off;\n' "$work" "$work"
        sed "/proxy_pass http:..127/d; s,#\(proxy_pass http://unix:\)/run/tunneld.sock,\1$socket,
            s,listen 443,listen 127.0.0.1:$unix_port,; s,/etc/ssl/sandbox,$work/tls,; s,75s,3s," scripts/nginx.conf
        echo '}'
    } >"$work/nginx-unix.conf"
    start nginx-unix nginx -p "$work" -c "$work/nginx-unix.conf"
    wait_for "nginx listens" listens "$unix_port" || { cat "$work/nginx-unix.log" "$work/nginx-unix.err"; return 1; }
    through "localhost:$unix_port/tunnel" || return
    expect "$work/unix.log" "up=52428801 down=52428800" && ! grep "peer=unix" "$work/unix.log" &&
        expect "$work/unix.log" "peer=127.0.0.1 "
}

socket_units_are_valid() {
    mkdir -p "$work/unit" && cp scripts/tunneld.socket "$work/unit/" && unit_is_valid || return
    systemd-analyze verify "$work/unit/tunneld.socket" >"$work/out" 2>&1 && ! [ -s "$work/out" ] || { cat "$work/out"; return 1; }
}

socket_activation() { # started by the first connection, which is served; and it ends by itself
    local activated wrapper
    activated=$(free_port)
    start activated systemd-socket-activate -l "127.0.0.1:$activated" -l "$work/activated.sock" \
        target/release/tunneld --exit-when-idle 1s
    wrapper=${pids[-1]}
    wait_for "systemd listens" listens_without_connecting "$activated" || return
    ! grep -q "listening on 127" "$work/activated.log" || { echo "it started without a connection"; return 1; }
    printf request | timeout 10 websocat --binary - "ws://127.0.0.1:$activated/tunnel?port=$upper_port" >"$work/out" &&
        expect "$work/out" REQUEST || return
    expect "$work/activated.log" "listening on 127.0.0.1:$activated" &&
        expect "$work/activated.log" "listening on unix:$work/activated.sock" || return
    timeout 10 tail --pid="$wrapper" -f /dev/null && wait "$wrapper" && expect "$work/activated.log" "shut down" || return
    [ -S "$work/activated.sock" ] # which is systemd's
}

listens_without_connecting() { ss -Hltn "sport = :$1" | grep -q .; }

chromium_page_with_token() {
    local page_port closed_port
    page_port=$(free_port)
    TUNNELD_ACCESS_TOKEN=$token start closed target/release/tunneld --listen 127.0.0.1:0
    closed_port=$(listening_port closed) || return
    TUNNELD_ACCESS_TOKEN=$token timeout 120 python3 scripts/e2e/page.py "$page_port" "$test_port" "$closed_port" >"$work/out" 2>&1 &
    local page=$!
    wait_for "the page is served" listens "$page_port" || return
    start chromium-token chromium --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync \
        --disable-background-networking --disable-component-update --disable-dev-shm-usage \
        --user-data-dir="$work/chromium-token" "http://127.0.0.1:$page_port/"
    local browser=${pids[-1]}
    wait "$page"
    kill "$browser" 2>/dev/null
    seen "50 MiB each way, then our close: 1000" "the target's end: bye 1000" "the target's reset:  1011" || return
    ! grep -F -e "$token" -e bearer "$work/closed.log"
}

start_named() { # an open daemon that answers to the name sandbox; sets $named_port
    start named target/release/tunneld --listen 127.0.0.1:0 --allow-host sandbox --log-format json
    wait_for "tunneld listens" grep -q 'listening on' "$work/named.log" || return
    named_port=$(sed -n 's/.*listening on .*:\([0-9]*\)".*/\1/p' "$work/named.log")
}

clients_with_an_origin() { # websocket-client sends one; and a subprotocol that is offered must be chosen
    once start_named && once start_upper || return
    timeout 20 target/venv/bin/python - "$named_port" "$upper_port" <<'END' || return
import socket, sys, websocket
named, upper = sys.argv[1:]
for host, subprotocols in [("127.0.0.1", None), ("localhost", ["binary"]), ("sandbox", ["binary", "base64"])]:
    client = websocket.create_connection(
        f"ws://{host}:{named}/tunnel?port={upper}", subprotocols=subprotocols, timeout=10,
        socket=socket.create_connection(("127.0.0.1", int(named))))
    assert client.getsubprotocol() == (subprotocols and "binary"), client.getsubprotocol()
    client.send_binary(b"request")
    client.send_close()
    assert client.recv() == b"REQUEST"
    client.close()
for host in ["evil.example", "sandbox.evil.example"]:
    try:
        websocket.create_connection(f"ws://{host}:{named}/tunnel?port={upper}", timeout=10,
                                    socket=socket.create_connection(("127.0.0.1", int(named))))
    except websocket.WebSocketBadStatusException as error:
        assert error.status_code == 403 and b"--allow-host" in error.resp_body, error
    else:
        raise AssertionError(host)
END
    NODE_PATH=target/node/node_modules timeout 20 node -e '
const WebSocket = require("ws");
const socket = new WebSocket(process.argv[1], ["binary"], { perMessageDeflate: false });
socket.on("open", () => { console.log(socket.protocol); socket.close(); });
socket.on("error", (error) => console.log(String(error)));' "ws://127.0.0.1:$named_port/tunnel?port=$upper_port" >"$work/out" &&
        expect "$work/out" binary || return
    # Each line is an object.
    wait_for "both refusals are logged" sh -c "[ \$(grep -c '\"status\":403' '$work/named.log') = 2 ]" || return
    python3 -c 'import json, sys; [json.loads(line) for line in sys.stdin]' <"$work/named.log"
}

dashboard_and_alerts() {
    local prometheus_port
    once start_named && once start_upper || return
    printf '' | timeout 10 websocat --binary - "ws://127.0.0.1:$named_port/tunnel?port=$upper_port" || return
    promtool check rules scripts/alerts.yaml && timeout 10 curl -sS "http://127.0.0.1:$named_port/metrics" >"$work/metrics" &&
        promtool check metrics <"$work/metrics" || return
    cat >"$work/prometheus.yml" <<END
global: {scrape_interval: 1s, evaluation_interval: 1s}
rule_files: [$root/scripts/alerts.yaml]
scrape_configs:
  - job_name: tunneld
    static_configs: [{targets: ['127.0.0.1:$named_port']}]
END
    promtool check config "$work/prometheus.yml" || return
    prometheus_port=$(free_port)
    start prometheus prometheus --config.file="$work/prometheus.yml" --storage.tsdb.path="$work/prometheus" \
        --web.listen-address="127.0.0.1:$prometheus_port"
    wait_for "Prometheus has scraped" sh -c "promtool query instant http://127.0.0.1:$prometheus_port \
        'count_over_time(tunneld_connections[20s]) > 3' | grep -q ." || { tail "$work/prometheus.log"; return 1; }
    # A rate wants something between two scrapes.
    printf '' | timeout 10 websocat --binary - "ws://127.0.0.1:$named_port/tunnel?port=$upper_port" || return
    sleep 3
    timeout 60 target/venv/bin/python scripts/e2e/monitoring.py "$work/metrics" "http://127.0.0.1:$prometheus_port"
}

lint() { # lint PATH CURL_OPTION...: httplint finds nothing bad in the answer
    local path=$1
    shift
    timeout 10 curl -sS -i -o "$work/head" "${upgrade[@]}" "$@" "http://127.0.0.1:$named_port$path" || return
    # What it says of a 400 and its like is said of every one.
    target/venv/bin/httplint -n <"$work/head" >"$work/lint" || return
    grep -E '\[(BAD|WARN)\]' "$work/lint" | grep -v "The server didn't understand the request" || return 0
    cat "$work/head"
    return 1
}

http_heads() {
    local path closed=1 # nobody is given that port
    once start_named || return
    for path in /health /metrics /openapi.yaml /nothing /tunnel '/tunnel?port=0' "/tunnel?port=$closed"; do
        lint "$path" || return
    done
    lint /health -X POST && lint /tunnel -X OPTIONS && lint /metrics -H "Origin: http://evil.example" &&
        lint '/tunnel?port=1' -H "Sec-WebSocket-Version: 8" && lint /health -H "X: $(printf '%020000d' 0)"
}

check "proxy: nginx over a Unix socket, with its clients' addresses in the log" nginx_unix
check "systemd: the socket unit is valid" socket_units_are_valid
check "systemd: the first connection starts it, and without one it ends" socket_activation
check "client: a page in Chromium with a token" chromium_page_with_token
check "client: websocket-client and ws with subprotocols, on an open daemon, by name" clients_with_an_origin
check "Prometheus: the dashboard and the alerts name what is there" dashboard_and_alerts
check "HTTP: httplint finds nothing in the heads" http_heads
