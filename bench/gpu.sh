#!/bin/bash
# Everything that only a GPU can show, in one command and within ten minutes:
#
#     bash bench/gpu.sh [FOLDER]          # results into FOLDER, default .cache/gpu
#
# Tests that need CUDA; the main job at budget smoke; a profile of the training step; the step beside
# dictionary_learning's and the bound; the language model beside its bare forward pass.
# PYTHON names an interpreter with requirements.txt and pytest (default python). The stand-in's
# packages are taken from SAE_CACHE_DIR where they are; a part that fails does not stop the others.
set -u
python=${PYTHON:-python}
root=$(realpath "$(dirname "$0")/..")
folder=$(realpath -m "${1:-$root/.cache/gpu}")
cd "$root" || exit 1
"$python" bench/gpu.py card || exit 1
mkdir -p "$folder"
export SAE_SUBSTRATE=${SAE_SUBSTRATE:-standin} WANDB_MODE=disabled

part() {
    seconds=$1 name=$2
    shift 2
    printf '\n== %s\n' "$name"
    timeout "$seconds" "$@" 2>&1 | tee "$folder/${name// /_}.txt" | tail -n 60
    [ "${PIPESTATUS[0]}" = 0 ] || echo "== $name: failed or took longer than $seconds s"
}

part 150 tests "$python" -m pytest -q -p no:cacheprovider tests/test_gpu.py -k on_a_card
part 30 "dictionary learning" "$python" -m pip install -q --no-deps --target "$folder/peer" \
    dictionary-learning==0.1.0 einops==0.8.1
export PYTHONPATH="$folder/peer${PYTHONPATH:+:$PYTHONPATH}"
part 120 steps "$python" bench/gpu.py steps
part 40 profile "$python" bench/gpu.py profile
part 40 "language model" "$python" bench/gpu.py language_model
SAE_BUDGET=smoke part 200 "main job" "$python" experiment.py --out_dir="$folder/run_2"
printf '\nall of it lies in %s\n' "$folder"
