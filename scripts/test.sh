#!/usr/bin/env bash
# Every check of the project: form, lints with each set of features, models, tests, some fuzzing, half a minute of soak,
# and the integration run.
# All tests are run with the default features; with the others, those of what the features change, the client. Stops at
# the first check that fails. Ends with the names of the tests that can't be run here, and "N passed, N failed, N skipped".
set -uo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
passed=0
failed=0
export TUNNELD_TEST_SKIPS=$work/tests # a test that finds it can't be run names itself there, and is "ok" to cargo
touch "$TUNNELD_TEST_SKIPS" "$work/cases"

finish() {
    passed=$((passed - $(wc -l <"$work/tests")))
    cat "$work/tests" "$work/cases" >"$work/skipped"
    sed 's/^/skipped /' "$work/skipped"
    echo "$passed passed, $failed failed, $(wc -l <"$work/skipped") skipped"
    rm -rf "$work"
}
trap finish EXIT

check() { # check COMMAND...: one check, or as many as it says itself
    "$@" 2>&1 | tee "$work/out"
    local code=${PIPESTATUS[0]} counts more_passed more_failed
    counts=$(sed -nE 's/^(test result: .*\. )?([0-9]+) passed[,;] ([0-9]+) failed.*/\2 \3/p' "$work/out")
    [ "$counts" ] || grep -q '^skipped ' "$work/out" || { [ "$code" -eq 0 ] && counts="1 0"; }
    while read -r more_passed more_failed; do
        passed=$((passed + more_passed)) failed=$((failed + more_failed))
    done <<<"${counts:-0 0}"
    sed -n 's/^skipped //p' "$work/out" >>"$work/cases"
    [ "$code" -eq 0 ] && return
    [ "$failed" -gt 0 ] || failed=1
    exit 1
}

minimum_rust() { # what Cargo.toml promises; beside it, clippy knows since when each function of std is there
    local version
    version=$(sed -nE 's/^rust-version = "(.*)"/\1/p' Cargo.toml)
    if rustup run "$version" rustc --version >/dev/null 2>&1; then
        cargo "+$version" check --locked --all-targets --target-dir target/minimum-rust
    else
        echo "skipped the minimum Rust version: needs rustup's toolchain $version"
    fi
}

supply_chain() { # not installed by this script: it takes longer to compile than all of the tests
    if PATH=target/tools/bin:$PATH command -v cargo-deny >/dev/null; then
        PATH=target/tools/bin:$PATH cargo-deny --locked --config scripts/deny.toml check licenses bans sources
    else
        echo "skipped licences and bans of the crates: needs cargo-deny (scripts/deny.toml says how)"
    fi
}

models() { # every order in which the threads of a model can meet, with up to three interrupted; built apart, for loom
    RUSTFLAGS="--cfg loom" LOOM_MAX_PREEMPTIONS=3 cargo test --locked --no-default-features --lib --target-dir target/loom \
        --config profile.dev.debug=false --config profile.dev.package.loom.opt-level=2 models::
}

fuzzing() {
    if command -v c++ >/dev/null; then
        cargo fmt --check --manifest-path scripts/fuzz/Cargo.toml && scripts/fuzz.sh 8
    else
        echo "skipped the fuzzing: needs a C++ compiler, for libFuzzer"
    fi
}

check cargo fmt --check
check supply_chain
check cargo clippy --locked --all-targets -- -D warnings
check cargo clippy --locked --all-targets --no-default-features -- -D warnings
check cargo clippy --locked --all-targets --features tls12 -- -D warnings
check minimum_rust
RUSTDOCFLAGS="-D warnings" check cargo doc --locked --quiet --no-deps
check models
check cargo test --locked
for features in --no-default-features "--features tls12"; do
    # shellcheck disable=SC2086  # words
    check cargo test --locked $features --lib --test it -- client:: connect:: connect_tls::
done
check fuzzing
check scripts/soak.sh 0.5
check scripts/e2e.sh
