# Clients: 50 MB each way, an end from each side with its code, a refusal. Sourced by ../e2e.sh.

start_test_target() { # sets $test_port
    test_port=$(free_port)
    start target python3 scripts/e2e/target.py "$test_port"
    wait_for "the target listens" listens "$test_port" && { printf E; head -c 50M /dev/urandom; } >"$work/sent"
}

websocat_1() {
    timeout 60 websocat --binary -H="$header" - "$url?port=$test_port" <"$work/sent" >"$work/received" || return
    tail -c +2 "$work/sent" | cmp - "$work/received" || return
    expect "$work/tunneld.log" "up=52428801 down=52428800" || return
    printf B | timeout 10 websocat --binary -H="$header" - "$url?port=$test_port" >"$work/out" && expect "$work/out" bye
}

websocat_4() { # it writes the payload of a Close into the data
    timeout 60 "$root/$websocat_4/bin/websocat" -b -H "$header" stdio: "$url?port=$test_port" \
        <"$work/sent" >"$work/received" || return
    tail -c +2 "$work/sent" | cat - <(printf '\x03\xe8') | cmp - "$work/received"
}

seen() { # seen LINE...: the client has printed these lines
    cat "$work/out"
    local line
    for line; do grep -qxF -- "$line" "$work/out" || { echo "not seen: $line"; return 1; }; done
}

python_websockets() {
    TUNNELD_ACCESS_TOKEN=$token timeout 120 target/venv/bin/python scripts/e2e/client.py "$url?port=$test_port" \
        >"$work/out" 2>&1
    seen "50 MiB each way, then our close: 1000" "our close, then the target's answer: 3 bytes came" \
        "the target's end: bye 1000" "the target's reset:  1011" "a program that failed: 1011" &&
        grep -q '^a wrong token: 401 {"code":401' "$work/out" || return
    # The program that failed, as its target and the daemon have seen it.
    wait_for "the target's word" grep -q "the input" "$work/target.log" && cat "$work/target.log" &&
        ! grep -v "the input was reset" "$work/target.log" &&
        wait_for "its end" grep -q "end=client_aborted" "$work/tunneld.log"
}

node_ws() {
    NODE_PATH=target/node/node_modules TUNNELD_ACCESS_TOKEN=$token timeout 120 node scripts/e2e/client.cjs \
        "$url?port=$test_port" >"$work/out" 2>&1
    seen "50 MiB each way, then our close: 1000" "our close, then the target's answer: 3 bytes came 1000" \
        "the target's end: bye 1000" "the target's reset:  1011" "a wrong token: 401"
}

chromium_page() {
    local page_port open_port
    page_port=$(free_port)
    start open target/release/tunneld --listen 127.0.0.1:0 --allow-origin "http://127.0.0.1:$page_port"
    open_port=$(listening_port open) || return
    timeout 120 python3 scripts/e2e/page.py "$page_port" "$test_port" "$open_port" >"$work/out" 2>&1 &
    local page=$!
    wait_for "the page is served" listens "$page_port" || return
    start chromium chromium --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync \
        --disable-background-networking --disable-component-update --disable-dev-shm-usage \
        --user-data-dir="$work/chromium" "http://127.0.0.1:$page_port/"
    local browser=${pids[-1]}
    wait "$page"
    kill "$browser" 2>/dev/null
    seen "50 MiB each way, then our close: 1000" "the target's end: bye 1000" "the target's reset:  1011" || return
    # Another origin's page may not.
    timeout 10 curl -sS -o "$work/out" -w '%{http_code}' -H "Origin: http://evil.example" "${upgrade[@]}" \
        "http://127.0.0.1:$open_port/tunnel?port=$test_port" | grep -qx 403
}

start_test_target || exit 1
check "client: websocat 1.14" websocat_1
check "client: websocat 4.0.0-alpha3" websocat_4
check "client: Python websockets" python_websockets
check "client: Node ws" node_ws
check "client: a page in Chromium" chromium_page
