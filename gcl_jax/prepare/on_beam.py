"""Records written by many processes or machines: the parts of a store in an Apache Beam pipeline.

What takes time is reading, decoding and writing the records, and no part of them needs another.
This process notes what each part is made of; Beam's workers make the parts, each a TFDS data set of
one shard, wherever they see the folder that the store is built in.
"""

import itertools
import pickle
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gcl_jax import logs
from gcl_jax.errors import ConfigError
from gcl_jax.prepare import parts
from gcl_jax.prepare.bad_rows import BadRows
from gcl_jax.prepare.parts import PartsWriter, Records


def write_parts(
    kind: str, fields: dict[str, str], records: Records, folder: Path, options: Sequence[str]
) -> None:
    """Makes the parts of `kind` in `folder`, but for those that are there; `PartsWriter` then finds
    them done, and reports what was wrong with their records.

    Args:
        options: of the pipeline, such as ["--runner=FlinkRunner"]; Beam's default is this machine.

    Raises:
        ConfigError: Apache Beam is not installed.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise ConfigError('--beam needs Apache Beam: pip install "gcl_jax[beam]"') from None

    numbers = list(_note_items(PartsWriter(kind, fields, folder, BadRows("skip")), records))
    quiet = "--default_sdk_harness_log_level=ERROR"
    with beam.Pipeline(options=PipelineOptions([quiet, *options])) as pipeline:
        (
            pipeline
            | beam.Create(numbers)
            | beam.Reshuffle()
            | beam.Map(_write_part, kind, fields, folder.absolute(), parts.RECORDS_PER_PART)
        )


def _items_of(folder: Path, kind: str, number: int) -> Path:
    return folder / f"{kind}-{number:05}.items"


def _note_items(writer: PartsWriter, records: Records) -> Iterator[int]:
    """Yields the number of every part that is to be made, its items written to a file."""
    remaining = iter(records)
    for number in itertools.count():
        items = list(itertools.islice(remaining, parts.RECORDS_PER_PART))
        if not items:
            return
        if not writer.is_done(number):
            _items_of(writer.folder, writer.kind, number).write_bytes(pickle.dumps(items))
            yield number


def _write_part(number: int, kind: str, fields: dict[str, str], folder: Path, size: int) -> None:
    """Runs in a worker. Bad rows are noted in the part, whatever the policy."""
    noted = _items_of(folder, kind, number)
    writer = PartsWriter(kind, fields, folder, BadRows("skip"))
    if writer.is_done(number):  # Beam may run an element again
        return
    with (
        ThreadPoolExecutor(1) as pool,
        parts.silent_tfds(),
        logs.progress(0, unit="records", description=kind, quiet=True) as bar,
    ):
        # Our own file of a moment ago, not input: unpickling it runs nothing of anybody else's.
        writer.write_part(number, iter(pickle.loads(noted.read_bytes())), number * size, bar, pool)
    noted.unlink(missing_ok=True)
