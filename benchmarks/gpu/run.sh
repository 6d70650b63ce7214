#!/bin/bash
# All that is measured on a GPU, most important first, each part within its time; results are written as they come.
#
#   bash benchmarks/gpu/run.sh [OUT=gpu-results] [GOLDEN=../shared/golden] [PART ...]     all parts, or those named
#
# Needs torch with torchvision, tensorstore and, from .whl, what benchmarks/gpu/fetch_wheels.sh fetched. No network.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=$(realpath -m "${1:-gpu-results}") golden=${2:-../shared/golden} only=" ${*:3} " scratch=$(mktemp -d)
mkdir -p "$out"
if compgen -G '.whl/*.whl' >/dev/null; then
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$scratch/site" .whl/*.whl
  export PYTHONPATH=$scratch/site
fi
export PYTHONPATH=$PWD:${PYTHONPATH:-} PYTHONUNBUFFERED=1
part() { # NAME SECONDS COMMAND...
  local name=$1 seconds=$2 began=$SECONDS
  [[ $only == "  " || $only == *" $name "* ]] || return
  shift 2
  timeout -k 5 "$seconds" "$@" 2>"$scratch/said" | tee -a "$out/results.jsonl"
  echo "$name: exit ${PIPESTATUS[0]} after $((SECONDS - began)) s" | tee -a "$out/errors.txt"
  grep -v -e '^$' -e USDT "$scratch/said" | tail -n 30 >>"$out/errors.txt"
  tail -n 2 "$out/errors.txt"
}
{
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader
  python3 -c "import torch; print('torch', torch.__version__, 'cudnn', torch.backends.cudnn.version())"
} | tee "$out/machine.txt"
(cd benchmarks/gpu && python3 -c "import network, volume") || exit 1
network="python3 benchmarks/gpu/network.py" volume="python3 benchmarks/gpu/volume.py"
part golden 40 $network golden "$golden"
part kernels 60 $network kernels
part settings 60 $network settings
part busy-float32 50 $volume busy "$scratch/v" float32 small 256
part busy-bfloat16 50 $volume busy "$scratch/v" bfloat16 small 256
part speed 145 $network speed 130
part law1 110 $volume law1 "$scratch/v"
part train 100 python3 benchmarks/gpu/training.py "$scratch/t" vqgan 35 float32,bfloat16
part same 40 $network same
rm -rf "$scratch"
