"""The command `moe-lm`: make a corpus, train a language model, evaluate it, let it write."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.table import Table

from benchmarks.cli.terminal import Json, bar, console_of, errors, group, pairs, require_writable, write

if TYPE_CHECKING:
    from experts.offload import OffloadedModel

app = group("Make a corpus, train a language model on it, evaluate it, let it write.")
Model = Annotated[str, typer.Argument(help="Shipped model (language), folder of a model, or run folder.")]
Experts = Annotated[
    str | None, typer.Option("--k", help="Experts of a token: a number, or one for each layer as 4,2,2,1.")
]


@app.command("corpus")
def _corpus(
    out: Annotated[Path, typer.Option(help="New folder of the corpus.")],
    limit: Annotated[int, typer.Option(min=1, help="Characters of a domain, about.")] = 3_500_000,
) -> None:
    """Make the reference corpus from packages of Debian and Python's sources (needs apt-get and groff; minutes)."""
    from experts.language import debian

    debian.write(out, limit, lambda line: errors.print(line))
    console_of(None).print(f"[green]made[/] {out}    train: moe-lm train --data {out} --out runs/lm", soft_wrap=True)


@app.command("train")
def _train(
    data: Annotated[
        Path | None, typer.Option(help="Corpus: a folder with a folder of text files for each domain.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="New run folder.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Resume this interrupted run.")] = None,
    model: Annotated[
        list[str], typer.Option("--model", "-m", help="Size as name=value, e.g. d_ff=512; can be repeated.")
    ] = [],  # noqa: B006
    setting: Annotated[
        list[str], typer.Option("--set", "-s", help="Setting as name=value, e.g. steps=1000; can be repeated.")
    ] = [],  # noqa: B006
    limit: Annotated[int | None, typer.Option(min=1, help="Use about so many characters of a domain.")] = None,
    json_file: Json = None,
) -> None:
    """Train a language model; the run folder gets the model, the validation curve and the monitor's logs.

    Example: moe-lm train --data corpus --out runs/lm -s steps=3000 -m d_ff=256
    """
    from experts.language import pretraining
    from experts.language.transformer import ModelSettings

    require_writable(json_file)
    if (resume is None) == (data is None) or (resume is None) == (out is None):
        raise ValueError("give --data and --out for a new run, or --resume for an interrupted one")
    if resume and (model or setting or limit):
        raise ValueError("--model, --set and --limit beside --resume: a resumed run keeps its settings")
    folder = resume or out
    assert folder is not None
    with bar() as add:
        show = add(f"training in {folder}")
        try:
            if resume:
                found = pretraining.resume(resume, lambda share, line: show(share))
            else:
                size = ModelSettings(**pairs(model, "--model"))
                chosen = {"threads": pretraining.all_threads()} | pairs(setting, "--set")
                own = pretraining.PretrainingSettings(**chosen)
                assert data is not None
                found = pretraining.train(data, folder, size, own, limit=limit, report=lambda share, line: show(share))
        except KeyboardInterrupt:
            errors.print(f"stopped; resume: moe-lm train --resume {folder}", soft_wrap=True)
            raise typer.Exit(130) from None
    last = found.metadata["curve"][-1]
    write(json_file, {"model": asdict(found.settings), **last})
    console_of(json_file).print(
        f"[green]saved[/] {folder / pretraining.MODEL}    validation {last['validation']:.3f} nats a token    "
        f"evaluate: moe-lm eval {folder} --data DIR    write: moe-lm generate {folder} 'Once'",
        soft_wrap=True,
    )


@app.command("eval")
def _evaluate(
    model: Model,
    data: Annotated[Path, typer.Option(help="Corpus: a folder with a folder of text files for each domain.")],
    split: Annotated[str, typer.Option(help="train, rl_train, validation or test.")] = "test",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Characters of a domain in the corpus, as in the training.")
    ] = None,
    most: Annotated[int, typer.Option(min=1, help="Evaluate so many characters of a domain.")] = 200_000,
    k: Experts = None,
    json_file: Json = None,
) -> None:
    """Bits per byte of each domain, beside those of xz -9 and bzip2 -9 on the same text."""
    from experts.language.evaluation import evaluate

    require_writable(json_file)
    with bar() as add:
        rows = evaluate(loaded(model), data, split, limit, most, _experts(k), add("evaluating"))
    table = Table("domain", "bytes", "model", "xz -9", "bzip2 -9", "model less xz")
    for row in rows:
        bits = [f"{row[name]:.3f}" for name in ("model", "xz", "bzip2")]
        table.add_row(row["domain"], f"{row['bytes']:,}", *bits, f"{row['model'] / row['xz'] - 1:+.1%}")
    write(json_file, rows)
    console_of(json_file).print(table)


@app.command("generate")
def _generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")] = "",
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens to write.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")] = 0.8,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Draw from the most likely tokens of this sum.")
    ] = 0.95,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    k: Experts = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Hold experts of so many bytes, e.g. 2MB; read the others from the disk."),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help="What leaves the memory: lru (default), lfu, lrfu, arc, sieve, least-stale or random, each also with "
            "-per-layer appended; static keeps what the passages that come with the model ask for most; "
            "policy:DIR, a run of MoEExpertCache-v0 or a saved RolloutClassifier, also decides what is loaded."
        ),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Experts on the disk and in memory: float32 (default), bfloat16, int8 or int4.")
    ] = None,
    prefetch: Annotated[bool, typer.Option(help="Read ahead what the token before used in the next layer.")] = False,
) -> None:
    """Write text after a prompt."""
    of_memory = {"policy": policy, "weights": weights, "prefetch": "last" if prefetch else None}
    given: dict[str, Any] = {name: value for name, value in of_memory.items() if value is not None}
    if given and memory is None:
        raise ValueError(f"--{next(iter(given))} needs --memory")
    language_model = loaded(model)
    options: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed}
    if memory is None:
        typer.echo(prompt + language_model.generate(prompt, tokens, _experts(k), **options))
        return
    from experts.offload import OffloadedModel

    if policy is not None and policy.startswith("policy:"):
        if k is not None or prefetch:
            raise ValueError(
                "--policy policy:... decides what runs and what is loaded: it takes neither --k nor --prefetch"
            )
        given["policy"] = _control(policy.removeprefix("policy:"), model, language_model, _size(memory), weights)
    elif policy == "static":
        from agents.deploy.expertcache import fit_static

        given["policy"] = fit_static(language_model, _texts(model))
    with OffloadedModel(language_model, _size(memory), **given) as offloaded:
        typer.echo(prompt + language_model.generate(prompt, tokens, _experts(k), **options))
        typer.echo(_of_disk(offloaded), err=True)


def loaded(name: str) -> Any:
    """A model by name, folder or run folder."""
    from experts import language

    return language.load(_folder(name))


def _folder(name: str) -> str | Path:
    from experts.language.pretraining import MODEL, RUN

    return Path(name) / MODEL if (Path(name) / RUN).exists() else name


def _control(folder: str, name: str, model: Any, memory: int, weights: Any) -> Any:
    """A policy of MoEExpertCache-v0 for a model, with the demand in passages that come with it."""
    from agents.deploy.expertcache import control_of_run

    return control_of_run(Path(folder), model, memory, weights or "float32", _texts(name))


def _texts(name: str) -> Any:
    """Passages that come with a model, ids `[n, T]`."""
    from experts.language import find, passages

    place = find(_folder(name))
    if not (place / passages.FILE).exists():
        raise ValueError(f"this --policy is fitted to passages beside the model, and {place} has none")
    texts = passages.load(place, "rl_train").ids[:, :-1]
    return texts[:: max(1, len(texts) // 96)]


def _size(text: str) -> int:
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise ValueError(f"--memory {text!r}: must be a number of bytes, as 2000000, 500kB or 2MB") from None


def _of_disk(offloaded: OffloadedModel) -> str:
    found, pool = offloaded.statistics(), offloaded.pool
    source = "the disk" if offloaded.direct else "the disk or the page cache"
    return (
        f"{pool.capacity} experts of {pool.each:,} bytes fit; {found['hit_rate']:.1%} of {found['requests']:,} "
        f"requests were in memory or coming; {found['loads']:,} were read from {source}, "
        f"{found['bytes'] / 1e6:.1f} MB; waited {1e3 * found['wait_s_per_token']:.2f} ms a token"
    )


def _experts(text: str | None) -> int | list[int] | None:
    if text is None:
        return None
    try:
        found = json.loads(f"[{text}]")
        if not found or not all(isinstance(each, int) for each in found):
            raise ValueError
    except ValueError:
        raise ValueError(f"--k {text!r}: must be a number, or one for each layer as 4,2,2,1") from None
    return found[0] if len(found) == 1 else list(found)
