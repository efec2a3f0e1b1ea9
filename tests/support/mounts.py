"""The skip marker of tests that mount their own disks: full, read-only, small."""

from __future__ import annotations

import os
import sys

import pytest

needs_mounts = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="mounting in a mount namespace needs Linux and root"
)
