"""Start processes and jobs: torchrun, sweeps, the queue, Slurm."""
