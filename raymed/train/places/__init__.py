"""Where a training runs: this process, workers of Ray Train, or processes of torchrun and SLURM."""
