"""``secateur push``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from secateur.export.hub import Upload


@click.command("push")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repo_id", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="Make the repository private.")
@click.option(
    "--gguf", "ggufs", multiple=True, type=click.Path(path_type=Path), help="GGUF file to send too; may be repeated."
)
@click.option("--revision", help="Branch; made if there is none. Default: the main one.")
@click.option("--accept-licence-terms", is_flag=True, help="You meet, or will meet, what the model's licence asks.")
@click.option("--dry-run", is_flag=True, help="Check and show what would be sent, and send nothing.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask before sending.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; needs --yes or --dry-run.")
def command(
    folder: Path,
    repo_id: str,
    private: bool,
    ggufs: tuple[Path, ...],
    revision: str | None,
    accept_licence_terms: bool,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Send the model in FOLDER (a model folder, or a run's) to the Hugging Face hub, as OWNER/NAME.

    Only what belongs to the model goes up: weights, configuration, tokenizer, plan, model card and licence texts. The
    model must be whole, and its card must state a licence. Where that licence asks more of who shares a changed model
    than to carry it over, it is shown, and sending needs --accept-licence-terms.
    """
    from secateur.cli.console import print_json, quiet_libraries
    from secateur.errors import ConfigError, ExportError
    from secateur.export.given import given_folder
    from secateur.export.hub import plan_upload, push

    quiet_libraries()
    upload = plan_upload(given_folder(folder), repo_id, ggufs=ggufs)
    if not as_json:
        _show(upload)
    if upload.terms.duties and not accept_licence_terms and not dry_run:
        unmet = f" Not met: {'; '.join(upload.unmet)}." if upload.unmet else ""
        raise ExportError(
            f"{upload.terms.describe()}{unmet} If you meet or will meet this, say so with --accept-licence-terms."
        )
    if not dry_run and not yes:
        if as_json or not sys.stdin.isatty():
            raise ConfigError("nobody can be asked here whether to send this. Give --yes, or --dry-run to look only.")
        click.confirm(f"send this to {repo_id} ({'private' if private else 'PUBLIC'})?", abort=True)
    url = "" if dry_run else push(upload, private=private, revision=revision)
    if as_json:
        print_json(_facts(upload, url))
    else:
        click.echo("nothing was sent (--dry-run)" if dry_run else f"sent: {url}")


def _show(upload: Upload) -> None:
    from secateur.report.tables import format_bytes

    click.echo(f"{upload.repo_id}: {len(upload.files)} files, {format_bytes(upload.size_bytes)}")
    for file in upload.files:
        click.echo(f"  {format_bytes(file.size_bytes):>10}  {file.name}")
    if upload.left_out:
        click.echo(f"stay here: {', '.join(upload.left_out)}")
    for note in upload.notes:
        click.echo(f"note: {note}")
    if upload.terms.duties:
        click.echo(f"licence: {upload.terms.describe()}")
    for duty in upload.unmet:
        click.echo(f"NOT MET: {duty}")


def _facts(upload: Upload, url: str) -> dict[str, object]:
    return {
        "repository": upload.repo_id,
        "files": {file.name: file.size_bytes for file in upload.files},
        "left_out": list(upload.left_out),
        "notes": list(upload.notes),
        "licence": upload.terms.describe(),
        "unmet": list(upload.unmet),
        "url": url,
    }
