"""``secateur sweep``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from secateur.pipeline.sweep import SweepResult
    from secateur.pipeline.trials import TrialResult
    from secateur.records.sweep import SweepPoint


@click.command("sweep")
@click.argument("sweep", type=click.Path(dir_okay=False))
@click.option("--output", "-o", help="Folder of the sweep; wins over the file's.")
@click.option("--only", multiple=True, metavar="NAME", help="Run this point alone; * and ? as in file names.")
@click.option("--max-time", metavar="TIME", help="Start no further point after this time, such as 2h or 90m.")
@click.option("--ray", is_flag=False, flag_value="local", metavar="[ADDRESS]", help="Spread points over a Ray cluster.")
@click.option("--ray-cpus", type=float, default=1.0, show_default=True, help="Processors of every point, with --ray.")
@click.option("--ray-gpus", type=float, default=0.0, show_default=True, help="Accelerators of every point, with --ray.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any key, such as prune.seed=1.")
@click.option("--list", "only_list", is_flag=True, help="List the points and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
def command(
    sweep: str,
    output: str | None,
    only: tuple[str, ...],
    max_time: str | None,
    ray: str | None,
    ray_cpus: float,
    ray_gpus: float,
    settings: tuple[str, ...],
    only_list: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Run every point of SWEEP, a recipe with a section `sweep`, over one calibration, and show size against quality.

    Points that are done are kept, so the same command resumes after a stop; points that failed are recorded and tried
    again. Models are deleted once they have been measured, unless sweep.keep_models says otherwise.
    """
    from secateur.cli.console import print_json, progress_for, quiet_libraries
    from secateur.cli.limits import seconds_of
    from secateur.recipe import parse_override
    from secateur.sweep_recipe import chosen, load_sweep, points_of

    overrides: dict[str, Any] = dict(parse_override(text) for text in settings)
    if output is not None:
        overrides["output"] = output
    recipe, spec = load_sweep(sweep, overrides)
    if only_list:
        points = chosen(points_of(spec), only)
        if as_json:
            print_json({"points": [{"name": point.name, "overrides": dict(point.overrides)} for point in points]})
            return
        for point in points:
            click.echo(f"{point.name}: " + ", ".join(f"{key}={value}" for key, value in point.overrides.items()))
        return
    seconds = seconds_of(max_time)
    quiet_libraries()
    from secateur.pipeline.cluster import Cluster
    from secateur.pipeline.sweep import run_sweep
    from secateur.pipeline.trials import run_jobs

    cluster = None if ray is None else Cluster(None if ray == "local" else ray, ray_cpus, ray_gpus)
    with progress_for(as_json, quiet, keep=False) as progress:
        result = run_sweep(
            recipe,
            spec,
            only=only,
            max_time=seconds,
            progress=progress,
            run=run_jobs if cluster is None else cluster.run_jobs,
            on_result=_silent if quiet else _Teller(recipe.domain).tell,
        )
    _show(result, as_json=as_json)


def _silent(result: TrialResult, point: SweepPoint) -> None:
    """Say nothing."""


class _Teller:
    """Says what came of each point as soon as it is known."""

    def __init__(self, domains: Any) -> None:
        self._domains = list(domains)

    def tell(self, result: TrialResult, point: SweepPoint) -> None:
        from secateur.report.sweep import describe

        told = describe(point, self._domains)
        click.echo(f"{result.status}: {told}" if result.status == "done" else told, err=True)


def _show(result: SweepResult, *, as_json: bool) -> None:
    """Print the end of a sweep."""
    from secateur.cli.console import print_json, print_table
    from secateur.report.sweep import failures, sweep_cautions, sweep_table, sweep_verdict

    sweep, folder = result.sweep, result.folder
    if as_json:
        page = {"page": str(result.page)} if result.page else {}
        front = [point.name for point in sweep.front]
        print_json({"output": str(folder), "verdict": sweep_verdict(sweep), "front": front, **page, **sweep.to_dict()})
        return
    print_table(sweep_table(sweep))
    for sentence in (*failures(sweep), *(f"note: {caution}" for caution in sweep_cautions(sweep))):
        click.echo(sentence)
    click.echo(sweep_verdict(sweep))
    click.echo(f"\nfront:  {', '.join(point.name for point in sweep.front)}")
    click.echo(f"table:  {folder / 'sweep.json'}, {folder / 'sweep.parquet'}")
    click.echo(f"page:   {result.page}  (open it in a browser)" if result.page else f"no page: {result.no_page}")
    if sweep.front:
        click.echo(f"have a point's model: secateur run {folder / sweep.front[-1].folder / 'recipe.yml'}")
