"""When a checkpoint is written: in the background or at once, one at a time, and what happens when a write fails.

A background save is begun (`save`), published when every rank has written its part (`poll`, `settle`), and only then
counts. A save that fails is reported where the run's state is whole, and tried once more with the state of then; if
that fails too, the state goes to the fallback folder if there is one, and the run ends with an error.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dapo.checkpoints.checksums import write_checksums
from megatron_dapo.checkpoints.meta import META, Identity, describe, write_meta
from megatron_dapo.checkpoints.state_file import write_state
from megatron_dapo.checkpoints.store import MODEL, CheckpointStore, Entry, next_sequence
from megatron_dapo.digests import FileDigest
from megatron_dapo.runtime.group import WorkerError
from megatron_dapo.workers.policy_group import CheckpointWriteError, PolicyGroup


@dataclass(frozen=True)
class SaveRules:
    background: bool  # training goes on while the files are written
    limit: int | None  # checkpoints that are kept; None: all


@dataclass(frozen=True)
class Snapshot:
    """The driver's state after a training step."""

    step: int
    state: dict[str, Any]


@dataclass(frozen=True)
class _Draft:
    """A save under way."""

    folder: Path
    step: int
    digests: dict[str, FileDigest]  # of what the driver wrote
    store: CheckpointStore


class Saver:
    """Writes the checkpoints of one run.

    `snapshot` gives the driver's state as it is now, and is called where that state is whole.
    """

    def __init__(
        self,
        store: CheckpointStore,
        fallback: CheckpointStore | None,
        policy: PolicyGroup,
        identity: Identity,
        rules: SaveRules,
        snapshot: Callable[[], Snapshot],
        report: Callable[[str], None],
    ):
        self._store, self._fallback, self._policy, self._identity = store, fallback, policy, identity
        self._rules, self._snapshot, self._report = rules, snapshot, report
        self._draft: _Draft | None = None
        self._failure: CheckpointWriteError | None = None
        self._advancing = threading.Lock()

    def save(self, background: bool | None = None) -> None:
        """A checkpoint of the run as it stands; an earlier one under way is finished first.

        Raises:
            CheckpointWriteError: it could not be written, nor at a second try.
        """
        self.settle(wait=True)
        try:
            self._begin(self._store, self._rules.background if background is None else background)
        except CheckpointWriteError as error:
            self._rescue(error)

    def poll(self, wait: bool = False) -> None:
        """Publish the save under way if all its parts are there. A failure is kept for `settle`."""
        try:
            self._advance(wait)
        except CheckpointWriteError as error:
            self._failure = error

    def settle(self, wait: bool = False) -> None:
        """`poll`, and act on a failure. Only where the run's state is whole.

        Raises:
            CheckpointWriteError: a save has failed, and so did a second one.
        """
        self.poll(wait)
        failure, self._failure = self._failure, None
        if failure is not None:
            self._rescue(failure)

    def last_will(self, policy: Callable[[], PolicyGroup]) -> str:
        """Where ranks are stuck and the run is about to be ended: complete the save under way, if that can be. What a
        person should know of it, in words. From any thread.

        Args:
            policy: makes the ranks' side, for calls that do not need their main threads.
        """
        said = []
        if (draft := self._draft) is not None:
            how = self._completed(policy)
            said.append(f"The save after step {draft.step} that was under way {how}.")
        stores = [self._store, *([self._fallback] if self._fallback else [])]
        newest = max((entry for store in stores for entry in store.entries()), key=_sequence, default=None)
        if newest is None:
            said.append("There is no checkpoint: the next start begins anew.")
        else:
            said.append(f"The next start goes on after step {newest.step}, from {newest.path}.")
        return " ".join(said)

    def _completed(self, policy: Callable[[], PolicyGroup]) -> str:
        if not self._advancing.acquire(blocking=False):  # the main thread is at it, and may be stuck there
            return "is lost: a rank did not take part in its end"
        try:
            self._finish(policy(), wait=True)
        except (CheckpointWriteError, WorkerError) as error:
            return f"is lost: {error}"
        finally:
            self._advancing.release()
        return "was completed" if self._draft is None else "is lost: it had only begun"

    def _begin(self, store: CheckpointStore, background: bool) -> None:
        snapshot = self._snapshot()
        sequence = next_sequence(self._store, *([self._fallback] if self._fallback else []))
        try:
            folder = store.begin(snapshot.step)
        except OSError as error:
            raise _unwritten(store.root, error) from error
        self._draft = _Draft(folder, snapshot.step, {}, store)
        try:
            self._draft.digests.update(write_state(folder, snapshot.state))
            self._draft.digests[META] = write_meta(folder, describe(self._identity, sequence, snapshot.step))
        except OSError as error:
            self._discard()
            raise _unwritten(folder, error) from error
        self._policy.start_save(str(folder / MODEL), background)
        if not background:
            self._advance(wait=True)

    def _advance(self, wait: bool) -> None:
        with self._advancing:
            self._finish(self._policy, wait)

    def _finish(self, policy: PolicyGroup, wait: bool) -> None:
        draft = self._draft
        if draft is None:
            return
        try:
            written = policy.finish_save(wait)
            if written is None:
                return
            known = draft.digests | {f"{MODEL}/{name}": digest for name, digest in written.items()}
            write_checksums(draft.folder, known)
            draft.store.publish(draft.folder, draft.step)
        except CheckpointWriteError as error:
            self._discard()
            raise _unwritten(draft.folder, error) from error
        except OSError as error:
            self._discard()
            raise _unwritten(draft.folder, error) from error
        self._draft = None
        if self._rules.limit is not None and draft.store is self._store:
            self._store.prune(self._rules.limit)

    def _discard(self) -> None:
        """What was written of a failed save goes, which also makes room on a full disk."""
        if self._draft is not None:
            shutil.rmtree(self._draft.folder, ignore_errors=True)
        self._draft = None

    def _rescue(self, failure: CheckpointWriteError) -> None:
        self._report(f"{failure}; the checkpoints before it are untouched. Trying once more")
        try:
            self._begin(self._store, background=False)
            return
        except CheckpointWriteError as error:
            if self._fallback is None:
                raise CheckpointWriteError(
                    f"{error}; the checkpoints before it are untouched. Make room or name another "
                    "trainer.default_local_dir; trainer.fallback_local_dir names a folder for such a case"
                ) from error
            self._report(f"{error}; saving to {self._fallback.root}")
            again = error
        self._begin(self._fallback, background=False)
        raise CheckpointWriteError(
            f"{again}; the state after step {self._snapshot().step} is saved in {self._fallback.root}. Make room and "
            "start the same command again: it goes on from there"
        )


def _sequence(entry: Entry) -> int:
    return entry.sequence


def _unwritten(path: Path, error: Exception) -> CheckpointWriteError:
    reason = f"{error.strerror or error} ({error.filename or path})" if isinstance(error, OSError) else str(error)
    return CheckpointWriteError(f"the checkpoint {path} could not be written: {reason}")
