"""The batches of an evaluation: every example of a split on just one rank, once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dist_train.batching import evaluation_shard
from dist_train.config import DataConfig
from dist_train.data.batches import Batch, Placing, is_resident
from dist_train.data.image_set import Examples, ImageSet, num_examples
from dist_train.data.loader import loader_of, stream
from dist_train.data.pixels import Pixels, yields_pixels
from dist_train.distributed import World
from dist_train.seeding import derive_seed


class EvaluationBatches:
    """One rank's shard of a split, once over. Every rank has `num_batches`, the last of them may be empty."""

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
    ) -> None:
        self.num_examples = len(examples)  # type: ignore[arg-type]  # of the whole split
        self.num_batches = num_batches
        self._chunks = torch.split(shard, batch_size) if len(shard) else ()
        self._place = Placing(pixels, device)
        self._seed = seed
        self._resident = None
        if resident and isinstance(examples, ImageSet):
            self._resident = examples.images.to(device), examples.labels.to(device)
        # One for all passes: its workers live on between them.
        keys = [[(0, index) for index in chunk.tolist()] for chunk in self._chunks]
        self._loader = loader_of(examples, keys, num_workers, device, derive_seed(seed, "evaluation"))

    def __iter__(self) -> Iterator[Batch]:
        if self._resident is None:
            yield from map(self._place, stream(self._loader))
            return
        images, labels = self._resident
        for chunk in self._chunks:
            here = chunk.to(images.device)
            yield self._place((images.index_select(0, here), labels.index_select(0, here), chunk))

    def seed_of(self, batch: Batch) -> int:
        """For nets that draw in evaluation too (a VAE, dropout kept on): the same after any resume."""
        return derive_seed(self._seed, "evaluation forward", int(batch.indices[0]))


def evaluation_batches(
    examples: Examples, batch_size: int, world: World, config: DataConfig, seed: int
) -> EvaluationBatches:
    """This rank's shard of a split."""
    total = num_examples(examples)
    largest_shard = -(-total // world.size)
    device = world.device
    return EvaluationBatches(
        examples,
        evaluation_shard(total, world.rank, world.size),
        batch_size=batch_size,
        num_batches=-(-largest_shard // batch_size),
        resident=isinstance(examples, ImageSet) and is_resident(examples, config, device),
        pixels=Pixels(config.normalize, device) if yields_pixels(examples) else None,
        device=device,
        num_workers=config.num_workers,
        seed=seed,
    )
