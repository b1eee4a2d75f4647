"""The command `moe-export`: write a model as a file that another runtime runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks.cli.terminal import Json, _version, bar, console_of, require_writable, write
from experts.serving.control import DEADLINE, NEVER

if TYPE_CHECKING:
    from experts.serving.runners import Source

app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def _export(
    model: Annotated[
        str,
        typer.Argument(
            help="Bundle (digits, fashion-mnist, a folder), reference model (digits-mlp), language model (language, a "
            "folder), or run folder of a policy of MoERouting-v0, which routes its bundle."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the exported model; an exported model in it is replaced.")],
    form: Annotated[
        str, typer.Option("--format", help="onnx, onnx-int8, torchscript, torch-export or huggingface.")
    ] = "onnx",
    model_version: Annotated[str, typer.Option(help="Semantic version of the model.")] = "0.1.0",
    measured: Annotated[
        bool,
        typer.Option(
            "--measured",
            help="Time an ONNX file beside PyTorch, tune the server's rule by its times, and write both to the "
            "manifest; takes minutes.",
        ),
    ] = False,
    deadline: Annotated[
        float,
        typer.Option(min=0.001, max=NEVER, help="With --measured: seconds until an answer of the server is worth 0."),
    ] = DEADLINE,
    tries: Annotated[
        int,
        typer.Option(min=1, help="With --measured: random settings to try of each rule, and changes to the best."),
    ] = 4,
    json_file: Json = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Export a model, compare it with PyTorch, and write its manifest.

    Example: moe-export fashion-mnist --format onnx --out exported/fashion-mnist
    """
    from experts.serving.export import add_tuned_rule, export

    require_writable(json_file)
    chosen: Any = form
    source = source_of(model)
    manifest = export(source, out, chosen, model_version, measured=measured)
    if measured and not source.batch and source.language is None:
        from benchmarks.programs.tuning import tuned_rule_of_server

        with bar() as add:
            tuned = tuned_rule_of_server(str(out), deadline, tries, add("tuning the server's rules"))
        manifest = add_tuned_rule(out, manifest["files"], tuned)
    write(json_file, manifest)
    parity, console = manifest["parity"], console_of(json_file)
    console.print(
        f"{parity['predictions']:,} predictions: {parity['same_top_1']:.2%} as PyTorch's, {parity['close']:.2%} with "
        f"the same logits, which differ by at most {parity['largest_difference']:.2g} (the largest is "
        f"{parity['largest_logit']:.3g})"
    )
    for name, sha256 in manifest["files"].items():
        console.print(f"{sha256[:16]}  {(out / name).stat().st_size:>12,} bytes  {name}", soft_wrap=True)
    for what, row in manifest.get("recommended", {}).items():
        console.print(
            f"{what}: {row['runtime']}, {row['threads']} threads, batch {row['batch']}: {1e3 * row['median']:.3g} ms"
        )
    if found := manifest.get("tuned_rule"):
        console.print(
            f"rule of the server for a deadline of {found['deadline']:g} s: {found['rule']} (simulated return "
            f"{found['test_return']:.4f}, SlackFit's {found['slackfit_test_return']:.4f})", soft_wrap=True,
        )  # fmt: skip
    elif measured:
        console.print("no rule was tuned: moe-serve takes ONNX of classifiers, and tunes for batches of any size")
    console.print(f"[green]saved[/] {out}", soft_wrap=True)


def source_of(model: str) -> Source:
    """What a model's name or folder stands for; raises `ValueError` with the known names."""
    from agents.runs import SETTINGS
    from experts import reference_models, zoo
    from experts.language.model import SHIPPED, TOKENIZER
    from experts.language.pretraining import MODEL
    from experts.serving import sources

    place, languages = Path(model), [each.name for each in SHIPPED.glob("[!.]*")]
    if model in languages or (place / TOKENIZER).exists():
        return sources.of_language(model)
    if (place / MODEL / TOKENIZER).exists():
        return sources.of_language(place / MODEL)
    if (place / SETTINGS).exists():
        return _of_policy(place)
    if zoo.find(model) is not None or model in zoo.names():
        return sources.of_bundle(model)
    try:
        reference_models.recipe_of(model)
    except ValueError:
        known = ", ".join([*zoo.names(), *reference_models.RECIPES, *languages])
        raise ValueError(f"no model {model!r}; there are {known}, or give a folder") from None
    return sources.of_reference_model(model)


def _of_policy(folder: Path) -> Source:
    """A bundle routed by a trained policy: all inputs of a batch are decided together, so its size is fixed."""
    from agents.deploy.routing import DenseRouted
    from agents.deploy.serving import routed_of_run
    from experts.serving.runners import Source

    routed, found = routed_of_run(folder)
    about = {
        "kind": "classifier", "name": found.path.name, "sha256": found.sha256, "policy": folder.name,
        "routing": f"a policy, for batches of {routed.batch_size}",
    }  # fmt: skip
    return Source(DenseRouted(routed).eval(), found.examples, about, batch=routed.batch_size)
