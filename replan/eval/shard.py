"""Several editors side by side: accelerate's launcher starts the processes, each takes its share of the items."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from replan.backbones.runtime import Runtime
from replan.errors import ConfigError, ReplanError

LONGEST = timedelta(days=30)  # that the first process to finish waits for the last
USERS_MISTAKE = 2  # the exit code


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

    state = PartialState(cpu=runtime.torch_device().type == "cpu", timeout=LONGEST)
    # not cpu:0: moving weights there copies them, and elsewhere in memory the last bit of a sum may come out otherwise
    own = str(state.device)
    device = "cpu" if own.startswith("cpu") else own
    return Shard(state.process_index, state.num_processes), replace(runtime, device=device)


def leave() -> None:
    """Wait for the other processes and end the group that this_shard joined.

    The launcher ends all when one ends with an error, as one with failed items does: by then the others must be done.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()
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
    # its lines name processes and signals by number only; what failed is said below
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch_command(launch_command_parser().parse_args(words))
    except SystemExit as left:
        if left.code:
            raise LaunchError(f"one of {processes} processes failed; the same command resumes") from left
    except Exception as error:  # torch's elastic launcher wraps a child's failure, and signals, in errors of its own
        name = type(error).__name__
        if name == "SignalException":
            raise _stopped(getattr(error, "sigval", 0)) from None
        if name not in ("ChildFailedError", "CalledProcessError"):
            raise
        raise _failure(error, processes) from error


def _stopped(number: int) -> BaseException:
    """A signal to the launcher, which has passed it on: what Ctrl-C does without a launcher, or an error."""
    if number == signal.SIGINT:
        return KeyboardInterrupt()
    return LaunchError(f"stopped by signal {int(number)}; the same command resumes")


def _failure(error: Any, processes: int) -> ReplanError:
    """What a process has said already is not said again, but the user's mistake stays one."""
    failures: dict[int, Any] = getattr(error, "failures", {})
    rank, failure = min(failures.items(), key=lambda each: each[1].timestamp, default=(None, None))
    if failure is None:
        return LaunchError(f"one of {processes} processes failed; the same command resumes")
    if failure.exitcode == USERS_MISTAKE:
        return ConfigError(f"process {rank} of {processes} refused, as it says above")
    ended = f"by signal {-failure.exitcode}" if failure.exitcode < 0 else f"with exit code {failure.exitcode}"
    return LaunchError(f"process {rank} of {processes} ended {ended}; the same command resumes")
