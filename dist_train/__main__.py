"""Entry point of `python -m dist_train`, the same as `dist-train`, for `torchrun -m dist_train train -c ...`."""

from dist_train.cli import main

if __name__ == "__main__":
    main()
