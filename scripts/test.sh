#!/usr/bin/env bash
# Every check of the project: form, lints, tests, half a minute of soak, and the integration run. Ends with "N passed, N failed".
set -euo pipefail
cd "$(dirname "$0")/.."
cargo fmt --check
cargo clippy --locked --all-targets -- -D warnings
RUSTDOCFLAGS="-D warnings" cargo doc --locked --quiet --no-deps
cargo test --locked
scripts/soak.sh 0.5
scripts/e2e.sh
