"""Accuracy and time of configs/vit_digits.py for BDIA-ViT and the plain ViT, three seeds each."""

import statistics
import sys
import tempfile
import time

from benchmarks import record
from configs import vit_digits
from train.config import Config
from train.data import load_images
from train.train import make_program, make_schedule, planned_memory, train

SYSTEMS = {
    "bdia": {},
    "plain": {"gamma": 0.0, "quantize": False, "backprop": "store"},
}


def measure(changes: dict) -> dict:
    """One run from nothing: accuracy, seconds (compilation included), bytes of a step."""
    values = vit_digits.get_config().unlock()
    values.update(changes)
    config = Config.from_config_dict(values)
    data = load_images(config.dataset, config.train_split)
    _, step, _ = make_program(config, data, make_schedule(config))
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as workdir:
        accuracy = train(config, workdir)
    return {
        "accuracy": accuracy,
        "seconds": time.monotonic() - begin,
        "temp_bytes": planned_memory(step).temp_size_in_bytes,
    }


def main(argv: list[str]) -> dict:
    args = record.parse(record.parser(__doc__), argv)
    seeds = range(1 if args.toy else 3)
    shorter = {"num_steps": 4, "warmup_steps": 0} if args.toy else {}
    results = {}
    for name, system in SYSTEMS.items():
        runs = [measure({**system, **shorter, "seed": seed}) for seed in seeds]
        accuracies = [run["accuracy"] for run in runs]
        results[name] = {
            "runs": runs,
            "mean_accuracy": statistics.mean(accuracies),
            "std_accuracy": statistics.pstdev(accuracies),
        }
    config = {"config": "configs/vit_digits.py", "seeds": len(seeds), **shorter}
    record.write("digits", results, config, argv=argv, args=args)
    for name, result in results.items():
        print(f"{name}: {result['mean_accuracy']:.4f} +- {result['std_accuracy']:.4f}")
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
