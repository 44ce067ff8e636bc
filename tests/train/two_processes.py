"""One of several processes of a tiny run, as accelerate starts them: two_processes.py FOLDER NAME [KEY=VALUE ...].

accelerate shards on accelerators only. Where it was told to use FSDP and found CPUs, it is made to believe in GPUs
while it decides; all that follows is torch's and accelerate's own.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from tiny_run import TextScorer, settings

from replan.train import engine_trl


def shard_on_cpus() -> None:
    decide = AcceleratorState.__init__

    def decide_for_cpus(self: Any, *given: Any, **named: Any) -> None:
        PartialState(cpu=True)
        shared = PartialState._shared_state
        if shared["distributed_type"] == DistributedType.MULTI_CPU:
            shared["distributed_type"] = DistributedType.MULTI_GPU
        decide(self, *given, **named)

    AcceleratorState.__init__ = decide_for_cpus  # type: ignore[method-assign]


def tell_shards() -> None:
    """Print at the end how many parameters were sharded, of how many."""
    from torch.distributed.tensor import DTensor

    finish = engine_trl._finish

    def told(trainer: Any, config: Any) -> Path:
        parameters = list(trainer.model.parameters())
        sharded = sum(isinstance(each, DTensor) for each in parameters)
        print(f"sharded: {sharded} of {len(parameters)}", flush=True)
        return finish(trainer, config)

    engine_trl._finish = told


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_cpus()
    tell_shards()
    engine_trl.train(settings(Path(sys.argv[1]), *sys.argv[2:]), TextScorer())  # type: ignore[arg-type]
