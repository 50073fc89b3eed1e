#!/bin/bash
# Scratch environments in which the peers run, one for each, because their requirements conflict:
#
#     bash bench/peers.sh            # into $SAE_PEERS, default .cache/peers
#
# torch comes first and stays, so that all are measured on the same build of it.
# dictionary_learning needs the releases of its time, and imports no vision package, of which only
# a build for another torch is resolved.
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
}

build sae_lens sae-lens==6.54.12
build sae_bench sae-bench==0.6.0
build dictionary_learning dictionary-learning==0.1.0 transformers==4.47.1 datasets==3.2.0
"$folder/dictionary_learning/bin/pip" uninstall -q -y torchvision
