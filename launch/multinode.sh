#!/usr/bin/env bash
# Train on the hosts of a hostfile, started from one of them by DeepSpeed over ssh, with pdsh.
#
#   launch/multinode.sh RECIPE --hostfile FILE [OPTION...] [ARGUMENT...]
#
#   RECIPE             a YAML, or the name of one in configs/
#   --hostfile FILE    a line `NAME slots=GPUS` for each host; the first is the master
#   --ssh-port P       of the hosts' ssh servers (default: ssh's own)
#   --master-addr A    the master as the others know it (default: its name in the hostfile)
#   --master-port P    where the ranks meet (default 29500)
#   ARGUMENT...        passed on to pretrain_gpt.py
#
# The hosts need the same folder, Python and data at the same paths, and a common run.save: a preflight looks first, and
# says what is missing where. Of this shell's environment only NCCL*, PYTHON*, UCX*, MV2* and MLFLOW* variables travel;
# others go into .deepspeed_env (launch/deepspeed_env.example). Checkpoints go to run.save or runs/RECIPE, and the same
# command continues from the newest there. Ctrl-C or SIGTERM to this command saves and stops, within 30 s, every
# DeepSpeed job of this Python on these hosts: that is how DeepSpeed ends its own.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/common.sh
source "$root/launch/common.sh"

[[ ${1:-} != --help ]] || usage "$0"
find_recipe "${1:-}"
shift
sort_options "hostfile ssh-port master-addr master-port" "$@"
hostfile=${own[hostfile]:-}
ssh_port=${own[ssh-port]:-}
address=${own[master-addr]:-}
port=${own[master-port]:-29500}
[[ -n $hostfile ]] || fail "which hosts? --hostfile FILE, with a line like: node1 slots=8"
[[ -f $hostfile ]] || fail "$hostfile: no such hostfile; write one with a line like: node1 slots=8"
need deepspeed
need pdsh
# The first host's name, as the hostfile has it.
address=${address:-$(awk '!/^[[:space:]]*(#|$)/ {print $1; exit}' "$hostfile")}

python -m merit_ds.preflight "$recipe" --hostfile "$hostfile" ${ssh_port:+"--ssh-port=$ssh_port"} \
    --master-addr "$address" --master-port "$port" "${saving[@]}" "${rest[@]}"

# pdsh would wait forever for a host that has died: ssh gives it up after 30 s without an answer.
export PDSH_SSH_ARGS_APPEND="-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=10 -o ServerAliveCountMax=3"
exec deepspeed --hostfile "$hostfile" --force_multi --no_ssh_check --launcher pdsh ${ssh_port:+"--ssh_port=$ssh_port"} \
    --master_addr "$address" --master_port "$port" "$root/pretrain_gpt.py" --config "$recipe" \
    "${saving[@]}" "${rest[@]}"
