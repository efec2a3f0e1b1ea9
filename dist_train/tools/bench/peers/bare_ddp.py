"""The bare loop over resident tensors under DistributedDataParallel; each rank takes its part of the batch."""

import json
import os

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from dist_train.distributed.devices import peak_memory_gib
from dist_train.tools.bench.task import task_of_this_process


def main() -> None:
    task = task_of_this_process()
    dist.init_process_group("nccl" if task.device.type == "cuda" else "gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    if task.device.type == "cuda":
        torch.cuda.set_device(rank)
    images, labels = task.resident(train=True)
    net = DistributedDataParallel(task.new_net().to(task.device))
    optimizer = torch.optim.Adam(net.parameters(), lr=task.lr)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).to(task.device)
    for steps in task.rounds():
        for batch in order.split(task.batch_size)[:steps]:
            mine = batch[rank::size]
            with torch.autocast(task.device.type, torch.bfloat16, enabled=task.precision == "bf16"):
                loss = cross_entropy(net(images[mine]), labels[mine])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    if rank == 0:
        speed = task.steps * task.batch_size / task.seconds
        print(json.dumps({"samples_per_s": speed, "peak_memory_gib": peak_memory_gib(task.device)}), flush=True)
    dist.barrier()
    os._exit(0)  # gloo's destructor can hang


if __name__ == "__main__":
    main()
