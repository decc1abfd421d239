#!/bin/bash
# Unhealthy: sshd was asked for and does not answer; or HEALTH_FILE, the metrics.jsonl of the run that this container
# works on, has not grown for HEALTH_SECONDS (default 1800).
set -eu

if [ -e "$HOME/.ssh/host_key" ]; then
    exec 3<> "/dev/tcp/${SSHD_ADDRESS:-127.0.0.1}/${SSHD_PORT:-2222}"
    read -r -t 5 banner <&3
    case $banner in
        SSH-2.0-*) ;;
        *) echo "what answers there is not sshd: $banner"; exit 1 ;;
    esac
fi

if [ -n "${HEALTH_FILE:-}" ]; then
    if [ ! -e "$HEALTH_FILE" ]; then
        echo "$HEALTH_FILE is not there"
        exit 1
    fi
    age=$(($(date +%s) - $(stat -c %Y "$HEALTH_FILE")))
    if [ "$age" -gt "${HEALTH_SECONDS:-1800}" ]; then
        echo "$HEALTH_FILE has not grown for $age s"
        exit 1
    fi
fi
