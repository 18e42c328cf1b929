"""GPT-2 and BDIA-GPT2 on a small sample of OpenWebText: Fig. 5 of arXiv 2407.09093.

    python -m train.sweep --config=configs/gpt2_openwebtext.py
    python -m train.report runs/gpt2_openwebtext

The paper shows training and validation loss of nanoGPT's 124M model on little data: plain GPT-2
over-fits, BDIA-GPT2 far less. Layout and optimizer are nanoGPT's (AdamW, b2 0.95, decay 0.1 of
matrices, peak 6e-4, cosine, clipping 1), but for the cosine ending at 0 and documents not
seeing each other; --config.input.isolate_documents=False lets them, and needs no attention mask,
so that a GPU has flash attention. `:small` is a CPU's share of it: four blocks of width 64 on
the bytes of 8 documents. `:plain,tiny` is the small GPT-2 that configs/gpt2_e2e.py:small is
fine-tuned from: 1.7M parameters, all documents.

The data: `python -m train.prepare openwebtext_sample --from openwebtext.jsonl`. Tokens: GPT-2's, by
tiktoken.

Ours: not run at this size yet.
"""
# what a group of a ConfigDict has, no type knows
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

from ml_collections import ConfigDict

from configs import common

RUNS = {"bdia": common.BDIA, "plain": common.PLAIN}
PAPER: dict[str, float] = {}
METRIC = "loss"
_BYTES = dict(tokenizer="bytes", length=128)
SCALES = {
    "smoke": dict(
        common.SMOKE,
        dataset="pydoc",
        train_split="train[:3]",
        eval_split="validation[:1]",
        input=_BYTES,
        model=dict(width=16, depth=2, num_heads=2, mlp_dim=32),
        batch_size=8,
    ),
    "small": dict(
        train_split="train[:8]",
        eval_split="validation[:8]",
        input=_BYTES,
        model=dict(width=64, depth=4, num_heads=4, mlp_dim=256),
        learning_rate=3e-3,
        batch_size=8,
        num_steps=2500,
        warmup_steps=100,
        log_every_steps=50,
        eval_every_steps=250,
        checkpoint_every_steps=2500,
    ),
    "tiny": dict(
        input=dict(tokenizer="bpe", vocab_size=4096, length=128, isolate_documents=False),
        model=dict(width=128, depth=6, num_heads=4, mlp_dim=512, dtype="float32"),
        learning_rate=2e-3,
        batch_size=16,
        num_steps=2500,
        warmup_steps=100,
        log_every_steps=100,
        eval_every_steps=1250,
        checkpoint_every_steps=500,
    ),
}


def get_config(arg: str | None = None) -> ConfigDict:
    config = common.defaults()
    config.update(task="language", dataset="openwebtext_sample")
    config.input = dict(tokenizer="gpt2", vocab_size=0, length=1024, isolate_documents=True)
    config.model = dict(name="gpt2", width=768, depth=12, num_heads=12, mlp_dim=3072)
    config.model.update(dropout_rate=0.0, dtype="bfloat16")
    config.update(optimizer="adamw", b2=0.95, weight_decay=0.1, grad_clip_norm=1.0)
    config.update(schedule="cosine", learning_rate=6e-4, warmup_steps=100)
    config.update(batch_size=32, num_steps=2_000)
    config.update(log_every_steps=20, eval_every_steps=100, checkpoint_every_steps=500)
    return common.choose(config, arg, RUNS, SCALES)
