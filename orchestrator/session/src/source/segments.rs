//! Shared segments of the frozen tree: compared on other threads while CRIU
//! dumps the rest, and sent between CRIU's pages.

use std::collections::BTreeSet;

use migrate_core::wire::{PageOwner, PageRun};
use migrate_criu::PARENT;
use migrate_memory::{FrozenRun, FrozenSegments, MemoryError};
use tokio::sync::mpsc;

use super::dump::{DumpSinkError, Outgoing, Stop};
use super::{Engine, Migration, not_yet};
use crate::error::Error;

/// Runs that may wait to be sent; each has at most 1 MiB.
const WAITING_RUNS_MAX: usize = 32;

/// What comes of the comparison: runs in the order of the final list, then none.
type Compared = Result<Option<FrozenRun>, MemoryError>;

/// The comparison under way. It ends when this is dropped.
pub(super) struct SegmentDump {
    pub(super) segments: FrozenSegments,
    ids: BTreeSet<u64>,
    compared: mpsc::Receiver<Compared>,
    complete: bool,
    _stop: Stop,
}

impl SegmentDump {
    fn begin(segments: FrozenSegments) -> Self {
        let (sender, compared) = mpsc::channel(WAITING_RUNS_MAX);
        let stop = Stop::default();
        let (flag, frozen) = (stop.flag(), segments.clone());
        tokio::task::spawn_blocking(move || {
            let taken = frozen.compare(&flag, |run| sender.blocking_send(Ok(Some(run))).is_ok());
            // Nobody hears it when the dump was given up.
            let _ = sender.blocking_send(taken.map(|()| None));
        });
        Self {
            ids: segments.ids(),
            segments,
            compared,
            complete: false,
            _stop: stop,
        }
    }

    /// Whether these are pages of a segment that is compared here, so that those
    /// which CRIU sends are not needed.
    pub(super) fn has(&self, owner: PageOwner) -> bool {
        matches!(owner, PageOwner::Shared(id) if self.ids.contains(&id))
    }

    /// The next run; none when there is none yet, or no more.
    pub(super) fn ready(&mut self) -> Result<Option<FrozenRun>, MemoryError> {
        match self.compared.try_recv() {
            Ok(compared) => self.taken(compared),
            Err(mpsc::error::TryRecvError::Empty) => Ok(None),
            Err(mpsc::error::TryRecvError::Disconnected) => self.ended(),
        }
    }

    /// The next run; none when that was the last.
    pub(super) async fn next(&mut self) -> Result<Option<FrozenRun>, MemoryError> {
        if self.complete {
            return Ok(None);
        }
        match self.compared.recv().await {
            Some(compared) => self.taken(compared),
            None => self.ended(),
        }
    }

    fn taken(&mut self, compared: Compared) -> Result<Option<FrozenRun>, MemoryError> {
        let run = compared?;
        self.complete |= run.is_none();
        Ok(run)
    }

    fn ended(&self) -> Result<Option<FrozenRun>, MemoryError> {
        if self.complete {
            Ok(None)
        } else {
            Err(MemoryError::Stopped)
        }
    }
}

impl Migration {
    /// The tree stands still: begins to compare its segments, and tells CRIU not
    /// to dump them.
    pub(super) fn compare_segments(&mut self) -> Result<(), Error> {
        let segments = match (&self.precopy, &self.content) {
            (Some(precopy), _) => precopy.frozen_segments()?,
            (None, Some(content)) => content.frozen_segments()?,
            // Rounds were CRIU's, which then dumps the segments as well.
            (None, None) => return Ok(()),
        };
        let dump = SegmentDump::begin(segments);
        let Engine::Dumping(session) = &self.engine else {
            return Err(not_yet("CRIU's dump"));
        };
        if let Some(device) = FrozenSegments::device() {
            session.leave_out(device, &dump.ids)?;
        }
        self.segments = Some(dump);
        Ok(())
    }
}

impl Outgoing<'_> {
    /// Sends what has been compared by now.
    pub(super) async fn send_compared(&mut self) -> Result<(), DumpSinkError> {
        while let Some(segments) = &mut self.segments
            && let Some(run) = segments.ready()?
        {
            self.send_segment(run).await?;
        }
        Ok(())
    }

    /// Sends what is left of all segments.
    pub(super) async fn send_all_compared(&mut self) -> Result<(), DumpSinkError> {
        while let Some(segments) = &mut self.segments
            && let Some(run) = segments.next().await?
        {
            self.send_segment(run).await?;
        }
        Ok(())
    }

    async fn send_segment(&mut self, (run, data): FrozenRun) -> Result<(), DumpSinkError> {
        let flags = if data.is_empty() { PARENT } else { run.flags };
        let run = PageRun { flags, ..run };
        self.list(run)?;
        Ok(self.send(run, &data).await?)
    }
}
