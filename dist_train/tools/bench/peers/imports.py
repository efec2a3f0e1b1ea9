"""What a training script has to wait for before its first line."""

import accelerate  # noqa: F401
import torch  # noqa: F401
