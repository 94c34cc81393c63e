#!/usr/bin/env bash
# transformers 5.24.0: a tokenizer.json without a class in tokenizer_config.json is not always used.
#
# AutoTokenizer then takes a class by the model_type in config.json. For qwen3_moe that is
# Qwen2Tokenizer, which takes vocabulary and merges from tokenizer.json, but cuts the text by rules that it
# has itself: the same words become other ids, without a warning. For deepseek_v3 the file is used as it is.
# One tokenizer whose file cuts before and after every b. Seen, on Linux x86-64, Python 3.11:
#
#     the file itself: 5 ids
#     deepseek_v3: the same ids (TokenizersBackend)
#     qwen3_moe: 3 other ids (Qwen2Tokenizer)
#
# Exits 0 while that is so, 1 when transformers has changed, 2 when packages could not be installed.
set -euo pipefail
source "$(dirname "$0")/environment.bash"
install transformers==5.24.0
cat > ids.py <<'PYTHON'
import json
import os

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
vocabulary = {symbol: number for number, symbol in enumerate([*symbols, "ab", "abc"])}
tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b"), ("ab", "c")]))
cut = [pre_tokenizers.Split("b", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cut)
own = tokenizer.encode("abc12").ids
print(f"the file itself: {len(own)} ids")
found = {}
for kind in ("deepseek_v3", "qwen3_moe"):
    os.mkdir(kind)
    tokenizer.save(f"{kind}/tokenizer.json")
    with open(f"{kind}/config.json", "w") as file:
        json.dump({"model_type": kind}, file)
    loaded = AutoTokenizer.from_pretrained(kind)
    ids = loaded("abc12")["input_ids"]
    found[kind] = ids == own
    said = "the same ids" if found[kind] else f"{len(ids)} other ids"
    print(f"{kind}: {said} ({type(loaded).__name__})")
raise SystemExit(found != {"deepseek_v3": True, "qwen3_moe": False})
PYTHON
HF_HUB_OFFLINE=1 "$python" ids.py
