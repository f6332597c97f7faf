#!/bin/sh
# Remembers that this is an update: dpkg does not tell it to the script that runs afterwards.
set -e
case "${1:-}" in
upgrade | 2) touch /run/corolla-update ;; # dpkg and rpm say so each in their way
*) rm -f /run/corolla-update ;;
esac
