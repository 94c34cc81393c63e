#!/usr/bin/env bash
# torch 2.14.1: DCP's reader of Hugging Face's safetensors ignores model.safetensors.index.json.
#
# A folder holds a model in nine files and their index, and beside them a file that the index does not
# name: an earlier export, or what a converter left. `HuggingFaceStorageReader` (torchtitan's
# --checkpoint.initial_load_in_hf) reads every *.safetensors in the folder. Of two tensors of one name
# that of the file listed last is loaded, without a word; the order is that of the file system. So a
# model trains on from other values than those of its index, or not, by the names of the files.
# Seen, on Linux x86-64, Python 3.11:
#
#     torch 2.14.1: files that the index does not name are read: True; its tensors are replaced: 8 of 8
#
# (on ext4; in a tmpfs, which lists the newest file first, 0 of 8.)
#
# Exits 0 while such files are read, 1 when torch has changed, 2 when packages could not be installed.
set -euo pipefail
source "$(dirname "$0")/environment.bash"
install torch==2.14.1 safetensors==0.8.0 numpy==2.4.6
cat > read.py <<'PYTHON'
import json
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

warnings.simplefilter("ignore")
model = Path("model")
model.mkdir()
files = {f"model-0000{n}-of-00009.safetensors": n for n in range(1, 10)}
for file, n in files.items():
    save_file({f"layer_{n}": torch.ones(2)}, model / file)
index = {f"layer_{n}": file for file, n in files.items()}
(model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
stray = {f"layer_{n}": torch.zeros(2) for n in range(1, 11)}
are_read, win = True, 0
for name in ("model", "a", "m", "z", "old", "export", "consolidated", "pytorch_model"):
    file = model / f"{name}.safetensors"
    save_file(stray, file)
    state = {name: torch.full((2,), 7.0) for name in stray}
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(model)))
    are_read &= state["layer_10"].tolist() == [0, 0]  # which the index does not name
    win += any(state[key].tolist() == [0, 0] for key in index)
    file.unlink()
version = torch.__version__.partition("+")[0]
print(
    f"torch {version}: files that the index does not name are read: {are_read}; "
    f"its tensors are replaced: {win} of 8"
)
raise SystemExit(not are_read)
PYTHON
"$python" read.py
