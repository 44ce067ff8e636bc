"""`replan demo`: the app in a browser."""

from __future__ import annotations

import threading
from typing import Annotated

import typer

from replan.cli import options
from replan.cli.options import MODELS, Flags
from replan.errors import ConfigError


def demo(
    backbone: Annotated[
        list[str] | None,
        typer.Option(
            "--backbone",
            "-b",
            metavar="NAME",
            rich_help_panel=MODELS,
            help="Editor, as in `replan edit`; given several times, the page offers a choice. Default: mini.",
        ),
    ] = None,
    planner: Annotated[
        list[str] | None,
        typer.Option("--planner", metavar="NAME", rich_help_panel=MODELS, help="Planner; may be given several times."),
    ] = None,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address to listen on; 0.0.0.0 lets everyone on the network in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="Port; 0 takes a free one.")] = 8080,
    share: Annotated[bool, typer.Option("--share", help="A public link through Gradio's servers.")] = False,
    lora: options.Lora = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    offload: options.Offload = None,
    quantize: options.Quantize = None,
    compile: options.Compile = None,
    attention: options.Attention = None,
    speed: options.Speed = None,
    vae_tiling: options.VaeTiling = None,
) -> None:
    """Open the app: plan, correct boxes and hints by hand, edit, compare. Without options on the mini models, offline.

    [bold]Examples[/bold]
      [cyan]replan demo[/cyan]                                             http://127.0.0.1:8080
      [cyan]replan demo --backbone flux-kontext --offload model[/cyan]
      [cyan]replan demo -b flux-kontext -b qwen-image-edit --port 9000[/cyan]
    """
    given = locals()
    from replan import config
    from replan.backbones.runtime import Runtime
    from replan.cli.console import out, say

    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ConfigError("replan demo needs Gradio: install replan[demo]") from error
    from replan.demo.serve import LOOPBACK, Place, running
    from replan.demo.studio import Studio

    names = ("device", "dtype", "offload", "quantize", "compile", "attention", "vae_tiling", "lora")
    runtime = config.load(Runtime, {}, [(name, given[name]) for name in names if given[name] is not None])
    if runtime.offload == "stages":
        raise ConfigError("offload = stages: the demo keeps planners and editors loaded; use --offload model")
    backbones = backbone or ["mini"]
    planners = planner or [str(Flags(backbone=backbones[0]).setup().planner)]
    studio = Studio.load(backbones, planners, runtime, speed)
    if share or host not in (LOOPBACK, "localhost"):
        say("warning: whoever can reach this address can use the models; there is no login")
    if backbones[0] == planners[0] == "mini":  # a matter of seconds, and then nobody waits; others load when first used
        say("loading the mini models")
        studio.warm()
    with running(studio, Place(host, port, share)) as address:
        out(address)
        threading.Event().wait()  # until Ctrl-C
