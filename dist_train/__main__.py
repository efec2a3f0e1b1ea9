"""`python -m dist_train` is the `dist-train` command, so `torchrun -m dist_train train -c ...` works."""

from dist_train.cli import main

if __name__ == "__main__":
    main()
