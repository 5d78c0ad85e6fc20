# What the integration run needs. Sourced by ../e2e.sh. tunneld is built, and what the machine does not have is installed:
# Debian packages as root, crates under target/websocat-*, Python's packages in target/venv, Node's in target/node. Most of the
# time is the linker's, which has one thread: so the two kinds of builds go on side by side, and fetching beside them.

needed=( # COMMAND PACKAGE...
    "curl curl" "python3 python3 python3-venv" "ip iproute2" "git git" "openssl openssl" "rsync rsync"
    "redis-server redis-server" "redis-benchmark redis-tools" "sshd openssh-server" "ssh openssh-client"
    "psql postgresql-client" "initdb postgresql" "nginx nginx" "haproxy haproxy" "tinyproxy tinyproxy-bin"
    "node nodejs npm" "npm nodejs npm" "chromium chromium" "promtool prometheus" "slowhttptest slowhttptest"
    "systemd-analyze systemd" "zsh zsh" "fish fish"
)
[ "$(id -u)" -ne 0 ] || needed+=("lintian lintian") # for the package, which only root can install
python_packages='schemathesis>=4,<5 kosoku>=0.1,<0.2 prometheus_client websockets httplint websocket-client pyyaml'

install_packages() {
    local row command packages missing=()
    for row in "${needed[@]}"; do
        read -r command packages <<<"$row"
        # shellcheck disable=SC2206  # words
        PATH=$(echo /usr/lib/postgresql/*/bin):$PATH:/usr/sbin command -v "$command" >/dev/null || missing+=($packages)
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    echo "installing ${missing[*]} ..." >&2
    timeout 300 apt-get update -qq >&2 &&
        DEBIAN_FRONTEND=noninteractive timeout 1200 apt-get install -qq -y --no-install-recommends "${missing[@]}" >&2
}

install_python_packages() {
    local names='import schemathesis, kosoku, prometheus_client, websockets, httplint, websocket, yaml'
    # A script of it is run, too, as a checkout that was moved has one that can't be.
    { target/venv/bin/schemathesis --version && target/venv/bin/python -c "$names"; } >/dev/null 2>&1 && return
    echo "installing $python_packages ..." >&2
    # shellcheck disable=SC2086  # words
    python3 -m venv --clear target/venv && timeout 900 target/venv/bin/pip install --quiet $python_packages >&2
}

install_node_packages() {
    [ -d target/node/node_modules/ws ] ||
        timeout 300 npm install --silent --no-audit --no-fund --prefix target/node ws >&2
}

websocat_1=target/websocat-1
websocat_4=target/websocat-4

install_websocat() { # install_websocat ROOT VERSION
    [ -x "$1/bin/websocat" ] && return
    echo "installing websocat $2 ..." >&2
    timeout 1500 cargo install --quiet --locked --root "$1" websocat --version "$2" >&2
}

install_crates() {
    # What they do counts here, not how fast they do it.
    CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 CARGO_PROFILE_RELEASE_OPT_LEVEL=1
    export CARGO_PROFILE_RELEASE_LTO CARGO_PROFILE_RELEASE_CODEGEN_UNITS CARGO_PROFILE_RELEASE_OPT_LEVEL
    install_websocat "$websocat_4" 4.0.0-alpha3 && install_websocat "$websocat_1" 1.14.1
}

triple=$(rustc -vV | sed -n 's/^host: //p')

build_static() { # to target/$triple/release/tunneld, which needs nothing else in its image
    RUSTFLAGS='-C target-feature=+crt-static' timeout 1500 cargo build --quiet --release --locked --target "$triple"
}

build() {
    timeout 1500 cargo build --quiet --release --locked || return
    # The case that makes the package finds all of it done, or says what is wrong with it.
    [ "$only" ] || scripts/package.sh >/dev/null || true
}

install_crates &
pids=($!)
build &
pids+=($!)
install_packages && install_python_packages && install_node_packages
fetched=$?
wait "${pids[0]}" && wait "${pids[1]}" && [ $fetched -eq 0 ] ||
    { echo "not everything that is needed could be built and installed: see above" >&2; exit 1; }
pids=()
