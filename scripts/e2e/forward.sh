# tunneld connect in ssh's words: several ports of one process, SOCKS5, proxies on the way out, a server that wants a
# certificate, and services that come later. Sourced by ../e2e.sh, behind services.sh and proxies.sh.

forward() { # forward NAME URL OPTION...: a client with local ports; sets $forwarded to their numbers, in order
    local name=$1
    shift
    start "$name" target/release/tunneld connect "$@" --access-token-file "$work/token"
    local count
    count=$(printf '%s\n' "$@" | grep -cx -- '-[LD]')
    wait_for "$count local ports" test_lines "$count" "$work/$name.log" || { cat "$work/$name.log"; return 1; }
    mapfile -t forwarded < <(sed -n 's/.*listening on 127\.0\.0\.1:\([0-9]*\).*/\1/p' "$work/$name.log")
}

test_lines() { [ "$(grep -c 'listening on' "$2")" -eq "$1" ]; }

forward_two() { # PostgreSQL and SSH through one process
    once make_database && once start_sshd || return
    forward two "ws://127.0.0.1:$port" -L "0:$postgres_port" -L "127.0.0.1:0:localhost:$ssh_port" || return
    [ "$(sql "${forwarded[0]}" source "select count(*) from pgbench_branches")" = 7 ] || return
    { echo "Host forwarded
    HostName 127.0.0.1
    Port ${forwarded[1]}"
    cat "$work/ssh_options"; } >"$work/ssh_config_forwarded"
    timeout 30 ssh -F "$work/ssh_config_forwarded" forwarded 'echo "hello from $((6 * 7))"' >"$work/out" &&
        expect "$work/out" "hello from 42" || { cat "$work/sshd.log"; return 1; }
    # The other loopback has the same port.
    timeout 30 psql -XAtq -h localhost -p "${forwarded[0]}" -U postgres -d source -c "select 1" | grep -qx 1 || return
    wait_for "the ends are logged" grep -q "tunnel closed: .* target=localhost:$ssh_port .* end=orderly" "$work/two.log" &&
        ! grep WARN "$work/two.log"
}

serve_page() { # sets $page_port
    mkdir -p "$work/page" && echo '<!doctype html><title>x</title><p id=seen>seen from inside</p>' >"$work/page/index.html"
    page_port=$(free_port)
    start page python3 -m http.server --bind 127.0.0.1 --directory "$work/page" "$page_port"
    wait_for "the page is served" listens "$page_port"
}

socks_curl() {
    local closed=1 # nobody listens there, and no service is given it
    serve_page && forward socks "ws://127.0.0.1:$port" -D 0 || return
    timeout 20 curl -sS --noproxy '' --socks5-hostname "127.0.0.1:${forwarded[0]}" "http://box.localhost:$page_port/" >"$work/out" &&
        expect "$work/out" "seen from inside" || return
    timeout 20 curl -sS --noproxy '' -x "socks5h://localhost:${forwarded[0]}" "http://127.0.0.1:$page_port/" >"$work/out" &&
        expect "$work/out" "seen from inside" || return
    timeout 20 curl -sS --noproxy '' --socks5-hostname "127.0.0.1:${forwarded[0]}" "http://localhost:$closed/" >"$work/out" 2>&1
    [ $? -eq 97 ] && expect "$work/out" "(5)" || return
    timeout 20 curl -sS --noproxy '' --socks5-hostname "127.0.0.1:${forwarded[0]}" "http://no-such-name.invalid/" >"$work/out" 2>&1
    [ $? -eq 97 ] && expect "$work/out" "(4)" || return
    timeout 20 curl -sS --noproxy '' -x "http://127.0.0.1:${forwarded[0]}" "http://localhost:$page_port/" >"$work/out" 2>&1
    expect "$work/out" "This is a SOCKS5 proxy"
}

socks_chromium() { # which leaves out localhost unless told otherwise
    timeout 100 chromium --headless --no-sandbox --disable-gpu --no-first-run --disable-sync --disable-dev-shm-usage \
        --disable-background-networking --disable-component-update --user-data-dir="$work/chromium-socks" \
        --proxy-server="socks5://127.0.0.1:${forwarded[0]}" --proxy-bypass-list='<-loopback>' \
        --dump-dom "http://box.localhost:$page_port/" >"$work/out" 2>"$work/chromium-socks.log" ||
        { tail -n 5 "$work/chromium-socks.log"; return 1; }
    expect "$work/out" "seen from inside" && expect "$work/socks.log" "target=box.localhost:$page_port"
}

start_tinyproxy() { # sets $proxy_port, and $outside: a daemon at an address that is no loopback one
    proxy_port=$(free_port)
    printf 'Port %s\nListen 127.0.0.1\nTimeout 60\nMaxClients 50\nBasicAuth user s3cretword\nLogLevel Info\n' \
        "$proxy_port" >"$work/tinyproxy.conf"
    start tinyproxy tinyproxy -d -c "$work/tinyproxy.conf"
    TUNNELD_ACCESS_TOKEN=$token start outside target/release/tunneld --listen '*:0'
    wait_for "tinyproxy listens" listens "$proxy_port" || { cat "$work/tinyproxy.log"; return 1; }
    wait_for "tunneld listens" grep -q 'listening on' "$work/outside.log" || return
    outside=ws://$(hostname):$(sed -n 's/.*listening on 0\.0\.0\.0:\([0-9]*\).*/\1/p' "$work/outside.log")
}

proxy_http() {
    start_tinyproxy || return
    local proxy=http://user:s3cr%65tword@127.0.0.1:$proxy_port
    http_proxy=$proxy connect_pipe "$outside" --port "$test_port" || return
    expect "$work/tinyproxy.log" CONNECT || return
    # What curl does with the same variables.
    http_proxy=$proxy timeout 10 curl -sS -o /dev/null -w '%{http_code}' -p "http${outside#ws}/health" | grep -qx 204 || return
    local requests
    requests=$(grep -c CONNECT "$work/tinyproxy.log")
    printf B | http_proxy=$proxy no_proxy=$(hostname) connect "$outside" --port "$test_port" -n >"$work/out" &&
        expect "$work/out" bye && [ "$(grep -c CONNECT "$work/tinyproxy.log")" -eq "$requests" ] || return
    local wrong
    for wrong in "" user:mistaken@; do # to a wrong password it says 401
        connect "$outside" --port "$test_port" --proxy "http://${wrong}127.0.0.1:$proxy_port" </dev/null 2>"$work/out"
        [ $? -eq 1 ] && expect "$work/out" "the proxy 127.0.0.1:$proxy_port (from --proxy) refused to connect to" &&
            expect "$work/out" "in its URL" || expect "$work/out" "into the URL" || return
    done
    connect "$outside" -L 0:1 --proxy "http://127.0.0.1:$proxy_port" </dev/null 2>"$work/out"
    [ $? -eq 1 ] && expect "$work/out" 407 || return
    # What it says of a daemon that is not there.
    connect "ws://$(hostname):1" -W 1 --proxy "$proxy" --wait 1s </dev/null 2>"$work/out"
    [ $? -eq 1 ] && expect "$work/out" "with 500" && expect "$work/out" "tried again for"
}

proxy_socks() { # ssh's own
    once start_sshd || return
    local socks_port
    socks_port=$(free_port)
    { echo "Host direct
    HostName 127.0.0.1
    Port $ssh_port"
    cat "$work/ssh_options"; } >"$work/ssh_config_direct"
    start ssh-socks ssh -F "$work/ssh_config_direct" -N -D "127.0.0.1:$socks_port" direct
    wait_for "ssh serves SOCKS" listens "$socks_port" || { cat "$work/ssh-socks.log"; return 1; }
    all_proxy=socks5h://127.0.0.1:$socks_port connect_pipe "$outside" --port "$test_port" &&
        connect_pipe "ws://127.0.0.1:$port" --port "$test_port" --proxy "socks5h://localhost:$socks_port"
}

start_strict_nginx() { # wants a certificate of its CA's, and a header; sets $strict_port
    strict_port=$(free_port)
    openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=ca -keyout "$work/ca.key" -out "$work/ca.pem" 2>/dev/null &&
        openssl req -newkey rsa:2048 -nodes -subj /CN=me -keyout "$work/me.key" -out "$work/me.csr" 2>/dev/null &&
        openssl x509 -req -in "$work/me.csr" -CA "$work/ca.pem" -CAkey "$work/ca.key" -CAcreateserial -days 2 \
            -out "$work/me.pem" 2>/dev/null || return
    (umask 077 && echo 'X-Edge-Secret: of-the-edge-alone' >"$work/headers")
    cat >"$work/strict.conf" <<END
daemon off; pid $work/strict.pid; error_log $work/strict.err; events {}
http { access_log off; ssl_protocols TLSv1.2 TLSv1.3; # before 1.23.4 nginx has no TLS 1.3 by default
map \$http_upgrade \$connection_upgrade { default upgrade; '' close; }
server {
    listen 127.0.0.1:$strict_port ssl;
    ssl_certificate $work/tls.pem; ssl_certificate_key $work/tls.key;
    ssl_client_certificate $work/ca.pem; ssl_verify_client on;
    location / {
        if (\$host != edge.example) { return 421; }
        if (\$http_x_edge_secret != of-the-edge-alone) { return 403; }
        proxy_pass http://127.0.0.1:$port; proxy_http_version 1.1; proxy_buffering off;
        proxy_set_header Upgrade \$http_upgrade; proxy_set_header Connection \$connection_upgrade;
    }
}
}
END
    start strict nginx -p "$work" -c "$work/strict.conf"
    wait_for "nginx listens" listens "$strict_port" || { cat "$work/strict.log"; return 1; }
}

strict_edge() {
    once make_certificate && start_strict_nginx || return
    local edge=("wss://localhost:$strict_port" --ca-file "$work/tls.pem" -H 'Host: edge.example')
    local mine=(--cert "$work/me.pem" --key "$work/me.key") secret=(-H "@$work/headers")
    connect_pipe "${edge[@]}" "${mine[@]}" "${secret[@]}" --bearer --port "$test_port" || return
    # And TLS through the proxy of the case before.
    printf B | connect "${edge[@]}" "${mine[@]}" "${secret[@]}" --port "$test_port" -n \
        --proxy "http://user:s3cretword@127.0.0.1:$proxy_port" >"$work/out" && expect "$work/out" bye || return
    connect "${edge[@]}" "${secret[@]}" -L 0:1 </dev/null 2>"$work/out"
    [ $? -eq 1 ] && expect "$work/out" "No required SSL certificate was sent" || return
    connect "${edge[@]}" "${mine[@]}" -L 0:1 </dev/null 2>"$work/out"
    [ $? -eq 1 ] && expect "$work/out" "refused with 403" || return
    connect "${edge[@]}" --cert "$work/me.pem" --key "$work/ca.key" -L 0:1 </dev/null 2>"$work/out"
    [ $? -eq 2 ] && expect "$work/out" "is not that of the certificate"
}

waits() { # 5 s for a service, and for a daemon with it
    local late late_daemon
    late=$(free_port) && late_daemon=$(free_port)
    forward waiting "ws://127.0.0.1:$late_daemon" -L "0:$late" --wait 30s || return
    expect "$work/waiting.log" "the daemon is not there yet" || return
    TUNNELD_ACCESS_TOKEN=$token start late sh -c '
        sleep 5
        python3 -m http.server --bind 127.0.0.1 --directory "$1" "$2" &
        exec target/release/tunneld --listen "$3"' sh "$work/page" "$late" "$late_daemon"
    (printf 'GET / HTTP/1.0\r\n\r\n' | connect "ws://127.0.0.1:$late_daemon" -W "$late" -n --wait 30s >"$work/out-stdio" \
        2>"$work/err-stdio") &
    local stdio=$!
    timeout 30 curl -sS --fail --noproxy '*' "http://127.0.0.1:${forwarded[0]}/" >"$work/out" && expect "$work/out" "seen from inside" || return
    wait "$stdio" && expect "$work/out-stdio" "seen from inside" || { cat "$work/err-stdio"; return 1; }
    [ "$(wc -l <"$work/err-stdio")" -eq 1 ] && expect "$work/err-stdio" "trying again for" &&
        [ "$(grep -c "trying again" "$work/waiting.log")" -eq 1 ]
}

many_connections() { # 512 over eight ports of one process
    local options=() n
    TUNNELD_ACCESS_TOKEN=$token start roomy target/release/tunneld --listen 0 --max-connections 600
    local roomy
    wait_for "tunneld listens" grep -q 'listening on' "$work/roomy.log" || return
    roomy=$(sed -n 's/.*listening on 127\.0\.0\.1:\([0-9]*\).*/\1/p' "$work/roomy.log")
    for n in 1 2 3 4 5 6 7 8; do options+=(-L "127.0.0.1:0:localhost:$test_port"); done
    forward eight "ws://127.0.0.1:$roomy" "${options[@]}" || return
    timeout 100 python3 - "${forwarded[@]}" <<'END' || return
import socket, sys
ports = [int(port) for port in sys.argv[1:]]
assert len(ports) == 8, ports
peers = [socket.create_connection(("127.0.0.1", ports[n % 8]), 60) for n in range(512)]
for n, peer in enumerate(peers):
    peer.sendall(b"E%09d" % n)
for n, peer in enumerate(peers):
    received = b""
    while len(received) < 9:
        received += peer.recv(100)
    assert received == b"%09d" % n, received
more = socket.create_connection(("127.0.0.1", ports[0]), 60)
try:
    assert more.recv(1) == b"", "one more than --max-connections"
except ConnectionResetError:
    pass
END
    [ "$(grep -c "tunnel opened" "$work/eight.log")" -eq 512 ]
}

check "forward: psql and ssh through two ports of one process" forward_two
check "forward: 512 connections over eight ports" many_connections
check "SOCKS5: curl, its error codes, and an HTTP client that is told" socks_curl
check "SOCKS5: a page in Chromium" socks_chromium
check "proxy on the way out: tinyproxy with a password, and no_proxy" proxy_http
check "proxy on the way out: ssh -D" proxy_socks
check "an edge that wants a certificate and a header" strict_edge
check "--wait: a service and a daemon that come 5 s later" waits
