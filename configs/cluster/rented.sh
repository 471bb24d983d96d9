#!/bin/bash
# One rented machine that may be taken away at any moment (RunPod, Vast, Lambda and the like), as its start command:
#   bash /workspace/rented.sh train /workspace/my_run.yaml [section.key=value ...]
#
# Assumes: an image with python3.11 or newer and gcc (such as runpod/pytorch), and one disk at /workspace that outlives the
# machine, with this script, the wheel (dist/*.whl of `make release-check`), the configuration and the pairs on it.
# Started again on another machine, the run goes on from its newest checkpoint.
set -euo pipefail

disk=${QIF_DISK:-/workspace}
export HF_HOME=${HF_HOME:-$disk/huggingface}  # models are downloaded once
cd "$disk"
if [ ! -x qif/bin/python ]; then  # whole or not at all: a machine may go while pip works
  rm -rf qif.new && python3 -m venv qif.new
  qif.new/bin/python -m pip install --quiet --disable-pip-version-check qwen_image_finetune-*.whl
  mv qif.new qif
fi
# By its module: the commands of an environment that was moved still name its old place.
qif=(qif/bin/python -m qwen_image_finetune.cli)
"${qif[@]}" doctor || true  # what it says belongs into the log, whatever it is
[ "${1:-}" != train ] || set -- "$@" train.resume_from_checkpoint=latest
exec "${qif[@]}" "$@"  # exec: the provider's SIGTERM reaches the run, which saves
