"""Start processes and jobs: torchrun, sweeps, Slurm."""
