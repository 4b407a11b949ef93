#!/usr/bin/env bash
# The tests marked gpu and the GPU benchmarks, on a machine with CUDA, PyTorch, transformers and PEFT:
#     benchmarks/run_gpu.sh [FOLDER_OF_WHEELS]
# What else loratool needs is installed from that folder, into a folder of its own, and from nowhere else.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "There is no CUDA device here (or no PyTorch that sees one): nothing to run."
    exit 0
fi
if [ $# -gt 0 ]; then
    packages=$(mktemp -d)
    trap 'rm -rf "$packages"' EXIT
    "$python" -m pip install --quiet --no-deps --no-index --target "$packages" "$1"/*.whl
    export PYTHONPATH="$packages${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
"$python" -m pytest -m gpu -rs tests/test_cuda.py tests/test_cuda_nf4.py
"$python" benchmarks/gpu.py --record
"$python" benchmarks/gpu_nf4.py --record
