# Services, through tunneld and direct with the same results: with websocat on the way, and with tunneld connect.
# Sourced by ../e2e.sh.

postgres_bin=$(echo /usr/lib/postgresql/*/bin)
postgres_bin=${postgres_bin##* }

as_postgres() { # PostgreSQL refuses to run as root
    if [ "$(id -u)" = 0 ]; then setpriv --reuid=postgres --regid=postgres --init-groups "$@"; else "$@"; fi
}

make_certificate() { # for localhost: $work/tls.pem and tls.key
    openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost,IP:127.0.0.1 \
        -addext basicConstraints=critical,CA:FALSE -keyout "$work/tls.key" -out "$work/tls.pem" 2>/dev/null
}

start_postgres() { # with TLS for who asks for it; sets $postgres_port
    once make_certificate || return
    postgres_port=$(free_port)
    local data=$work/postgres
    mkdir "$data" && chmod 711 "$work" || return
    [ "$(id -u)" != 0 ] || chown postgres "$data"
    as_postgres "$postgres_bin/initdb" -A trust -U postgres -D "$data" >"$work/initdb.log" 2>&1 ||
        { cat "$work/initdb.log"; return 1; }
    cp "$work/tls.pem" "$work/tls.key" "$data/" && chmod 600 "$data/tls.key" || return
    [ "$(id -u)" != 0 ] || chown postgres "$data/tls.pem" "$data/tls.key"
    export PGUSER=postgres PGHOST=127.0.0.1 PGSSLMODE=disable
    start postgres setpriv --reuid=postgres --regid=postgres --init-groups "$postgres_bin/postgres" -D "$data" \
        -p "$postgres_port" -k "$data" -c listen_addresses=127.0.0.1 -c fsync=off \
        -c ssl=on -c ssl_cert_file=tls.pem -c ssl_key_file=tls.key
    wait_for "PostgreSQL answers" pg_isready -q -h 127.0.0.1 -p "$postgres_port"
}

sql() { # sql PORT DATABASE STATEMENT
    timeout 60 psql -XAtq -h 127.0.0.1 -p "$1" -U postgres -d "$2" -c "$3"
}

sums() { # sums PORT DATABASE: a checksum of every table
    local table
    for table in pgbench_accounts pgbench_branches pgbench_tellers; do
        sql "$1" "$2" "select '$table', count(*), md5(string_agg(t::text, ',' order by t::text)) from $table t"
    done
}

make_database() { # of about 100 MB
    once start_postgres || return
    sql "$postgres_port" postgres "create database source" &&
        timeout 60 pgbench -q -i -s 7 -p "$postgres_port" source >"$work/out" 2>&1 || { cat "$work/out"; return 1; }
    [ "$(sql "$postgres_port" source "select pg_database_size('source') > 100e6")" = t ]
}

source_database() { once make_database; }

postgres() { # dumped and restored through tunnels
    local copy=copy_${via//-/_}
    once make_database && local_listener "$postgres_port" && sql "$local_port" postgres "create database $copy" || return
    timeout 120 pg_dump -Fc -p "$local_port" source | timeout 120 pg_restore -p "$local_port" -d "$copy" || return
    sums "$postgres_port" source >"$work/direct" && sums "$local_port" "$copy" >"$work/tunneled" &&
        cmp "$work/direct" "$work/tunneled" && [ -s "$work/direct" ] || return
    timeout 60 pgbench -n -c 4 -T 3 -p "$local_port" "$copy" >"$work/out" 2>&1 || { cat "$work/out"; return 1; }
    expect "$work/out" "number of failed transactions: 0"
}

postgres_tls() { # PostgreSQL resets a TLS session's connection behind its client's end: that is no alarm
    once start_postgres && local_listener "$postgres_port" || return
    local mark
    mark=$(settled_mark "$postgres_port") || return
    for _ in 1 2 3 4 5; do
        PGSSLMODE=require sql "$local_port" postgres "select ssl from pg_stat_ssl where pid = pg_backend_pid()" >"$work/out" &&
            expect "$work/out" t || return
    done
    PGSSLMODE=require sql "$local_port" postgres "select repeat('0123456789', 300000)" >"$work/out" &&
        [ "$(wc -c <"$work/out")" -eq 3000001 ] || return
    wait_for "every tunnel's end" has_ends 6 "$mark" "$postgres_port" && ends_since "$mark" "$postgres_port" &&
        ! grep WARN "$work/local-$local_port.log" &&
        ! tail -n +"$((mark + 1))" "$work/tunneld.log" | grep "WARN.*localhost:$postgres_port"
}

redis_subscription() {
    rm -f "$work/news"
    once start_redis && local_listener "$redis_port" || return
    timeout 20 redis-cli -p "$local_port" subscribe news >"$work/news" &
    wait_for "the subscription stands" grep -q subscribe "$work/news" || return
    local n
    for n in 1 2 3; do timeout 10 redis-cli -p "$local_port" publish news "message $n" >"$work/out" || return; done
    wait_for "every message" grep -q "message 3" "$work/news" && [ "$(grep -c '^message [123]$' "$work/news")" -eq 3 ]
}

redis_pipeline() {
    once start_redis && local_listener "$redis_port" || return
    local n
    for n in $(seq 20000); do printf 'SET key%d value%d\r\nGET key%d\r\n' "$n" "$n" "$n"; done >"$work/commands"
    timeout 60 redis-cli -p "$redis_port" --raw <"$work/commands" >"$work/direct" &&
        timeout 60 redis-cli -p "$local_port" --raw <"$work/commands" >"$work/tunneled" || return
    cmp "$work/direct" "$work/tunneled" && [ "$(wc -l <"$work/direct")" -eq 40000 ]
}

ssh_rsync() {
    once start_sshd || return
    mkdir -p "$work/tree" && cp -r src tests scripts "$work/tree/" && head -c 20M /dev/urandom >"$work/tree/large" || return
    timeout 60 rsync -a -e "ssh -F $work/ssh_connect" "$work/tree/" "sandbox:$work/there/" &&
        timeout 60 rsync -a -e "ssh -F $work/ssh_connect" "sandbox:$work/there/" "$work/here/" && diff -r "$work/tree" "$work/here"
}

ssh_git() {
    once start_sshd || return
    local repository=$work/repository
    git init -q "$repository" && cp -r src "$repository/" || return
    git -C "$repository" add -A && git -C "$repository" -c user.name=e2e -c user.email=e2e@localhost commit -qm first || return
    GIT_SSH_COMMAND="ssh -F $work/ssh_connect" timeout 60 git -c safe.directory='*' clone -q "sandbox:$repository" "$work/cloned" &&
        diff -r "$repository/src" "$work/cloned/src" &&
        [ "$(git -C "$repository" rev-parse HEAD)" = "$(git -C "$work/cloned" rev-parse HEAD)" ]
}

http_keep_alive() { # two requests on one connection, which is one tunnel
    local served
    served=$(free_port)
    start "http11-$via" python3 -c '
import http.server, sys
class Handler(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()' "$served"
    wait_for "the HTTP server listens" listens "$served" && local_listener "$served" || return
    timeout 10 curl -sS --fail -w '%{num_connects} ' -o "$work/1" -o "$work/2" "http://127.0.0.1:$local_port/README.md" \
        "http://127.0.0.1:$local_port/Cargo.toml" >"$work/out" || return
    cmp README.md "$work/1" && cmp Cargo.toml "$work/2" && expect "$work/out" "1 0" || return
    local used="tunnel closed: .* target=localhost:$served .* up=[1-9]"
    wait_for "the tunnel's end" grep -q "$used" "$work/tunneld.log" && [ "$(grep -c "$used" "$work/tunneld.log")" -eq 1 ]
}

websocket_inside() { # a WebSocket server is reached through a tunnel, which is one too
    local served
    served=$(free_port)
    start "inner-$via" websocat --binary "ws-l:127.0.0.1:$served" mirror:
    wait_for "the inner server listens" listens "$served" && local_listener "$served" || return
    head -c 1M /dev/urandom >"$work/inner"
    timeout 20 target/venv/bin/python - "$local_port" "$work/inner" <<'EOF'
import sys
from websockets.sync.client import connect
data = open(sys.argv[2], "rb").read()
with connect(f"ws://127.0.0.1:{sys.argv[1]}/", max_size=None, compression=None) as websocket:
    received = b""
    for at in range(0, len(data), 10000):
        websocket.send(data[at:at + 10000])
        received += websocket.recv()
assert received == data
EOF
}

check "PostgreSQL: a database of 100 MB" source_database
for via in websocat connect connect-tcp; do
    check "PostgreSQL: dumped and restored, pgbench ($via)" postgres
    check "Redis: a subscription ($via)" redis_subscription
    check "Redis: 40,000 pipelined commands ($via)" redis_pipeline
    check "HTTP: two requests on one connection ($via)" http_keep_alive
    check "a WebSocket inside the tunnel ($via)" websocket_inside
done
for via in connect connect-tcp; do
    check "PostgreSQL: over TLS, without an alarm ($via)" postgres_tls
done
via=websocat
check "SSH: rsync of a tree there and back" ssh_rsync
check "SSH: git clone" ssh_git
