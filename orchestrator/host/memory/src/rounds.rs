//! Rounds: what changed since the last one, handed on while the tree runs.
//!
//! ```text
//! round:  processes of the tree now
//!         each:  new, or exec called  -> userfaultfd made inside
//!                mappings now, each:  not watched -> register; all of it is new
//!                    PAGEMAP_SCAN marks written pages clean and names them
//!                    process_vm_readv, PageSink
//!         segments that they share: read, compared by content, PageSink
//! ```
//!
//! First marked, then read: a write after the mark marks the page again, so
//! either this reading or the next round has it.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error as StdError;
use std::future::Future;
use std::ops::Range;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use migrate_core::wire::{PAGE_BYTES, PageOwner, PageRun};

use crate::error::{MemoryError, RoundError, UntrackedReason};
use crate::frozen::{FrozenPages, TaskRanges};
use crate::inject::{InjectError, Injection};
use crate::maps::{self, Vma};
use crate::probe::{Support, probe};
use crate::process::{self, OtherMemory, Watch};
use crate::segments::{FrozenSegments, Segments};
use crate::sys::{self, ScanMode};
use crate::tree::{self, Member};
use crate::{PAGE, ZERO_PAGE};

/// Most pages that a run with data has: 1 MiB, well below the frame limit of
/// the channel and the kernel's limit of one reading.
pub const RUN_PAGES_MAX: u64 = 256;

/// Every address that a process can have.
pub(crate) const ALL_ADDRESSES: Range<u64> = 0..1 << 63;

/// Takes the pages of a round.
pub trait PageSink: Send {
    /// Why pages were not taken.
    type Error: StdError + Send + Sync + 'static;

    /// Takes a run of at most [`RUN_PAGES_MAX`] pages: with its data and
    /// [`PageRun::PRESENT`], or without data and [`PageRun::ZERO`]. It replaces
    /// whatever came earlier for these pages. Pages come in ascending order
    /// within a mapping only.
    fn pages(
        &mut self,
        run: PageRun,
        data: Bytes,
    ) -> impl Future<Output = Result<(), Self::Error>> + Send;

    /// Memory that was there in the last round is not any more; of an ended
    /// process, every address. What came for it earlier may be thrown away, what comes
    /// later may not. Only a hint: what stays costs room, and is in nobody's list in the end.
    fn gone(
        &mut self,
        owner: PageOwner,
        ranges: &[Range<u64>],
    ) -> impl Future<Output = Result<(), Self::Error>> + Send {
        let _ = (owner, ranges);
        async { Ok(()) }
    }
}

/// Bounds of a pre-copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most processes that are followed.
    pub processes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { processes: 4096 }
    }
}

/// What a round did. Pages are those of 4 KiB.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RoundStats {
    /// Populated pages looked at: written and skipped together.
    pub pages_scanned: u64,
    /// Pages that had changed, and were handed on.
    pub pages_written: u64,
    /// Pages that had not changed.
    pub pages_skipped: u64,
    /// Those of `pages_written` that hold nothing but zeros and went without data.
    pub zero_pages: u64,
    /// Pages that had changed and were gone before they could be read.
    pub pages_vanished: u64,
    /// Populated private pages that are not tracked: they move while the tree
    /// is frozen, however many rounds there are.
    pub pages_untracked: u64,
    /// Those of `pages_untracked` that may be much: all but what was written to private
    /// mappings of files.
    pub pages_whole: u64,
    /// Those of `pages_scanned` in shared segments. They are read and compared,
    /// in every round and of the frozen tree.
    pub pages_shared: u64,
    /// Bytes of page data handed on.
    pub bytes: u64,
    /// Processes in the tree.
    pub processes: u64,
    /// Processes that were newly tracked in this round.
    pub injections: u64,
    /// The longest time that one thread stood still for that, in microseconds.
    pub injection_stopped_us_max: u64,
    /// From the start of the previous round to that of this one, in
    /// microseconds: how long the pages had to change. Zero in the first.
    pub since_previous_us: u64,
    /// How long the round took, waiting for the sink included, in microseconds.
    pub took_us: u64,
    /// How much of that was spent waiting for the sink, in microseconds.
    pub sink_us: u64,
}

impl RoundStats {
    /// Of a round that begins at `start`, after one that began at `previous`.
    pub(crate) fn begun(start: Instant, previous: Option<Instant>) -> Self {
        Self {
            since_previous_us: previous
                .map_or(0, |previous| micros(start.duration_since(previous))),
            ..Self::default()
        }
    }
}

/// A process that ends in the middle of a round is no error, unless it is the
/// root of the tree.
pub(crate) fn unless_gone<E: std::error::Error + 'static>(
    done: Result<(), RoundError<E>>,
    root: i32,
) -> Result<(), RoundError<E>> {
    match done {
        Err(RoundError::Memory {
            source: MemoryError::Gone { pid },
        }) if pid != root => Ok(()),
        done => done,
    }
}

/// Whether a process is tracked.
#[derive(Debug)]
pub enum TrackingState {
    /// Its clean pages have been handed on.
    Tracked {
        /// What it cost to begin.
        injection: Injection,
    },
    /// All of its memory counts as dirty.
    Untracked {
        /// Why.
        reason: UntrackedReason,
    },
}

/// A process of the tree as the last round saw it.
#[derive(Debug)]
pub struct ProcessStatus<'a> {
    /// Its PID.
    pub pid: i32,
    /// Whether it is tracked.
    pub state: &'a TrackingState,
}

#[derive(Debug)]
struct Process {
    start_ticks: u64,
    watch: Option<Watch>,
    state: TrackingState,
    /// Where the vDSO was when it was handed on. It never changes, but exec moves it.
    vdso: Option<Range<u64>>,
    /// What was copied in the last round, for [`PageSink::gone`].
    known: Vec<Range<u64>>,
}

/// Pre-copy of one tree.
///
/// Lives until CRIU has dumped the tree: dropping it ends the tracking, and all
/// memory counts as dirty from then on. The tree is not affected by that.
#[derive(Debug)]
pub struct Precopy {
    root: i32,
    limits: Limits,
    support: Support,
    processes: BTreeMap<i32, Process>,
    segments: Segments,
    last_start: Option<Instant>,
    buffer: BytesMut,
}

impl Precopy {
    /// Prepares to copy the tree of `root`. The tree is not touched yet.
    ///
    /// # Errors
    ///
    /// This host cannot track memory, see [`probe`].
    pub fn new(root: i32, limits: Limits) -> Result<Self, MemoryError> {
        let support = probe().map_err(|source| MemoryError::Unsupported { source })?;
        Ok(Self {
            root,
            limits,
            support,
            processes: BTreeMap::new(),
            segments: Segments::default(),
            last_start: None,
            buffer: BytesMut::new(),
        })
    }

    /// The processes as the last round saw them, by PID.
    pub fn processes(&self) -> impl Iterator<Item = ProcessStatus<'_>> {
        self.processes.iter().map(|(&pid, process)| ProcessStatus {
            pid,
            state: &process.state,
        })
    }

    /// Where the vDSO of processes is, of the tree that stands still, that have called exec
    /// since the last round, by PID: nobody has handed it on from there.
    ///
    /// # Errors
    ///
    /// A process cannot be looked at.
    pub fn moved_vdsos(&self) -> Result<BTreeMap<u32, Range<u64>>, MemoryError> {
        let mut moved = BTreeMap::new();
        for (&pid, process) in &self.processes {
            let tracked = matches!(process.state, TrackingState::Tracked { .. });
            let sent = process.watch.as_ref().zip(process.vdso.as_ref());
            if !tracked || sent.is_some_and(|(watch, at)| watch.is_of_living_memory(at)) {
                continue;
            }
            if let Some(vdso) = vdso(pid)? {
                moved.insert(pid.unsigned_abs(), vdso);
            }
        }
        Ok(moved)
    }

    /// The shared segments of the tree, which stands still.
    ///
    /// # Errors
    ///
    /// The tree cannot be looked at.
    pub fn frozen_segments(&self) -> Result<FrozenSegments, MemoryError> {
        self.segments.frozen(self.root, self.limits.processes)
    }

    /// What has changed since the last round, of the tree that stands still now and that
    /// CRIU is about to dump. `held` is what of it cannot wait; where that is not known,
    /// nothing, if one of these processes, all of the tree's, has locked memory in.
    ///
    /// # Errors
    ///
    /// A process cannot be looked at.
    pub fn frozen_pages(
        &self,
        tree: &[u32],
        held: Option<&TaskRanges>,
    ) -> Result<FrozenPages, MemoryError> {
        let watched = self.processes.iter().filter_map(|(&pid, process)| {
            let watch = process.watch.as_ref()?;
            Some((pid, watch))
        });
        FrozenPages::of(watched, self.support.guard_pages, tree, held)
    }

    /// Hands on what has changed since the last round; everything in the first.
    ///
    /// Cancel safe: a round that is dropped counts what it did not hand on as
    /// changed.
    ///
    /// # Errors
    ///
    /// The root is gone, the tree has too many processes, or the sink refused.
    /// A process that cannot be tracked is no error, see
    /// [`processes`](Self::processes).
    pub async fn round<S: PageSink>(
        &mut self,
        sink: &mut S,
    ) -> Result<RoundStats, RoundError<S::Error>> {
        let start = Instant::now();
        let mut stats = RoundStats::begun(start, self.last_start);
        let members = tree::members(self.root, self.limits.processes)?;
        self.last_start = Some(start);
        self.forget_ended(&members, sink).await?;
        for &member in &members {
            let done = self.copy(member, sink, &mut stats).await;
            unless_gone(done, self.root)?;
        }
        self.segments.round(&members, sink, &mut stats).await?;
        stats.processes = members.len() as u64;
        stats.took_us = micros(start.elapsed());
        Ok(stats)
    }

    /// Forgets processes that have ended, or whose PID now is another's.
    async fn forget_ended<S: PageSink>(
        &mut self,
        members: &[Member],
        sink: &mut S,
    ) -> Result<(), RoundError<S::Error>> {
        let running: BTreeSet<(i32, u64)> = members
            .iter()
            .map(|member| (member.pid, member.start_ticks))
            .collect();
        let runs = |pid, process: &Process| running.contains(&(pid, process.start_ticks));
        let forgotten = self.forget_but(runs, sink).await;
        forgotten.map_err(|source| RoundError::Sink { source })
    }

    /// Forgets processes that have ended since the last round, and tells the sink: those
    /// that are not among the PIDs of the frozen tree.
    ///
    /// # Errors
    ///
    /// The sink refused.
    pub async fn forget_ended_but<S: PageSink>(
        &mut self,
        frozen: &BTreeSet<i32>,
        sink: &mut S,
    ) -> Result<(), S::Error> {
        self.forget_but(|pid, _| frozen.contains(&pid), sink).await
    }

    async fn forget_but<S: PageSink>(
        &mut self,
        runs: impl Fn(i32, &Process) -> bool,
        sink: &mut S,
    ) -> Result<(), S::Error> {
        let ended = self.processes.iter();
        let ended = ended.filter(|&(&pid, process)| !runs(pid, process));
        let ended: Vec<i32> = ended.map(|(&pid, _)| pid).collect();
        for pid in ended {
            self.processes.remove(&pid);
            sink.gone(PageOwner::Task(pid.unsigned_abs()), &[ALL_ADDRESSES])
                .await?;
        }
        Ok(())
    }

    async fn copy<S: PageSink>(
        &mut self,
        member: Member,
        sink: &mut S,
        stats: &mut RoundStats,
    ) -> Result<(), RoundError<S::Error>> {
        let pid = member.pid;
        /// A process may call exec again while it is looked at.
        const EXECS_MAX: usize = 3;
        for _ in 0..EXECS_MAX {
            let mut vmas = maps::read(pid)?;
            let injections = stats.injections;
            let process = track(&mut self.processes, member, &vmas, stats)?;
            if stats.injections > injections {
                // Of the memory that is watched: what was seen before may be that of
                // another program, which has called exec meanwhile.
                vmas = maps::read(pid)?;
            }
            let memory = process::Memory::open(pid)?;
            let guards = self.support.guard_pages;
            let Some(watch) = &mut process.watch else {
                for vma in vmas.iter().filter(|vma| vma.private()) {
                    let pages = process::populated_pages(pid, memory.pagemap(), vma, guards)?;
                    stats.pages_untracked += pages;
                    stats.pages_whole += pages;
                }
                return Ok(());
            };
            // Before what is there now, for other memory may be at the same addresses.
            let before = std::mem::replace(&mut process.known, merged(&vmas));
            let gone = without(&before, &process.known);
            if !gone.is_empty() {
                let owner = PageOwner::Task(pid.unsigned_abs());
                let told = sink.gone(owner, &gone).await;
                told.map_err(|source| RoundError::Sink { source })?;
            }
            let trackable = vmas.iter().filter(|vma| vma.trackable());
            let Ok(refused) = watch.adopt(trackable) else {
                process.watch = None;
                continue;
            };
            let mut pass = Pass {
                pid,
                watch: &*watch,
                refused,
                changed: Vec::new(),
                memory: &memory,
                guards,
                buffer: &mut self.buffer,
                sink,
                stats,
            };
            if process.vdso.is_none() {
                process.vdso = pass.vdso(&vmas).await?;
            }
            for vma in &vmas {
                pass.mapping(vma).await?;
            }
            if pass.what_has_changed().await?.is_ok() {
                return Ok(());
            }
            process.watch = None;
        }
        Ok(())
    }
}

/// Sees to it that a process is tracked, if it can be.
fn track<'p>(
    processes: &'p mut BTreeMap<i32, Process>,
    member: Member,
    vmas: &[Vma],
    stats: &mut RoundStats,
) -> Result<&'p mut Process, MemoryError> {
    let pid = member.pid;
    let refused = untrackable(member, vmas);
    let watched = processes
        .get(&pid)
        .is_some_and(|process| process.watch.is_some());
    let (watch, state) = match refused {
        Some(reason) => (None, TrackingState::Untracked { reason }),
        None if watched => {
            return processes.get_mut(&pid).ok_or(MemoryError::Gone { pid });
        }
        None => match Watch::begin(pid) {
            Ok((watch, injection)) => {
                stats.injections += 1;
                stats.injection_stopped_us_max =
                    stats.injection_stopped_us_max.max(injection.stopped_us);
                (Some(watch), TrackingState::Tracked { injection })
            }
            Err(InjectError::Gone) => return Err(MemoryError::Gone { pid }),
            Err(InjectError::Refused(reason)) => (None, TrackingState::Untracked { reason }),
        },
    };
    let known = processes
        .remove(&pid)
        .map(|process| process.known)
        .unwrap_or_default();
    Ok(processes.entry(pid).or_insert(Process {
        start_ticks: member.start_ticks,
        watch,
        state,
        vdso: None,
        known,
    }))
}

/// Why no marks in the page tables can account for what this process writes.
fn untrackable(member: Member, vmas: &[Vma]) -> Option<UntrackedReason> {
    let device = process::device_writes(member.pid, vmas);
    let shared = member
        .parent
        .filter(|&parent| sys::same_memory(member.pid, parent));
    match (device, shared) {
        (Some(what), _) => Some(UntrackedReason::Pinned { what }),
        (None, Some(with)) => Some(UntrackedReason::SharedMemory { with }),
        (None, None) => None,
    }
}

/// See [`markable`].
#[derive(Debug, Default)]
pub struct Markable {
    /// Where the vDSO of a process is, by PID. It moves when the process calls exec.
    pub vdsos: BTreeMap<u32, Option<Range<u64>>>,
    /// The others, by PID.
    pub refused: BTreeMap<i32, UntrackedReason>,
}

/// Processes of a tree for which marks in the page tables account for every
/// write, whoever sets them. Refused are those that devices write to, and those that share
/// their memory with others: whoever clears the marks of one clears those of all.
///
/// # Errors
///
/// The root is gone, or the tree has too many processes.
pub fn markable(root: i32, limits: Limits) -> Result<Markable, MemoryError> {
    let mut found = Markable::default();
    let mut sharing = Vec::new();
    for member in tree::members(root, limits.processes)? {
        let vmas = match maps::read(member.pid) {
            Err(MemoryError::Gone { pid }) if pid != root => continue,
            vmas => vmas?,
        };
        match untrackable(member, &vmas) {
            None => {
                let vdso = vdso_of(&vmas);
                found.vdsos.insert(member.pid.unsigned_abs(), vdso);
            }
            Some(reason) => {
                if let UntrackedReason::SharedMemory { with } = reason {
                    sharing.push((with, member.pid));
                }
                found.refused.insert(member.pid, reason);
            }
        }
    }
    for (pid, with) in sharing {
        if found.vdsos.remove(&pid.unsigned_abs()).is_some() {
            let reason = UntrackedReason::SharedMemory { with };
            found.refused.insert(pid, reason);
        }
    }
    Ok(found)
}

/// Where the vDSO of a process is; `None`: it has none, or has ended.
///
/// # Errors
///
/// The process cannot be looked at.
pub fn vdso(pid: i32) -> Result<Option<Range<u64>>, MemoryError> {
    match maps::read(pid) {
        Err(MemoryError::Gone { .. }) => Ok(None),
        vmas => Ok(vdso_of(&vmas?)),
    }
}

fn vdso_of(vmas: &[Vma]) -> Option<Range<u64>> {
    let vdso = vmas.iter().find(|vma| vma.name == "[vdso]");
    vdso.map(|vma| vma.range.clone())
}

/// One round over one process.
struct Pass<'a, S> {
    pid: i32,
    watch: &'a Watch,
    /// Mappings that cannot be watched now.
    refused: Vec<Range<u64>>,
    /// What was not what it had been when it was found.
    changed: Vec<Range<u64>>,
    memory: &'a process::Memory,
    guards: bool,
    buffer: &'a mut BytesMut,
    sink: &'a mut S,
    stats: &'a mut RoundStats,
}

impl<S: PageSink> Pass<'_, S> {
    /// Hands on the vDSO; where it is, if it could be read. CRIU counts its pages as
    /// clean although nothing tracks them, and it never changes.
    async fn vdso(&mut self, vmas: &[Vma]) -> Result<Option<Range<u64>>, RoundError<S::Error>> {
        let Some(vdso) = vdso_of(vmas) else {
            return Ok(None);
        };
        let mut at = vdso.start;
        while at < vdso.end {
            let piece = at..vdso.end.min(at + RUN_PAGES_MAX * PAGE);
            at = piece.end;
            let wanted = piece.end - piece.start;
            let Some(data) = self
                .memory
                .read(std::slice::from_ref(&piece), self.buffer)?
            else {
                return Err(MemoryError::Gone { pid: self.pid }.into());
            };
            if data.len() as u64 != wanted {
                return Ok(None);
            }
            self.hand_on(&[piece], &data.freeze()).await?;
            self.stats.pages_scanned += wanted / PAGE;
            self.stats.pages_written += wanted / PAGE;
        }
        Ok(Some(vdso))
    }

    /// Copies what changed in one mapping.
    async fn mapping(&mut self, vma: &Vma) -> Result<(), RoundError<S::Error>> {
        if !vma.trackable() || self.refused.contains(&vma.range) {
            if vma.private() && vma.name != "[vdso]" {
                self.untracked(vma)?;
            }
            return Ok(());
        }
        let left = self.written(vma.range.clone()).await?;
        if !left.is_empty() {
            self.changed.push(left);
        }
        Ok(())
    }

    /// The same of mappings that are not those which were found, once all others are copied:
    /// the process has gone on meanwhile. An error when it has called exec since it is
    /// watched.
    async fn what_has_changed(&mut self) -> Result<Result<(), OtherMemory>, RoundError<S::Error>> {
        let changed = std::mem::take(&mut self.changed);
        if changed.is_empty() {
            return Ok(Ok(()));
        }
        let (watched, mut others) = match self.watch.renew(&changed) {
            Ok(found) => found,
            Err(other) => return Ok(Err(other)),
        };
        for vma in watched {
            let range = self.written(vma.range.clone()).await?;
            if !range.is_empty() {
                others.push(Vma { range, ..vma });
            }
        }
        for vma in others.iter().filter(|vma| vma.private()) {
            self.untracked(vma)?;
        }
        Ok(Ok(()))
    }

    /// Copies what changed in a range that is one mapping; what is left of it where it is not,
    /// or not a watched one.
    async fn written(&mut self, mut range: Range<u64>) -> Result<Range<u64>, RoundError<S::Error>> {
        while range.start < range.end {
            let Ok(scan) = self.watch.scan(
                self.memory.pagemap(),
                &range,
                ScanMode::Protect,
                self.guards,
            ) else {
                break;
            };
            self.stats.pages_scanned += scan.clean_pages + scan.written_pages;
            self.stats.pages_skipped += scan.clean_pages;
            range.start = scan.next.max(range.start + PAGE);
            self.settle(scan.owed).await?;
        }
        Ok(range.start.min(range.end)..range.end)
    }

    fn untracked(&mut self, vma: &Vma) -> Result<(), MemoryError> {
        let pages = process::populated_pages(self.pid, self.memory.pagemap(), vma, self.guards)?;
        self.stats.pages_untracked += pages;
        if !vma.of_file() {
            self.stats.pages_whole += pages;
        }
        Ok(())
    }

    /// Reads and hands on the pages that a scan named.
    async fn settle(&mut self, mut owed: process::Owed<'_>) -> Result<(), RoundError<S::Error>> {
        // What is not mapped any more may be one page or most of a region: the next page that
        // can be read is found in as many steps as its logarithm.
        let mut missing = 1;
        loop {
            let pieces = owed.next_pieces(RUN_PAGES_MAX);
            if pieces.is_empty() {
                return Ok(());
            }
            let wanted: u64 = pieces.iter().map(|piece| piece.end - piece.start).sum();
            let Some(data) = self.memory.read(&pieces, self.buffer)? else {
                return Err(MemoryError::Gone { pid: self.pid }.into());
            };
            let read = data.len() as u64;
            self.hand_on(&pieces, &data.freeze()).await?;
            owed.settle(read);
            self.stats.pages_written += read / PAGE;
            if read > 0 {
                missing = 1;
            }
            if read < wanted {
                let given_up = owed.give_up(missing);
                missing = 2 * given_up;
                self.stats.pages_scanned -= given_up;
                self.stats.pages_vanished += given_up;
            }
        }
    }

    /// Hands on the leading pieces that `data` covers, zeros without data.
    async fn hand_on(
        &mut self,
        pieces: &[Range<u64>],
        data: &Bytes,
    ) -> Result<(), RoundError<S::Error>> {
        let owner = PageOwner::Task(self.pid.unsigned_abs());
        let mut at = 0usize;
        for piece in pieces {
            let bytes = usize::try_from(piece.end - piece.start).unwrap_or(usize::MAX);
            let end = data.len().min(at.saturating_add(bytes));
            let content = data.slice(at..end);
            hand_on(owner, piece.start, &content, self.sink, self.stats)
                .await
                .map_err(|source| RoundError::Sink { source })?;
            at = end;
        }
        Ok(())
    }
}

/// Hands on pages side by side, zeros without data, and counts what goes out.
///
/// # Errors
///
/// The sink's.
pub async fn hand_on<S: PageSink>(
    owner: PageOwner,
    vaddr: u64,
    data: &Bytes,
    sink: &mut S,
    stats: &mut RoundStats,
) -> Result<(), S::Error> {
    let waiting = Instant::now();
    for (run, content) in runs(owner, vaddr, data) {
        if run.flags == PageRun::ZERO {
            stats.zero_pages += run.pages;
        }
        stats.bytes += content.len() as u64;
        sink.pages(run, content).await?;
    }
    stats.sink_us += micros(waiting.elapsed());
    Ok(())
}

/// Splits pages side by side into runs of zeros and runs of content.
fn runs(owner: PageOwner, vaddr: u64, data: &Bytes) -> impl Iterator<Item = (PageRun, Bytes)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let rest = &data[at..];
        let mut pages = rest.chunks(PAGE_BYTES).map(|page| page == ZERO_PAGE);
        let zero = pages.next()?;
        let count = 1 + pages.take_while(|&next| next == zero).count();
        let start = at;
        at += count * PAGE_BYTES;
        let run = PageRun {
            owner,
            vaddr: vaddr + start as u64,
            pages: count as u64,
            flags: if zero {
                PageRun::ZERO
            } else {
                PageRun::PRESENT
            },
        };
        let content = if zero {
            Bytes::new()
        } else {
            data.slice(start..at)
        };
        Some((run, content))
    })
}

/// The mappings that may be tracked, adjacent ones in one.
fn merged(vmas: &[Vma]) -> Vec<Range<u64>> {
    let mut merged: Vec<Range<u64>> = Vec::new();
    for vma in vmas.iter().filter(|vma| vma.anonymous()) {
        match merged.last_mut() {
            Some(last) if last.end == vma.range.start => last.end = vma.range.end,
            _ => merged.push(vma.range.clone()),
        }
    }
    merged
}

/// What of `before` is not in `now`; both ascend and do not overlap.
pub(crate) fn without(before: &[Range<u64>], now: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut gone = Vec::new();
    for range in before {
        let mut at = range.start;
        let first = now.partition_point(|kept| kept.end <= range.start);
        for kept in now[first..]
            .iter()
            .take_while(|kept| kept.start < range.end)
        {
            if at < kept.start {
                gone.push(at..kept.start);
            }
            at = kept.end;
        }
        if at < range.end {
            gone.push(at..range.end);
        }
    }
    gone
}

pub(crate) fn micros(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::OpenOptionsExt as _;

    use super::*;

    #[test]
    fn marks_do_not_account_for_what_devices_write() {
        let own = std::process::id().cast_signed();
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        // Whoever starts a program goes on before its memory is set up. The words
        // of its command line come last.
        let line = format!("/proc/{}/cmdline", child.id());
        while std::fs::read(&line).unwrap() != b"sleep\x0060\0" {
            assert!(child.try_wait().unwrap().is_none(), "it has ended");
            std::thread::yield_now();
        }
        let opened = std::fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECT)
            .open("/proc/self/exe")
            .unwrap();
        let found = markable(own, Limits::default()).unwrap();
        assert!(!found.vdsos.contains_key(&own.unsigned_abs()), "{found:?}");
        let reason = found.refused[&own].to_string();
        assert!(reason.contains("O_DIRECT"), "{found:?}");
        let vdso = found.vdsos.get(&child.id()).unwrap();
        assert!(vdso.as_ref().is_some_and(|range| !range.is_empty()));
        drop(opened);
        let found = markable(own, Limits::default()).unwrap();
        assert!(found.vdsos.contains_key(&own.unsigned_abs()), "{found:?}");
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
