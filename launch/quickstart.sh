#!/usr/bin/env bash
# Trains a Llama of 5M parameters on this machine, from nothing to a sample, in a few minutes: installs herd_jax into .venv,
# tokenizes the Python standard library (or your text), trains configs/quickstart.py. Run it again and it continues.
#   bash launch/quickstart.sh
#   bash launch/quickstart.sh --text 'notes/**/*.md'
#   bash launch/quickstart.sh --config.train.num_steps=800

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

# Paths are the caller's; everything below runs in the repository.
from_here() {
    if [[ $1 == /* || $1 == "~"* || $PWD == "$root" ]]; then echo "$1"; else echo "$PWD/$1"; fi
}

workdir="" text=() overrides=()
while (($#)); do
    case $1 in
        --text)
            shift
            (($#)) && [[ $1 != --* ]] || fail "--text needs files, directories or a quoted glob: --text 'notes/**/*.md'"
            while (($#)) && [[ $1 != --* ]]; do text+=("$(from_here "$1")"); shift; done ;;
        --text=*) text+=("$(from_here "${1#*=}")"); shift ;;
        --config.workdir=*) workdir=$(from_here "${1#*=}"); shift ;;
        --config.*=*) overrides+=("$1"); shift ;;
        *) fail "unknown argument '$1': the arguments are [--text GLOB...] [--config.KEY=VALUE...]" ;;
    esac
done

install ""
cd "$root" || exit

if ((${#text[@]})); then
    workdir=${workdir:-runs/own-text} sources=$(printf '%s\n' "${text[@]}") prompt=""
else
    library=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')
    text=("$library/*.py" "$library/[!_est]*/*.py")  # not its tests, character tables and installed packages
    workdir=${workdir:-runs/quickstart} sources="the Python standard library" prompt="def"
fi
data=$workdir-data

tokenize() {
    "$python" -m herd_jax.tokenize --source "${text[@]}" --target "$data" --validation-fraction 0.03 --overwrite "$@"
}

if [[ ! -d $data/train || ! -f $data/sources ]]; then
    echo "Tokenizing ${sources//$'\n'/, } into $data"
    if ! tokenize --train-tokenizer 4096; then
        echo "Trying once more with single bytes as tokens, for which no amount of text is too small"
        tokenize --tokenizer bytes || exit 1
    fi
    echo "$sources" >"$data/sources"
elif [[ $(<"$data/sources") != "$sources" ]]; then
    fail "$data was made from other text ($(<"$data/sources")): keep this run apart with --config.workdir=DIR"
fi

train=("$python" -m herd_jax.train --config configs/quickstart.py "--config.workdir=$workdir" "--config.data.sources=$data" "${overrides[@]}")
"${train[@]}" || exit 1

"$python" - "$workdir/metrics.jsonl" <<'PROGRAM' || exit 1
import json, sys

lines = [json.loads(line) for line in open(sys.argv[1])]
looks = ["step {step}: {val_loss:.2f} nats per token, {val_bits_per_byte:.2f} bits per byte".format(**line) for line in lines if "val_loss" in line]
print("Validation loss at", looks[0], "-> at", looks[-1])
PROGRAM

echo "A sample:"
"$python" -m herd_jax.generate --model "$workdir" --prompt "$prompt" --max-new-tokens 100 --temperature 0.6 || exit 1
echo
echo "Next: train on your own files with bash launch/quickstart.sh --text 'GLOB', or read README.md for meshes and larger models"
