#!/usr/bin/env bash
# Fuzzes what parses, guided by coverage, each of scripts/fuzz/*.rs for SECONDS (60) from its corpus on.
#
#   scripts/fuzz.sh [SECONDS [TARGET...]]     frames, capsules, request_head, policy, options
#
# That is libFuzzer, with rustc's own instrumentation for it, which stable has: no nightly and no cargo-fuzz, but a C++
# compiler. New inputs go to target/fuzz/corpus/TARGET. An input that makes one fail goes to target/fuzz/artifacts/, with
# its name at the end of what is printed: run target/fuzz/*/debug/TARGET with it, mend, and put it into the corpus. What
# has been found is added to the corpus by -merge=1 scripts/fuzz/corpus/TARGET target/fuzz/corpus/TARGET.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-60}
shift $(($# > 0))
[ $# -gt 0 ] || set -- frames capsules request_head policy options

host=$(rustc -vV | sed -n 's/^host: //p')
# With --target, build scripts and macros of the compiler's are left as they are.
RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares" \
    cargo build --quiet --locked --manifest-path scripts/fuzz/Cargo.toml --target "$host" --target-dir target/fuzz --bins

for target in "$@"; do
    mkdir -p "target/fuzz/corpus/$target" target/fuzz/artifacts
    log=target/fuzz/$target.log
    if ! "target/fuzz/$host/debug/$target" -max_total_time="$seconds" -max_len=2048 -timeout=30 -rss_limit_mb=2048 \
        -print_final_stats=1 -artifact_prefix="target/fuzz/artifacts/$target-" \
        "target/fuzz/corpus/$target" "scripts/fuzz/corpus/$target" >"$log" 2>&1; then
        tail -n 40 "$log"
        echo "fuzzing $target has found an input that fails; all of it is in $log"
        exit 1
    fi
    echo "fuzzed $target: $(sed -nE 's/^Done ([0-9]+) runs in ([0-9]+) second.*/\1 inputs in \2 s/p' "$log")," \
        "$(sed -nE 's/^#[0-9]+\s+DONE +cov: ([0-9]+) .*corp: ([0-9]+).*/\1 edges covered by \2 inputs/p' "$log")"
done
