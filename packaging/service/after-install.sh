#!/bin/sh
# Makes the user and the folders. Starts the service; after an update only if it ran, or had failed.
set -e
systemd-sysusers corolla.conf
systemd-tmpfiles --create corolla.conf || true # it needs /proc, which an image being built may lack; at boot it is done
if [ -e /run/corolla-update ]; then
    rm -f /run/corolla-update
    [ -d /run/systemd/system ] || exit 0
    systemctl daemon-reload
    [ "$(systemctl show -p ActiveState --value corollad.service)" != inactive ] || exit 0
    systemctl reset-failed corollad.service || true # it may have been tried too often in its old version
else
    systemctl enable --quiet corollad.service
    [ -d /run/systemd/system ] || exit 0
    systemctl daemon-reload
fi
# Sessions of the version before move to other peers first; it is given TimeoutStopSec for that.
systemctl restart corollad.service || echo "corolla: the service did not start; see: systemctl status corollad" >&2
