#!/usr/bin/env bash
# Train on this machine alone.
#
#   launch/local.sh RECIPE [--ranks N] [--master-port PORT] [ARGUMENT...]
#
#   RECIPE           a YAML, or the name of one in configs/, for instance quickstart
#   --ranks N        processes, one for each GPU (default: all GPUs that DeepSpeed finds)
#   --master-port P  where the ranks meet (default 29500); two runs on one machine need two
#   ARGUMENT...      passed on to pretrain_gpt.py, for instance --set run.save_interval=100
#
# Checkpoints go to run.save or runs/RECIPE, and the same command continues from the newest there. Ctrl-C and SIGTERM
# save and stop.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/common.sh
source "$root/launch/common.sh"

[[ ${1:-} != --help ]] || usage "$0"
find_recipe "${1:-}"
shift
sort_options "ranks master-port" "$@"
ranks=${own[ranks]:-}
port=${own[master-port]:-29500}
need deepspeed

run_group deepspeed ${ranks:+--num_gpus "$ranks"} --master_port "$port" "$root/pretrain_gpt.py" --config "$recipe" \
    "${saving[@]}" "${rest[@]}"
