"""The builder on Ray Data: shard numbers are the data set, a map over actors writes them.

Every machine of the cluster must see the manifest, the clips and the folder of the corpus under the same
paths. The shards are the same to the byte as those of the local builder.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .clips import DataError

if TYPE_CHECKING:
    from .workshop import BuildConfig, Built


class ShardMaker:
    """An actor of Ray Data: keeps a library open, writes the shards it is given."""

    def __init__(self, config: BuildConfig, out: str) -> None:
        from .workshop import Workshop

        self.workshop, self.out = Workshop(config), Path(out)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """{"id": shard} -> {"built": Built}, or {"error": text} where it could not be made."""
        try:
            return {"built": self.workshop.make(int(row["id"]), self.out), "error": ""}
        except DataError as error:
            return {"built": None, "error": str(error)}


def build_with_ray(
    config: BuildConfig, out: Path, missing: Sequence[int], workers: int
) -> Generator[Built, None, None]:
    """Shards as they get ready. A running cluster is used (RAY_ADDRESS), else one is started here.

    workers: actors, at most; 0: as many as the cluster has CPUs.
    """
    try:
        import ray
        import ray.data
    except ImportError:
        raise DataError("--ray needs Ray: install it (pip install 'ray[data]')") from None
    if not missing:
        return
    started = not ray.is_initialized()
    if started:
        ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        most = workers or int(ray.cluster_resources().get("CPU", 1))
        actors = ray.data.ActorPoolStrategy(min_size=1, max_size=max(1, min(most, len(missing))))
        numbers = ray.data.from_items(
            [{"id": number} for number in missing], override_num_blocks=len(missing)
        )
        maker: Any = ShardMaker  # `map` takes the class of an actor, its annotation knows functions only
        made = numbers.map(
            maker, fn_constructor_args=(config, str(out.absolute())), compute=actors, num_cpus=1
        )
        for row in made.iter_rows():
            if row["error"]:
                raise DataError(row["error"])
            yield row["built"]
    finally:
        if started:
            ray.shutdown()
