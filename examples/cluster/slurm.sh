#!/bin/bash
# sbatch examples/cluster/slurm.sh: one process a GPU, 4 nodes of 8. The workdir is on a shared disk.
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --signal=TERM@120
#SBATCH --requeue
# SIGTERM two minutes before the time is over: the run saves and ends. Submitted again, or requeued
# by SLURM, it goes on from there, on as many nodes as it then has.
srun .venv/bin/python -m train --distributed \
    --config=configs/gpt2_openwebtext.py \
    --config.mesh.data=-1 --config.mesh.fsdp=8 \
    --config.checkpoint_every_steps=500 \
    --workdir=runs/gpt2
