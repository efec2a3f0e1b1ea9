"""Starting processes and jobs: torchrun, sweeps, Slurm."""
