//! Rounds by CRIU: `pre-dump` copies what the kernel has marked as written.
//!
//! ```text
//! round:  a CRIU of its own -> tree stands still: pages into pipes, marks cleared
//!                              tree goes on:      pages -> serve_pages -> Round -> destination
//! dump:   the marks since the last round
//! ```
//!
//! Pages that are clean since the last round are listed by CRIU without their
//! content where that round had the task too, which is for us to say: CRIU asks
//! its page server whether there is a parent image.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Instant;

use bytes::Bytes;
use migrate_channel::ChannelError;
use migrate_core::wire::{PageOwner, PageRun};
use migrate_criu::{
    Criu, CriuError, Marks, Notice, Outcome, PageSink, PageStats, PreDumpOptions, Session, Track,
    WorkerOptions, serve_pages,
};
use migrate_memory::{Limits, Markable, RoundStats, UntrackedReason};

use super::dump::{DUMP_LIMIT, Outgoing, out_of_order};
use super::{micros, not_yet};
use crate::error::Error;
use crate::state::make_private;

type Precopied = BTreeMap<u32, Option<Range<u64>>>;

/// Pre-copy of one tree by the kernel's soft-dirty marks.
#[derive(Debug)]
pub(super) struct SoftDirty {
    root: i32,
    criu: Criu,
    /// Image directories of rounds, one each, go there.
    images: PathBuf,
    rounds: u32,
    /// The image directory of the last round.
    last: Option<PathBuf>,
    /// Tasks whose clean pages have gone over, and where their vDSO was then.
    /// CRIU lists it as clean whether it is marked or not.
    precopied: Precopied,
    /// Processes that are sent whole in each round, and why, by PID.
    refused: BTreeMap<i32, UntrackedReason>,
    last_start: Option<Instant>,
    /// A round that has not come to its end: CRIU may hold the tree.
    running: Option<Session>,
}

impl SoftDirty {
    /// Prepares to copy the tree of `root`, with room for small files in
    /// `images`. The tree is not touched yet.
    pub(super) fn new(root: i32, criu: Criu, images: &Path) -> Self {
        Self {
            root,
            criu,
            images: images.to_owned(),
            rounds: 0,
            last: None,
            precopied: Precopied::new(),
            refused: BTreeMap::new(),
            last_start: None,
            running: None,
        }
    }

    /// Sends what has changed since the last round; everything in the first.
    /// A round that fails or is dropped is the last one.
    pub(super) async fn round(&mut self, sink: &mut Outgoing<'_>) -> Result<RoundStats, Error> {
        let start = Instant::now();
        // Before the marks are cleared: who calls exec meanwhile comes whole next time.
        let Markable {
            vdsos: now,
            refused,
        } = migrate_memory::markable(self.root, Limits::default())?;
        self.refused = refused;
        self.precopied
            .retain(|pid, vdso| now.get(pid) == Some(vdso));
        let directory = self.images.join(format!("round-{}", self.rounds + 1));
        make_private(&directory)?;
        let options = PreDumpOptions {
            track: self
                .last
                .clone()
                .map(|since| (since, self.precopied.keys().copied().collect())),
            ..PreDumpOptions::new(self.root, &directory)
        };
        let worker = self.criu.worker(WorkerOptions::default()).await?;
        let session = worker
            .pre_dump(&options)
            .await
            .map_err(Error::DumpRefused)?;
        let session = self.running.insert(session);
        let socket = session
            .page_socket()
            .ok_or_else(|| not_yet("the page socket"))?;
        let mut round = Round::new(sink);
        let served = serve_pages(socket, self.criu.version, &mut round, DUMP_LIMIT).await;
        let ended = session.next(DUMP_LIMIT).await;
        self.running = None;
        match (ended, served) {
            // It ended the stream itself, and says why.
            (Err(error), Ok(_) | Err(CriuError::PageStreamEnded { .. })) => {
                return Err(Error::DumpRefused(error));
            }
            (_, Err(error)) => return Err(error.into()),
            (Ok(Notice::Finished(Outcome::PreDumped)), Ok(_)) => {}
            (Ok(other), Ok(_)) => return Err(out_of_order(&other, "the end of a round")),
        }
        let Round {
            seen, mut stats, ..
        } = round;
        self.precopied = now;
        self.precopied.retain(|pid, _| seen.contains(pid));
        self.rounds += 1;
        if let Some(before) = self.last.replace(directory) {
            let _ = std::fs::remove_dir_all(before);
        }
        if let Some(previous) = self.last_start.replace(start) {
            stats.since_previous_us = micros(start.duration_since(previous));
        }
        stats.took_us = micros(start.elapsed());
        Ok(stats)
    }

    /// For the final dump: whose clean pages have gone over, and since when.
    pub(super) fn track(&self) -> Option<Track> {
        let since = self.last.clone()?;
        // Without it everything comes whole.
        let now = migrate_memory::markable(self.root, Limits::default()).ok()?;
        let now = now.vdsos;
        let unchanged = self
            .precopied
            .iter()
            .filter(|&(pid, vdso)| now.get(pid) == Some(vdso));
        Some(Track {
            marks: Marks::Kernel { since },
            precopied: unchanged.map(|(pid, _)| *pid).collect(),
        })
    }

    /// Processes of which the last round knew that nothing tells what they change.
    pub(super) fn refused(&self) -> impl Iterator<Item = (i32, &UntrackedReason)> {
        self.refused.iter().map(|(&pid, reason)| (pid, reason))
    }

    /// Where the vDSO is, of the tree that stands still, of tasks that have called exec since
    /// the last round, by PID: nobody has handed it on from there.
    pub(super) fn moved_vdsos(&self) -> Result<BTreeMap<u32, Range<u64>>, Error> {
        let mut moved = BTreeMap::new();
        for (&pid, then) in &self.precopied {
            let now = migrate_memory::vdso(pid.cast_signed())?;
            if let Some(now) = now.filter(|now| Some(now) != then.as_ref()) {
                moved.insert(pid, now);
            }
        }
        Ok(moved)
    }

    /// The CRIU of a round that was given up; it lets the tree go by itself.
    pub(super) fn take_running(&mut self) -> Option<Session> {
        self.running.take()
    }
}

/// Sends the pages of a round, and counts.
struct Round<'s, 'l> {
    sink: &'s mut Outgoing<'l>,
    /// Tasks that are in it.
    seen: BTreeSet<u32>,
    stats: RoundStats,
}

impl<'s, 'l> Round<'s, 'l> {
    fn new(sink: &'s mut Outgoing<'l>) -> Self {
        Self {
            sink,
            seen: BTreeSet::new(),
            stats: RoundStats::default(),
        }
    }
}

impl PageSink for Round<'_, '_> {
    type Error = ChannelError;

    async fn pages(&mut self, run: PageRun, data: Bytes) -> Result<(), ChannelError> {
        let PageOwner::Task(pid) = run.owner else {
            // CRIU does not track segments: they come whole with the final dump.
            self.stats.pages_untracked += run.pages;
            self.stats.pages_whole += run.pages;
            return Ok(());
        };
        if self.seen.insert(pid) {
            self.stats.processes += 1;
        }
        self.stats.pages_scanned += run.pages;
        if data.is_empty() {
            self.stats.pages_skipped += run.pages;
            return Ok(());
        }
        self.stats.pages_written += run.pages;
        migrate_memory::hand_on(run.owner, run.vaddr, &data, self.sink, &mut self.stats).await
    }

    async fn close(&mut self, _stats: PageStats) -> Result<(), ChannelError> {
        Ok(())
    }
}
