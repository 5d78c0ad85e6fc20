#!/usr/bin/env bash
# A machine of its own, as far as services can tell: systemd is process 1, over a copy of this machine's files that is
# gone afterwards. Nothing but the directory WORK is kept. Needs root.
#
#   scripts/e2e/systemd.sh WORK COMMAND...    runs COMMAND in there, its output in WORK/out, and exits with its code
set -euo pipefail
if [ "$$" -ne 1 ]; then
    exec unshare --pid --mount --uts --ipc --cgroup --net --fork --kill-child "$0" "$@"
fi
work=$1
shift
mount --make-rprivate /
files=$work/files
mkdir "$files"
mount -t tmpfs tmpfs "$files"
new=$files/root
mkdir "$files"/{upper,work,root}
mount -t overlay overlay -o "lowerdir=/,upperdir=$files/upper,workdir=$files/work" "$new"
mount -t proc proc "$new/proc"
mount -t sysfs sysfs "$new/sys"
mount -t cgroup2 cgroup2 "$new/sys/fs/cgroup"
mount --rbind /dev "$new/dev"
mount -t tmpfs tmpfs "$new/run"
mount --bind "$work" "$new$work"
ip link set lo up

# None of this machine's services, and nothing that empties /tmp at boot or sets what belongs to the kernel.
rm -rf "$new"/etc/systemd/system/*.wants "$new/lib/systemd/system/sysinit.target.wants"
rm -f "$new/var/lib/man-db/auto-update" # which would read all of its manual pages
: >"$new/etc/machine-id"
printf '%q ' "$@" >"$work/command"
cat >"$new/etc/systemd/system/command.service" <<END
[Unit]
After=sysinit.target
FailureAction=exit
[Service]
Type=oneshot
WorkingDirectory=$PWD
ExecStart=/bin/bash -c '. $work/command; systemctl exit \$?'
StandardOutput=truncate:$work/out
StandardError=inherit
END
printf '[Unit]\nWants=command.service\nAllowIsolate=yes\n' >"$new/etc/systemd/system/command.target"

mkdir "$new/old"
cd "$new"
pivot_root . old
umount --lazy /old
# What a service manager of a real machine finds.
mount --make-rshared /
exec env -i container=other PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --unit=command.target </dev/null
