"""The same loop with Accelerate, which prepares everything."""

from itertools import islice

import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy

from dist_train.tools.bench.peers.dataloader import loader_of
from dist_train.tools.bench.task import task_of_this_process


def main() -> None:
    task = task_of_this_process()
    accelerator = Accelerator(mixed_precision=task.precision)
    net = task.new_net()
    optimizer = torch.optim.Adam(net.parameters(), lr=task.lr)
    net, optimizer, loader = accelerator.prepare(net, optimizer, loader_of(task))
    for steps in task.rounds():
        for images, labels in islice(loader, steps):
            with accelerator.autocast():
                loss = cross_entropy(net(images), labels)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
    task.report(accelerator.unwrap_model(net, keep_fp32_wrapper=False))


if __name__ == "__main__":
    main()
