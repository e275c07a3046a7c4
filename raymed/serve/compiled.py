"""torch.compile of a handler's modules (hardware.compile): all that is compiled is compiled when a model is loaded.

Nobody waits for the compiler. It works in the thread that loads the model, under a lock, since PyTorch runs nothing
that is compiled while another thread compiles: what is asked meanwhile runs as it is written, and so does, later, what
no graph fits. Two graphs fit nearly all, one of a lone item and one of any larger batch. What has gradients
(explanations) is never compiled.
"""

import threading
import weakref
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from raymed.config import UserError

_MOST_GRAPHS = 64
"""Of one class of networks; PyTorch's own bound, 8, is for programs that hold one model."""
_lock = threading.RLock()
_is_loading = ContextVar("is_loading", default=False)


class Compiled:
    """In place of `forward` of a module that takes one batch, of images of one size. It keeps no module alive."""

    def __init__(self, module: nn.Module):
        self._module = weakref.ref(module)
        self._plain: Callable[..., Any] = type(module).forward
        self._compiled = torch.compile(self._plain)

    def __call__(self, batch: Tensor) -> Any:
        """What the module gives for a batch."""
        if torch.is_grad_enabled() or not _lock.acquire(blocking=False):
            return self._plain(self._module(), batch)
        try:
            return self._run(batch)
        finally:
            _lock.release()

    def _run(self, batch: Tensor) -> Any:
        if not _is_loading.get():
            with torch.compiler.set_stance("eager_on_recompile"):
                return self._compiled(self._module(), batch)
        if len(batch) > 1:
            torch._dynamo.maybe_mark_dynamic(batch, 0)
        return self._compiled(self._module(), batch)


def compile_modules(
    modules: Sequence[nn.Module], run: Callable[[int], Any], sizes: Sequence[int], threads: int
) -> None:
    """Compile modules, in place. Blocks for a minute or so.

    run: runs them on a batch of so many items, just as requests will. sizes: those that it is called with. threads: of
    torch, in the thread that will run them; a graph is made for a number of threads.

    Raises:
        UserError: they cannot be compiled on this machine.
    """
    from torch._dynamo import config
    from torch._dynamo.exc import TorchDynamoException

    for module in modules:
        module.forward = Compiled(module)
    torch.set_num_threads(threads)
    token = _is_loading.set(True)
    try:
        with _lock, config.patch(recompile_limit=_MOST_GRAPHS):
            for size in sizes:
                run(size)
    except TorchDynamoException as error:
        raise UserError(
            f"hardware.compile: the networks cannot be compiled here ({type(error).__name__}): a C++ compiler (g++) is "
            "needed and, on a GPU, Triton. Without hardware.compile they are served as they are"
        ) from None
    finally:
        _is_loading.reset(token)
