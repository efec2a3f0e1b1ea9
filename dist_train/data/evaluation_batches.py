"""Evaluation batches: each example of a split once, on exactly one rank."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from dist_train.config.schema import Config
from dist_train.data.batches import Batch, ToDevice, is_resident
from dist_train.data.loader import make_loader, stream
from dist_train.data.resident_set import tensors_of
from dist_train.data.sampler import evaluation_shard
from dist_train.data.sets.image_set import Examples, ImageSet, num_examples, yields_pixels
from dist_train.data.transforms import Pixels
from dist_train.data.views import other_views
from dist_train.distributed.rng import derive_seed
from dist_train.distributed.world import World

# A convolution's output should fit in a CPU's caches, and a forward pass in a GPU's memory.
# 10 000 images on two cores: conv takes 1.3 s in batches of 256 and 2.2 s of 512; mlp 11 ms of 256 and 9 of 1000.
_BATCH_SIZE = 256
_KEPT_PIXELS = 16 * 2**20  # 64 MiB as fp32: MNIST's test set takes 30


class EvaluationBatches:
    """One pass over a rank's shard of a split. `num_batches` is equal on all ranks; a shard may have fewer."""

    def __init__(
        self,
        examples: Examples,
        shard: Tensor,
        batch_size: int,
        num_batches: int,
        resident: bool,
        pixels: Pixels | None,
        device: torch.device,
        num_workers: int,
        seed: int,
        tta: str | None = None,
    ) -> None:
        self.examples = examples  # the whole split
        self.num_examples = num_examples(examples)
        self.num_batches = num_batches
        self._tta = tta
        self._chunks = torch.split(shard, batch_size) if len(shard) else ()
        self._to_device = ToDevice(pixels, device)
        self._seed = seed
        self._resident = None
        if resident and (tensors := tensors_of(examples)):
            inputs, targets = (each.to(device) for each in tensors)
            self._resident = inputs, targets
            self._keeps = len(shard) * inputs[0].numel() <= _KEPT_PIXELS
        self._kept: dict[int, tuple[Batch, tuple[int, ...]]] = {}
        # One loader for all passes: its workers persist between them.
        keys = [[(0, index) for index in chunk.tolist()] for chunk in self._chunks]
        self._loader = make_loader(examples, keys, num_workers, device, derive_seed(seed, "evaluation"))

    def __iter__(self) -> Iterator[Batch]:
        if self._resident is None:
            yield from map(self._to_device, stream(self._loader))
            return
        for number, chunk in enumerate(self._chunks):
            batch, versions = self._kept.get(number, (None, ()))
            if batch is None or _versions(batch) != versions:  # not kept, or changed in place by the net
                batch = self._gather(chunk, *self._resident)
                if self._keeps:
                    self._kept[number] = batch, _versions(batch)
            yield batch

    def _gather(self, chunk: Tensor, inputs: Tensor, targets: Tensor) -> Batch:
        indices = chunk.to(inputs.device)
        return self._to_device((inputs.index_select(0, indices), targets.index_select(0, indices), chunk))

    def other_views(self, batch: Batch) -> list[tuple[float, Tensor]]:
        """Return the views in which the batch is evaluated too, as `views.other_views`; none without data.tta."""
        return other_views(batch.inputs, self._tta) if self._tta else []

    def seed_of(self, batch: Batch) -> int:
        """Return a seed for nets that draw random numbers in evaluation (a VAE, active dropout); a resume keeps it."""
        return derive_seed(self._seed, "evaluation forward", int(batch.indices[0]))


def _versions(batch: Batch) -> tuple[int, ...]:
    """Return the in-place modification counter of each tensor."""
    return batch.inputs._version, batch.targets._version


def evaluation_batches(examples: Examples, net: nn.Module, world: World, config: Config) -> EvaluationBatches:
    """Return this rank's shard of a split, with a batch size that suits the net."""
    total = num_examples(examples)
    largest_shard = -(-total // world.size)
    device = world.device
    resident = is_resident(examples, config.data, device)
    batch_size = _BATCH_SIZE if config.per_device_batch_size == "auto" else config.per_device_batch_size
    # A user's set keeps the batches of streaming, and so its results to the bit.
    if not (resident and isinstance(examples, ImageSet) and device.type == "cpu") or any(
        isinstance(module, _ConvNd) for module in net.modules()
    ):
        batch_size = min(batch_size, _BATCH_SIZE)
    return EvaluationBatches(
        examples,
        evaluation_shard(total, world.rank, world.size),
        batch_size=batch_size,
        num_batches=-(-largest_shard // batch_size),
        resident=resident,
        pixels=Pixels(config.data.normalize, device) if yields_pixels(examples) else None,
        device=device,
        num_workers=config.data.num_workers,
        seed=config.seed,
        tta=config.data.tta,
    )
