"""Several editors side by side: accelerate's launcher starts the processes, each takes its share of the items."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from replan.backbones.runtime import Runtime
from replan.errors import ConfigError, ReplanError


class LaunchError(ReplanError, RuntimeError):
    """A process of a launched run failed."""


@dataclass(frozen=True, slots=True)
class Shard:
    """This process among those of the run: it takes the items index, index + count, ..."""

    index: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        return self.index == 0


def this_shard(runtime: Runtime) -> tuple[Shard, Runtime]:
    """Which share of the items this process takes and on which device; all on the given one unless it was launched."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return Shard(), runtime
    from accelerate import PartialState

    state = PartialState(cpu=runtime.torch_device().type == "cpu")
    # not cpu:0: moving weights there copies them, and elsewhere in memory the last bit of a sum may come out otherwise
    own = str(state.device)
    device = "cpu" if own.startswith("cpu") else own
    return Shard(state.process_index, state.num_processes), replace(runtime, device=device)


def leave() -> None:
    """End the process group that this_shard joined."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState().destroy_process_group()


def launch(processes: int, runtime: Runtime, arguments: Sequence[str]) -> None:
    """Run `replan ARGUMENTS` in several processes through accelerate's launcher. Raises LaunchError when one fails.

    The arguments must not ask for several processes again.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser

    # --multi_gpu is what makes accelerate start several processes, on a CPU too; a process takes runtime.device then.
    words = ["--multi_gpu", "--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"]
    words += ["--dynamo_backend", "no", "--main_process_port", "0", "--module", "replan", *arguments]
    if runtime.device.partition(":")[2]:
        raise ConfigError(f"runtime.device = {runtime.device}: each of the processes takes its own; say cuda")
    try:
        launch_command(launch_command_parser().parse_args(words))
    except SystemExit as left:
        if left.code:
            raise LaunchError(f"one of {processes} processes failed; the same command resumes") from left
    except Exception as error:  # torch's elastic launcher wraps a child's failure in errors of its own
        if type(error).__name__ not in ("ChildFailedError", "CalledProcessError"):
            raise
        raise LaunchError(f"one of {processes} processes failed; the same command resumes") from error
