#!/usr/bin/env bash
# Installs herd_jax with what its tests need into .venv and runs them on all cores; arguments go to pytest.
#   bash launch/test.sh
#   bash launch/test.sh tests/test_config.py -k override

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install "[test]"
unset "${!JAX_@}" "${!XLA_@}" "${!PYTEST_@}"  # tests/conftest.py sets what the tests need
cd "$root"
exec "$python" -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal "$@"
