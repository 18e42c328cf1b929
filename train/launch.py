"""Several processes on this machine: python -m train.launch --processes=4 -- ARGUMENTS

ARGUMENTS, such as --config=configs/vit_digits.py --workdir=runs/digits --config.mesh.data=-1, go
to `python -m train` of each process; mesh.data=-1 takes all devices of all processes. If one
process ends badly the others are stopped; SIGTERM and Ctrl-C are handed on. On several machines a
job manager starts the processes: see docs/devices.md.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from absl import flags

from train import cli

_PROCESSES = flags.DEFINE_integer("processes", 2, "How many.", lower_bound=1)
_DEVICES = flags.DEFINE_integer(
    "devices", 1, "CPU devices of each process; of GPUs each gets its share.", lower_bound=1
)
_FORCE = "--xla_force_host_platform_device_count="


def launch(arguments: Sequence[str], processes: int, devices: int = 1) -> int:
    """Runs `python -m train` in so many processes, and returns the first bad exit status, or 0.

    Args:
        arguments: of `python -m train`, without those that join the processes.
        processes: how many.
        devices: CPU devices of each.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    kept = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if _FORCE not in flag]
    environment = os.environ | {"XLA_FLAGS": " ".join([*kept, f"{_FORCE}{devices}"])}
    gpus = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    running = []
    for index in range(processes):
        joining = [f"--coordinator={address}", f"--num_processes={processes}"]
        command = [sys.executable, "-m", "train", *arguments, *joining, f"--process_id={index}"]
        own = {"CUDA_VISIBLE_DEVICES": ",".join(gpus[index::processes])} if gpus else {}
        running.append(subprocess.Popen(command, env=environment | own))
    before = {
        number: signal.signal(number, lambda number, _: _signal(running, number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        return _wait(running)
    finally:
        _signal(running, signal.SIGKILL)
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(running: list[subprocess.Popen]) -> int:
    """Until all have ended well, or one has not and the others were given time to notice."""
    while True:
        statuses = [process.poll() for process in running]
        bad = [status for status in statuses if status]
        if bad:
            _signal(running, signal.SIGTERM)
            time.sleep(3)
            return bad[0] if bad[0] > 0 else 128 - bad[0]
        if None not in statuses:
            return 0
        time.sleep(0.1)


def _signal(running: list[subprocess.Popen], number: int) -> None:
    for process in running:
        if process.poll() is None:
            process.send_signal(number)


def main(argv):
    sys.exit(launch(argv[1:], _PROCESSES.value, _DEVICES.value))


if __name__ == "__main__":
    cli.run(main)
