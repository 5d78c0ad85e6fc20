#!/usr/bin/env bash
# Opens, uses and ends tunnels in every way at random for MINUTES (2), and accounts for every byte.
#
#   scripts/soak.sh [MINUTES]         SOAK_SEED=… repeats a run
#
# With the build that cargo test has, which is slower: less happens in a minute, and nothing else is compiled for it.
set -euo pipefail
cd "$(dirname "$0")/.."
SOAK_MINUTES=${1:-2} exec cargo test --quiet --locked --test it soak:: -- --ignored --nocapture
