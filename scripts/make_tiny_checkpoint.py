"""Write a tiny DeepSeek-V3 with random weights, as ``save_pretrained`` does, for finetune.md.

python scripts/make_tiny_checkpoint.py FOLDER
"""

import sys

import torch

try:
    from transformers import AutoTokenizer, DeepseekV3Config, DeepseekV3ForCausalLM
except ModuleNotFoundError as error:
    sys.exit(f"{sys.argv[0]}: needs {error.name}: pip install transformers.")

from ezpz_moe.config.assets import EMBEDDED_TOKENIZER

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def main(folder: str) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_TOKENIZER)
    tokenizer.chat_template = CHAT_TEMPLATE
    config = DeepseekV3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        kv_lora_rank=32,
        q_lora_rank=None,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        max_position_embeddings=2048,
        num_nextn_predict_layers=0,
        rms_norm_eps=1e-5,  # torchtitan's
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = DeepseekV3ForCausalLM(config)
    for written in (model, tokenizer):
        written.save_pretrained(folder)
    print(f"{folder}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main(*sys.argv[1:])
