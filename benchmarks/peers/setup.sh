#!/usr/bin/env bash
# Install the peers into an environment of their own: benchmarks/peers/setup.sh [FOLDER, default .peers]
# Nothing of loghook is installed there. Running it again changes nothing, or mends what an interruption left.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
folder=${1:-.peers}
python="$folder/bin/python"
"$python" -m pip --version >/dev/null 2>&1 || "${PYTHON:-python3}" -m venv --clear "$folder"

install() { "$python" -m pip install --quiet --disable-pip-version-check "$@"; }

# What all of them run on, in the versions that loghook is tested with, and what they need beyond that.
install --constraint constraints.txt torch transformers datasets accelerate peft bitsandbytes pandas pyyaml scipy \
    einconv==0.1.0 einops==0.8.2 jaxtyping==0.3.11 ml_dtypes==0.6.0 natsort==8.4.0 opt_einsum==3.4.0 petname==2.9 \
    simple-parsing==0.1.9 torchopt==0.7.3
# --no-deps: they also ask for torchvision, torchaudio and pretty_midi, which nothing here uses.
install --no-deps kronfluence==1.0.1 bergson==2.5.1 dattri==0.3.0 dattri-llm==0.1.0
# LogIX declares Python below 3.11; it is pure Python and runs on newer ones. Where it will not install, its rows say so.
install --no-deps --ignore-requires-python logix-ai==0.1.1 || echo "logix-ai 0.1.1 does not install here" >&2

"$python" -c 'import bergson, dattri_llm, kronfluence' >/dev/null
echo "peers installed in $folder"
