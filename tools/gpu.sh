#!/usr/bin/env bash
# All that can be asked of a GPU in some minutes: build, probe, smoke test, tests, sanitizers, benchmarks, profile.
#
#     bash tools/gpu.sh [SECONDS] [--built]      default: 900 seconds; --built: rnnfast/_cuda*.so is there already
#
# Takes the torch that is installed (2.10 or later), CMake, ninja, pybind11, pytest, rich and nvcc; downloads and
# installs nothing. Each stage has a limit of its own, none stops the next. Logs and results: $OUT (build/gpu-report).
# Exit status: 0 all was run and right, 1 something failed, 3 nothing failed but something was not run.
set -u
cd "$(dirname "$0")/.." || exit 1
seconds=900 built=
for argument in "$@"; do
  case $argument in
    --built) built=yes ;;
    *[!0-9]* | '') sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2 ;;
    *) seconds=$argument ;;
  esac
done
: "${OUT:=$PWD/build/gpu-report}" "${PYTHON:=python3}"
export OUT PYTHON PYTHONUNBUFFERED=1 PYTHONPATH=$PWD OPENBLAS_NUM_THREADS=1
export PATH=$PATH:/usr/local/cuda/bin
mkdir -p "$OUT" || exit 1
summary=$OUT/summary.txt
: >"$summary"
rm -f "$OUT"/bench-*.json

say() { echo "$*" | tee -a "$summary"; }
left() { echo $((seconds - SECONDS)); }
has() { command -v "$1" >/dev/null 2>&1; }

# stage NAME LIMIT COMMAND...: a line in the summary, the output in NAME.log
stage() {
  local name=$1 limit=$2 from=$SECONDS status
  shift 2
  if [ -n "${why_not:-}" ]; then say "SKIPPED $name: $why_not"; return 3; fi
  if [ "$(left)" -lt 10 ]; then say "SKIPPED $name: no time left"; return 3; fi
  [ "$limit" -lt "$(left)" ] || limit=$(($(left) - 3))
  timeout -k 5 "$limit" "$@" >"$OUT/$name.log" 2>&1
  status=$?
  local verdict=FAILED
  [ $status -ne 0 ] || verdict=ok
  [ $status -ne 124 ] || verdict="FAILED (cut off after $limit s)"
  say "$verdict $name, $((SECONDS - from)) s: $(grep -v '^[[:space:]]*$' "$OUT/$name.log" | tail -n 1 | cut -c1-140)"
  return $status
}

build() {
  cmake -S . -B build/gpu -G Ninja -DPython_EXECUTABLE="$(command -v "$PYTHON")" \
    -Dpybind11_DIR="$("$PYTHON" -m pybind11 --cmakedir)" -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$PWD/rnnfast" \
    -DRNNFAST_CUDA=on -DRNNFAST_CUDA_ARCHS="$sm" && cmake --build build/gpu
}
probe() { nvcc -std=c++17 -O3 -arch="sm_$sm" -o "$OUT/probe" tools/probe.cu && "$OUT/probe"; }
tests() { "$PYTHON" -m pytest -o addopts= tests/test_cuda.py -q --tb=short -p no:cacheprovider --maxfail=25 -k "$1"; }
bench() { # NAME LIMIT CELLS FILTER
  stage "bench-$1" "$2" "$PYTHON" -m benchmarks --device cuda --preset gpu --seconds $(($2 / 2)) --cells "$3" \
    --filter "$4" --json "$OUT/bench-$1.json"
}
export -f build probe tests

sm=
gpu=$(timeout 60 "$PYTHON" -c 'import torch; c = torch.cuda.get_device_capability(); print("%d%d" % c, torch.cuda.get_device_name(), "torch", torch.__version__)' 2>/dev/null)
if [ -n "$gpu" ]; then sm=${gpu%% *}; say "sm_$gpu"; else no_gpu="torch finds no GPU"; say "$no_gpu"; fi
export sm=${sm:-90}

# --- build, and what must be right before anything is timed
why_not=${built:+"--built was given"}
has nvcc || why_not=${why_not:-"there is no nvcc"}
[ -n "$built" ] || [ -z "${no_gpu:-}" ] || why_not=${why_not:-$no_gpu}
stage build 300 bash -c build
why_not=${no_gpu:-}
has nvcc || why_not=${why_not:-"there is no nvcc"}
stage probe 60 bash -c probe
why_not=${no_gpu:-}
"$PYTHON" -c 'import sys; from rnnfast import cuda; sys.exit(not cuda.is_built())' 2>/dev/null || why_not=${why_not:-"rnnfast has no CUDA kernels, see build.log"}
kernels="steps block cluster grid"
for kernel in $kernels; do stage "smoke-$kernel" 90 "$PYTHON" tools/gpu_smoke.py "$kernel" & done
wait
for kernel in composite $kernels; do stage "test-$kernel" 200 bash -c "tests $kernel" & done
stage test-rest 200 bash -c 'tests "not (composite or steps or block or cluster or grid)"' &
wait
could=$why_not
has compute-sanitizer || why_not=${why_not:-"there is no compute-sanitizer"}
for tool in memcheck racecheck synccheck; do
  stage $tool 90 compute-sanitizer --tool $tool --kernel-regex kns=persistent --error-exitcode 9 "$PYTHON" tools/gpu_smoke.py all --tiny &
done
wait
why_not=$could

# --- how fast: the goals first
bench lstm512 60 lstm '(inference|train) T512 B\d+ I512 H512 bfloat16$'
bench lstm-half 90 lstm '(inference|train) .* float16$'
bench lstm-bfloat16 90 lstm '(inference|train) .* H(256|768|1024) bfloat16$'
bench lstm-tf32 90 lstm '(inference|train) T512 B\d+ I\d+ H\d+$'
bench elman 150 rnn '(inference|train) T512 B\d+ I\d+ H\d+( \w+)?$'
bench options 90 lstm,rnn '(L2|D2|packed|memory|H64 )'
has ncu || why_not=${why_not:-"there is no ncu"}
stage profile 60 ncu --clock-control none --set full -k 'regex:persistent_(forward|backward)' -s 4 -c 2 -f -o "$OUT/lstm512" \
  "$PYTHON" tools/gpu_smoke.py profile

results=("$OUT"/bench-*.json)
[ ! -e "${results[0]}" ] || "$PYTHON" -m benchmarks.gpu_goals "${results[@]}" | tee "$OUT/goals.txt"
echo
cat "$summary"
if grep -q '^FAILED' "$summary"; then exit 1; fi
if grep -q '^SKIPPED' "$summary"; then exit 3; fi
