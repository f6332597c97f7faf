#!/bin/sh
# Stops the service for good, but not when another version takes the place of this one.
set -e
case "${1:-}" in
remove | deconfigure | 0) ;; # dpkg and rpm say so each in their way
*) exit 0 ;;
esac
if [ -d /run/systemd/system ]; then
    systemctl disable --quiet --now corollad.service || true
else
    systemctl disable --quiet corollad.service || true
fi
