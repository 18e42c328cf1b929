"""How Orbax writes and reads the arrays of a state."""

import asyncio
import copy
from typing import Any

import jax
import orbax.checkpoint as ocp


def arrays_handler() -> ocp.PyTreeCheckpointHandler:
    """Orbax's own, of `patient` reads."""
    arrays = patient(ocp.type_handlers.get_type_handler(jax.Array))
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def patient(handler: Any) -> Any:
    """The handler; but when one of its reads fails, it waits for those beside it.

    Orbax would close the event loop below them, and Python then tells of each at length, some
    much later. (Of a write that fails it does: that is in a thread of Orbax.)
    """
    waiting = copy.copy(handler)

    async def deserialize(infos: Any, args: Any = None) -> Any:
        before = asyncio.all_tasks()
        try:
            return await type(handler).deserialize(waiting, infos, args)
        except Exception:
            await asyncio.gather(*asyncio.all_tasks() - before, return_exceptions=True)
            raise

    waiting.deserialize = deserialize
    return waiting
