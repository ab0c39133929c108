"""``Session``: a run's folder as one process writes it, from the claim on it to the seal."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from loghook.capture.config import Config
from loghook.capture.repeats import Repeats
from loghook.errors import LogExistsError, NotFiniteError, StateError, WriteError
from loghook.log.disk import writing
from loghook.log.folder import check_same, claim, ranks_on_disk, read_back, seal
from loghook.log.format import MANIFEST, Manifest
from loghook.log.writer import Writer
from loghook.processes import process_rank, shared_run_id, world_size


class Session:
    """A run's folder as this process writes it."""

    def __init__(self, config: Config, *, resume: bool, overwrite: bool) -> None:
        """Claim the folder; on resume read what is committed."""
        self._config, self.path = config, config.path
        self.resumed = resume and (config.path / MANIFEST).exists()  # there was a run to go on with
        if process_rank() == 0:
            claim(config.path, resume=resume, overwrite=overwrite)
        self.manifest: Manifest | None = None  # before the first block of a new run
        self.writer: Writer | None = None  # open from the first block on
        self.repeats = Repeats()  # ids met, by this process and by the one that it takes up again
        self.sealed = False  # finished, by this process or by an earlier one
        if self.resumed:
            self.manifest = Manifest.load(self.path)
            self.sealed = self.manifest.sealed is not None
            self.repeats.committed = read_back(self.path, self.manifest, outside_too=config.on_repeat is not None)

    def open(self, fresh: Manifest) -> Writer:
        """Open the writer, and with it the manifest, which is ``fresh`` unless the run has one already."""
        if self.manifest is not None:
            check_same(self.manifest, fresh)
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            writer = Writer(
                self.path, self.manifest or fresh, process_rank(), shard_bytes=self._config.shard_bytes,
                commit_seconds=self._config.commit_seconds,
            )  # fmt: skip
            try:
                # Under the lock: whoever comes second must not put a manifest of its own in place of the first one's.
                self.manifest = self._settle(fresh)
            except BaseException:
                writer.close()
                raise
        self.writer = writer
        return writer

    def _settle(self, fresh: Manifest) -> Manifest:
        """Return the run's manifest, written by rank 0 if it is new or more ranks write now than before."""
        old = self.manifest
        if process_rank() != 0:
            return old or fresh
        if old is None and (self.path / MANIFEST).exists():
            raise LogExistsError(f"{self.path} was taken by another run meanwhile: choose another path.")
        writers = max(fresh.world_size, len(ranks_on_disk(self.path, fresh)))
        if old is None or old.world_size < writers:
            old = dataclasses.replace(old or fresh, world_size=writers)
            old.save(self.path)
        return old

    @contextmanager
    def heeding(self) -> Iterator[None]:
        """Let ids come again whose batches the writer rejects."""
        try:
            yield
        except NotFiniteError as error:
            self.repeats.forget(error.ids)
            raise

    def close(self) -> None:
        """Commit what was handed over, and let others write."""
        if self.writer is not None:
            writer, self.writer = self.writer, None
            writer.close()

    def end(self, digest: Callable[[], str | None] | None) -> None:
        """Commit and, on rank 0, wait for the others and seal; ``digest`` gives that of the last parameter values."""
        writer, manifest = self.writer, self.manifest
        assert writer is not None and manifest is not None
        try:
            with self.heeding():
                writer.settle()  # while this rank can still go on, and before the others are told that it ended
        except WriteError:
            self.close()  # which raises it again and lets others write
            raise
        session = _agree_to_end()
        self.writer = None
        try:
            writer.put({"end": session})
            writer.close(keep_lock=True)
            if process_rank() == 0:
                if digest is not None:
                    manifest.parameters["last"] = digest()
                with writing(self.path):
                    manifest.sealed = seal(self.path, manifest, session, world_size())
                    manifest.save(self.path)
        finally:
            writer.unlock()
        self.sealed = True


def _agree_to_end() -> str:
    """Draw an id for this end, the same on all ranks, so that the end of an interrupted run is not taken for it."""
    try:
        return shared_run_id()
    except RuntimeError as error:
        raise StateError(
            f"another process is gone before it came to finalize() ({error}). What was committed is kept: start all "
            "of them again with resume=True."
        ) from error
