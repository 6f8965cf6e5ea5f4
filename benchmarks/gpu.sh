#!/usr/bin/env bash
# The whole suite on one GPU, with nothing installed but what the library needs and pytest. Rows go to OUT as they come,
# so a part that is cut short by its time limit leaves what it has.
#
#   benchmarks/gpu.sh OUT                       every part: tests, layer, routes, profile, step, stream, memory, ops
#   benchmarks/gpu.sh OUT layer ops             some of them
#   POETX_BENCH_TINY=1 benchmarks/gpu.sh OUT    a rehearsal with tiny sizes, which a CPU can do
set -u
usage="usage: benchmarks/gpu.sh OUT [tests|layer|routes|profile|step|stream|memory|ops ...]"
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
    local workers=""
    "$python" -c "import xdist" 2>/dev/null && workers="-n 6"
    limited 150 tests "$python" -m pytest -v --tb=short -p no:cacheprovider --no-header --durations 8 \
        ${tiny:+--collect-only} $workers tests/ops tests/test_on_gpu.py -m gpu
}

part_layer() {
    if [ -n "$tiny" ]; then
        bench 60 layer layer --tokens 32 --in-features 32 --out-features 48 --block-size 16 --repeats 1
        return
    fi
    local tokens near=fast-contiguous,mem-contiguous
    local all=linear,original,fast,mem,$near,single-step,single-step-free some=linear,fast,mem,$near,single-step-free
    for tokens in 8192 2048 16384; do
        bench 40 layer layer --tokens $tokens --in-features 4096 --out-features 4096 --block-size 256 --contestants $all
        bench 40 layer layer --tokens $tokens --in-features 4096 --out-features 14336 --block-size 256 \
            --contestants $some --no-parts
    done
}

part_routes() {
    [ -n "$tiny" ] || limited 40 routes "$python" -m benchmarks.routes --out "$out/routes.jsonl"
}

part_profile() {
    if [ -n "$tiny" ]; then
        limited 100 profile "$python" -m benchmarks.profile_step demo $tiny_model --tokens 2x16 --methods mem \
            --out "$out/profile.jsonl"
        return
    fi
    limited 60 profile "$python" -m benchmarks.profile_step llama-8b model.num_layers=4 $rates --tokens 1x2048,4x2048 \
        --methods adamw,fast,mem,single-step,int8 --out "$out/profile.jsonl"
    limited 60 launches "$python" -m benchmarks.launches llama-8b model.num_layers=4 --tokens 1x2048 \
        --methods fast,mem,single-step --out "$out/launches.jsonl" # what the profile's counts were expected to be
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
    bench 60 step step llama-1b $rates --seq-lens 2048 --batch-sizes 1,4,8 --methods adamw,fast,mem,single-step
    bench 60 step step llama-1b $rates train.cuda_graphs=true --seq-lens 2048 --batch-sizes 1,4 \
        --methods adamw,fast,mem,single-step
    bench 90 step step llama-8b $rates optimizer.state_dtype=same --seq-lens 2048 --batch-sizes 1,4 --repeats 3 \
        --methods adamw,fast,mem,single-step
    bench 60 step step llama-8b model.num_layers=4 $rates --seq-lens 2048 --batch-sizes 1,4 --repeats 3 \
        --methods benchmarks/permutations.yaml
    bench 90 step step llama-8b ${rates% *} optimizer.state_dtype=same $checkpointed --seq-lens 2048 --batch-sizes 1,4 \
        --repeats 3 --methods adamw,single-step
}

part_stream() { # weights in host memory, and the inputs of layers, too, beside the same run with them on the card
    local keys="model.gradient_checkpointing=true train.chunked_loss=true optimizer.state_dtype=int8"
    [ -z "$tiny" ] || return 0
    local offload
    for offload in null frozen both; do
        bench 60 stream step llama-8b $rates $keys model.offload=$offload --seq-lens 2048 --batch-sizes 1,4 --repeats 3 \
            --methods mem,int8,single-step
    done
}

part_memory() {
    [ -n "$tiny" ] || limited 150 memory "$python" -m benchmarks.memory measured --out "$out/memory.jsonl"
}

# Small, as there is no warm-up: the loss on a batch that is seen again has to fall from the first step on.
rates="optimizer.lr=1e-4 optimizer.poet_lr=1e-4"
checkpointed="model.gradient_checkpointing=true train.chunked_loss=true" # with which AdamW at 8B fits 80 GB
tiny_model="model.hidden_size=32 model.intermediate_size=48 model.num_layers=1 model.num_heads=2 data.vocab_size=300
    poet.block_size=16"
[ $# -gt 0 ] || set -- tests layer routes profile step stream memory ops
for part in "$@"; do
    case $part in
        tests | layer | routes | profile | step | stream | memory | ops) ;;
        *) echo "$part: no such part; $usage" >&2; exit 2 ;;
    esac
done
limited 30 environment "$python" -m poetx env
for part in "$@"; do "part_$part"; done
[ -z "$failed" ] || { echo "failed or cut short:$failed"; exit 1; }
