#!/usr/bin/env bash
# Opens, uses and ends tunnels in every way at random for MINUTES (2), and accounts for every byte.
#
#   scripts/soak.sh [MINUTES]         SOAK_SEED=… repeats a run
set -euo pipefail
cd "$(dirname "$0")/.."
SOAK_MINUTES=${1:-2} exec cargo test --quiet --release --locked --test it soak:: -- --ignored --nocapture
