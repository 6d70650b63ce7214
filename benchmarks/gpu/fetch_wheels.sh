#!/bin/bash
# Fetches what a GPU machine without a network lacks beside torch, numpy and tensorstore, as wheels for Python 3.12.
#
#   bash benchmarks/gpu/fetch_wheels.sh      into .whl, which git ignores; benchmarks/gpu/run.sh installs them from there
set -euo pipefail
cd "$(dirname "$0")/../.."
platforms=(manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64 manylinux1_x86_64)
mkdir -p .whl
python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  "${platforms[@]/#/--platform=}" -d .whl \
  dask distributed partd locket tblib tornado zict toolz donfig google-crc32c zarr numcodecs \
  pydantic==2.12.5 pydantic-core==2.41.5 annotated-types typing-inspection tenacity lightning-fabric cryptography cffi
du -sh .whl
