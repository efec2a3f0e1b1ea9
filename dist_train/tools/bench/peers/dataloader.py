"""The loop of the PyTorch tutorials: torchvision's MNIST through a DataLoader."""

from itertools import islice

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from dist_train.config.paths import default_data_root
from dist_train.tools.bench.task import MEAN, STD, Task, task_of_this_process
from dist_train.torchvision_compat import import_torchvision


def loader_of(task: Task) -> DataLoader[tuple[Tensor, Tensor]]:
    torchvision = import_torchvision()
    transforms = torchvision.transforms
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((MEAN,), (STD,))])
    dataset = torchvision.datasets.MNIST(default_data_root(), train=True, transform=transform)
    return DataLoader(
        dataset, task.batch_size, shuffle=True, drop_last=True, num_workers=task.num_workers,
        persistent_workers=task.num_workers > 0, pin_memory=task.device.type == "cuda",
    )  # fmt: skip


def main() -> None:
    task = task_of_this_process()
    loader = loader_of(task)
    net = task.new_net().to(task.device)
    optimizer = torch.optim.Adam(net.parameters(), lr=task.lr)
    for steps in task.rounds():
        for images, labels in islice(loader, steps):
            images, labels = images.to(task.device, non_blocking=True), labels.to(task.device, non_blocking=True)
            with torch.autocast(task.device.type, torch.bfloat16, enabled=task.precision == "bf16"):
                loss = cross_entropy(net(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    task.report(net)


if __name__ == "__main__":
    main()
