#!/usr/bin/env bash
# The integration run: real clients reach real services through a tunnel, on loopback and free ports.
#
#   scripts/e2e.sh                builds tunneld, installs what is missing, runs every case
#   scripts/e2e.sh --only TEXT    only the cases whose name holds TEXT, and what they need
#
# Prints a line a case and "N passed, N failed" last; exits with 1 if one failed. What it starts, it stops.
# What it builds and installs is in scripts/e2e/prepare.sh.
set -uo pipefail
cd "$(dirname "$0")/.."
case ${1:-} in
'') only= ;;
--only) only=${2:?--only takes a part of a name} ;;
*) echo "unknown option $1: --only TEXT is the only one" >&2 && exit 2 ;;
esac
root=$PWD
work=$(mktemp -d)
passed=0
failed=0
pids=()

stop() {
    for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null; done
    sleep 0.2
    for pid in "${pids[@]}"; do kill -9 "$pid" 2>/dev/null; done
    rm -rf "$work"
}
trap stop EXIT
trap 'exit 130' INT TERM

# shellcheck source=scripts/e2e/prepare.sh
. scripts/e2e/prepare.sh
PATH=$root/$websocat_1/bin:$PATH:/usr/sbin

# --- words --------------------------------------------------------------------------------------------

free_port() {
    python3 -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

start() { # start NAME COMMAND...: in the background, its output in $work/NAME.log, stopped at the end
    local name=$1
    shift
    timeout 3600 "$@" >"$work/$name.log" 2>&1 </dev/null &
    pids+=($!)
}

wait_for() { # wait_for WHAT COMMAND...: until the command succeeds
    local what=$1
    shift
    for _ in $(seq 200); do
        "$@" >/dev/null 2>&1 && return
        sleep 0.05
    done
    echo "not in 10 s: $what" >&2
    return 1
}

listens() { (: <"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

declare -A done_once
once() { # once FUNCTION: sets up what several cases need, unless it has succeeded before
    [ "${done_once[$1]:-}" ] || { "$1" && done_once[$1]=1; }
}

check() { # check NAME FUNCTION: one case
    [[ $1 == *"$only"* ]] || return 0
    local start=$SECONDS
    if "$2" >"$work/case.log" 2>&1; then
        passed=$((passed + 1))
        echo "ok      $1 ($((SECONDS - start)) s)"
    else
        failed=$((failed + 1))
        echo "FAILED  $1"
        sed 's/^/        /' "$work/case.log"
        tail -n 5 "$work/tunneld.log" | sed 's/^/        tunneld: /'
    fi
}

check_if() { # check_if COMMAND NAME FUNCTION: one case, left out where the command can't be run
    [[ $2 == *"$only"* ]] || return 0
    if $1 >"$work/out" 2>&1; then check "$2" "$3"; else echo "skipped $2: '$1' fails here"; fi
}

expect() { # expect FILE TEXT
    grep -qF -- "$2" "$1" || { echo "expected '$2' in:"; cat "$1"; return 1; }
}

same_sum() { [ "$(sha256sum <"$1")" = "$(sha256sum <"$2")" ] || { echo "$1 and $2 differ"; return 1; }; }

# --- the daemon and the services ----------------------------------------------------------------------

token=e2e-$RANDOM$RANDOM$RANDOM
TUNNELD_ACCESS_TOKEN=$token start tunneld target/release/tunneld --listen 127.0.0.1:0
daemon_pid=${pids[-1]}
wait_for "tunneld listens" grep -q 'listening on' "$work/tunneld.log" || { cat "$work/tunneld.log"; exit 1; }
port=$(sed -n 's/.*listening on 127\.0\.0\.1:\([0-9]*\).*/\1/p' "$work/tunneld.log")
url="ws://127.0.0.1:$port/tunnel"
(umask 077 && printf '%s\n' "$token" >"$work/token")
header="X-Access-Token: $token"
upgrade=(-H 'Connection: Upgrade' -H 'Upgrade: websocket' -H 'Sec-WebSocket-Version: 13' # for curl
    -H 'Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==')

via=websocat # or connect, or connect-tcp, which is connect with that protocol: what leads through a tunnel

client_command() { # client_command TARGET_PORT: what carries stdin and stdout through a tunnel, as shell words
    case $via in
    websocat) echo "websocat --binary -H='$header' - $url?port=$1" ;;
    connect*)
        echo "$root/target/release/tunneld connect ws://127.0.0.1:$port --protocol $(protocol) --port $1" \
            "--access-token-file $work/token"
        ;;
    esac
}

protocol() { if [ "$via" = connect-tcp ]; then echo connect-tcp; else echo websocket; fi; }

local_listener() { # local_listener TARGET_PORT: a local port that leads through a tunnel; sets $local_port
    local_port=$(free_port)
    case $via in
    websocat) start "local-$local_port" websocat --binary -H="$header" "tcp-l:127.0.0.1:$local_port" "$url?port=$1" ;;
    connect*)
        start "local-$local_port" target/release/tunneld connect "ws://127.0.0.1:$port" --protocol "$(protocol)" \
            --port "$1" --listen "127.0.0.1:$local_port" --access-token-file "$work/token"
        ;;
    esac
    wait_for "the local port listens" listens "$local_port"
}

settled_mark() { # settled_mark TARGET_PORT: where the log is, once every tunnel to there has been closed
    wait_for "the tunnels' ends" is_settled "$1" && wc -l <"$work/tunneld.log"
}

is_settled() {
    [ "$(grep -c "tunnel opened: .* target=localhost:$1 " "$work/tunneld.log")" -eq \
        "$(grep -c "tunnel closed: .* target=localhost:$1 " "$work/tunneld.log")" ]
}

ends_since() { # ends_since MARK TARGET_PORT: the end= of every tunnel to there that was closed since, a line each
    tail -n +"$(($1 + 1))" "$work/tunneld.log" |
        sed -n "s/.*tunnel closed: .* target=localhost:$2 .* end=\([a-z_]*\) .*/\1/p"
}

has_ends() { [ "$(ends_since "$2" "$3" | wc -l)" -ge "$1" ]; } # has_ends COUNT MARK TARGET_PORT

all_ended() { # all_ended COUNT END MARK TARGET_PORT: so many tunnels were closed since, and each like that
    wait_for "$1 tunnels' ends" has_ends "$1" "$3" "$4"
    [ "$(ends_since "$3" "$4" | grep -cx "$2")" -eq "$1" ] && [ "$(ends_since "$3" "$4" | sort -u)" = "$2" ] ||
        { echo "the ends are:"; ends_since "$3" "$4"; return 1; }
}

# --- cases --------------------------------------------------------------------------------------------

http_file() {
    mkdir -p "$work/www" && head -c 200M /dev/urandom >"$work/www/file" || return
    local served
    served=$(free_port)
    start http python3 -m http.server --bind 127.0.0.1 --directory "$work/www" "$served"
    wait_for "the HTTP server listens" listens "$served" || return
    local_listener "$served" || return
    timeout 120 curl -sS --fail -o "$work/fetched" "http://127.0.0.1:$local_port/file" || return
    same_sum "$work/www/file" "$work/fetched"
}

start_redis() {
    redis_port=$(free_port)
    start redis redis-server --bind 127.0.0.1 --port "$redis_port" --save '' --appendonly no --dir "$work"
    wait_for "redis listens" listens "$redis_port"
    { head -c 5M /dev/urandom | base64 -w0; } >"$work/value"
}

redis_commands() {
    once start_redis && local_listener "$redis_port" || return
    timeout 20 redis-cli -p "$local_port" set greeting hello >"$work/out" && expect "$work/out" OK || return
    timeout 20 redis-cli -p "$local_port" get greeting >"$work/out" && expect "$work/out" hello || return
    timeout 20 redis-cli -p "$local_port" -x set big <"$work/value" >"$work/out" && expect "$work/out" OK || return
    timeout 20 redis-cli -p "$local_port" --raw get big | tr -d '\n' >"$work/out" && same_sum "$work/value" "$work/out"
}

redis_bench() {
    once start_redis && local_listener "$redis_port" || return
    timeout 120 redis-benchmark -p "$local_port" -c 50 -n 20000 -P 8 -t set,get -q >"$work/out" || return
    tr '\r' '\n' <"$work/out" | grep 'requests per second' >"$work/rates"
    cat "$work/out"
    [ "$(grep -c 'p50=' "$work/rates")" -eq 2 ]
}

start_sshd() {
    ssh_port=$(free_port)
    mkdir -p /run/sshd 2>/dev/null
    ssh-keygen -q -t ed25519 -N '' -f "$work/host_key" && ssh-keygen -q -t ed25519 -N '' -f "$work/key" || return
    cp "$work/key.pub" "$work/authorized_keys"
    cat >"$work/sshd_config" <<EOF
Port $ssh_port
ListenAddress 127.0.0.1
HostKey $work/host_key
PidFile $work/sshd.pid
AuthorizedKeysFile $work/authorized_keys
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
Subsystem sftp internal-sftp
EOF
    cat >"$work/ssh_options" <<EOF
    User $(id -un)
    IdentityFile $work/key
    IdentitiesOnly yes
    UserKnownHostsFile $work/known_hosts
    StrictHostKeyChecking accept-new
    BatchMode yes
EOF
    local via
    for via in websocat connect connect-tcp; do
        { printf 'Host sandbox\n    ProxyCommand %s\n' "$(client_command "$ssh_port")"; cat "$work/ssh_options"; } \
            >"$work/ssh_$via"
    done
    start sshd /usr/sbin/sshd -D -e -f "$work/sshd_config"
    wait_for "sshd listens" listens "$ssh_port" || { cat "$work/sshd.log"; return 1; }
}

ssh_command() {
    once start_sshd || return
    timeout 30 ssh -F "$work/ssh_$via" sandbox 'echo "hello from $((6 * 7))"' >"$work/out" &&
        expect "$work/out" "hello from 42" || { cat "$work/sshd.log"; return 1; }
    timeout 30 ssh -F "$work/ssh_$via" sandbox 'exit 7'
    [ $? -eq 7 ]
}

ssh_orderly() { # ssh ends its ProxyCommand by SIGHUP
    once start_sshd || return
    local mark
    mark=$(settled_mark "$ssh_port") || return
    for _ in 1 2 3 4 5; do timeout 30 ssh -F "$work/ssh_$via" sandbox true || return; done
    all_ended 5 orderly "$mark" "$ssh_port"
}

scp_file() {
    once start_sshd || return
    head -c 50M /dev/urandom >"$work/local"
    timeout 60 scp -q -F "$work/ssh_$via" "$work/local" "sandbox:$work/remote" || return
    same_sum "$work/local" "$work/remote" || return
    timeout 60 scp -q -F "$work/ssh_$via" "sandbox:$work/remote" "$work/back" && same_sum "$work/local" "$work/back"
}

start_upper() { # a server that answers in capitals once its input has ended; sets $upper_port
    upper_port=$(free_port)
    start upper python3 -c '
import socket, sys
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
while True:
    peer, _ = listener.accept()
    if received := b"".join(iter(lambda: peer.recv(65536), b"")):
        peer.sendall(received.upper())
    peer.close()' "$upper_port"
    wait_for "the server listens" listens "$upper_port"
}

upper_through() { # upper_through URL [HOST]: an answer comes through the tunnel
    printf 'request' | timeout 10 websocat --binary -H="$header" - "$1?port=$upper_port&host=${2:-}" >"$work/out" &&
        expect "$work/out" REQUEST
}

answer_after_end() {
    once start_upper || return
    for _ in 1 2 3 4 5; do
        upper_through "$url" || return
    done
    head -c 5M /dev/zero | tr '\0' a >"$work/request"
    timeout 20 websocat --binary -H="$header" - "$url?port=$upper_port" <"$work/request" >"$work/out" || return
    tr a A <"$work/request" >"$work/wanted" && same_sum "$work/wanted" "$work/out"
}

refused_by() { # refused_by PORT HEADER URL TEXT: websocat fails and says TEXT
    timeout 10 websocat --binary -H="$1" - "$2" </dev/null >"$work/out" 2>&1 && { echo "it succeeded"; return 1; }
    expect "$work/out" "$3"
}

wrong_token() {
    refused_by "X-Access-Token: wrong" "$url?port=1" "401" && expect "$work/tunneld.log" "status=401"
}

closed_port() {
    local closed
    closed=1 # nobody is given that port
    refused_by "$header" "$url?port=$closed" "502" && expect "$work/tunneld.log" "cannot reach localhost:$closed" &&
        timeout 10 curl -sS -H "$header" "${upgrade[@]}" "http://127.0.0.1:$port/tunnel?port=$closed" >"$work/out" &&
        expect "$work/out" '"code":502' && expect "$work/out" "Connection refused"
}

text_mode() { # websocat without --binary sends text frames
    once start_redis || return
    printf hi | timeout 10 websocat --text -H="$header" - "$url?port=$redis_port" >"$work/out" 2>&1
    wait_for "the refusal is logged" grep -q "binary frames only (websocat: --binary)" "$work/tunneld.log"
}

secret_kept() {
    ! grep -qF "$token" "$work/tunneld.log" && ! tr '\0' ' ' <"/proc/$(pgrep -P "$daemon_pid")/cmdline" | grep -qF "$token"
}

footprint_is_small() { timeout 100 scripts/footprint.py --check target/release/tunneld; }

unit_is_valid() {
    mkdir -p "$work/unit" && sed "s,/usr/local/bin/tunneld,$root/target/release/tunneld," scripts/tunneld.service \
        >"$work/unit/tunneld.service" || return
    systemd-analyze verify "$work/unit/tunneld.service" >"$work/out" 2>&1
    local code=$?
    cat "$work/out"
    [ $code -eq 0 ] && ! [ -s "$work/out" ]
}

unit_is_tight() { # the exposure that systemd-analyze sees is at most 2 of 10
    systemd-analyze security --offline=true --threshold=20 scripts/tunneld.service >"$work/out" ||
        { grep -v '^✓' "$work/out"; return 1; }
}

ends_in_order() { # ends_in_order NAME PID WRAPPER: SIGTERM to PID, started as NAME, ends it with exit code 0
    kill -TERM "$2" && wait "$3"
    local code=$?
    cat "$work/$1.log"
    echo "exit code $code"
    [ $code -eq 0 ] && expect "$work/$1.log" "shut down"
}

listening_port() { # listening_port NAME: the port in the log of a daemon
    wait_for "tunneld listens" grep -q 'listening on' "$work/$1.log" || { cat "$work/$1.log"; return 1; }
    sed -n 's/.*listening on .*:\([0-9]*\)$/\1/p' "$work/$1.log"
}

has_no_privileges() { # has_no_privileges PID USER: nor a way to get any
    local wanted tab=$'\t'
    for wanted in "Uid:($tab$2){4}" "Groups:$tab *" "CapPrm:${tab}0+" "CapEff:${tab}0+" "NoNewPrivs:${tab}1"; do
        grep -qxE -- "$wanted" "/proc/$1/status" || { echo "no '$wanted' in:"; cat "/proc/$1/status"; return 1; }
    done
}

as_service() { # the unit's own command, without privileges, and a service manager that writes down what it hears
    once start_upper || return
    start manager python3 -uc '
import os, socket, sys
manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
manager.bind(sys.argv[1])
os.chmod(sys.argv[1], 0o777)
while True:
    print(manager.recv(4096).decode())' "$work/notify"
    wait_for "the manager listens" test -S "$work/notify" || return
    # The user has to get through to the binary and the token.
    chmod 711 "$work" && mkdir -p "$work/service" && cp target/release/tunneld "$work/service/" || return
    (umask 077 && printf '%s\n' "$token" >"$work/service/token") && chown 65534 "$work/service/token" || return
    local command service_port
    command=$(sed -n 's/^ExecStart=//p' scripts/tunneld.service |
        sed "s,/usr/local/bin,$work/service,; s,%d,$work/service,; s,0.0.0.0:49983,127.0.0.1:0,")
    # shellcheck disable=SC2086  # the command is words
    NOTIFY_SOCKET=$work/notify start service setpriv --reuid=65534 --regid=65534 --clear-groups --no-new-privs \
        --inh-caps=-all --bounding-set=-all prlimit --nofile=8192 $command
    local wrapper=${pids[-1]}
    service_port=$(listening_port service) && wait_for "READY=1" grep -qx READY=1 "$work/manager.log" || return
    expect "$work/manager.log" "STATUS=listening on 127.0.0.1:$service_port" || return
    upper_through "ws://127.0.0.1:$service_port/tunnel" || return
    has_no_privileges "$(pgrep -P "$wrapper")" 65534 || return
    ends_in_order service "$(pgrep -P "$wrapper")" "$wrapper" && expect "$work/manager.log" STOPPING=1 &&
        ! grep WARN "$work/service.log"
}

# As a container runtime does it: a read-only root with the static binary and what every runtime puts beside it, and
# the daemon in there as PID 1, with the Containerfile's user.
as_container() {
    local image=$work/image user container_port wrapper pid
    build_static || return
    once start_upper || return
    user=$(sed -n 's/^USER //p' scripts/Containerfile)
    mkdir -p "$image/dev/shm" "$image/etc" "$image/run/secrets" &&
        cp "target/$triple/release/tunneld" "$image/tunneld" && echo "127.0.0.1 database" >"$image/etc/hosts" &&
        (umask 077 && echo "$token" >"$image/run/secrets/token") && chown "$user" "$image/run/secrets/token" || return
    start container unshare --mount --pid --fork sh -c '
        image=$1 user=$2
        shift 2
        mount --bind "$image" "$image" && mount -o remount,bind,ro "$image" &&
            mount -t tmpfs -o mode=1777 tmpfs "$image/dev/shm" || exit
        exec setpriv --no-new-privs --inh-caps=-all --bounding-set=-all,+sys_chroot,+setuid,+setgid \
            chroot --userspec="$user" --groups= "$image" /tunneld "$@"
        ' sh "$image" "$user" --listen 127.0.0.1:0 --access-token-file /run/secrets/token
    wrapper=${pids[-1]}
    container_port=$(listening_port container) || return
    pid=$(pgrep -P "$(pgrep -P "$wrapper")")
    grep -qE '^NSpid:.*[[:space:]]1$' "/proc/$pid/status" && has_no_privileges "$pid" "${user%:*}" || return
    ! touch "/proc/$pid/root/new" && ! compgen -G "/proc/$pid/root/dev/shm/tunneld-*" || return
    upper_through "ws://127.0.0.1:$container_port/tunnel" || return
    upper_through "ws://127.0.0.1:$container_port/tunnel" database || return
    ends_in_order container "$pid" "$wrapper"
}

# A network of their own, so that no generated name or address leads anywhere.
contract() { # seven operations: it leaves the one out that serves the document
    # shellcheck disable=SC2016  # expanded inside
    timeout 300 unshare --net bash -c '
        ip link set lo up || exit
        target/release/tunneld --listen 127.0.0.1:49983 2>"$1/contract.log" & daemon=$!
        trap "kill $daemon" EXIT
        for _ in {1..100}; do (: </dev/tcp/127.0.0.1/49983) 2>/dev/null && break; sleep 0.05; done
        target/venv/bin/schemathesis --config-file scripts/schemathesis.toml run http://127.0.0.1:49983/openapi.yaml \
            --header "X-Access-Token: $TUNNELD_ACCESS_TOKEN" --max-examples 300 --continue-on-failure --no-color
        ' contract "$work" >"$work/out" 2>&1
    local code=$?
    cat "$work/out"
    [ $code -eq 0 ] && expect "$work/out" "Tested: 7" && ! grep ERROR "$work/contract.log"
}

metrics_parse() { # by the parser of Prometheus' own client, and compared with the log
    timeout 10 curl -sS --fail -H "$header" "http://127.0.0.1:$port/metrics" >"$work/metrics" || return
    target/venv/bin/python - "$work/metrics" "$work/tunneld.log" <<'EOF'
import re, sys
from prometheus_client.parser import text_string_to_metric_families
families = {family.name: family for family in text_string_to_metric_families(open(sys.argv[1]).read())}
assert len(families) > 10 and all(family.documentation for family in families.values()), families.keys()
log = open(sys.argv[2]).read()
total = lambda name, **labels: sum(
    sample.value for sample in families[name].samples
    if sample.name.endswith("_total") and labels.items() <= sample.labels.items())
ends = re.findall(r"tunnel closed: .* up=(\d+) down=(\d+) .* end=(\w+)", log)
assert total("tunneld_tunnels_opened") == log.count("tunnel opened:"), log.count("tunnel opened:")
assert total("tunneld_tunnels_closed") == len(ends) > 50, len(ends)
for end in {end for _, _, end in ends}:
    assert total("tunneld_tunnels_closed", end=end) == sum(1 for other in ends if other[2] == end), end
for status in set(re.findall(r"refused: .* status=(\d+)", log)):
    assert total("tunneld_refusals", status=status) == log.count(f" status={status} "), status
closed = [sum(int(end[way]) for end in ends) for way in (0, 1)]
relayed = [total("tunneld_bytes", direction=way) for way in ("up", "down")]
assert all(have >= ended for have, ended in zip(relayed, closed)) and closed[1] > 200e6, (relayed, closed)
print(relayed, closed)
EOF
}

orderly_stop() {
    ends_in_order tunneld "$(pgrep -P "$daemon_pid")" "$daemon_pid"
}

daemon_down() { refused_by "$header" "$url?port=1" "Connection refused"; }

check "HTTP: curl fetches 200 MB through a local listener" http_file
check "Redis: redis-cli through a local listener" redis_commands
check "Redis: redis-benchmark, 50 clients, pipelined" redis_bench
for via in websocat connect connect-tcp; do
    check "SSH: a command through ProxyCommand, and its exit code ($via)" ssh_command
done
for via in connect connect-tcp; do
    check "SSH: every session's tunnel is closed in order ($via)" ssh_orderly
    check "SSH: scp of 50 MB there and back ($via)" scp_file
done
via=websocat
check "stdin: a server that answers after the end of its input" answer_after_end
check "wrong token: websocat says 401, the log why" wrong_token
check "closed port: websocat says 502, curl and the log why" closed_port
check "text frames: the log says how to do it" text_mode
check "the token is in no log and no argument list" secret_kept
check "footprint: size, start, memory and crates are as the reference says" footprint_is_small
check "systemd: the unit is valid" unit_is_valid
check "systemd: the unit leaves little exposed" unit_is_tight
check_if "setpriv --clear-groups true" \
    "systemd: the unit's command, without privileges, tells when it is ready and when it stops" as_service
check_if "unshare --mount --pid --fork true" \
    "container: the static binary, as PID 1 in an empty read-only root, serves and stops" as_container
# shellcheck source=scripts/e2e/clients.sh
. scripts/e2e/clients.sh
# shellcheck source=scripts/e2e/services.sh
. scripts/e2e/services.sh
# shellcheck source=scripts/e2e/proxies.sh
. scripts/e2e/proxies.sh
# shellcheck source=scripts/e2e/connect.sh
. scripts/e2e/connect.sh
# shellcheck source=scripts/e2e/forward.sh
. scripts/e2e/forward.sh
# shellcheck source=scripts/e2e/connect_tcp.sh
. scripts/e2e/connect_tcp.sh
check "metrics: Prometheus' parser reads what the log tells" metrics_parse
TUNNELD_ACCESS_TOKEN=$token check_if "unshare --net ip link set lo up" \
    "OpenAPI: schemathesis finds nothing against the document" contract
check "SIGTERM ends the daemon in order" orderly_stop
check "daemon down: websocat says so" daemon_down
# shellcheck source=scripts/e2e/operating.sh
. scripts/e2e/operating.sh
# shellcheck source=scripts/e2e/suites.sh
. scripts/e2e/suites.sh
# shellcheck source=scripts/e2e/completions.sh
. scripts/e2e/completions.sh
# shellcheck source=scripts/e2e/package.sh
. scripts/e2e/package.sh

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
