"""A step of the paper's public PyTorch code each time a line comes in.

Run by `benchmarks.step_cost` in a Python that has torch: the network is imported
from the checkout, the step is the one of its training script on a fixed batch.
"""

import pathlib
import sys

import torch

reference_dir, batch_size, penalised = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "1"
sys.path.insert(0, str(pathlib.Path(reference_dir) / "cifar10"))
import models  # noqa: E402  (of the checkout)

torch.manual_seed(0)
network = models.ResNeXt34_2x32().train()
optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
criterion = torch.nn.CrossEntropyLoss(reduction="none")
images = torch.rand(batch_size, 3, 32, 32)
labels = torch.randint(0, 10, (batch_size,))
STEP, WEIGHT = 1e-2, 0.1

for _ in sys.stdin:
    optimizer.zero_grad()
    x = images.clone().requires_grad_(penalised)
    losses = criterion(network(x), labels)
    loss = losses.mean()
    if penalised:
        (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
        flat = gradient.flatten(1)
        direction = (flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-30)).view_as(x)
        ahead = criterion(network((x + STEP * direction).detach()), labels)
        loss = loss + WEIGHT * ((ahead - losses) / STEP).square().mean() / 2
    loss.backward()
    optimizer.step()
    print("done", flush=True)
