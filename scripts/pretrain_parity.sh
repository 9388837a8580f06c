#!/usr/bin/env bash
# Compares MoE++ inside torchtitan and Megatron-Core with this package's own layers and models, on the CPU: losses,
# gradients, weights there and back (tests/pretrain). The engines go into an environment that is thrown away, beside the
# torch that runs this; what they need for training alone is left out.
#
#     scripts/pretrain_parity.sh [python]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/env"
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
own=$("$folder/env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$site" > "$own/of_the_caller.pth"
PYTHONPATH= "$folder/env/bin/pip" install -qq --no-deps \
    'torchtitan==0.3.0' 'spmd_types==0.2.3' torch_checkpointing tyro docstring-parser typeguard 'megatron-core==0.16.1'
OMP_NUM_THREADS=1 PYTHONPATH="$PWD" "$folder/env/bin/python" -m pytest -n0 -p no:cacheprovider -q -W ignore tests/pretrain "${@:2}"
