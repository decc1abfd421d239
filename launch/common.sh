# shellcheck shell=bash
# What the launchers share. Sourced by them, after they have set `root`; it starts nothing.

fail() {
    echo "error: $*" >&2
    exit 1
}

# usage FILE: the comment at the head of a script, as its --help.
usage() {
    sed -n '2,/^[^#]/{s/^#\( \|$\)//p}' "$1"
    exit 0
}

# find_recipe NAME: a YAML, or the name of one in configs/. Sets `recipe`; `folder`, where the run's checkpoints go if
# nothing else says it; and `saving`, by which one command serves the first start and every further one.
find_recipe() {
    [[ -n ${1:-} ]] || fail "which recipe? For instance quickstart; --help tells more"
    recipe=$1
    [[ -f $recipe ]] || recipe=${root:?}/configs/$1.yaml
    [[ -f $recipe ]] || fail "$1: no such recipe; give a YAML, or one of configs/: $(cd "$root/configs" && echo *.yaml)"
    folder=runs/$(basename "$recipe" .yaml)
    # shellcheck disable=SC2034 # for the script that sources this
    saving=(--default-save "$folder" --resume)
}

# need COMMAND: is it on the PATH?
need() {
    command -v "$1" >/dev/null || fail "$1 is not on the PATH: install it, or activate the environment it is in"
}

declare -A own=()

# sort_options "NAME..." ARGUMENT...: the values of the script's own options, wherever they stand, go into `own`, and
# everything else, which is the trainer's, into `rest`.
sort_options() {
    local names=" $1 " name
    shift
    rest=()
    while (($#)); do
        name=${1#--}
        name=${name%%=*}
        if [[ $1 != --* || $names != *" $name "* ]]; then
            rest+=("$1")
            shift
            continue
        fi
        if [[ $1 == *=* ]]; then set -- "--$name" "${1#*=}" "${@:2}"; fi
        [[ -n ${2:-} ]] || fail "$1 needs a value; --help tells more"
        own[$name]=$2
        shift 2
    done
}

# need_options NAME...: were they given?
need_options() {
    local name missing=()
    for name in "$@"; do
        [[ -n ${own[$name]:-} ]] || missing+=("--$name")
    done
    [[ -z ${missing[*]} ]] || fail "${missing[*]}: needed as well; --help tells more"
}

# wait_for PID: its status when it ends, however many trapped signals interrupt the waiting.
wait_for() {
    local status last
    while true; do
        status=0
        wait "$1" || status=$?
        if ((status <= 128)) || ! kill -0 "$1" 2>/dev/null; then break; fi
    done
    # It may have ended while a signal was handled: bash still knows its own status then, and nothing (127) otherwise.
    last=0
    wait "$1" 2>/dev/null || last=$?
    ((last == 127)) || status=$last
    return "$status"
}

# alive GROUP: is a process of that group still running? `kill -0` counts zombies too, and in a container whose first
# process reaps nobody they stay for ever.
alive() {
    # A process that ends meanwhile fails `cat`, so it is the output that tells. After the name: state, parent, group.
    [[ -n $(cat /proc/[0-9]*/stat 2>/dev/null | sed 's/.*) //' | awk -v group="$1" '$3 == group && $1 != "Z"') ]]
}

# run_group COMMAND...: run it with everything that it starts as one process group, pass SIGTERM and SIGINT on to all of
# it, and return its status when the last of them has ended. The deepspeed command itself would die of SIGTERM without a
# word to its ranks, and as the first process of a container it would not even notice.
run_group() {
    local status=0
    set -m
    "$@" &
    local group=$!
    # shellcheck disable=SC2064 # this group
    trap "kill -TERM -- -$group" TERM
    # shellcheck disable=SC2064
    trap "kill -INT -- -$group" INT
    wait_for "$group" || status=$?
    while alive "$group"; do
        sleep 1
    done
    trap - TERM INT
    return "$status"
}
