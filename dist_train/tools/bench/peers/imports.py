"""The imports that a training script waits for before its first line."""

import accelerate  # noqa: F401
import torch  # noqa: F401
