//! Pre-copy: memory goes over while the tree runs, round after round, until
//! another round would not shorten the blackout.

use std::collections::BTreeSet;
use std::ops::Range;
use std::time::{Duration, Instant};

use bytes::Bytes;
use migrate_channel::ChannelError;
use migrate_core::blackout::Standing;
use migrate_core::convergence::{Convergence, Decision, OnTimeout, Policy, Round, StopReason};
use migrate_core::preflight::Finding;
use migrate_core::report::{RoundReport, counted};
use migrate_core::wire::{GONE_RANGES_MAX, Message, PAGE_BYTES, PageOwner, PageRun};
use migrate_criu::{Criu, Marks, Track, WorkerOptions};
use migrate_gate::FlowCount;
use migrate_memory::{ContentPrecopy, Limits, Precopy, RoundError, RoundStats, TrackingState};

use super::dump::Outgoing;
use super::look::Look;
use super::pacer::Pacer;
use super::soft_dirty::SoftDirty;
use super::untracked::Untracked;
use super::{Migration, Plan, micros, not_yet};
use crate::error::Error;
use crate::progress::Progress;

/// How memory is moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// Rounds while the tree runs, tracked by userfaultfd; CRIU's final dump
    /// leaves out what has not changed since.
    Uffd,
    /// Rounds by CRIU, tracked by the kernel's soft-dirty marks; the tree stands
    /// still for a moment in each, and the final dump leaves out what has not
    /// changed since the last.
    SoftDirty,
    /// Rounds that compare content while the tree runs; CRIU's final dump looks
    /// at everything, and what is as it was sent is left out.
    Full,
}

/// What the user wants of [`Engine`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EngineChoice {
    /// The best that works here.
    #[default]
    Auto,
    /// This one or none.
    Only(Engine),
}

/// What connections hold, a few MiB, has gone over a link of half a megabit by then, and been
/// put into memory.
const STORED_LIMIT: Duration = Duration::from_secs(120);

/// Chooses the engine and says why.
///
/// # Errors
///
/// The finding, when the wanted engine does not work here.
pub(super) async fn choose(wanted: EngineChoice, criu: &Criu) -> (Engine, Finding) {
    const ANOTHER: &str = "use another --engine, or --engine auto";
    let subject = "memory engine";
    if wanted == EngineChoice::Only(Engine::Full) {
        let finding = Finding::ok(
            subject,
            "full: rounds compare content; the frozen tree is read whole, and what changed is sent",
        );
        return (Engine::Full, finding);
    }
    let mut obstacles = Vec::new();
    if wanted != EngineChoice::Only(Engine::SoftDirty) {
        match uffd_works(criu).await {
            Ok(()) => {
                let finding = Finding::ok(subject, "uffd: memory moves while the tree runs");
                return (Engine::Uffd, finding);
            }
            Err(why) if wanted == EngineChoice::Only(Engine::Uffd) => {
                return (Engine::Uffd, Finding::refused(subject, why, ANOTHER));
            }
            Err(why) => obstacles.push(format!("not uffd: {why}")),
        }
    }
    match (soft_dirty_works(criu).await, wanted) {
        (Ok(()), _) => {
            let chosen = "soft-dirty: memory moves while the tree runs; it stands still for a \
                          moment in each round";
            let finding = match obstacles.first() {
                None => Finding::ok(subject, chosen),
                Some(why) => Finding::note(subject, format!("{chosen} ({why})"), ""),
            };
            return (Engine::SoftDirty, finding);
        }
        (Err(why), EngineChoice::Only(_)) => {
            return (Engine::SoftDirty, Finding::refused(subject, why, ANOTHER));
        }
        (Err(why), EngineChoice::Auto) => obstacles.push(format!("not soft-dirty: {why}")),
    }
    let finding = Finding::note(
        subject,
        format!(
            "full, the frozen tree is read whole and compared; {}",
            obstacles.join("; ")
        ),
        "",
    );
    (Engine::Full, finding)
}

async fn uffd_works(criu: &Criu) -> Result<(), String> {
    migrate_memory::probe().map_err(|error| crate::error::chain(&error))?;
    criu.self_check_shim()
        .await
        .map_err(|error| crate::error::chain(&error))
}

async fn soft_dirty_works(criu: &Criu) -> Result<(), String> {
    // Most kernels without tracking have no marks either; no CRIU need be started
    // to learn that.
    migrate_memory::probe_soft_dirty().map_err(|error| crate::error::chain(&error))?;
    let checked = async {
        criu.worker(WorkerOptions::default())
            .await?
            .check_soft_dirty()
            .await
    };
    checked.await.map_err(|error| crate::error::chain(&error))
}

impl Migration {
    /// Makes rounds until they have done their work.
    pub(super) async fn precopy(&mut self) -> Result<String, Error> {
        match self.plan()?.engine {
            Engine::Full => {
                let precopy = ContentPrecopy::new(self.request.pid, Limits::default());
                self.content = Some(precopy);
            }
            Engine::Uffd => {
                self.precopy = Some(Precopy::new(self.request.pid, Limits::default())?);
            }
            Engine::SoftDirty => {
                let images = self.image_directory()?;
                let criu = self.criu()?.clone();
                self.soft_dirty = Some(SoftDirty::new(self.request.pid, criu, images));
            }
        }
        self.rounds().await
    }

    async fn rounds(&mut self) -> Result<String, Error> {
        const AWAITED: &str = "a round";
        const STORED: &str = "the pages of a round in store";
        let begun = Instant::now();
        let policy = self.request.choices.policy;
        let give_up_at = give_up_at(begun, &policy);
        let mut convergence = Convergence::new(policy);
        let mut untracked = Untracked::default();
        let mut look = Look::default();
        let mut pacer = self.pacer()?;
        // The first sends everything, and the others hardly more than the one before.
        let mut pages_expected = self.plan()?.facts.resident_bytes / PAGE_BYTES as u64;
        loop {
            if self.gate.is_some() {
                look.begin(self.request.pid);
            }
            let link = self
                .link
                .as_mut()
                .ok_or_else(|| not_yet("the connection"))?;
            let before = link.sender.stream_stats();
            let mut sink = Outgoing::of_round(
                &mut link.sender,
                self.reporter.clone(),
                self.rounds + 1,
                pages_expected,
                pacer.as_mut(),
            );
            let broken = |source| Error::Channel {
                peer: link.peer.clone(),
                source,
            };
            let round = async {
                let made = match (&mut self.precopy, &mut self.content, &mut self.soft_dirty) {
                    (Some(precopy), _, _) => precopy.round(&mut sink).await,
                    (None, Some(content), _) => content.round(&mut sink).await,
                    (None, None, Some(soft_dirty)) => Ok(soft_dirty.round(&mut sink).await?),
                    (None, None, None) => return Err(not_yet("the engine")),
                };
                let stats = made.map_err(|error| match error {
                    RoundError::Memory { source } => source.into(),
                    RoundError::Sink { source } => broken(source),
                })?;
                let sent = Instant::now();
                sink.sender
                    .control(&Message::RoundSent)
                    .await
                    .map_err(broken)?;
                Ok((stats, sent))
            };
            let (stats, sent) = tokio::select! {
                stats = round => stats?,
                // Nothing is due from the destination now but its giving up.
                message = link.inbox.next(AWAITED) => {
                    let message = message?;
                    return Err(link.inbox.unexpected(&message, AWAITED));
                }
                () = reached(give_up_at) => {
                    return Err(Error::NotConverged { reason: StopReason::Timeout });
                }
            };
            let stored = tokio::select! {
                message = link.inbox.next_within(STORED, STORED_LIMIT) => message?,
                () = reached(give_up_at) => {
                    return Err(Error::NotConverged { reason: StopReason::Timeout });
                }
            };
            if stored != Message::RoundStored {
                return Err(link.inbox.unexpected(&stored, STORED));
            }
            self.round_pages += stats.pages_written;
            // There is none in the rounds that follow.
            let paused = pacer.take().map_or(Duration::ZERO, |pacer| pacer.paused());
            let after = link.sender.stream_stats();
            let sent_bytes = after.raw_bytes.saturating_sub(before.raw_bytes);
            let sending = after.busy.saturating_sub(before.busy) + sent.elapsed();
            self.rounds += 1;
            let counted = self.count_flows(&mut look).await;
            let round = Round {
                pages_written: stats.pages_written,
                pages_skipped: stats.pages_skipped,
                pages_untracked: stats.pages_untracked,
                pages_whole: stats.pages_whole,
                since_previous_us: stats.since_previous_us,
                took_us: stats.took_us,
                elapsed_us: micros(begun.elapsed()),
                link_bytes_per_s: self.link_rate(sent_bytes, sending),
                standing_us: self.standing(&stats, counted)?.us(),
                is_postcopy: self.request.choices.postcopy,
            };
            let verdict = convergence.after_round(&round);
            pages_expected = stats.pages_written;
            let stopped = match verdict.decision {
                Decision::Another => None,
                Decision::Stop { reason, .. } => Some(reason),
            };
            untracked.warn(
                self.precopy.as_ref(),
                self.soft_dirty.as_ref(),
                stopped.is_some(),
                &self.reporter,
            );
            let report = RoundReport {
                round: verdict.iteration,
                start_us: micros(self.begun.elapsed()).saturating_sub(stats.took_us),
                pages_scanned: stats.pages_scanned,
                pages_written: stats.pages_written,
                pages_skipped: stats.pages_skipped,
                pages_whole: stats.pages_whole,
                skipped_percent: verdict.skipped_percent,
                bytes: stats.bytes,
                took_us: stats.took_us,
                paused_us: micros(paused),
                dirty_bytes_per_s: verdict.dirty_bytes_per_s,
                link_bytes_per_s: round.link_bytes_per_s,
                flows: counted.map(|count| count.flows),
                dirty_flows: counted.map(|count| count.dirty),
                blackout_us_predicted: verdict.blackout_us_predicted,
                stopped,
            };
            self.precopy_rounds.push(report.clone());
            self.reporter.tell(Progress::Round { round: report });
            match verdict.decision {
                Decision::Another => {}
                Decision::Stop {
                    then: OnTimeout::Cancel,
                    reason,
                } if reason != StopReason::Converged => {
                    return Err(Error::NotConverged { reason });
                }
                Decision::Stop { reason, then } => {
                    self.postcopies = self.request.choices.postcopy || then == OnTimeout::Postcopy;
                    return Ok(summary(verdict.iteration, reason, &stats));
                }
            }
        }
    }

    /// What the tree stands still for in any case, after a round.
    fn standing(&self, stats: &RoundStats, counted: Option<FlowCount>) -> Result<Standing, Error> {
        let Plan { facts, engine, .. } = self.plan()?;
        let restore = self.request.choices.effective_restore();
        Ok(Standing {
            processes: stats.processes,
            flows: counted.map_or(facts.flows.len(), |count| count.flows) as u64,
            pages: stats.pages_scanned + stats.pages_untracked,
            pages_shared: stats.pages_shared,
            is_compared: *engine == Engine::Full,
            is_eager: !restore.is_lazy(facts),
        })
    }

    /// Who stands back in the first round. Marks of the kernel are read by CRIU, with the tree
    /// frozen; and what is written while a round pauses would come late.
    fn pacer(&self) -> Result<Option<Pacer>, Error> {
        if self.soft_dirty.is_some() || self.request.choices.postcopy {
            return Ok(None);
        }
        let processes = &self.plan()?.facts.processes;
        let pids: Vec<i32> = processes.iter().map(|process| process.pid).collect();
        let timeout = self.request.choices.policy.timeout_us;
        Ok(Some(Pacer::new(&pids, timeout.map(Duration::from_micros))))
    }

    /// Rate of the page stream: of this round when it sent enough to tell, or
    /// the best seen before.
    fn link_rate(&mut self, bytes: u64, sending: Duration) -> u64 {
        /// Less than this is gone in one write and tells nothing.
        const TELLING_BYTES: u64 = 4 << 20;
        if bytes >= TELLING_BYTES || self.link_bytes_per_s == 0 {
            let sending_us = micros(sending).max(1);
            let rate = u128::from(bytes) * 1_000_000 / u128::from(sending_us);
            self.link_bytes_per_s = u64::try_from(rate).unwrap_or(u64::MAX);
        }
        self.link_bytes_per_s
    }

    /// What rounds have sent of processes that are not among those of the frozen tree takes
    /// no room beside what the final dump brings.
    pub(super) async fn forget_ended(&mut self, frozen: &BTreeSet<i32>) -> Result<(), Error> {
        let (Some(precopy), Some(link)) = (&mut self.precopy, &mut self.link) else {
            return Ok(());
        };
        let mut sink = Outgoing::new(&mut link.sender);
        let forgotten = precopy.forget_ended_but(frozen, &mut sink).await;
        forgotten.map_err(|source| Error::Channel {
            peer: link.peer.clone(),
            source,
        })
    }

    /// For the final dump: whose clean pages have gone over.
    pub(super) fn precopied(&self) -> Option<Track> {
        if let Some(soft_dirty) = &self.soft_dirty {
            return soft_dirty.track();
        }
        let precopy = self.precopy.as_ref()?;
        Some(Track {
            marks: Marks::Tracker,
            precopied: precopy
                .processes()
                .filter(|process| matches!(process.state, TrackingState::Tracked { .. }))
                .filter_map(|process| u32::try_from(process.pid).ok())
                .collect(),
        })
    }
}

/// When a round is given up that is not at its end, where the user wants no freeze then.
/// Elsewhere it is finished: what it has not sent would go in the blackout.
fn give_up_at(begun: Instant, policy: &Policy) -> Option<Instant> {
    let timeout = policy
        .timeout_us
        .filter(|_| policy.on_timeout == OnTimeout::Cancel)?;
    // One that is further away than any clock goes is none.
    begun.checked_add(Duration::from_micros(timeout))
}

/// Waits until then; for ever where there is no such moment.
async fn reached(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment.into()).await,
        None => std::future::pending().await,
    }
}

fn summary(rounds: u32, reason: StopReason, last: &RoundStats) -> String {
    let rounds = counted(usize::try_from(rounds).unwrap_or(usize::MAX), "round");
    format!(
        "{rounds}, {reason}; the last found {} of {} pages changed",
        last.pages_written, last.pages_scanned
    )
}

impl migrate_memory::PageSink for Outgoing<'_> {
    type Error = ChannelError;

    async fn pages(&mut self, run: PageRun, data: Bytes) -> Result<(), ChannelError> {
        self.send(run, &data).await
    }

    async fn gone(&mut self, owner: PageOwner, ranges: &[Range<u64>]) -> Result<(), ChannelError> {
        let page = PAGE_BYTES as u64;
        for ranges in ranges.chunks(GONE_RANGES_MAX) {
            let pages = ranges
                .iter()
                .map(|range| (range.start / page, (range.end - range.start) / page));
            let gone = Message::Gone {
                owner,
                pages: pages.collect(),
            };
            self.sender.control(&gone).await?;
        }
        Ok(())
    }
}
