#!/usr/bin/env bash
# Runs a training as N processes of fake CPU devices on this machine, as on N hosts; the arguments are those of herd_jax.train.
# The lines of process i begin with "[i] ". When one process ends, or on Ctrl-C, all end; the exit status is that of the first to fail.
#   bash launch/local_multiprocess.sh 2 --config configs/quickstart.py --config.mesh.dp=4 --config.workdir=runs/two

python=${HERD_PYTHON:-$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/python}
[[ $1 =~ ^[1-9][0-9]*$ ]] || {
    echo "error: give the number of processes first: bash launch/local_multiprocess.sh 2 --config FILE" >&2
    exit 1
}

export HERD_NUM_PROCESSES=$1 JAX_PLATFORMS=cpu PYTHONUNBUFFERED=1
shift
port=$("$python" - <<'PROGRAM'
import socket

while True:  # a port that is free together with the next one
    with socket.create_server(("", 0)) as first:
        port = first.getsockname()[1]
        try:
            socket.create_server(("", port + 1)).close()
        except (OSError, OverflowError):
            continue
        print(port)
        break
PROGRAM
) || exit 1
export HERD_COORDINATOR=localhost:$port

set -m  # process groups of their own: Ctrl-C reaches this script alone, which passes it on
label() { trap '' INT TERM USR1; exec sed -u "/^\[Gloo\] Rank/d; /connected peer ranks/d; s/^/[$1] /"; }  # Gloo's threads cut each other's lines
pids=()
for ((i = 0; i < HERD_NUM_PROCESSES; i++)); do
    HERD_PROCESS_ID=$i "$python" -m herd_jax.train "$@" > >(label "$i") 2> >(label "$i" >&2) &
    pids+=($!)
done
trap 'kill -INT "${pids[@]}" 2>/dev/null' INT
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM
trap 'kill -USR1 "${pids[@]}" 2>/dev/null' USR1

status=0 killer=""
while ((${#pids[@]})); do
    sleep 0.2
    remaining=()
    for pid in "${pids[@]}"; do
        if kill -0 "$pid" 2>/dev/null; then remaining+=("$pid"); continue; fi
        wait "$pid"
        code=$?
        ((status)) || status=$code
    done
    pids=("${remaining[@]}")
    if ((status && ${#pids[@]})) && [[ -z $killer ]]; then  # by themselves they end too, unless it was too early
        (sleep 20; kill -KILL "${pids[@]}" 2>/dev/null) &
        killer=$!
        disown
    fi
done
[[ -z $killer ]] || kill -- "-$killer" 2>/dev/null
exit "$status"
