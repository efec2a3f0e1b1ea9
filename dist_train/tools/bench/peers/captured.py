"""The bare loop over tensors on the device, its step captured by hand as a CUDA graph: the limit of replaying."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from dist_train.tools.bench.task import task_of_this_process


def main() -> None:
    task = task_of_this_process()
    images, labels = task.resident(train=True)
    net = task.new_net().to(task.device)
    optimizer = torch.optim.Adam(net.parameters(), lr=task.lr, fused=True, capturable=True)
    indices = torch.arange(task.batch_size, device=task.device)

    def update(batch: Tensor) -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=task.precision == "bf16", cache_enabled=False):
            loss = cross_entropy(net(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            update(indices)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update(indices)

    for steps in task.rounds():
        order = torch.randperm(len(images), device=task.device)
        for batch in order.split(task.batch_size)[:steps]:
            indices.copy_(batch)
            graph.replay()
    task.report(net)


if __name__ == "__main__":
    main()
