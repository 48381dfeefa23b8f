"""Batch normalisation where it needs care: of one value a channel, and in activations that are computed again."""

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class SafeBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation that uses its running statistics where a batch has one value a channel (a single image
    behind global pooling), which would be 0 whatever it was, and which torch refuses to train on."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.shape[0] * input.shape[2] * input.shape[3] == 1:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        return super().forward(input)


class StillStatistics:
    """A context, to be entered as often as one likes, in which the batch-norms of a module move copies of their
    running statistics.

    Without any they would save fewer tensors for the backward pass than the first time, which checkpointing
    refuses.
    """

    def __init__(self, module: nn.Module) -> None:
        self.norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
        self.kept: list[tuple[nn.Module, str, Tensor]] = []

    def __enter__(self) -> None:
        for norm in self.norms:
            for name, buffer in norm.named_buffers(recurse=False):
                self.kept.append((norm, name, buffer))
                setattr(norm, name, buffer.clone())

    def __exit__(self, *error: object) -> None:
        for norm, name, buffer in self.kept:
            setattr(norm, name, buffer)
        self.kept.clear()


def recomputation(module: nn.Module) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Contexts of a checkpointed module's first pass and of its repetition, which must not count twice."""
    return nullcontext(), StillStatistics(module)


def recomputed(module: nn.Module, *inputs: Tensor) -> Tensor:
    """`module(*inputs)`, whose activations are not kept but computed again in the backward pass.

    Batch-norm's running statistics move once, as without.
    """
    return checkpoint(module, *inputs, use_reentrant=False, context_fn=functools.partial(recomputation, module))
