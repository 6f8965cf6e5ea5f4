#!/usr/bin/env bash
# The whole suite on one GPU in under nine minutes, with nothing installed: torch, triton, transformers and typer are
# enough. Rows go to OUT as they come, so a part that is cut short by its time limit leaves what it has.
#
#   benchmarks/gpu.sh OUT                       every part: tests, layer, ops, step, memory
#   benchmarks/gpu.sh OUT layer ops             some of them
#   POETX_BENCH_TINY=1 benchmarks/gpu.sh OUT    a rehearsal with tiny sizes, which a CPU can do
set -u
usage="usage: benchmarks/gpu.sh OUT [tests|layer|ops|step|memory ...]"
case "${1:-}" in "" | -*) echo "$usage" >&2; exit 2 ;; esac
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd); shift
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
tiny=${POETX_BENCH_TINY:-}
failed=""

# limited SECONDS NAME COMMAND...: its output goes to OUT/NAME.log and to the terminal.
limited() {
    local seconds=$1 name=$2 status; shift 2
    echo "== $name (at most ${seconds} s)"
    timeout -k 5 "$seconds" "$@" > >(tee -a "$out/$name.log") 2>&1
    status=$?
    [ $status -eq 0 ] && return
    echo "$name: exit $status$([ $status -eq 124 ] && echo ', cut at its time limit')" | tee -a "$out/$name.log"
    failed="$failed $name"
}

bench() { # bench SECONDS NAME ARGUMENTS...: `poetx bench` into OUT/NAME.jsonl
    local seconds=$1 name=$2; shift 2
    limited "$seconds" "$name" "$python" -m poetx bench "$@" --out "$out/$name.jsonl"
}

part_tests() {
    limited 90 tests "$python" -m pytest -q -p no:cacheprovider ${tiny:+--collect-only} tests/ops -m gpu
}

part_layer() {
    if [ -n "$tiny" ]; then
        bench 60 layer layer --tokens 32 --in-features 32 --out-features 48 --block-size 16 --repeats 1
        return
    fi
    bench 40 layer layer --tokens 2048 --in-features 4096 --out-features 4096 --block-size 256 --repeats 30 \
        --contestants linear,original,fast,mem,single-step,single-step-free
    bench 40 layer layer --tokens 2048 --in-features 4096 --out-features 14336 --block-size 256 --repeats 20 \
        --contestants linear,original,fast,mem,single-step,single-step-free
    bench 30 layer layer --tokens 2048 --in-features 14336 --out-features 4096 --block-size 256 --repeats 20 \
        --contestants linear,fast,mem --no-parts
    bench 30 layer layer --tokens 16384 --in-features 4096 --out-features 4096 --block-size 256 --repeats 20 \
        --contestants linear,fast,mem
}

part_ops() {
    if [ -n "$tiny" ]; then
        bench 60 ops ops --tokens 32 --features 32 --blocks 2 --block-sizes 16 --repeats 1
    else
        bench 60 ops ops
    fi
}

part_step() {
    if [ -n "$tiny" ]; then
        bench 100 step step demo $tiny_model --seq-lens 16 --batch-sizes 2 --repeats 1
        return
    fi
    bench 70 step step llama-1b --seq-lens 512,2048 --batch-sizes 1,8,24,48 \
        --methods adamw,fast,mem,single-step
    bench 130 step step llama-8b --seq-lens 512,1024,2048 --batch-sizes 1,4,12 --repeats 3
}

part_memory() {
    if [ -n "$tiny" ]; then
        bench 100 memory step demo $tiny_model --seq-lens 16 --batch-sizes 1 --repeats 1 --methods fast,mem
        return
    fi
    bench 50 memory step llama-3b --seq-lens 512,1024,2048 --batch-sizes 1 --repeats 1
}

tiny_model="model.hidden_size=32 model.intermediate_size=48 model.num_layers=1 model.num_heads=2 data.vocab_size=300
    poet.block_size=16"
[ $# -gt 0 ] || set -- layer ops step tests memory
for part in "$@"; do
    case $part in
        tests | layer | ops | step | memory) ;;
        *) echo "$part: no such part; $usage" >&2; exit 2 ;;
    esac
done
limited 30 environment "$python" -m poetx env
for part in "$@"; do "part_$part"; done
[ -z "$failed" ] || { echo "failed or cut short:$failed"; exit 1; }
