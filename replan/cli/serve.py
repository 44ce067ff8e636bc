"""`replan serve`: editor and judge as HTTP services."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from replan.cli import options
from replan.cli.options import MODELS, Flags
from replan.errors import ConfigError

if TYPE_CHECKING:
    from replan.record import Setup
    from replan.serve.limits import Limits

serve = typer.Typer(help="Serve the editor or the judge over HTTP.", no_args_is_help=True)

SERVICE = "Service"
Host = Annotated[
    str,
    typer.Option(
        metavar="ADDRESS", rich_help_panel=SERVICE, help="Address to listen on; 0.0.0.0 lets everyone in: no login."
    ),
]
Port = Annotated[int, typer.Option(min=0, max=65535, metavar="N", rich_help_panel=SERVICE, help="0 takes a free one.")]
Queue = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", rich_help_panel=SERVICE, help="Requests that may wait; more get 429. 16."),
]
Timeout = Annotated[
    float | None,
    typer.Option(min=0.001, metavar="S", rich_help_panel=SERVICE, help="Seconds for a request, waiting included. 300."),
]
MaxPixels = Annotated[
    int | None, typer.Option(min=1, metavar="N", rich_help_panel=SERVICE, help="Of each picture. 16777216.")
]
MaxBytes = Annotated[int | None, typer.Option(min=1, metavar="N", rich_help_panel=SERVICE, help="Of a request. 64 MB.")]


@serve.command()
def editor(
    settings: options.Settings = None,
    host: Host = "127.0.0.1",
    port: Port = 8001,
    replicas: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", rich_help_panel=SERVICE,
            help="Editors on Ray Serve, one GPU each; a lost one costs a retry. Without it: one, in this process.",
        ),
    ] = None,
    queue: Queue = None,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", rich_help_panel=SERVICE,
            help="Edits in one forward, where they fit: faster, but a few pixels depend on the neighbours. 1.",
        ),
    ] = None,
    timeout: Timeout = None,
    max_pixels: MaxPixels = None,
    max_bytes: MaxBytes = None,
    max_steps: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", rich_help_panel=SERVICE, help="Steps that a request may ask for. 100."),
    ] = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    negative_prompt: options.NegativePrompt = None,
    baseline: options.Baseline = False,
    keep_background: options.KeepBackground = None,
    config: options.Config = None,
    expand: options.Expand = None,
    isolate: options.Isolate = None,
    rules: options.Rules = None,
    backbone: options.Backbone = None,
    planner: options.Planner = None,
    prompt_template: options.PromptTemplate = None,
    lora: options.Lora = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    offload: options.Offload = None,
    quantize: options.Quantize = None,
    compile: options.Compile = None,
    attention: options.Attention = None,
    speed: options.Speed = None,
    vae_tiling: options.VaeTiling = None,
) -> None:  # fmt: skip
    """Edits over HTTP; the address goes to stdout, the schema with examples is at /docs and /openapi.json.

    [bold]Examples[/bold]
      [cyan]replan serve editor[/cyan]                                        mini, http://127.0.0.1:8001
      [cyan]replan serve editor -b flux-kontext --replicas 8[/cyan]           eight GPUs on Ray Serve
      [cyan]replan serve editor --planner none -b qwen-image-edit[/cyan]      requests bring their own plans
    """  # fmt: skip
    given = dict(locals())
    _needs_web()
    _, _, rest = options.positionals([word for word in settings or () if word], 0)
    setup = _setup(given | {"settings": rest})
    limits = _limits(queue=queue, batch=batch, timeout=timeout, max_pixels=max_pixels, max_bytes=max_bytes,
                     max_steps=max_steps)  # fmt: skip
    if replicas is None:
        from replan.serve.run import editor_app

        _serve(editor_app(setup, limits), host, port)
        return
    _replicas(setup, limits, host, port, replicas)


@serve.command()
def judge(
    judge: Annotated[
        str,
        typer.Option(
            "--judge", metavar="NAME|URL", rich_help_panel=MODELS,
            help="mini: the mini world's exact judge; else as for `replan eval score`: http(s)://host/v1#MODEL, ...",
        ),
    ] = "mini",
    settings: options.Settings = None,
    host: Host = "127.0.0.1",
    port: Port = 8002,
    queue: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", rich_help_panel=SERVICE, help="Cases that may wait; more get 429. 64."),
    ] = None,
    timeout: Timeout = None,
    max_pixels: MaxPixels = None,
    max_bytes: MaxBytes = None,
) -> None:  # fmt: skip
    """Verdicts over HTTP. Settings are the judge's own, such as concurrency=24 or max_tokens=1024.

    [bold]Examples[/bold]
      [cyan]replan serve judge[/cyan]                                                  mini, http://127.0.0.1:8002
      [cyan]replan serve judge --judge http://127.0.0.1:8000/v1#Qwen2.5-VL-72B[/cyan]  a model behind vllm serve
    """  # fmt: skip
    _needs_web()
    from replan import config
    from replan.judge import JudgeConfig, load_judge
    from replan.serve.run import judge_app

    _, _, rest = options.positionals(list(settings or ()), 0)
    asked = config.load(JudgeConfig, {}, rest)
    limits = _limits(queue=queue or 64, timeout=timeout, max_pixels=max_pixels, max_bytes=max_bytes)
    _serve(judge_app(load_judge(judge, asked), limits, asked.concurrency), host, port)


def _setup(given: dict[str, Any]) -> Setup:
    """The setup of the flags; `--planner none` plans nothing."""
    from dataclasses import replace

    if given.get("planner") != "none":
        return Flags.of(given).setup()
    return replace(Flags.of(given | {"planner": "mini"}).setup(), planner=None)


def _limits(**given: Any) -> Limits:
    from replan.serve.limits import Limits

    return Limits(**{name: value for name, value in given.items() if value is not None})


def _needs_web() -> None:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError("replan serve needs a web framework: pip install 'replan[serve]'") from error


def _serve(app: Any, host: str, port: int) -> None:
    from replan.cli.console import out, quiet_libraries
    from replan.serve.run import listen, serve_on

    quiet_libraries()
    _warn(host)
    with listen(host, port) as listener:
        out(f"http://{host}:{listener.getsockname()[1]}")
        serve_on(app, listener)


def _replicas(setup: Setup, limits: Limits, host: str, port: int, replicas: int) -> None:
    import os
    import signal
    import threading

    from replan.cli.console import out, say

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing about this machine is sent anywhere
    from replan.serve.cluster import Cluster, running
    from replan.serve.run import free_port

    _warn(host)
    on_gpu = str(setup.runtime.torch_device()).startswith("cuda")
    cluster = Cluster(replicas, host, port or free_port(host), gpus=float(on_gpu))
    say(f"starting {replicas} replicas on Ray Serve")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the replicas must go with this process, not linger
    with running(setup, limits, cluster) as address:
        out(address)
        threading.Event().wait()  # until Ctrl-C


def _warn(host: str) -> None:
    from replan.cli.console import say

    if host not in ("127.0.0.1", "localhost", "::1"):
        say("warning: whoever can reach this address can use the model; there is no login")
