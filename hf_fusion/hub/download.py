"""Downloads files of several models in parallel, resumably, with one progress bar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_fusion.hub.client import explain_hub_errors, hub_api, in_parallel, silent_bar
from hf_fusion.hub.commits import download_file
from hf_fusion.hub.model_files import Source
from hf_fusion.hub.snapshot_checks import check_snapshot
from hf_fusion.progress import is_reported, phase

if TYPE_CHECKING:
    from huggingface_hub import HfApi

WORKERS = 8  # parallel downloads


def download(wanted: Sequence[tuple[Source, list[str]]], api: HfApi | None = None) -> None:
    """Downloads files of all sources and sets each ``source.folder``.

    After an interruption it only downloads files that are not complete in the cache. Reports a phase over all bytes;
    without a reporter, shows a bar on a terminal's stderr.

    Args:
        wanted: sources, each with paths of files.
        api: the Hub's client.
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
        phase("Downloading", total, "B") as progress,
        tqdm(total=total, unit="B", unit_scale=True, desc="Downloading experts", disable=quiet) as bar,
    ):

        def more(size: float) -> None:
            bar.update(size)
            progress.advance(size)

        def fetch(job: tuple[Source, str]) -> None:
            source, file = job
            with explain_hub_errors(source.name):
                path = download_file(client, source.name, file, source.revision, tqdm_class=silent_bar(more))
            source.folder = path.parents[file.count("/")]

        in_parallel(fetch, jobs, WORKERS)
        for source in {id(source): source for source, _ in jobs}.values():
            assert source.folder is not None
            check_snapshot(source.folder, source.name)
        more(max(0, total - progress.done))  # files that were in the cache
