"""Downloads of the files of many models: parallel, resumable, with one progress bar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_fusion.hub.client import explain_hub_errors, hub_api, in_parallel, silent_bar
from hf_fusion.hub.commits import download_file
from hf_fusion.hub.snapshot import check_snapshot
from hf_fusion.hub.source import Source
from hf_fusion.progress import is_reported, phase

if TYPE_CHECKING:
    from huggingface_hub import HfApi

WORKERS = 8  # downloads of weights at a time


def download(wanted: Sequence[tuple[Source, list[str]]], api: HfApi | None = None) -> None:
    """Fetch all files of all sources at once and set each ``source.folder``.

    Run again after an interruption, it fetches what is not in the cache in full. A phase over all bytes; where nobody
    is told of phases, a bar on a terminal's stderr.
    """
    jobs = [
        (source, file)
        for source, files in wanted
        for file in files
        if not source.is_local and (source.folder is None or not (source.folder / file).exists())
    ]
    if not jobs:
        return

    from huggingface_hub.utils import tqdm  # silent under HF_HUB_DISABLE_PROGRESS_BARS

    client = hub_api(api)
    total = sum(source.sizes[file] for source, file in jobs)
    quiet = True if is_reported() else None
    with (
        phase("Downloading", total, "B") as told,
        tqdm(total=total, unit="B", unit_scale=True, desc="Downloading experts", disable=quiet) as bar,
    ):

        def more(size: float) -> None:
            bar.update(size)
            told.advance(size)

        def fetch(job: tuple[Source, str]) -> None:
            source, file = job
            with explain_hub_errors(source.name):
                path = download_file(client, source.name, file, source.revision, tqdm_class=silent_bar(more))
            source.folder = path.parents[file.count("/")]

        in_parallel(fetch, jobs, WORKERS)
        for source in {id(source): source for source, _ in jobs}.values():
            assert source.folder is not None
            check_snapshot(source.folder, source.name)
        more(max(0, total - told.done))  # files that were in the cache
