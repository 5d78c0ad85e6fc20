# tunneld connect, the client in the box: in a pipe, as a local port, and through the proxies. SSH goes through it in
# ../e2e.sh, the services in services.sh. Sourced by ../e2e.sh.

connect() { # connect URL OPTION...: with the token
    timeout 60 target/release/tunneld connect "$@" --access-token-file "$work/token"
}

connect_pipe() { # connect_pipe URL OPTION...: 50 MB each way, and each of the ends
    connect "$@" <"$work/sent" >"$work/received" || return
    tail -c +2 "$work/sent" | cmp - "$work/received" || return
    printf Ahalf-close | connect "$@" >"$work/out" && expect "$work/out" "10 bytes came" || return
    # The target's end comes first, with a stdin that stays open.
    sleep 3 | { printf B; cat; } | connect "$@" >"$work/out" && expect "$work/out" bye || return
    printf R | connect "$@" 2>"$work/out"
    [ $? -eq 1 ] && expect "$work/out" "tunneld: the tunnel broke: target failed: Connection reset by peer"
}

connect_in_a_pipe() { connect_pipe "ws://127.0.0.1:$port" --port "$test_port"; }

connect_refused() {
    local closed
    closed=$(free_port)
    connect "ws://127.0.0.1:$port" --port "$closed" </dev/null 2>"$work/out"
    [ $? -eq 1 ] && expect "$work/out" "tunneld: refused with 502: cannot reach localhost:$closed: " || return
    TUNNELD_ACCESS_TOKEN=mistaken timeout 10 target/release/tunneld connect "ws://127.0.0.1:$port" --port 1 </dev/null 2>"$work/out"
    [ $? -eq 1 ] && expect "$work/out" "tunneld: refused with 401: " && ! grep -qF mistaken "$work/out"
}

connect_local_port() {
    local connected
    start connect-local target/release/tunneld connect "ws://127.0.0.1:$port" --port "$redis_port" \
        --listen 127.0.0.1:0 --access-token-file "$work/token"
    connected=$(listening_port connect-local) || return
    timeout 20 redis-cli -p "$connected" -x set big <"$work/value" >"$work/out" && expect "$work/out" OK || return
    timeout 20 redis-cli -p "$connected" --raw get big | tr -d '\n' >"$work/out" && same_sum "$work/value" "$work/out" || return
    timeout 120 redis-benchmark -p "$connected" -c 50 -n 20000 -P 8 -t set,get -q >"$work/out" &&
        [ "$(tr '\r' '\n' <"$work/out" | grep -c 'p50=')" -ge 2 ] && ! grep WARN "$work/connect-local.log"
}

connect_wss() {
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

check "connect: a pipe of 50 MB each way, and every end with its exit code" connect_in_a_pipe
check "connect: a refusal with its message" connect_refused
check "connect: redis-cli and redis-benchmark through a local port" connect_local_port
check "connect: wss through nginx and HAProxy" connect_wss
