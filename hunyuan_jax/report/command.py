"""The command `report`."""

from hunyuan_jax import flags
from hunyuan_jax.files import LocalPath


@flags.command(
    flags.Option(
        "workdir",
        LocalPath,
        "folder of the run, such as runs/tiny, or the --output of `eval`.",
        is_required=True,
    ),
    flags.Option("output", LocalPath, "File to write.", default_meaning="WORKDIR/report.html"),
)
def report(values) -> int:
    """Writes one HTML page about a run (also while it runs): curves, goodput, experts, config."""
    from hunyuan_jax.report import page

    print(page.write(values.workdir, values.output))
    return 0
