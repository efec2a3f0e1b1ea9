"""Mixup and cutmix: against a loop over the global batch, for every division of it, and as a distribution."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from dist_train.config.batch_plan import BatchPlan
from dist_train.config.data import DataConfig
from dist_train.data.batches import Batches, training_batches
from dist_train.data.mixing import Mixed
from dist_train.data.sampler import ShardSampler
from dist_train.data.sets.image_set import ImageSet
from dist_train.errors import ConfigError
from dist_train.models.nets import Mlp
from dist_train.models.tasks.losses import CrossEntropy
from dist_train.models.tasks.objective import Objective, count_correct

GLOBAL, CLASSES = 24, 4
WHOLE = BatchPlan(GLOBAL, 1, 1)
STEPS = (0, 3, 4, 9)  # four steps per epoch
CHANGES = {"shift": 2, "flip": "alternate"}
MIXED: dict[str, dict[str, object]] = {"mixup": {"mixup_alpha": 0.4}, "cutmix": {"cutmix_alpha": 1.0},
         "both": {"mixup_alpha": 0.4, "cutmix_alpha": 1.0}}  # fmt: skip
every_kind = pytest.mark.parametrize("kind", MIXED.values(), ids=MIXED)


@pytest.fixture(scope="module")
def images() -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(1, 256, (100, 3, 7, 9), dtype=torch.uint8, generator=generator)
    return ImageSet(pixels, torch.arange(100) % CLASSES, tuple("abcd"))


def batches(images: ImageSet, plan: BatchPlan, rank: int, augment: dict[str, object], **settings: object) -> Batches:
    config = DataConfig.model_validate({"augment": CHANGES | augment, **settings})
    return training_batches(images, ShardSampler(len(images), plan, rank, 5), config, torch.device("cpu"), seed=5)


def by_example(source: list[Batches], plan: BatchPlan, step: int) -> dict[int, tuple[Tensor, ...]]:
    """Return the image, both labels and the share of each example of a global batch."""
    found: dict[int, tuple[Tensor, ...]] = {}
    for each in source:
        for micro_step in range(plan.grad_accum_steps):
            batch = each.at(step, micro_step)
            labels, others, share = batch.targets
            assert len(batch) == len(batch.inputs) == plan.per_device_batch_size
            rows = zip(batch.inputs, labels, others, share.expand(len(batch)), strict=True)
            found |= dict(zip(batch.indices.tolist(), rows, strict=True))
    return found


@every_kind
@pytest.mark.parametrize(
    ("plan", "settings"),
    [
        (BatchPlan(12, 1, 2), {}),
        (BatchPlan(2, 4, 3), {}),
        (BatchPlan(8, 3, 1), {"resident": False}),
        (BatchPlan(4, 3, 2), {"resident": False, "num_workers": 2}),
    ],
    ids=["two", "three-micro", "streamed-micro", "workers"],
)
def test_mixed_images_are_equal_for_any_division(
    plan: BatchPlan, settings: dict[str, object], kind: dict[str, object], images: ImageSet
) -> None:
    source = [batches(images, plan, rank, kind, **settings) for rank in range(plan.world_size)]
    for step in STEPS:
        whole = by_example([batches(images, WHOLE, 0, kind)], WHOLE, step)
        divided = by_example(source, plan, step)
        assert len(whole) == GLOBAL
        assert whole.keys() == divided.keys()
        assert all(torch.equal(*pair) for key in whole for pair in zip(whole[key], divided[key], strict=True))


@every_kind
def test_each_image_is_mixed_with_the_one_before_it(kind: dict[str, object], images: ImageSet) -> None:
    plain, mixed = batches(images, WHOLE, 0, {}), batches(images, WHOLE, 0, kind)
    cut = 0
    for step in range(20):
        own, made = plain.at(step, 0), mixed.at(step, 0)
        assert torch.equal(made.indices, own.indices)
        other, share = own.inputs.roll(1, dims=0), made.targets.share
        assert torch.equal(made.targets.labels, own.targets)
        assert torch.equal(made.targets.others, own.targets.roll(1))
        is_cut = bool(((made.inputs == own.inputs) | (made.inputs == other)).all())
        cut += is_cut
        if is_cut:
            from_other = (made.inputs != own.inputs).any(dim=(0, 1))  # [H, W]: one rectangle
            rows, columns = from_other.any(dim=1), from_other.any(dim=0)
            assert torch.equal(from_other, rows[:, None] & columns)
            assert int(rows.diff().sum()) <= 2
            assert int(columns.diff().sum()) <= 2
            assert float(share) == pytest.approx(1 - from_other.float().mean().item(), abs=1e-6)
        else:
            assert torch.allclose(made.inputs, share * own.inputs + (1 - share) * other, atol=1e-6)
    assert (cut == 20) if "mixup_alpha" not in kind else (cut == 0) if "cutmix_alpha" not in kind else 0 < cut < 20


def test_shares_are_those_of_beta_and_kinds_equally_likely(images: ImageSet) -> None:
    """Of 1000 steps. Beta(0.4, 0.4) has the variance 1 / 4 / 1.8; off by more than 5 sigma once in 10^6."""
    alone, both = batches(images, WHOLE, 0, MIXED["mixup"]), batches(images, WHOLE, 0, MIXED["both"])
    shares = torch.stack([alone.at(step, 0).targets.share for step in range(1000)])
    assert abs(shares.mean() - 0.5) < 5 * (shares.var() / 1000) ** 0.5
    assert shares.var() == pytest.approx(1 / 4 / 1.8, rel=0.1)
    pixels = 7 * 9
    areas = [float(both.at(step, 0).targets.share) * pixels for step in range(400)]
    assert abs(sum(abs(area - round(area)) < 1e-4 for area in areas) - 200) < 5 * 10


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_cross_entropy_with_soft_targets(smoothing: float) -> None:
    """It agrees with torch's for probabilities, gradient included; the label with the larger share counts."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(GLOBAL, CLASSES, dtype=torch.float64, generator=generator, requires_grad=True)
    labels, others = torch.randint(CLASSES, (2, GLOBAL), generator=generator)
    objective = Objective(Mlp(), CrossEntropy(smoothing))
    for share in (0.0, 0.3, 0.5, 1.0):
        targets = Mixed(labels, others, torch.tensor(share, dtype=torch.float64))
        soft = share * one_hot(labels, CLASSES).double() + (1 - share) * one_hot(others, CLASSES).double()
        expected = cross_entropy(logits, soft, label_smoothing=smoothing)
        loss = objective.loss(logits, targets)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
        gradient, expected_gradient = (torch.autograd.grad(each, logits)[0] for each in (loss, expected))
        assert torch.allclose(gradient, expected_gradient, rtol=0, atol=1e-15)
        counted = count_correct(logits, targets)
        assert counted is not None
        assert int(counted) == int((logits.argmax(dim=1) == (labels if share >= 0.5 else others)).sum())


def test_nothing_to_mix_with_is_refused(images: ImageSet) -> None:
    with pytest.raises(ConfigError, match="global_batch_size=1 leaves no other image"):
        batches(images, BatchPlan(1, 1, 1), 0, MIXED["mixup"])
