#!/usr/bin/env bash
# Times the CPU kernels beside other libraries, for figure_cpu_peers.py: one linear with one thread
# and with two, then a whole model. Nothing else should run meanwhile. On a CPU with AVX2 alone, where
# torch's bf16 linear is far slower than its fp32 one, one shape is timed with fp32, up to 256 tokens
# without the other libraries, some of which take minutes there.
#     benchmarks/on_cpu.sh [FOLDER]      where the files go; default: benchmarks/results
# ROUNDS: every linear is timed so often, and the fastest counts; default 3. With one round all takes
# about 12 minutes on two cores of an AMD EPYC (Zen 4).
# PYTHON names the interpreter that has torch; default: the environment's, else python3. The other
# libraries are those of the extra `peers`; who is absent is named with the reason.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
folder="${1:-benchmarks/results}"
# All files come at the end: a changed file of results would make the commit in the next a dirty one.
new="$(mktemp -d)"
trap 'rm -rf "$new"' EXIT
linear() {
  OMP_NUM_THREADS=$1 "$PYTHON" benchmarks/bench_linear.py --device cpu --activations exact int8 \
    --seconds 0.2 --rounds "${ROUNDS:-3}" --out "$new" --name "$2" "${@:3}"
}
if grep -qsw avx512f /proc/cpuinfo; then
  how=(--shapes 11008x4096 4096x4096 --m 1 4 16 64 256 --values fp16 int8 int4 --dtype bf16)
  linear 1 cpu-peers-1-thread "${how[@]}"
  linear 2 cpu-peers-2-threads "${how[@]}"
  OMP_NUM_THREADS=2 "$PYTHON" benchmarks/bench_end_to_end.py --threads 1 2 \
    --out "$new/end-to-end-cpu.json"
elif grep -qsw avx2 /proc/cpuinfo; then
  how=(--shapes 11008x4096 --m 1 2 4 8 16 64 --values int8 int4 --dtype fp32)
  linear 1 cpu-avx2-1-thread "${how[@]}"
  linear 2 cpu-avx2-2-threads "${how[@]}"
  for threads in 1 2; do
    linear "$threads" "cpu-avx2-many-$threads" "${how[@]}" --m 16 64 256 --no-peers
  done
  OMP_NUM_THREADS=2 "$PYTHON" benchmarks/bench_end_to_end.py --threads 1 2 --dtype fp32 \
    --out "$new/end-to-end-avx2.json"
else
  echo "on_cpu.sh: the tables are of CPUs with AVX-512 or AVX2, and this one has neither" >&2
  exit 1
fi
mkdir -p "$folder"
cp "$new"/*.csv "$new"/*.json "$folder"
