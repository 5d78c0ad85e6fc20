# tunneld connect, the client in the box, by both of its protocols: in a pipe, as a local port, and through the
# proxies. SSH goes through it in ../e2e.sh, the services in services.sh. Sourced by ../e2e.sh.

connect() { # connect URL OPTION...: with the token, and the protocol of $via
    timeout 60 target/release/tunneld connect "$@" --protocol "$(protocol)" --access-token-file "$work/token"
}

connect_pipe() { # connect_pipe URL OPTION...: 50 MB each way, and each of the ends
    connect "$@" <"$work/sent" >"$work/received" || return
    tail -c +2 "$work/sent" | cmp - "$work/received" || return
    printf Ahalf-close | connect "$@" >"$work/out" && expect "$work/out" "10 bytes came" || return
    # The target's end comes first, with a stdin that stays open.
    sleep 3 | { printf B; cat; } | connect "$@" >"$work/out" && expect "$work/out" bye || return
    printf R | connect "$@" 2>"$work/out"
    [ $? -eq 1 ] && expect "$work/out" "tunneld: the tunnel broke: " || return
    # Only the WebSocket has room for the reason.
    [ "$via" = connect-tcp ] || expect "$work/out" "target failed: Connection reset by peer"
}

connect_in_a_pipe() { connect_pipe "ws://127.0.0.1:$port" --port "$test_port"; }

connect_refused() {
    local closed
    closed=1 # nobody is given that port
    connect "ws://127.0.0.1:$port" --port "$closed" </dev/null 2>"$work/out"
    [ $? -eq 1 ] && expect "$work/out" "tunneld: refused with 502: cannot reach localhost:$closed: " || return
    TUNNELD_ACCESS_TOKEN=mistaken timeout 10 target/release/tunneld connect "ws://127.0.0.1:$port" --protocol "$(protocol)" \
        --port 1 </dev/null 2>"$work/out"
    [ $? -eq 1 ] && expect "$work/out" "tunneld: refused with 401: " && ! grep -qF mistaken "$work/out"
}

connect_local_port() {
    once start_redis || return
    local connected
    start "$via-local" target/release/tunneld connect "ws://127.0.0.1:$port" --protocol "$(protocol)" \
        --port "$redis_port" --listen 127.0.0.1:0 --access-token-file "$work/token"
    connected=$(listening_port "$via-local") || return
    timeout 20 redis-cli -p "$connected" -x set big <"$work/value" >"$work/out" && expect "$work/out" OK || return
    timeout 20 redis-cli -p "$connected" --raw get big | tr -d '\n' >"$work/out" && same_sum "$work/value" "$work/out" || return
    timeout 120 redis-benchmark -p "$connected" -c 50 -n 20000 -P 8 -t set,get -q >"$work/out" &&
        [ "$(tr '\r' '\n' <"$work/out" | grep -c 'p50=')" -ge 2 ] && ! grep WARN "$work/$via-local.log"
}

start_closer() { # a target that closes at once; sets $closer_port
    closer_port=$(free_port)
    start closer python3 -c '
import socket, sys
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
while True:
    listener.accept()[0].close()' "$closer_port"
    wait_for "the target listens" listens "$closer_port"
}

connect_undeliverable() { # what the target does not take is told at once
    once start_closer || return
    local codes
    for _ in 1 2 3; do
        yes | timeout 2 target/release/tunneld connect "ws://127.0.0.1:$port" --protocol "$(protocol)" \
            --port "$closer_port" --access-token-file "$work/token" >"$work/out" 2>&1
        codes=("${PIPESTATUS[@]}")
        [ "${codes[1]}" -eq 1 ] && expect "$work/out" "tunneld: the tunnel broke: " ||
            { echo "exit codes ${codes[*]}"; return 1; }
    done
}

connect_wss() {
    once start_proxied || return
    local base
    for base in "localhost:$nginx_port" "localhost:$haproxy_port/a/tunnel"; do
        connect_pipe "wss://$base" --port "$test_port" --ca-file "$work/tls.pem" || return
        # Idle for longer than the proxy allows, and then it still carries.
        { printf E; sleep 5; printf later; } | connect "wss://$base" --port "$test_port" --ca-file "$work/tls.pem" \
            --ping-interval 1s >"$work/out" && expect "$work/out" later || return
        connect "wss://$base" --port "$test_port" </dev/null 2>"$work/out"
        [ $? -eq 1 ] && expect "$work/out" "--ca-file" || return
    done
}

for via in connect connect-tcp; do
    check "connect: a pipe of 50 MB each way, and every end with its exit code ($via)" connect_in_a_pipe
    check "connect: a refusal with its message ($via)" connect_refused
    check "connect: redis-cli and redis-benchmark through a local port ($via)" connect_local_port
    check "connect: an endless stdin and a target that closes at once ($via)" connect_undeliverable
    check "connect: wss through nginx and HAProxy ($via)" connect_wss
done
via=websocat
