#!/usr/bin/env bash
# Lengthens a small Llama from 256 to 2,048 tokens in gated stages on this machine: installs herd_jax into .venv, makes records hidden in the Python
# standard library, trains configs/long_context_small.py, and looks for needles before and after. Run it again and it continues.
#   bash launch/long_context.sh

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
(($# == 0)) || fail "unknown argument '$1': this script takes none"
install "[plot]"
cd "$root" || exit

data=runs/long-context-data workdir=runs/long-context
if [[ ! -f $data/finished ]]; then
    library=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')
    # Not its tests, character tables and installed packages; not its manual, in which the needles are hidden afterwards.
    "$python" benchmarks/make_needles.py --source "$library/*.py" "$library/[!_estp]*/*.py" --target "$data" || exit 1
    touch "$data/finished"
fi
"$python" -m herd_jax.train --config configs/long_context_small.py || exit 1
"$python" -m herd_jax.evaluate needle --model "$workdir" --cp 2 --template record --lengths 256 512 1024 2048 --output "$workdir/evaluation" || exit 1
"$python" benchmarks/plot_long_context.py "$workdir" --output "$workdir/long_context.png"
