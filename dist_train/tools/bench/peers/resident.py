"""The bare loop over tensors on the device: the floor of eager PyTorch."""

import torch
from torch.nn.functional import cross_entropy

from dist_train.tools.bench.task import task_of_this_process


def main() -> None:
    task = task_of_this_process()
    images, labels = task.resident(train=True)
    net = task.new_net().to(task.device)
    optimizer = torch.optim.Adam(net.parameters(), lr=task.lr)
    for steps in task.rounds():
        order = torch.randperm(len(images), device=task.device)
        for batch in order.split(task.batch_size)[:steps]:
            with torch.autocast(task.device.type, torch.bfloat16, enabled=task.precision == "bf16"):
                loss = cross_entropy(net(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    task.report(net)


if __name__ == "__main__":
    main()
