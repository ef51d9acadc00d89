"""torch.compile for the blocks that a network repeats, each by itself."""

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

_REPORTED: set[str] = set()


def compile_blocks(network: nn.Module) -> None:
    """Let every repeated block run compiled from its next call on; names and tensors stay.

    Blocks that differ only in their weights share one program, so a deep network compiles in the
    time of a shallow one. What cannot be compiled runs as it stands, after a warning with the
    cause.
    """
    import torch._dynamo
    import torch._functorch.config as functorch

    # As many programs of a block's code as there are widths, strides and rates: 8 is too few.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.suppress_errors = True  # what cannot be traced: warned of by torch
    # DDP sends the gradients of a block during the backward pass of the next: nothing to cut.
    torch._dynamo.config.optimize_ddp = False
    # The backward pass is compiled with the forward one, where a failure can still be answered.
    functorch.force_non_lazy_backward_lowering = True
    blocks = list(repeated_blocks(network))
    if not blocks:
        log.warning("compile: the network repeats no block, so none is compiled")
    for block in blocks:
        block.compile(backend=_inductor_or_as_it_stands)


def repeated_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules that have siblings of their own class, torch's own classes apart."""
    kinds = Counter(type(child) for child in module.children())
    for child in module.children():
        of_torch = type(child).__module__.startswith("torch.")
        if kinds[type(child)] > 1 and not of_torch:
            yield child
        else:
            yield from repeated_blocks(child)


def _inductor_or_as_it_stands(
    graph: torch.fx.GraphModule, inputs: list[Tensor], **options: Any
) -> Any:
    from torch._dynamo.exc import RestartAnalysis
    from torch._inductor.compile_fx import compile_fx

    try:
        return compile_fx(graph, inputs, **options)
    except RestartAnalysis:  # no failure: it will be traced again
        raise
    except Exception as error:
        cause = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        if cause not in _REPORTED:
            _REPORTED.add(cause)
            log.warning("compile: goes on without, where it fails: %s", cause)
        return graph.forward
