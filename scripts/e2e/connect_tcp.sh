# CONNECT-TCP by a client that was written from the draft: connect_tcp.py, and connect_tcp_rules.py for the rules.
# tunneld's own client speaks it in connect.sh and services.sh. Sourced by ../e2e.sh.

draft_client() { # draft_client PROXY OPTION...: stdin and stdout through a tunnel to target.py
    timeout 60 python3 scripts/e2e/connect_tcp.py "$1" localhost "$test_port" --token-file "$work/token" "${@:2}"
}

draft_ends() { # draft_ends PROXY OPTION...: 5 MB each way, and each of the ends
    head -c 5M "$work/sent" >"$work/draft-sent"
    draft_client "$@" <"$work/draft-sent" >"$work/received" || return
    tail -c +2 "$work/draft-sent" >"$work/wanted" && same_sum "$work/wanted" "$work/received" || return
    printf Ahalf-close | draft_client "$@" >"$work/out" && expect "$work/out" "10 bytes came" || return
    # The target's end comes first, with a stdin that stays open.
    sleep 3 | { printf B; cat; } | draft_client "$@" >"$work/out" && expect "$work/out" bye || return
    ! printf R | draft_client "$@" >"$work/out" 2>&1 && expect "$work/out" "connect_tcp.py: "
}

draft_client_carries() {
    draft_ends "127.0.0.1:$port" && draft_ends "127.0.0.1:$port" --default-template
}

draft_client_with_ssh() { # a ProxyCommand that is not of this project
    once start_sshd || return
    { printf 'Host sandbox\n    ProxyCommand python3 %s/scripts/e2e/connect_tcp.py 127.0.0.1:%s localhost %s --token-file %s\n' \
        "$root" "$port" "$ssh_port" "$work/token"; cat "$work/ssh_options"; } >"$work/ssh_draft"
    local via=draft
    ssh_command
}

start_rules() { # a daemon that pings each second, and plain proxies before it; sets $rules_port and $rules_pid
    TUNNELD_ACCESS_TOKEN=$token start rules target/release/tunneld --listen 127.0.0.1:0 --ping-interval 1s
    local wrapper=${pids[-1]}
    rules_port=$(listening_port rules) && rules_pid=$(pgrep -P "$wrapper") || return
    plain_nginx_port=$(free_port) && plain_haproxy_port=$(free_port)
    cat >"$work/plain-nginx.conf" <<EOF
daemon off; pid $work/plain-nginx.pid; error_log $work/plain-nginx.err; events {}
http {
    access_log off;
    server {
        listen 127.0.0.1:$plain_nginx_port;
        location / {
            proxy_pass http://127.0.0.1:$rules_port;
            proxy_http_version 1.1;
            proxy_set_header Upgrade \$http_upgrade;
            proxy_set_header Connection upgrade;
        }
    }
}
EOF
    cat >"$work/plain-haproxy.cfg" <<EOF
defaults
    mode http
    timeout connect 5s
    timeout client  60s
    timeout server  60s
frontend plain
    bind 127.0.0.1:$plain_haproxy_port
    default_backend tunneld
backend tunneld
    server tunneld 127.0.0.1:$rules_port
EOF
    start plain-nginx nginx -p "$work" -c "$work/plain-nginx.conf"
    start plain-haproxy haproxy -db -f "$work/plain-haproxy.cfg"
    wait_for "nginx listens" listens "$plain_nginx_port" && wait_for "HAProxy listens" listens "$plain_haproxy_port" ||
        { cat "$work/plain-nginx.log" "$work/plain-haproxy.log"; return 1; }
}

rules() { # rules PORT OPTION...
    timeout 300 python3 scripts/e2e/connect_tcp_rules.py "127.0.0.1:$1" --token-file "$work/token" \
        --pid "$rules_pid" "${@:2}"
}

draft_rules() { once start_rules && rules "$rules_port"; }

# What passes: the 101 with its fields, every capsule however it is cut, half-closed tunnels in both orders, empty DATA
# as a sign of life, and a client's reset to the target. What does not: a reset to the client, which arrives as a FIN
# (over TLS as close_notify) without FINAL_DATA. nginx says 100 to an Expect by itself, also if a refusal follows.
draft_rules_through_nginx() { once start_rules && rules "$plain_nginx_port" --through-proxy; }

draft_rules_through_haproxy() { once start_rules && rules "$plain_haproxy_port" --through-proxy; }

draft_through() { # draft_through PROXY: all of it through one proxy that terminates TLS
    draft_ends "$1" --ca-file "$work/tls.pem" || return
    # Idle for longer than the proxy allows, and then it still carries.
    { printf E; sleep 5; printf later; } | draft_client "$1" --ca-file "$work/tls.pem" >"$work/out" &&
        [ "$(cat "$work/out")" = later ] || { echo "idle: $(cat "$work/out")"; return 1; }
    # A client that vanishes is a reset for the target.
    : >"$work/target.log"
    { printf L; sleep 5; } | timeout 3 python3 scripts/e2e/connect_tcp.py "$1" localhost "$test_port" \
        --token-file "$work/token" --ca-file "$work/tls.pem"
    wait_for "the target's word" grep -q "the input was reset" "$work/target.log" || return
    # A refusal keeps its Proxy-Status.
    timeout 10 curl -sS -o "$work/body" -D "$work/head" --cacert "$work/tls.pem" --http1.1 -H "$header" \
        -H 'Connection: Upgrade' -H 'Upgrade: connect-tcp-12' "https://${1%%/*}/${1#*/}?port=0"
    expect "$work/head" "400" && expect "$work/head" "error=http_request_error"
}

draft_through_nginx() { once start_proxied && draft_through "localhost:$nginx_port/tunnel"; }

draft_through_haproxy() { once start_proxied && draft_through "localhost:$haproxy_port/a/tunnel"; }

check "CONNECT-TCP: a client from the draft, 5 MB each way and every end, by both templates" draft_client_carries
check "CONNECT-TCP: ssh through a client from the draft" draft_client_with_ssh
check "CONNECT-TCP: the rules of the draft" draft_rules
check "CONNECT-TCP: the rules of the draft through nginx" draft_rules_through_nginx
check "CONNECT-TCP: the rules of the draft through HAProxy" draft_rules_through_haproxy
check "CONNECT-TCP: nginx, TLS, idle timeout of 3 s" draft_through_nginx
check "CONNECT-TCP: HAProxy, TLS, idle timeout of 3 s" draft_through_haproxy
