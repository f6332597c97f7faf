#!/bin/sh
# Stops the service for good, but not when a newer version takes the place of this one.
set -e
case "${1:-}" in
upgrade | 1) exit 0 ;; # dpkg and rpm say so each in their way
esac
if [ -d /run/systemd/system ]; then
    systemctl disable --quiet --now corollad.service || true
fi
