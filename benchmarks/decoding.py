"""Loss against BLEU of fine-tuned runs: python -m benchmarks.decoding runs/e2e_200/plain runs/...

Each is a workdir of configs/gpt2_e2e.py. Token by token on the evaluation set: the loss, the loss
once the logits are divided by the temperature that suits best (what is left is not calibration),
how often the likeliest token is right, the entropy; and the loss of the mean prediction of
networks drawn with gamma, as in training. Then the sentences by beams of several sizes and length
penalties, in fixed and in floating point: BLEU, and the length of the outputs over that of the
nearest reference.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import sacrebleu
from flax import nnx

from benchmarks import record
from train.data.text import by_first, read_texts
from train.inference.open_run import open_run
from train.run.pretrained import FOLDER
from train.tasks import load_task
from train.tasks.data_to_text import Sentences, encode_prompts, say

TEMPERATURES = tuple(float(each) for each in np.geomspace(0.5, 3.0, 19).round(3))
DRAWS = 8  # of gamma
# (beam, length penalty, fixed point)
DECODINGS = ((1, 0.9, True), (4, 0.9, True), (10, 0.9, True), (10, 0.0, True), (10, 0.9, False))


def measure(workdir: str, sentences: int, decodings: Any) -> dict[str, Any]:
    """What is said above, of one run."""
    opened = open_run(workdir)
    model: Any = opened.model
    tokenizer, config = opened.tokenizer, opened.config
    assert config is not None and tokenizer is not None
    config = dataclasses.replace(config, init_from=str(Path(workdir) / FOLDER))
    (held_out,) = load_task(config).eval_groups
    results: dict[str, Any] = {"gamma": config.gamma, "tokens": by_token(model, held_out, 50)}
    features = "meaning_representation", "reference"
    rows = read_texts(config.dataset, config.eval_split, config.data_dir, *features)
    references = dict([*by_first([*rows]).items()][:sentences])
    prompts, lengths = encode_prompts([*references], tokenizer, config.input.length)
    fixed_point = model.stack.fixed_point
    for beam, penalty, is_fixed in decodings:
        options = dataclasses.replace(config.input, beam_size=beam, length_penalty=penalty)
        model.stack.fixed_point = fixed_point if is_fixed else None
        model.stack.backprop = "store"
        said = say(model, prompts, lengths, tokenizer, options, config.batch_size)
        name = f"beam_{beam}_penalty_{penalty}" + ("" if is_fixed else "_float")
        results[name] = row = scores(said, [*references.values()])
        print(f"{workdir} {name} {row}", flush=True)
    return results


def scores(said: list[str], references: list[list[str]]) -> dict[str, Any]:
    longest = max(map(len, references))
    streams = [[each[i] if i < len(each) else None for each in references] for i in range(longest)]
    score: Any = sacrebleu.corpus_bleu(said, streams, lowercase=True, smooth_method="none")  # pyright: ignore[reportArgumentType]
    return {
        "bleu": score.score,
        "precisions": score.precisions,
        "brevity_penalty": score.bp,
        "length_over_references": score.sys_len / score.ref_len,
        "different": len(set(said)) / len(said),
    }


def by_token(model: Any, held_out: Sentences, batch_size: int) -> dict[str, Any]:
    """Means over the tokens of the references."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def sums(state, tokens, start, stop):
        place = jnp.arange(1, tokens.shape[1])
        counts = (place >= start[:, None]) & (place < stop[:, None])
        targets = tokens[:, 1:]

        def logits(rngs):
            here = nnx.merge(graphdef, state)
            here.train() if rngs is not None else here.eval()
            return here.logits(here.features(tokens[:, :-1], rngs=rngs)).astype(jnp.float32)

        def loss(log_p):
            at = jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
            return -jnp.where(counts, at, 0.0).sum()

        def mean_of(each):
            return jnp.where(counts, each, 0.0).sum()

        at_zero = logits(None)
        log_p = jax.nn.log_softmax(at_zero)
        drawn = [jax.nn.log_softmax(logits(nnx.Rngs(n))) for n in range(DRAWS)]
        mean = jax.nn.logsumexp(jnp.stack(drawn), 0) - jnp.log(DRAWS)
        return {
            "count": counts.sum(),
            "loss": loss(log_p),
            "accuracy": mean_of(at_zero.argmax(-1) == targets),
            "entropy": mean_of(-(jnp.exp(log_p) * log_p).sum(-1)),
            "loss_of_a_draw": loss(drawn[0]),
            "loss_of_mean_draw": loss(mean),
            "accuracy_of_mean_draw": mean_of(mean.argmax(-1) == targets),
            "by_temperature": jnp.stack(
                [loss(jax.nn.log_softmax(at_zero / each)) for each in TEMPERATURES]
            ),
        }

    batches = range(0, len(held_out.tokens), batch_size)
    parts = [sums(state, *(leaf[i : i + batch_size] for leaf in held_out)) for i in batches]
    totals = jax.tree.map(lambda *leaves: np.sum(leaves, 0, dtype=np.float64), *parts)
    count = totals.pop("count")
    means = {name: total / count for name, total in totals.items()}
    losses = means.pop("by_temperature")
    best = int(losses.argmin())
    found = {name: float(mean) for name, mean in means.items()}
    return found | {"best_temperature": TEMPERATURES[best], "loss_at_it": float(losses[best])}


def main(argv: list[str]) -> dict[str, Any]:
    """Measures each run and records all."""
    options = record.parser(__doc__)
    options.add_argument("workdirs", nargs="+")
    options.add_argument("--sentences", type=int, default=100, help="to say")
    args = record.parse(options, argv)
    decodings = DECODINGS[:1] if args.toy else DECODINGS
    names = {Path(each).name: each for each in args.workdirs}
    if len(names) < len(args.workdirs):
        options.error(f"{args.workdirs} has two of one name; a result is known by the last folder")
    results = {name: measure(each, args.sentences, decodings) for name, each in names.items()}
    config = {"temperatures": TEMPERATURES, "draws": DRAWS, "sentences": args.sentences}
    record.write("decoding", results, config, argv=argv, args=args)
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
