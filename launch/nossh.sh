#!/usr/bin/env bash
# Train on several nodes without ssh: run this on each of them, as in containers and Kubernetes.
#
#   launch/nossh.sh RECIPE --nodes N --node-rank I --master-addr A --ranks-per-node R [OPTION...] [ARGUMENT...]
#
#   RECIPE               a YAML, or the name of one in configs/
#   --nodes N            how many there are
#   --node-rank I        which one this is, 0 to N-1; in a Kubernetes Indexed Job $JOB_COMPLETION_INDEX
#   --master-addr A      node 0, as the others know it
#   --ranks-per-node R   GPUs of a node
#   --master-port P      where the ranks meet (default 29500)
#   ARGUMENT...          passed on to pretrain_gpt.py
#
# A preflight looks at this node first. The environment is that of each node: nothing travels. Checkpoints go to
# run.save or runs/RECIPE, which must be one folder for all nodes, and the same commands continue from the newest there.
# SIGTERM saves and stops: a pod needs a terminationGracePeriodSeconds above the 30 s that DeepSpeed gives its ranks.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/common.sh
source "$root/launch/common.sh"

[[ ${1:-} != --help ]] || usage "$0"
find_recipe "${1:-}"
shift
sort_options "nodes node-rank master-addr ranks-per-node master-port" "$@"
need_options nodes node-rank master-addr ranks-per-node
nodes=${own[nodes]}
node_rank=${own[node-rank]}
address=${own[master-addr]}
ranks=${own[ranks-per-node]}
port=${own[master-port]:-29500}
need deepspeed

python -m merit_ds.preflight "$recipe" --nodes "$nodes" --node-rank "$node_rank" --slots "$ranks" \
    --master-port "$port" "${saving[@]}" "${rest[@]}"

# DeepSpeed takes the numbers of nodes and ranks from a hostfile, also where it connects to none of its hosts.
hostfile=$(mktemp)
for ((node = 0; node < nodes; node++)); do echo "node$node slots=$ranks"; done >"$hostfile"
run_group deepspeed --hostfile "$hostfile" --no_ssh --node_rank "$node_rank" --master_addr "$address" \
    --master_port "$port" "$root/pretrain_gpt.py" --config "$recipe" "${saving[@]}" "${rest[@]}" &&
    status=0 || status=$?
rm -f "$hostfile"
exit "$status"
