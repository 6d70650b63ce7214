#!/bin/bash
# All that is measured on a GPU, most important first, each part within its time; results are written as they come.
#
#   bash benchmarks/gpu/run.sh [--smoke] [OUT=gpu-results] [GOLDEN=../shared/golden] [PART ...]    all parts, or those named
#
# With --smoke every part runs as small as it can, on a CPU too: that shows that the script works, and measures nothing.
# Needs torch with torchvision, tensorstore and, from .whl, what benchmarks/gpu/fetch_wheels.sh fetched. No network.
set -uo pipefail
cd "$(dirname "$0")/../.."
smoke=
if [ "${1:-}" = --smoke ]; then
  smoke=1
  shift
fi
out=$(realpath -m "${1:-gpu-results}") golden=$(realpath -m "${2:-../shared/golden}") only=" ${*:3} " scratch=$(mktemp -d)
mkdir -p "$out"
trap 'rm -rf "$scratch"' EXIT
python=${PYTHON:-python3}
if [ -z "$smoke" ] && compgen -G '.whl/*.whl' >/dev/null; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$scratch/site" .whl/*.whl
  export PYTHONPATH=$scratch/site
fi
export PYTHONPATH=$PWD:${PYTHONPATH:-} PYTHONUNBUFFERED=1
failed=0
part() { # NAME SECONDS COMMAND...
  local name=$1 seconds=$2 began=$SECONDS code
  [[ $only == "  " || $only == *" $name "* ]] || return
  shift 2
  timeout -k 5 "$seconds" "$@" 2>"$scratch/said" | tee -a "$out/results.jsonl"
  code=${PIPESTATUS[0]}
  echo "$name: exit $code after $((SECONDS - began)) s" | tee -a "$out/errors.txt"
  [ "$code" = 0 ] || failed=1
  grep -v -e '^$' -e USDT "$scratch/said" | tail -n 30 >>"$out/errors.txt"
  tail -n 2 "$out/errors.txt"
}
{
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader
  "$python" -c "import torch; print('torch', torch.__version__, 'cudnn', torch.backends.cudnn.version())"
} 2>&1 | tee "$out/machine.txt"
network="$python benchmarks/gpu/network.py" volume="$python benchmarks/gpu/volume.py"
training="$python benchmarks/gpu/training.py"
(cd benchmarks/gpu && "$python" -c "import network, volume, training") || exit 1
doctor() { "$python" -m pipeline doctor --json >"$out/doctor.json" && echo '{"doctor": "ok"}'; }
if [ -n "$smoke" ]; then
  part speed 300 $network speed 300 smoke
  part same 300 $network same
  part operators 300 $network operators
  part kernels 300 $network kernels small
  part authors 300 $network authors 0
  part busy 300 $volume busy "$scratch/v" float32 small 16 2
  part train 300 $training "$scratch/t" flow,vqgan,indexer,network 3 float32 smoke
  exit $failed
fi
export -f doctor
export python out
part doctor 75 bash -c doctor
part golden 30 $network golden "$golden"
part speed 130 $network speed 115
part same 40 $network same
part busy-paper 60 $volume busy "$scratch/v" bfloat16 paper 512
part law1 90 $volume law1 "$scratch/v"
part operators 40 $network operators
part compiled 90 $network compiled 80
part kernels 30 $network kernels
part busy-small 40 $volume busy "$scratch/v" tf32 small 512
part authors 20 $network authors 10
part train 110 $training "$scratch/t" network,vqgan,indexer,flow 10 bfloat16,tf32
exit $failed
