#!/bin/bash
# Scratch environments in which the peers run, one for each, because their requirements conflict:
#
#     bash bench/peers.sh            # into $SAE_PEERS, default .cache/peers
#
# torch comes first and stays, so that all are measured on the same build of it. torchvision, which
# is resolved for another build of torch and then breaks every import of transformers, is not needed
# and removed. dictionary_learning needs libraries of its time.
set -eu
folder=${SAE_PEERS:-.cache/peers}
mkdir -p "$folder"
echo "torch==2.13.0" > "$folder/constraints.txt"

build() {
    name=$1
    shift
    [ -x "$folder/$name/bin/python" ] || python3 -m venv "$folder/$name"
    "$folder/$name/bin/pip" install -q torch==2.13.0
    "$folder/$name/bin/pip" install -q -c "$folder/constraints.txt" "$@"
    "$folder/$name/bin/pip" uninstall -q -y torchvision
}

build sae_lens sae-lens==6.54.12
build sae_bench sae-bench==0.6.0
build dictionary_learning dictionary-learning==0.1.0 transformers==4.47.1 datasets==3.2.0
