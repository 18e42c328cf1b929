"""Fine-tuning SmolLM2-135M on Shakespeare: as configs/smollm2_e2e.py, on other text.

    python -m train.sweep --config=configs/smollm2_shakespeare.py --config.num_seeds=3
    python -m train.report runs/smollm2_shakespeare

The checkpoint and what is trained are those of configs/smollm2_e2e.py.

The data: `python -m train.prepare tinyshakespeare --from input.txt`.
"""

from ml_collections import ConfigDict

from configs import common, gpt2_openwebtext, smollm2_e2e

RUNS, PAPER, METRIC = smollm2_e2e.RUNS, smollm2_e2e.PAPER, smollm2_e2e.METRIC
SCALES = {"smoke": gpt2_openwebtext.SCALES["smoke"] | dict(init_from="")}


def get_config(arg: str | None = None) -> ConfigDict:
    config = smollm2_e2e.base()
    config.update(task="language", dataset="tinyshakespeare", eval_split="validation[:5]")
    config.input = dict(tokenizer="checkpoint", vocab_size=0, length=72, isolate_documents=False)
    return common.choose(config, arg, RUNS, SCALES)
