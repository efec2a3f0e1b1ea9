"""Lightning's Trainer, with everything but training turned off."""

import time

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from dist_train.tools.bench.peers.dataloader import loader_of
from dist_train.tools.bench.task import Task, task_of_this_process
from dist_train.torchvision_compat import import_torchvision

import_torchvision()  # Lightning imports it, and crashes if its operators do not match torch
import lightning  # noqa: E402


class Classifier(lightning.LightningModule):
    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task, self.net = task, task.new_net()

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        images, labels = batch
        return cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.task.lr)

    def on_train_epoch_start(self) -> None:
        self.started = time.perf_counter()

    def on_train_epoch_end(self) -> None:
        self.task.seconds = time.perf_counter() - self.started  # of the second epoch


def main() -> None:
    task = task_of_this_process()
    trainer = lightning.Trainer(
        max_epochs=2, limit_train_batches=task.steps, devices=1,
        precision="bf16-mixed" if task.precision == "bf16" else "32-true", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Classifier(task)
    trainer.fit(module, loader_of(task))
    task.report(module.net.to(task.device))


if __name__ == "__main__":
    main()
