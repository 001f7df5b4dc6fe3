//! Shared segments: memory that is no process's own, in rounds.
//!
//! Anonymous shared memory, System V segments and memfds are files without a
//! name in one file system of the kernel's. CRIU dumps each of them once, under
//! the number of its inode. A process that maps one, writes and ends leaves no
//! mark in any page table that could be asked, nor does `write(2)`. So a segment
//! is read through its file and compared by content, whoever wrote to it.
//!
//! ```text
//! round:   mappings of the tree -> /proc/PID/map_files -> pread, digest -> PageSink
//! frozen:  the same, all cores; what is as it was handed on goes without data
//! ```
//!
//! Reading by `pread` instead of a mapping provides no pages for holes, and a
//! file that shrinks meanwhile is no signal.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::task::Poll;

use bytes::{Bytes, BytesMut};
use migrate_core::wire::{PAGE_BYTES, PageOwner, PageRun};

use crate::PAGE;
use crate::arena::memory_file;
use crate::error::{MemoryError, RoundError};
use crate::known::{Known, alike};
use crate::maps;
use crate::rounds::{ALL_ADDRESSES, PageSink, RUN_PAGES_MAX, RoundStats};
use crate::store::MemoryDigest;
use crate::sys;
use crate::tree::{self, Member};

/// Threads that compare a frozen tree's segments: more than four do not read
/// memory any faster on the machines that are known here.
const THREADS_MAX: usize = 4;

/// Windows of 1 MiB that a thread may be ahead of the sink.
const AHEAD_WINDOWS: usize = 8;

/// The file system of all segments: where a memfd of our own is.
fn device() -> Option<(u64, (u32, u32))> {
    static DEVICE: OnceLock<Option<(u64, (u32, u32))>> = OnceLock::new();
    *DEVICE.get_or_init(|| {
        let device = memory_file(c"migrate-probe").ok()?.metadata().ok()?.dev();
        let numbers = (libc::major(device), libc::minor(device));
        Some((device, numbers))
    })
}

/// A segment of the tree, open.
#[derive(Debug, Clone)]
struct Segment {
    id: u64,
    file: Arc<File>,
    /// Its size as it was when it was opened.
    size_bytes: u64,
}

/// The kinds of names under which the segments' file system shows them. One
/// number may stand for a System V segment and a file that has nothing to do
/// with it; such are left to CRIU.
fn is_system_v(name: &str) -> bool {
    name.starts_with("/SYSV")
}

fn is_segment(name: &str) -> bool {
    is_system_v(name) || name.starts_with("/memfd:") || name.starts_with("/dev/zero")
}

/// The segments that processes have mapped, by number.
///
/// What cannot be opened is left out: its mapping has changed since it was
/// listed, or its process has ended.
fn segments(members: &[Member]) -> Result<Vec<Segment>, MemoryError> {
    let Some((device, numbers)) = device() else {
        return Ok(Vec::new());
    };
    let mut found: BTreeMap<u64, (bool, Option<Segment>)> = BTreeMap::new();
    let mut ambiguous = BTreeSet::new();
    for member in members {
        let vmas = match maps::read(member.pid) {
            Ok(vmas) => vmas,
            Err(MemoryError::Gone { .. }) => continue,
            Err(error) => return Err(error),
        };
        for vma in vmas
            .iter()
            .filter(|vma| vma.device == numbers && is_segment(&vma.name))
            // CRIU cuts longer numbers off.
            .filter(|vma| u32::try_from(vma.inode).is_ok())
        {
            let system_v = is_system_v(&vma.name);
            let (kind, segment) = found.entry(vma.inode).or_insert((system_v, None));
            if *kind != system_v {
                ambiguous.insert(vma.inode);
            }
            if segment.is_some() {
                continue;
            }
            let path = format!(
                "/proc/{}/map_files/{:x}-{:x}",
                member.pid, vma.range.start, vma.range.end
            );
            *segment = File::open(path).ok().and_then(|file| {
                let meta = file.metadata().ok()?;
                let same = meta.ino() == vma.inode && meta.dev() == device && meta.is_file();
                same.then(|| Segment {
                    id: vma.inode,
                    file: Arc::new(file),
                    size_bytes: meta.size(),
                })
            });
        }
    }
    Ok(found
        .into_iter()
        .filter(|(id, _)| !ambiguous.contains(id))
        .filter_map(|(_, (_, segment))| segment)
        .collect())
}

impl Segment {
    fn owner(&self) -> PageOwner {
        PageOwner::Shared(self.id)
    }

    fn failed(&self, source: io::Error) -> MemoryError {
        MemoryError::Proc {
            path: format!("shared segment {:#x}", self.id),
            source,
        }
    }

    /// The populated parts in whole pages, in order, as the kernel has them now.
    fn populated(&self) -> Result<Vec<Range<u64>>, MemoryError> {
        let mut parts: Vec<Range<u64>> = Vec::new();
        let mut at = 0;
        while let Some(start) =
            sys::seek(&self.file, at, libc::SEEK_DATA).map_err(|error| self.failed(error))?
        {
            let end = sys::seek(&self.file, start, libc::SEEK_HOLE)
                .map_err(|error| self.failed(error))?
                .unwrap_or(start);
            let part = start / PAGE * PAGE..end.div_ceil(PAGE) * PAGE;
            at = end.max(start + 1);
            match parts.last_mut() {
                Some(last) if last.end >= part.start => last.end = last.end.max(part.end),
                _ => parts.push(part),
            }
        }
        Ok(parts)
    }

    /// Reads whole pages. What lies behind the end of the file is not read,
    /// fewer pages are then in `into`.
    fn read(&self, range: &Range<u64>, into: &mut BytesMut) -> Result<(), MemoryError> {
        let bytes = usize::try_from(range.end - range.start).unwrap_or_default();
        into.clear();
        into.resize(bytes, 0);
        let mut filled = 0;
        while filled < bytes {
            match self
                .file
                .read_at(&mut into[filled..], range.start + filled as u64)
            {
                Ok(0) => break,
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.failed(error)),
            }
        }
        into.truncate(filled / PAGE_BYTES * PAGE_BYTES);
        Ok(())
    }

    /// The same of a tree that stands still, where the file's end may lie within
    /// its last page: what is mapped behind it is the tree's, too.
    fn read_frozen(&self, range: &Range<u64>, into: &mut BytesMut) -> Result<(), MemoryError> {
        self.read(range, into)?;
        let at = range.start + into.len() as u64;
        if at < range.end {
            sys::read_last_page(&self.file, at, into).map_err(|error| self.failed(error))?;
        }
        if range.start + (into.len() as u64) < range.end {
            return Err(self.failed(io::ErrorKind::UnexpectedEof.into()));
        }
        Ok(())
    }
}

/// Cuts ranges into pieces of at most 1 MiB.
fn windows(parts: Vec<Range<u64>>) -> impl Iterator<Item = Range<u64>> {
    let most = RUN_PAGES_MAX * PAGE;
    parts.into_iter().flat_map(move |part| {
        let starts = (part.start..part.end).step_by(usize::try_from(most).unwrap_or(PAGE_BYTES));
        starts.map(move |start| start..part.end.min(start + most))
    })
}

/// Rounds over the segments of a tree.
#[derive(Debug, Default)]
pub(crate) struct Segments {
    known: Arc<Known>,
    /// Of which something may have been handed on.
    seen: BTreeSet<u64>,
}

impl Segments {
    /// Hands on what is not as it was in the last round.
    pub(crate) async fn round<S: PageSink>(
        &mut self,
        members: &[Member],
        sink: &mut S,
        stats: &mut RoundStats,
    ) -> Result<(), RoundError<S::Error>> {
        let segments = segments(members)?;
        // A look in the frozen tree holds it, and is the last.
        let known = Arc::make_mut(&mut self.known);
        let now: BTreeSet<u64> = segments.iter().map(|segment| segment.id).collect();
        for &gone in self.seen.difference(&now) {
            // The number may come again, for another segment.
            known.forget(PageOwner::Shared(gone));
            sink.gone(PageOwner::Shared(gone), &[ALL_ADDRESSES])
                .await
                .map_err(|source| RoundError::Sink { source })?;
        }
        self.seen = now;
        let scanned = stats.pages_scanned;
        let mut buffer = BytesMut::new();
        for segment in &segments {
            for window in windows(segment.populated()?) {
                segment.read(&window, &mut buffer)?;
                // The memory comes back when the sink has let go of it.
                let data = buffer.split().freeze();
                known
                    .hand_on(segment.owner(), window.start, &data, sink, stats)
                    .await?;
                // Whoever waits for the end of the round may want to give up.
                breathe().await;
            }
        }
        stats.pages_shared += stats.pages_scanned - scanned;
        Ok(())
    }

    /// The segments of the tree that stands still.
    pub(crate) fn frozen(
        &self,
        root: i32,
        processes: usize,
    ) -> Result<FrozenSegments, MemoryError> {
        Ok(FrozenSegments {
            segments: segments(&tree::members(root, processes)?)?,
            known: Arc::clone(&self.known),
        })
    }
}

/// The segments of a tree that stands still, with what rounds have handed on.
#[derive(Debug, Clone, Default)]
pub struct FrozenSegments {
    segments: Vec<Segment>,
    known: Arc<Known>,
}

/// Pages of a frozen segment: with data, or empty where it is as it was handed
/// on last.
pub type FrozenRun = (PageRun, Bytes);

/// One window's share of the final list, or why there is none.
type Compared = Result<Vec<FrozenRun>, MemoryError>;

impl FrozenSegments {
    /// Their numbers.
    #[must_use]
    pub fn ids(&self) -> BTreeSet<u64> {
        self.segments.iter().map(|segment| segment.id).collect()
    }

    /// Number of the device that they are on; none where there is no such.
    #[must_use]
    pub fn device() -> Option<u64> {
        device().map(|(device, _)| device)
    }

    /// Their final list, segment by segment in ascending order of addresses:
    /// with data what is not as it was handed on last. Of a segment that holds
    /// nothing there is a page of zeros, without which CRIU would miss it.
    ///
    /// Blocks for as long as it takes to read and compare all of them; ends
    /// early when `take` says `false` or `stop` is set.
    ///
    /// # Errors
    ///
    /// A segment cannot be read.
    pub fn compare(
        &self,
        stop: &AtomicBool,
        mut take: impl FnMut(FrozenRun) -> bool,
    ) -> Result<(), MemoryError> {
        let mut work: Vec<(&Segment, Range<u64>)> = Vec::new();
        for segment in &self.segments {
            let parts = segment.populated()?;
            let empty = parts.is_empty() && segment.size_bytes > 0;
            let first = empty.then_some(0..PAGE);
            work.extend(windows(parts).chain(first).map(|window| (segment, window)));
        }
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = cores.min(THREADS_MAX).min(work.len()).max(1);
        let done = AtomicBool::new(false);
        let ended = || stop.load(Ordering::Relaxed) || done.load(Ordering::Relaxed);
        std::thread::scope(|scope| {
            // Each thread takes every nth window, so that they can be taken in
            // order and nobody is far ahead.
            let lanes: Vec<Receiver<Compared>> = (0..threads)
                .map(|lane| {
                    let (sender, receiver) = sync_channel(AHEAD_WINDOWS);
                    let share = work.iter().skip(lane).step_by(threads);
                    let ended = &ended;
                    scope.spawn(move || self.lane(share, &sender, ended));
                    receiver
                })
                .collect();
            let outcome = (0..work.len()).try_for_each(|index| {
                let compared = lanes[index % threads].recv();
                for run in compared.map_err(|_| MemoryError::Stopped)?? {
                    if !take(run) {
                        return Err(MemoryError::Stopped);
                    }
                }
                Ok(())
            });
            done.store(true, Ordering::Relaxed);
            // Threads that wait for room see that nobody takes any more.
            drop(lanes);
            outcome
        })
    }

    fn lane<'a>(
        &self,
        share: impl Iterator<Item = &'a (&'a Segment, Range<u64>)>,
        sender: &SyncSender<Compared>,
        ended: &impl Fn() -> bool,
    ) {
        let mut buffer = BytesMut::new();
        for (segment, window) in share {
            if ended() {
                return;
            }
            let read = segment.read_frozen(window, &mut buffer);
            let compared = read.map(|()| self.listed(segment.owner(), window.start, &buffer));
            if sender.send(compared).is_err() {
                return;
            }
        }
    }

    /// The final list of some pages.
    fn listed(&self, owner: PageOwner, vaddr: u64, data: &[u8]) -> Vec<FrozenRun> {
        let held: Vec<bool> = data
            .chunks_exact(PAGE_BYTES)
            .zip((vaddr..).step_by(PAGE_BYTES))
            .map(|(page, at)| self.known.holds(owner, at, page))
            .collect();
        alike(&held)
            .map(|(pages, held)| {
                let run = PageRun {
                    owner,
                    vaddr: vaddr + pages.start as u64 * PAGE,
                    pages: pages.len() as u64,
                    flags: if held { 0 } else { PageRun::PRESENT },
                };
                let content = if held {
                    Bytes::new()
                } else {
                    Bytes::copy_from_slice(&data[pages.start * PAGE_BYTES..pages.end * PAGE_BYTES])
                };
                (run, content)
            })
            .collect()
    }

    /// Digest of what the final list names of a segment; none when it is not
    /// among these.
    pub(crate) fn digest(
        &self,
        id: u64,
        runs: Vec<PageRun>,
        stop: &AtomicBool,
    ) -> Result<Option<[u8; 32]>, MemoryError> {
        let Some(segment) = self.segments.iter().find(|segment| segment.id == id) else {
            return Ok(None);
        };
        let mut digest = MemoryDigest::new();
        let mut buffer = BytesMut::new();
        let parts = runs
            .into_iter()
            .map(|run| run.vaddr..run.vaddr + run.pages * PAGE);
        for window in windows(parts.collect()) {
            if stop.load(Ordering::Relaxed) {
                return Err(MemoryError::Stopped);
            }
            segment.read_frozen(&window, &mut buffer)?;
            digest.add(window.start, &buffer);
        }
        Ok(Some(digest.finish()))
    }
}

/// Lets others have their turn.
pub(crate) async fn breathe() {
    let mut breathed = false;
    std::future::poll_fn(|context| {
        if std::mem::replace(&mut breathed, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::PageStore;
    use proptest::prelude::*;
    use std::convert::Infallible;
    use std::os::fd::AsRawFd as _;

    /// Keeps what comes, as the destination does.
    struct Kept(PageStore);

    impl PageSink for Kept {
        type Error = Infallible;

        async fn pages(&mut self, run: PageRun, data: Bytes) -> Result<(), Infallible> {
            self.0.put(run, &data).unwrap();
            Ok(())
        }

        async fn gone(
            &mut self,
            owner: PageOwner,
            ranges: &[Range<u64>],
        ) -> Result<(), Infallible> {
            for range in ranges {
                self.0.drop_range(owner, range.clone());
            }
            Ok(())
        }
    }

    /// A segment that this process has mapped, as `mmap` with `MAP_SHARED` or
    /// `shmget` make one.
    struct Mapped {
        file: File,
        at: *mut libc::c_void,
        pages: usize,
    }

    impl Mapped {
        fn new(pages: usize, bytes: usize) -> Self {
            let file = memory_file(c"migrate-test").unwrap();
            file.set_len(bytes as u64).unwrap();
            // SAFETY: a new mapping.
            let at = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    pages * PAGE_BYTES,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_SHARED,
                    file.as_raw_fd(),
                    0,
                )
            };
            assert_ne!(at, libc::MAP_FAILED);
            Self { file, at, pages }
        }

        fn id(&self) -> u64 {
            self.file.metadata().unwrap().ino()
        }

        fn owner(&self) -> PageOwner {
            PageOwner::Shared(self.id())
        }

        /// Writes through the mapping.
        fn write(&self, at: usize, value: u8) {
            assert!(at < self.pages * PAGE_BYTES);
            // SAFETY: within the mapping.
            unsafe { self.at.cast::<u8>().add(at).write_volatile(value) };
        }

        /// What a process finds there. Read from the file, for the kernel would
        /// provide pages for holes; but for what lies behind the file's end.
        fn content(&self) -> Vec<u8> {
            let mut content = vec![0; self.pages * PAGE_BYTES];
            let read = self.file.read_at(&mut content, 0).unwrap();
            for (at, byte) in content.iter_mut().enumerate().skip(read) {
                // SAFETY: within the mapping, and the file reaches into the page.
                *byte = unsafe { self.at.cast::<u8>().add(at).read_volatile() };
            }
            content
        }

        fn punch(&self, page: usize) {
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            let at = i64::try_from(page * PAGE_BYTES).unwrap();
            let length = i64::try_from(PAGE_BYTES).unwrap();
            // SAFETY: a hole in a file of ours.
            let failed = unsafe { libc::fallocate(self.file.as_raw_fd(), mode, at, length) };
            assert_eq!(failed, 0);
        }
    }

    impl Drop for Mapped {
        fn drop(&mut self) {
            // SAFETY: made by `new`, not used after this.
            unsafe { libc::munmap(self.at, self.pages * PAGE_BYTES) };
        }
    }

    fn own() -> Vec<Member> {
        vec![Member {
            pid: std::process::id().cast_signed(),
            parent: None,
            start_ticks: 0,
        }]
    }

    /// One round over this segment; others may be other tests'.
    fn round(segments: &mut Segments, kept: &mut Kept) -> RoundStats {
        let mut stats = RoundStats::default();
        let members = own();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        runtime
            .block_on(segments.round(&members, kept, &mut stats))
            .unwrap();
        stats
    }

    fn frozen(segments: &Segments, of: &Mapped) -> FrozenSegments {
        let own = std::process::id().cast_signed();
        let mut frozen = segments.frozen(own, 1000).unwrap();
        frozen.segments.retain(|segment| segment.id == of.id());
        frozen
    }

    fn compared(frozen: &FrozenSegments) -> Vec<FrozenRun> {
        let mut runs = Vec::new();
        let take = |run| {
            runs.push(run);
            true
        };
        frozen.compare(&AtomicBool::new(false), take).unwrap();
        runs
    }

    /// What the destination makes of rounds and the final list.
    fn arrived(kept: &Kept, of: &Mapped, runs: &[FrozenRun]) -> Vec<u8> {
        let mut content = vec![0; of.pages * PAGE_BYTES];
        let mut end = 0;
        for (run, data) in runs {
            assert!(run.owner == of.owner() && run.vaddr >= end && run.pages <= RUN_PAGES_MAX);
            end = run.vaddr + run.pages * PAGE;
            for page in 0..run.pages {
                let vaddr = run.vaddr + page * PAGE;
                let at = usize::try_from(page).unwrap() * PAGE_BYTES;
                let bytes = match data.is_empty() {
                    true => kept.0.page(run.owner, vaddr).expect("handed on"),
                    false => &data[at..at + PAGE_BYTES],
                };
                let to = usize::try_from(vaddr).unwrap();
                content[to..to + PAGE_BYTES].copy_from_slice(bytes);
            }
        }
        content
    }

    fn with_data(runs: &[FrozenRun]) -> Vec<u64> {
        runs.iter()
            .filter(|(_, data)| !data.is_empty())
            .flat_map(|(run, _)| (0..run.pages).map(|page| run.vaddr / PAGE + page))
            .collect()
    }

    #[test]
    fn what_has_changed_comes_again_and_nothing_else() {
        let segment = Mapped::new(700, 700 * PAGE_BYTES);
        for page in 100..600 {
            segment.write(page * PAGE_BYTES, u8::try_from(page % 251).unwrap() + 1);
        }
        let mut segments = Segments::default();
        let mut kept = Kept(PageStore::new(1 << 30));
        assert!(round(&mut segments, &mut kept).pages_shared >= 500);
        let runs = compared(&frozen(&segments, &segment));
        assert_eq!(with_data(&runs), [0_u64; 0]);
        assert_eq!(arrived(&kept, &segment, &runs), segment.content());

        // Through the mapping, by a call, a new page, the same content anew, a
        // page given back.
        segment.write(150 * PAGE_BYTES + 7, 9);
        segment.file.write_at(b"written", 160 * PAGE).unwrap();
        segment.write(650 * PAGE_BYTES, 1);
        segment.write(200 * PAGE_BYTES, 201);
        segment.punch(300);
        let runs = compared(&frozen(&segments, &segment));
        assert_eq!(with_data(&runs), [150, 160, 650]);
        assert_eq!(arrived(&kept, &segment, &runs), segment.content());
        round(&mut segments, &mut kept);
        let runs = compared(&frozen(&segments, &segment));
        assert_eq!(with_data(&runs), [0_u64; 0]);
        assert_eq!(arrived(&kept, &segment, &runs), segment.content());

        let owner = segment.owner();
        drop(segment);
        round(&mut segments, &mut kept);
        assert!(kept.0.owners().all(|other| other != owner));
    }

    #[test]
    fn a_segment_may_be_empty_or_end_within_a_page() {
        let empty = Mapped::new(3, 3 * PAGE_BYTES);
        let odd = Mapped::new(2, PAGE_BYTES + 100);
        odd.write(PAGE_BYTES + 50, 1);
        odd.write(PAGE_BYTES + 2000, 2);
        let mut segments = Segments::default();
        let mut kept = Kept(PageStore::new(1 << 30));
        round(&mut segments, &mut kept);
        let runs = compared(&frozen(&segments, &empty));
        assert_eq!(with_data(&runs), [0]);
        assert_eq!(arrived(&kept, &empty, &runs), empty.content());
        let runs = compared(&frozen(&segments, &odd));
        assert_eq!(with_data(&runs), [1]);
        assert_eq!(arrived(&kept, &odd, &runs), odd.content());
    }

    #[test]
    fn nobody_waits_for_a_comparison_that_is_given_up() {
        let segment = Mapped::new(20_000, 20_000 * PAGE_BYTES);
        for page in 0..20_000 {
            segment.write(page * PAGE_BYTES, 1);
        }
        let frozen = frozen(&Segments::default(), &segment);
        let mut taken = 0;
        let outcome = frozen.compare(&AtomicBool::new(false), |_| {
            taken += 1;
            taken < 3
        });
        assert!(matches!(outcome, Err(MemoryError::Stopped)) && taken == 3);
        let outcome = frozen.compare(&AtomicBool::new(true), |_| true);
        assert!(matches!(outcome, Err(MemoryError::Stopped)));
    }

    #[derive(Debug, Clone)]
    enum Step {
        Write(usize, u8),
        Call(usize, u8),
        Punch(usize),
        Round,
    }

    const PAGES: usize = 600;

    fn step() -> impl Strategy<Value = Step> {
        let at = 0..PAGES * PAGE_BYTES;
        prop_oneof![
            4 => (at.clone(), any::<u8>()).prop_map(|(at, value)| Step::Write(at, value)),
            2 => (at, any::<u8>()).prop_map(|(at, value)| Step::Call(at, value)),
            1 => (0..PAGES).prop_map(Step::Punch),
            1 => Just(Step::Round),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn what_arrives_is_what_was_there(steps in prop::collection::vec(step(), 0..60)) {
            let segment = Mapped::new(PAGES, PAGES * PAGE_BYTES);
            let mut segments = Segments::default();
            let mut kept = Kept(PageStore::new(1 << 30));
            for step in steps {
                match step {
                    Step::Write(at, value) => segment.write(at, value),
                    Step::Call(at, value) => {
                        segment.file.write_at(&[value], at as u64).unwrap();
                    }
                    Step::Punch(page) => segment.punch(page),
                    Step::Round => drop(round(&mut segments, &mut kept)),
                }
            }
            let frozen = frozen(&segments, &segment);
            let runs = compared(&frozen);
            prop_assert_eq!(arrived(&kept, &segment, &runs), segment.content());
            let mut digest = MemoryDigest::new();
            digest.add(0, &segment.content());
            let listed = runs.iter().map(|(run, _)| *run).collect();
            let stop = AtomicBool::new(false);
            let read = frozen.digest(segment.id(), listed, &stop).unwrap();
            prop_assert_eq!(read, Some(digest.finish()));
        }
    }
}
