#!/usr/bin/env bash
# Makes an environment with torch, PEFT, transformers, diffusers and mlx-lm, and runs the tests
# here in it:
#   tests/live/setup.sh ENVIRONMENT [PYTEST-ARGUMENT...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

environment=${1:?give the directory of the environment to make or to use}
shift
if [ ! -x "$environment/bin/python" ]; then
  "${PYTHON:-python3.11}" -m venv "$environment"
fi
"$environment/bin/python" -m pip install --quiet \
  -r tests/live/requirements.txt -e ".[tests]"
# Without one of these the tests would be skipped.
"$environment/bin/python" -c "import torch, peft, transformers, diffusers, mlx_lm, tests.live.support"
"$environment/bin/python" -m pytest -q -n 2 -p no:cacheprovider -m live tests/live "$@"
