#!/bin/sh
# `sshd [OPTIONS]` waits for DeepSpeed's launcher on SSHD_PORT (default 2222) of SSHD_ADDRESS (default all addresses); any
# other command is run as it is.
set -eu

if [ "${1:-}" != sshd ]; then
    exec "$@"
fi
shift

keys=${AUTHORIZED_KEYS:-/run/secrets/authorized_keys}
if [ ! -r "$keys" ]; then
    echo "error: $keys cannot be read: mount the public key of the host that launches there" >&2
    exit 1
fi
mkdir -p "$HOME/.ssh"
chmod 700 "$HOME/.ssh"

# Made anew in every container: a host key inside the image would be the same, and known, everywhere.
rm -f "$HOME/.ssh/host_key" "$HOME/.ssh/host_key.pub"
ssh-keygen -q -t ed25519 -N '' -f "$HOME/.ssh/host_key"

# sshd gives a session none of the container's environment: PATH, DS_ACCELERATOR, NCCL_* and the rest reach it here.
env | grep -E '^[A-Za-z_][A-Za-z0-9_]*=' | grep -vE '^(HOME|USER|LOGNAME|SHELL|PWD|OLDPWD|SHLVL|_|TERM|HOSTNAME)=' \
    > "$HOME/.ssh/environment"

exec /usr/sbin/sshd -D -e -f /opt/merit/docker/sshd_config -h "$HOME/.ssh/host_key" \
    -o "AuthorizedKeysFile=$keys" -o "ListenAddress=${SSHD_ADDRESS:-0.0.0.0}" -p "${SSHD_PORT:-2222}" "$@"
