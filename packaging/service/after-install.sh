#!/bin/sh
# Makes the user and the folders; starts the service, or restarts it after an update.
set -e
systemd-sysusers corolla.conf
systemd-tmpfiles --create corolla.conf
if [ -d /run/systemd/system ]; then
    systemctl daemon-reload
    systemctl enable --quiet corollad.service
    systemctl restart corollad.service || echo "corolla: the service did not start; see: systemctl status corollad" >&2
fi
