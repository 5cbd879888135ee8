"""Train the tiny language model that ships with halfbyte: a Qwen3-MoE of 1.7 million parameters and its tokenizer.

Both learn from the training text alone, by default for about 21 passes over it. The model is saved in bfloat16, in the
layout of any Hugging Face checkpoint. The shipped one was made by this command, in 13 minutes on one core of a Xeon
(PyTorch 2.13, transformers 5.23):

    OMP_NUM_THREADS=1 python examples/train_tiny.py \\
        --text src/halfbyte/data/text/train.txt --out tiny --steps 1500 --seed 0

It ended at a training loss of 1.09, dropout and the router's balancing loss included, and has a perplexity of 20.91 on
all 36 windows of evaluation.txt. The constants below were picked by hand from a few runs, by their perplexity on
calibration.txt (25.66 for the shipped model); evaluation.txt took no part in that. `--eval` measures a held-out text
once training is over.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

VOCAB = 768
WINDOW = 512  # tokens of a training sequence, the leading <bos> included
BATCH = 4  # sequences of a step
DROPOUT = 0.4
PEAK_LR = 4e-3
WEIGHT_DECAY = 1.5


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE learnt from `text`; encoding puts <bos> in front."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<bos>", "<eos>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet)
    )
    bpe.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", model_max_length=WINDOW
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    """One dense layer, then mixtures of experts; every Linear's input is a multiple of 32 wide."""
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        moe_intermediate_size=96,
        num_hidden_layers=5,
        mlp_only_layers=[0],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        router_aux_loss_coef=0.01,
        initializer_range=0.06,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3MoeForCausalLM(config)


def add_dropout(model: Qwen3MoeForCausalLM) -> None:
    """In training, drop activations where blocks join the residual stream: 390 kB of text is soon learnt by heart."""

    def drop(module: nn.Module, args: tuple, output):
        first, *rest = output if isinstance(output, tuple) else (output,)
        first = nn.functional.dropout(first, DROPOUT, module.training)
        return (first, *rest) if rest else first

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)
    model.model.embed_tokens.register_forward_hook(drop)


def optimizer_for(model: nn.Module) -> torch.optim.AdamW:
    """AdamW, which decays the matrices but not the norms."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95))


def train(model: Qwen3MoeForCausalLM, ids: torch.Tensor, steps: int) -> None:
    """Next-token training on windows that start anywhere in `ids`, each preceded by <bos>."""
    bos = torch.full((BATCH, 1), model.config.bos_token_id)
    optimizer = optimizer_for(model)
    warmup = max(1, min(100, steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(1, step / steps))))
    )
    model.train()
    began, mean = time.time(), None
    for step in range(1, steps + 1):
        starts = torch.randint(len(ids) - WINDOW + 2, (BATCH,))
        batch = torch.cat([bos, torch.stack([ids[s : s + WINDOW - 1] for s in starts])], dim=1)
        loss = model(batch, labels=batch, output_router_logits=True, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if step % 50 == 0 or step == steps:
            print(f"step {step}/{steps}  loss {mean:.3f}  {time.time() - began:.0f} s", flush=True)
    model.eval()


@torch.inference_mode()
def perplexity(model: Qwen3MoeForCausalLM, ids: torch.Tensor) -> float:
    """Perplexity of `ids` in non-overlapping windows, each preceded by <bos>."""
    bos = torch.tensor([model.config.bos_token_id])
    windows = ids[: len(ids) // (WINDOW - 1) * (WINDOW - 1)].view(-1, WINDOW - 1)
    losses = [model(batch, labels=batch).loss for batch in (torch.cat([bos, window])[None] for window in windows)]
    return torch.stack(losses).mean().exp().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="the text to train on")
    parser.add_argument("--out", type=Path, required=True, help="directory to save the model and its tokenizer in")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval", type=Path, help="held-out text to measure the saved model on, once, at the end")
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    text = args.text.read_text(encoding="utf-8")
    tokenizer = train_tokenizer(text)

    def encode(text: str) -> torch.Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    model = build_model(tokenizer)
    ids = encode(text)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(ids):,} tokens")
    train(model, ids, args.steps)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)

    if args.eval:
        saved = Qwen3MoeForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
        print(f"held-out perplexity {perplexity(saved, encode(args.eval.read_text(encoding='utf-8'))):.4f}")


if __name__ == "__main__":
    main()
