#!/bin/sh
# What can be fetched again goes; the owner's data (identity, memberships, settings) stays until `purge`.
set -e
case "${1:-}" in
upgrade | 1) exit 0 ;;
esac
rm -rf /var/cache/corolla /var/lib/corolla/worker
if [ "${1:-}" = purge ]; then
    rm -rf /var/lib/corolla /etc/corolla
fi
if [ -d /run/systemd/system ]; then
    systemctl daemon-reload
fi
