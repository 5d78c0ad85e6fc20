#!/usr/bin/env bash
# Makes the packages of this machine's architecture, under target/package: a .deb, a tarball with the static binary, and
# SHA256SUMS of both. The same commit gives the same bytes with the same compiler.
#
# cargo-deb comes from cargo, into target/tools.
set -euo pipefail
cd "$(dirname "$0")/.."
version=$(sed -nE '0,/^version = /s/^version = "(.*)"/\1/p' Cargo.toml)
triple=$(rustc -vV | sed -n 's/^host: //p')
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || stat -c %Y Cargo.toml)}
export SOURCE_DATE_EPOCH
out=target/package
parts=$out/parts
rm -rf "$out"
mkdir -p "$parts"

if ! [ -x target/tools/bin/cargo-deb ]; then
    echo "installing cargo-deb ..." >&2
    timeout 1500 cargo install --quiet --locked --debug --root target/tools cargo-deb --version 3.8.0 >&2
fi

timeout 600 cargo run --quiet --locked --example manual "$parts"
# Where the package has the binary, and its user.
sed 's,/usr/local/bin/,/usr/bin/,; s,^DynamicUser=yes$,&\nUser=tunneld,' scripts/tunneld.service >"$parts/tunneld.service"
cat >"$parts/changelog" <<END
tunneld ($version) unstable; urgency=medium

  * Made from the sources of version $version.

 -- the tunneld authors <tunneld@example.org>  $(LC_ALL=C date -uRd "@$SOURCE_DATE_EPOCH")
END
timeout 1500 cargo build --quiet --release --locked
timeout 300 target/tools/bin/cargo-deb --no-build --no-strip --quiet --output "$out/" >&2

RUSTFLAGS='-C target-feature=+crt-static' timeout 1500 cargo build --quiet --release --locked --target "$triple"
name=tunneld-$version-$triple
mkdir "$out/$name"
cp "target/$triple/release/tunneld" "$parts"/{tunneld.8,tunneld-connect.1,tunneld.bash,_tunneld,tunneld.fish} \
    scripts/tunneld.service scripts/tunneld.socket README.md src/reference.md LICENSE "$out/$name/"
tar --create --sort=name --owner=0 --group=0 --numeric-owner --mode=u=rwX,go=rX --mtime="@$SOURCE_DATE_EPOCH" \
    --directory "$out" "$name" | gzip -9n >"$out/$name.tar.gz"
rm -r "${out:?}/$name"
(cd "$out" && sha256sum ./*.deb ./*.tar.gz | tee SHA256SUMS)
