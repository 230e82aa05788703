# Sourced by the scripts beside it: `install EXTRAS` makes .venv in the repository, installs herd_jax there, and leaves the
# interpreter in $python. HERD_PYTHON names one that has everything already, and is then used as it is.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
unset PYTHONPATH PYTHONHOME PYTHONSTARTUP  # the code of this checkout runs, whatever else is installed

fail() {
    echo "error: $1" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer is on the PATH: install one, for example Python 3.12 from your system's packages or python.org"
}

# install EXTRAS ("" or "[test]"): does nothing where it is done and pyproject.toml has not changed since.
install() {
    export PYTHONPATH=$root
    python=${HERD_PYTHON:-$root/.venv/bin/python}
    [[ -z $HERD_PYTHON ]] || return 0
    local base stamp="$root/.venv/installed$1"
    if ! "$python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        base=$(find_python) || exit 1
        "$base" -c 'import ensurepip, venv' 2>/dev/null ||
            fail "$("$base" --version) cannot make virtual environments: install the package python3-venv (Debian and Ubuntu) and try again"
        "$base" -m venv --clear "$root/.venv" || fail "$root/.venv cannot be made: see above"
    fi
    if [[ ! $stamp -nt $root/pyproject.toml ]]; then
        echo "Installing herd_jax$1 into .venv with $("$python" --version) (a minute or two)"
        "$python" -m pip install --quiet --disable-pip-version-check --editable "$root$1" || fail "the installation failed: see above"
        touch "$stamp"
    fi
}
