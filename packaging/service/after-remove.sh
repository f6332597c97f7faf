#!/bin/sh
# What can be fetched again goes; the owner's data (identity, memberships, settings) stays until `purge`.
set -e
case "${1:-}" in
remove | 0)
    rm -rf /var/cache/corolla /var/lib/corolla/worker
    rmdir --ignore-fail-on-non-empty /etc/corolla 2>/dev/null || true
    ;;
purge)
    rm -rf /var/cache/corolla /var/lib/corolla /etc/corolla
    userdel corolla 2>/dev/null || true
    ;;
*) exit 0 ;;
esac
if [ -d /run/systemd/system ]; then
    systemctl daemon-reload
    systemctl reset-failed corollad.service 2>/dev/null || true
fi
