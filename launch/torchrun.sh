#!/usr/bin/env bash
# Train with torchrun: run this on each node. A rank that dies restarts all ranks, from the newest checkpoint.
#
#   launch/torchrun.sh RECIPE --nodes N --ranks-per-node R --master-addr A [OPTION...] [ARGUMENT...]
#
#   RECIPE               a YAML, or the name of one in configs/
#   --nodes N            how many there are; MIN:MAX starts with what has come, and goes on with fewer after a failure
#   --ranks-per-node R   GPUs of a node
#   --master-addr A      a node that all know by this address, for the rendezvous; it must outlive the others
#   --local-addr A       this node as the others know it, where they do not resolve its own name
#   --master-port P      where the nodes meet (default 29400)
#   --max-restarts K     how often a failure restarts the ranks (default 3)
#   ARGUMENT...          passed on to pretrain_gpt.py
#
# A preflight looks at this node first. Nodes are numbered as they come. The environment is that of each node: nothing
# travels. Checkpoints go to run.save or runs/RECIPE, which must be one folder for all nodes. SIGTERM saves and stops,
# within the 300 seconds of TORCH_ELASTIC_SHUTDOWN_TIMEOUT.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/common.sh
source "$root/launch/common.sh"

[[ ${1:-} != --help ]] || usage "$0"
find_recipe "${1:-}"
shift
sort_options "nodes ranks-per-node master-addr local-addr master-port max-restarts" "$@"
need_options nodes ranks-per-node master-addr
nodes=${own[nodes]}
ranks=${own[ranks-per-node]}
address=${own[master-addr]}
own_address=${own[local-addr]:-}
port=${own[master-port]:-29400}
restarts=${own[max-restarts]:-3}
need torchrun

# On several nodes, without --node-rank, it looks at no port: the rendezvous settles which node listens.
python -m merit_ds.preflight "$recipe" --nodes "${nodes##*:}" --fewest-nodes "${nodes%%:*}" --slots "$ranks" \
    --master-port "$port" "${saving[@]}" "${rest[@]}"

# Each attempt gets a store of its own: in the rendezvous' own the ranks would find the addresses of the attempt before,
# and gloo fails where it connects to them (torch 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# What ranks have to save in when the script gets a signal; torch's default is 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}
exec torchrun --nnodes "$nodes" --nproc-per-node "$ranks" --max-restarts "$restarts" --rdzv-backend c10d \
    --rdzv-endpoint "$address:$port" ${own_address:+--local-addr "$own_address"} --rdzv-id "$(basename "$folder")" \
    "$root/pretrain_gpt.py" --config "$recipe" "${saving[@]}" "${rest[@]}"
