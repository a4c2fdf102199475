"""The server's part: the run of a study, over Flower's grid."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the study that the run's configuration names."""
    from hiso_jax.network.flower import serve

    serve(grid, dict(context.run_config))
