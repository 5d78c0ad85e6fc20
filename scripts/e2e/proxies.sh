# Proxies in front that terminate TLS and cut what is idle for 3 s. Sourced by ../e2e.sh.

start_proxied() { # two daemons that ping each second, a certificate, nginx and HAProxy; sets $nginx_port, $haproxy_port
    export TUNNELD_ACCESS_TOKEN=$token
    start proxied-a target/release/tunneld --listen 127.0.0.1:0 --ping-interval 1s
    start proxied-b target/release/tunneld --listen 127.0.0.1:0 --ping-interval 1s
    unset TUNNELD_ACCESS_TOKEN
    local a b
    a=$(listening_port proxied-a) && b=$(listening_port proxied-b) || return
    once make_certificate || return
    cat "$work/tls.pem" "$work/tls.key" >"$work/both.pem"
    nginx_port=$(free_port) && haproxy_port=$(free_port)
    {
        printf 'daemon off; pid %s/nginx.pid; error_log %s/nginx.err; events {}\nhttp { access_log off;\n' "$work" "$work"
        sed "s,listen 443,listen 127.0.0.1:$nginx_port,; s,/etc/ssl/sandbox,$work/tls,; s,49983,$a,; s,75s,3s," scripts/nginx.conf
        echo '}'
    } >"$work/nginx.conf"
    sed "s,bind :443,bind 127.0.0.1:$haproxy_port,; s,/etc/ssl/sandboxes.pem,$work/both.pem,; s,49983,$a,; s,49984,$b,; s,75s,3s," \
        scripts/haproxy.cfg >"$work/haproxy.cfg"
    start nginx nginx -p "$work" -c "$work/nginx.conf"
    start haproxy haproxy -db -f "$work/haproxy.cfg"
    wait_for "nginx listens" listens "$nginx_port" && wait_for "HAProxy listens" listens "$haproxy_port" ||
        { cat "$work/nginx.log" "$work/haproxy.log"; return 1; }
}

wss() { # wss URL_PATH...: websocat through TLS
    SSL_CERT_FILE=$work/tls.pem timeout 60 websocat --binary -H="$header" - "$@"
}

status_of() { # status_of HTTPS_URL TOKEN: what an upgrade is answered with
    timeout 10 curl -sS -o "$work/body" -w '%{http_code}' --cacert "$work/tls.pem" -H "X-Access-Token: $2" \
        "${upgrade[@]}" --http1.1 "$1"
}

through() { # through BASE: all of it through one proxy, at localhost:PORT/PATH
    local base=$1 closed
    wss "wss://$base?port=$test_port" <"$work/sent" >"$work/received" || { echo "50 MB: exit code $?"; return 1; }
    tail -c +2 "$work/sent" | cmp - "$work/received" || return
    # An end from each side, and the target's reset, with their codes.
    SSL_CERT_FILE=$work/tls.pem TUNNELD_ACCESS_TOKEN=$token timeout 60 target/venv/bin/python scripts/e2e/client.py \
        "wss://$base?port=$test_port" 5 >"$work/out" 2>&1
    seen "5 MiB each way, then our close: 1000" "the target's end: bye 1000" "the target's reset:  1011" || return
    # Idle for longer than the proxy allows, and then it still carries.
    { printf E; sleep 5; printf later; } | wss "wss://$base?port=$test_port" >"$work/out" && [ "$(cat "$work/out")" = later ] ||
        { echo "idle: $(cat "$work/out")"; return 1; }
    closed=1 # nobody is given that port
    [ "$(status_of "https://$base?port=$closed" "$token")" = 502 ] && expect "$work/body" "Connection refused" || return
    [ "$(status_of "https://$base?port=0" "$token")" = 400 ] && expect "$work/body" "is not a valid port" || return
    [ "$(status_of "https://$base?port=1" wrong)" = 401 ] && expect "$work/body" "X-Access-Token" || return
    [ "$(status_of "https://${base%tunnel}nothing" "$token")" = 404 ] || return
    local answer=(timeout 10 curl -sS -o "$work/body" -w '%{http_code}' --cacert "$work/tls.pem" --http1.1 -H "$header")
    [ "$("${answer[@]}" "https://$base?port=1")" = 426 ] && [ "$("${answer[@]}" -X POST "https://$base?port=1")" = 405 ]
}

through_nginx() { once start_proxied && through "localhost:$nginx_port/tunnel"; }

through_haproxy() { once start_proxied && through "localhost:$haproxy_port/a/tunnel" && through "localhost:$haproxy_port/b/tunnel"; }

two_daemons() { # each sandbox got its own
    local which
    for which in a b; do
        expect "$work/proxied-$which.log" "up=52428801 down=52428800" || return
    done
    ! grep -h "idle\|no pong" "$work"/proxied-?.log
}

check "proxy: nginx, TLS, idle timeout of 3 s" through_nginx
check "proxy: HAProxy, TLS, idle timeout of 3 s, two daemons" through_haproxy
check "proxy: each of the two daemons had its tunnels" two_daemons
