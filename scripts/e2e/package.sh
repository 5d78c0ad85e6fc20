# The package: installed, used as its unit would, and purged. Sourced by ../e2e.sh.

# As root, and on a machine that has no tunneld of its own, which is left alone.
may_install() {
    local status # which dpkg remembers of what it has purged, too
    status=$(dpkg-query --show --showformat '${db:Status-Status}' tunneld 2>/dev/null)
    [ "$(id -u)" -eq 0 ] && [ "${status:-not-installed}" = not-installed ] && command -v dpkg-deb &&
        ! getent passwd tunneld && ! command -v tunneld && ! [ -e /etc/tunneld ]
}

purge_package() { DEBIAN_FRONTEND=noninteractive timeout 120 dpkg --purge tunneld; }

package_is_made() {
    timeout 1500 scripts/package.sh || return
    (cd target/package && sha256sum --check --quiet SHA256SUMS) || return
    local wanted
    wanted=$(sed -nE '0,/^version = /s/^version = "(.*)"/\1/p' Cargo.toml)
    [ "$(dpkg-deb --field target/package/*.deb Version)" = "$wanted" ] || return
    tar -xOzf target/package/*.tar.gz --wildcards '*/tunneld' >"$work/static" && chmod 700 "$work/static" || return
    [ "$("$work/static" --version)" = "tunneld $wanted" ] && ldd "$work/static" 2>&1 | grep -E "statically linked|not a dynamic"
}

package_is_clean() {
    timeout 120 lintian --allow-root --fail-on error target/package/*.deb
}

package_serves() { # tunneld connect reaches a service through the daemon that the unit's command starts
    once start_upper || return
    DEBIAN_FRONTEND=noninteractive timeout 300 apt-get install -qq -y --no-install-recommends \
        "$root"/target/package/*.deb || return
    [ -z "$(ls -A /etc/tunneld)" ] || return
    local unit=/lib/systemd/system/tunneld.service command installed_port wrapper
    systemd-analyze verify "$unit" >"$work/out" 2>&1 && ! [ -s "$work/out" ] || { cat "$work/out"; return 1; }
    # systemd would hand a copy of the token to the user.
    (umask 077 && printf '%s\n' "$token" >/etc/tunneld/token) && chmod 711 "$work" &&
        install -d "$work/credentials" && install -m 400 -o tunneld /etc/tunneld/token "$work/credentials/token" || return
    command=$(sed -n "s,%d,$work/credentials,; s,0.0.0.0:49983,127.0.0.1:0,; s/^ExecStart=//p" "$unit")
    # shellcheck disable=SC2086  # the command is words
    start installed setpriv --reuid=tunneld --regid=tunneld --clear-groups --no-new-privs --inh-caps=-all \
        --bounding-set=-all $command
    wrapper=${pids[-1]}
    installed_port=$(listening_port installed) || return
    printf request | timeout 10 /usr/bin/tunneld connect "ws://127.0.0.1:$installed_port" --port "$upper_port" \
        --access-token-file /etc/tunneld/token >"$work/out" && expect "$work/out" REQUEST || return
    ends_in_order installed "$(pgrep -P "$wrapper")" "$wrapper"
}

package_goes() {
    dpkg -L tunneld | sort >"$work/files" && purge_package || return
    local file
    while read -r file; do
        ! [ -f "$file" ] || { echo "left: $file"; return 1; }
    done <"$work/files"
    find /etc /usr /lib /var/lib /run -xdev -name '*tunneld*' -not -path "$root/*" -not -path "$work/*" >"$work/out"
    cat "$work/out"
    ! [ -s "$work/out" ] && ! getent passwd tunneld && ! getent group tunneld
}

package_runs_under_systemd() { # on a machine of its own, with the units as they are; unshare lets no other signal through
    mkdir "$work/machine" || return
    timeout --signal=KILL 120 scripts/e2e/systemd.sh "$work/machine" "$root/scripts/e2e/unit.sh" "$root"/target/package/*.deb ||
        { cat "$work/machine/out"; return 1; }
}

package() {
    package_is_made && package_is_clean && package_runs_under_systemd || return
    trap 'purge_package; stop' EXIT
    package_serves && package_goes
    local code=$?
    [ $code -eq 0 ] || purge_package
    trap stop EXIT
    return $code
}

check_if may_install "package: installed, it serves, under systemd too, and purging leaves nothing" package
