#!/usr/bin/env bash
# The package's units under a real systemd: package.sh has systemd.sh run this.
#
#   scripts/e2e/unit.sh PACKAGE
set -xuo pipefail
fail() {
    echo "failed: $*"
    systemctl status --no-pager tunneld.service tunneld.socket
    cat /var/log/tunneld.log
    exit 1
}

export DEBIAN_FRONTEND=noninteractive
dpkg --install "$1" || fail "the package's own scripts"
mkdir /etc/systemd/system/tunneld.service.d # there is no journal
printf '[Service]\nStandardError=append:/var/log/tunneld.log\n' >/etc/systemd/system/tunneld.service.d/log.conf
systemctl daemon-reload
[ "$(systemctl is-active tunneld.service tunneld.socket)" = $'inactive\ninactive' ] || fail "it was started without a token"

(umask 077 && echo of-the-unit >/etc/tunneld/token)
python3 - <<'END' &
import socket

with socket.create_server(("127.0.0.1", 7777)) as server:
    while True:
        client, _ = server.accept()
        request = b"".join(iter(lambda: client.recv(4096), b""))
        client.sendall(request.upper())
        client.close()
END
until (: <>/dev/tcp/127.0.0.1/7777) 2>/dev/null; do sleep 0.1; done # systemd.sh's caller has a limit

serves() { # serves HOW
    local answer
    answer=$(printf request | TUNNELD_ACCESS_TOKEN=of-the-unit timeout 10 tunneld connect ws://127.0.0.1:49983 --port 7777)
    [ "$answer" = REQUEST ] || fail "$1: '$answer'"
}

main_pid() { systemctl show --property MainPID --value tunneld.service; }

systemctl start tunneld.service || fail "it does not start"
serves "as soon as it is started"
main=$(main_pid)
[ "$(stat -c %U "/proc/$main")" = tunneld ] || fail "it runs as $(stat -c %U "/proc/$main")"
systemctl restart tunneld.service || fail "it does not start again"
serves "restarted"

main=$(main_pid)
[ "$main" -gt 1 ] && kill -9 "$main"
for _ in $(seq 100); do
    new=$(main_pid)
    [ "$new" -ne "$main" ] && [ "$(systemctl is-active tunneld.service)" = active ] && break
    sleep 0.1
done
serves "after a kill -9"
systemctl stop tunneld.service
[ "$(systemctl show --property Result --value tunneld.service)" = success ] || fail "it did not end in order"

systemctl start tunneld.socket || fail "its socket does not start"
[ "$(systemctl is-active tunneld.service)" = inactive ] || fail "it waits for nobody"
serves "started by its first connection"
dpkg --purge tunneld || fail "it can't be purged"
! pgrep -x tunneld || fail "it still runs"
! getent passwd tunneld || fail "its user is still there"
