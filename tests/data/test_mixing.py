"""Mixup and cutmix: against a loop over the global batch, for every division of it, and as a distribution."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from dist_train.config.batch_plan import BatchPlan
from dist_train.data.batches import Batch, Batches
from dist_train.data.mixing import Mixed
from dist_train.data.sets.image_set import ImageSet
from dist_train.errors import ConfigError
from dist_train.models.nets import Mlp
from dist_train.models.tasks.losses import CrossEntropy
from dist_train.models.tasks.objective import Objective, count_correct
from support.divided_batches import GLOBAL, STEPS, WHOLE, batches, check_division, every_division, random_images

CLASSES = 4
CHANGES = {"shift": 2, "flip": "alternate"}
MIXED: dict[str, dict[str, object]] = {"mixup": {"mixup_alpha": 0.4}, "cutmix": {"cutmix_alpha": 1.0},
         "both": {"mixup_alpha": 0.4, "cutmix_alpha": 1.0}}  # fmt: skip
every_kind = pytest.mark.parametrize("kind", MIXED.values(), ids=MIXED)


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return random_images()


def mixed_batches(images: ImageSet, plan: BatchPlan, kind: dict[str, object]) -> Batches:
    return batches(images, plan, 0, augment=CHANGES | kind)


def rows(batch: Batch) -> Iterable[tuple[Tensor, ...]]:
    """Return the image, both labels and the share of each example."""
    labels, others, share = batch.targets
    return zip(batch.inputs, labels, others, share.expand(len(batch)), strict=True)


@every_kind
@every_division
def test_mixed_images_are_equal_for_any_division(
    plan: BatchPlan, settings: dict[str, object], kind: dict[str, object], images: ImageSet
) -> None:
    check_division(images, plan, STEPS, rows, CHANGES | kind, **settings)


@every_kind
def test_each_image_is_mixed_with_the_one_before_it(kind: dict[str, object], images: ImageSet) -> None:
    plain, mixed = mixed_batches(images, WHOLE, {}), mixed_batches(images, WHOLE, kind)
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
    alone, both = (mixed_batches(images, WHOLE, MIXED[kind]) for kind in ("mixup", "both"))
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
        mixed_batches(images, BatchPlan(1, 1, 1), MIXED["mixup"])
