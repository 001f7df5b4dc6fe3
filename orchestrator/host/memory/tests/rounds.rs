//! Pre-copy of real processes, compared byte by byte.
//!
//! The process is stopped and each page that counts as clean must be in the
//! store with the content it has: that is what a final dump relies on.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use migrate_core::wire::{PAGE_BYTES, PageOwner, PageRun};
use migrate_memory::{
    FrozenMemory, Limits, MemoryError, PageSink, PageStore, Precopy, RoundError, RoundStats,
    StoreError, TaskRanges, TrackingState, UntrackedReason, probe,
};

const PAGE: u64 = PAGE_BYTES as u64;

/// Prints why and returns when this host cannot track memory.
macro_rules! require_tracking {
    ($test:literal) => {
        if let Err(reason) = probe() {
            println!("SKIP {}: {reason}", $test);
            return;
        }
    };
}

struct Victim {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Victim {
    fn start(arguments: &[&str]) -> Self {
        let mut path = std::env::current_exe().unwrap();
        path.pop();
        path.pop();
        let mut child = Command::new(path.join("examples/victim"))
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut victim = Self {
            child,
            input,
            output,
        };
        assert_eq!(victim.line(), "ready");
        victim
    }

    fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    fn ask(&mut self) -> String {
        self.input.write_all(b"\n").unwrap();
        self.line()
    }

    fn assert_alive(&mut self) {
        if let Some(status) = self.child.try_wait().unwrap() {
            panic!(
                "ended: code {:?}, signal {:?}",
                status.code(),
                status.signal()
            );
        }
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        // Children of the victim are ended by their own guards.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Ends a process that is not our child.
struct Ended(i32);

impl Drop for Ended {
    fn drop(&mut self) {
        signal(self.0, libc::SIGKILL);
    }
}

fn signal(pid: i32, signal: i32) {
    // SAFETY: no pointer is passed.
    unsafe { libc::kill(pid, signal) };
}

/// Stops a process and waits until all of its threads stand still.
fn stop(pid: i32) {
    signal(pid, libc::SIGSTOP);
    let deadline = Instant::now() + Duration::from_secs(20);
    let stands = |task: &fs::DirEntry| {
        fs::read_to_string(task.path().join("stat")).map_or(true, |stat| {
            stat.rsplit(") ")
                .next()
                .unwrap()
                .starts_with(['T', 't', 'Z'])
        })
    };
    while !fs::read_dir(format!("/proc/{pid}/task"))
        .unwrap()
        .map(Result::unwrap)
        .all(|task| stands(&task))
    {
        assert!(Instant::now() < deadline, "{pid} does not stop");
        std::thread::yield_now();
    }
}

/// A store at the other end of nothing.
struct Direct {
    store: PageStore,
    /// Refuse at this page, counted down.
    refuse_after: u64,
}

impl Direct {
    fn new() -> Self {
        Self {
            store: PageStore::new(8 << 30),
            refuse_after: u64::MAX,
        }
    }
}

impl PageSink for Direct {
    type Error = StoreError;

    async fn pages(&mut self, run: PageRun, data: Bytes) -> Result<(), StoreError> {
        assert!(run.pages <= migrate_memory::RUN_PAGES_MAX);
        if self.refuse_after < run.pages {
            return Err(StoreError::Full { limit_bytes: 0 });
        }
        self.refuse_after -= run.pages;
        self.store.put(run, &data)
    }

    async fn gone(&mut self, owner: PageOwner, ranges: &[Range<u64>]) -> Result<(), StoreError> {
        for range in ranges {
            self.store.drop_range(owner, range.clone());
        }
        Ok(())
    }
}

/// A page of a stopped process.
struct Seen {
    vaddr: u64,
    clean: bool,
}

/// Populated pages of private, readable, anonymous memory, read independently
/// of the code under test: `/proc/PID/pagemap`, bits 63 present, 62 swapped,
/// 61 file, 57 write-protected by userfaultfd.
///
/// A mark counts in a mapping that is watched only, as for the dump: when
/// `mremap` moves a mapping next to another, Linux joins the two and watches
/// neither any more, and the marks of the one that stayed are left behind.
fn populated(pid: i32) -> Vec<Seen> {
    let pagemap = File::open(format!("/proc/{pid}/pagemap")).unwrap();
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let mut seen = Vec::new();
    let mut mapping: Option<Range<u64>> = None;
    for line in smaps.lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        if let Some((start, end)) = fields[0].split_once('-') {
            let name = fields.get(5).copied().unwrap_or("");
            let ours = fields[1].starts_with('r')
                && fields[1].ends_with('p')
                && fields[4] == "0"
                && (name.is_empty() || name == "[heap]" || name == "[stack]");
            let address = |text| u64::from_str_radix(text, 16).unwrap();
            mapping = ours.then(|| address(start)..address(end));
        }
        if fields[0] != "VmFlags:" {
            continue;
        }
        let Some(range) = mapping.take() else {
            continue;
        };
        let watched = fields.contains(&"uw");
        let pages = (range.end - range.start) / PAGE;
        let mut entries = vec![0u8; usize::try_from(pages * 8).unwrap()];
        pagemap
            .read_exact_at(&mut entries, range.start / PAGE * 8)
            .unwrap();
        for (entry, vaddr) in entries.chunks_exact(8).zip(range.step_by(PAGE_BYTES)) {
            let entry = u64::from_ne_bytes(entry.try_into().unwrap());
            if entry >> 62 != 0 && entry & (1 << 61) == 0 {
                seen.push(Seen {
                    vaddr,
                    clean: watched && entry & (1 << 57) != 0,
                });
            }
        }
    }
    seen
}

/// Compares every clean page of a stopped process with the store. Returns how
/// many were clean and how many were not.
fn compare(pid: i32, store: &PageStore) -> (u64, u64) {
    let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
    let owner = PageOwner::Task(pid.unsigned_abs());
    let (mut clean, mut dirty) = (0, 0);
    let mut page = vec![0; PAGE_BYTES];
    for seen in populated(pid) {
        memory.read_exact_at(&mut page, seen.vaddr).unwrap();
        if !seen.clean {
            dirty += 1;
            continue;
        }
        clean += 1;
        let held = store
            .page(owner, seen.vaddr)
            .unwrap_or_else(|| panic!("clean page {:#x} was never sent", seen.vaddr));
        assert!(
            held == page,
            "clean page {:#x} of {pid} differs",
            seen.vaddr
        );
    }
    (clean, dirty)
}

fn print(what: &str, stats: &RoundStats) {
    println!(
        "{what}: scanned {} written {} skipped {} zero {} vanished {} untracked {} bytes {} took {} us (sink {}), \
         {} injections, stopped at most {} us",
        stats.pages_scanned,
        stats.pages_written,
        stats.pages_skipped,
        stats.zero_pages,
        stats.pages_vanished,
        stats.pages_untracked,
        stats.bytes,
        stats.took_us,
        stats.sink_us,
        stats.injections,
        stats.injection_stopped_us_max
    );
    assert_eq!(
        stats.pages_scanned,
        stats.pages_written + stats.pages_skipped
    );
}

/// Stops the process, compares what is clean, copies the rest, compares all.
async fn stop_and_compare(pids: &[i32], precopy: &mut Precopy, sink: &mut Direct) {
    for &pid in pids {
        stop(pid);
    }
    for &pid in pids {
        let (clean, dirty) = compare(pid, &sink.store);
        println!("{pid} before the last round: {clean} clean, {dirty} dirty");
    }
    let stats = precopy.round(sink).await.unwrap();
    print("last", &stats);
    for &pid in pids {
        let (clean, dirty) = compare(pid, &sink.store);
        println!("{pid} after the last round: {clean} clean, {dirty} dirty");
        assert!(clean > 0);
        // Zero pages that were never written to are in no round, and the
        // kernel's shared page of zeros cannot be told from others here.
        let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
        let mut page = vec![0; PAGE_BYTES];
        for seen in populated(pid).iter().filter(|seen| !seen.clean) {
            memory.read_exact_at(&mut page, seen.vaddr).unwrap();
            assert!(page.iter().all(|&byte| byte == 0), "{:#x}", seen.vaddr);
        }
    }
}

fn assert_tracked(precopy: &Precopy) {
    for process in precopy.processes() {
        match process.state {
            TrackingState::Tracked { injection } => println!(
                "{}: tracked, one thread stopped for {} us, {} us in all",
                process.pid, injection.stopped_us, injection.took_us
            ),
            TrackingState::Untracked { reason } => panic!("{}: {reason:?}", process.pid),
        }
    }
}

#[tokio::test]
async fn a_continuous_writer_is_copied_exactly() {
    require_tracking!("a_continuous_writer_is_copied_exactly");
    let mut victim = Victim::start(&["write", "64"]);
    let mut precopy = Precopy::new(victim.pid(), Limits::default()).unwrap();
    let mut sink = Direct::new();
    for round in 0..8 {
        let stats = precopy.round(&mut sink).await.unwrap();
        print(&format!("round {round}"), &stats);
    }
    assert_tracked(&precopy);
    victim.assert_alive();
    stop_and_compare(&[victim.pid()], &mut precopy, &mut sink).await;
}

/// What a stopped process has written since the last round is marked clean and named, page by
/// page, and can be read from it.
#[tokio::test]
async fn what_changed_before_the_end_is_named() {
    require_tracking!("what_changed_before_the_end_is_named");
    let victim = Victim::start(&["write", "64"]);
    let pid = victim.pid();
    let owner = PageOwner::Task(pid.unsigned_abs());
    let mut precopy = Precopy::new(pid, Limits::default()).unwrap();
    let mut sink = Direct::new();
    for _ in 0..3 {
        precopy.round(&mut sink).await.unwrap();
    }
    stop(pid);
    let (clean, dirty) = compare(pid, &sink.store);
    assert!(clean > 0 && dirty > 0, "{clean} clean, {dirty} dirty");
    let was_clean = |seen: &Seen| seen.clean.then_some(seen.vaddr);
    let clean_before: HashSet<u64> = populated(pid).iter().filter_map(was_clean).collect();

    let tree = [pid.unsigned_abs()];
    let pages = precopy.frozen_pages(&tree, None).unwrap();
    let stopped = pages.written(&AtomicBool::new(true)).unwrap_err();
    assert!(matches!(stopped, MemoryError::Stopped), "{stopped}");
    let mut written = pages.written(&AtomicBool::new(false)).unwrap();
    let ranges = written.remove(&pid.unsigned_abs()).unwrap();
    assert!(ranges.is_sorted_by(|one, next| one.end <= next.start));
    let named: HashSet<u64> = ranges
        .iter()
        .flat_map(|range| range.clone().step_by(PAGE_BYTES))
        .collect();
    for seen in populated(pid) {
        assert_eq!(
            seen.clean,
            clean_before.contains(&seen.vaddr) || named.contains(&seen.vaddr),
            "{:#x}",
            seen.vaddr
        );
    }
    assert!(named.is_disjoint(&clean_before) && named.len() as u64 >= dirty / 2);
    let again = pages.written(&AtomicBool::new(false)).unwrap();
    assert!(again.values().all(Vec::is_empty), "{again:?}");

    let direct = File::open(format!("/proc/{pid}/mem")).unwrap();
    let memory = FrozenMemory::open([pid], None).unwrap();
    let mut buffer = BytesMut::new();
    for ranges in ranges.chunks(32) {
        assert!(ranges.iter().all(|range| memory.may_wait(owner, range)));
        let content = memory.read(owner, ranges, &mut buffer).unwrap();
        let mut wanted = Vec::new();
        for range in ranges {
            let mut part = vec![0; usize::try_from(range.end - range.start).unwrap()];
            direct.read_exact_at(&mut part, range.start).unwrap();
            wanted.extend(part);
        }
        assert!(content == wanted, "{ranges:x?}");
    }
    let code = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let code = code.lines().find(|line| line.contains(" r-xp ")).unwrap();
    let code = u64::from_str_radix(code.split_once('-').unwrap().0, 16).unwrap();
    let code = code..code + PAGE;
    // Nobody's, half of it nobody's, another task's.
    let first = ranges[0].clone();
    for range in [0..PAGE, first.start..1 << 47] {
        assert!(!memory.may_wait(owner, &range), "{range:x?}");
    }
    // What cannot wait.
    let held = TaskRanges::from([(pid.unsigned_abs(), vec![first.clone()])]);
    let pages = precopy.frozen_pages(&tree, Some(&held)).unwrap();
    assert!(pages.written(&AtomicBool::new(false)).is_ok());
    assert!(!memory.waits(owner, &first));
    let all = FrozenMemory::open([pid], Some(&TaskRanges::new())).unwrap();
    assert!(ranges.iter().all(|range| all.waits(owner, range)));
    for range in [0..PAGE, first.start..1 << 47, code] {
        assert!(!all.waits(owner, &range), "{range:x?}");
    }
    let held = FrozenMemory::open([pid], Some(&held)).unwrap();
    assert!(!held.may_wait(owner, &first) && !held.waits(owner, &first));
    let another = PageOwner::Task(pid.unsigned_abs() + 1);
    assert!(!memory.may_wait(another, &first));
    let nobodys = std::slice::from_ref(&(0..PAGE)).to_owned();
    memory.read(owner, &nobodys, &mut buffer).unwrap_err();
}

#[tokio::test]
async fn threads_are_copied_exactly() {
    require_tracking!("threads_are_copied_exactly");
    let mut victim = Victim::start(&["threads", "16"]);
    let mut precopy = Precopy::new(victim.pid(), Limits::default()).unwrap();
    let mut sink = Direct::new();
    for round in 0..4 {
        let stats = precopy.round(&mut sink).await.unwrap();
        print(&format!("round {round}"), &stats);
    }
    assert_tracked(&precopy);
    assert_eq!(victim.ask(), "here");
    stop_and_compare(&[victim.pid()], &mut precopy, &mut sink).await;
}

#[tokio::test]
async fn what_did_not_change_is_skipped() {
    require_tracking!("what_did_not_change_is_skipped");
    let mut victim = Victim::start(&["idle", "64"]);
    let mut precopy = Precopy::new(victim.pid(), Limits::default()).unwrap();
    let mut sink = Direct::new();
    let first = precopy.round(&mut sink).await.unwrap();
    print("first", &first);
    assert!(first.pages_written >= 64 << 8);
    assert_eq!(first.pages_skipped, 0);
    let second = precopy.round(&mut sink).await.unwrap();
    print("second", &second);
    assert!(second.pages_written < 64, "{second:?}");
    assert!(second.pages_skipped >= 64 << 8);
    assert_eq!(victim.ask(), "here");
}

/// What is unmapped while a round reads costs the round little more than that.
#[tokio::test]
async fn what_vanishes_from_a_region_leaves_the_rest_of_it() {
    /// Has the victim unmap a quarter of its memory when the first pages of it have come.
    struct Unmaps<'v>(Direct, Option<&'v mut Victim>);
    impl PageSink for Unmaps<'_> {
        type Error = StoreError;
        async fn pages(&mut self, run: PageRun, data: Bytes) -> Result<(), StoreError> {
            if run.pages == migrate_memory::RUN_PAGES_MAX
                && let Some(victim) = self.1.take()
            {
                assert_eq!(victim.ask(), "0");
            }
            self.0.pages(run, data).await
        }
    }
    require_tracking!("what_vanishes_from_a_region_leaves_the_rest_of_it");
    const PAGES: u64 = 64 << 8;
    let mut victim = Victim::start(&["hole", "64"]);
    let pid = victim.pid();
    let mut precopy = Precopy::new(pid, Limits::default()).unwrap();
    let mut sink = Unmaps(Direct::new(), Some(&mut victim));
    let stats = precopy.round(&mut sink).await.unwrap();
    print("with a hole", &stats);
    let Unmaps(mut direct, unasked) = sink;
    assert!(unasked.is_none());
    // The steps over a hole are as long as itself, at most.
    let (hole, missed) = (PAGES / 4, stats.pages_vanished);
    assert!((hole..=2 * hole).contains(&missed), "{missed} of {PAGES}");
    assert!(stats.pages_written >= PAGES - 2 * hole);
    stop_and_compare(&[pid], &mut precopy, &mut direct).await;
}

/// Marks of a file's pages outlast the pages: nothing of it may be watched, although it is
/// where a round has found memory that is.
#[tokio::test]
async fn what_becomes_a_files_within_a_round_is_not_watched() {
    /// Has the victim replace its upper memory when the first pages of the lower have come.
    struct Replaces<'v>(Direct, Option<&'v mut Victim>, u64);
    impl PageSink for Replaces<'_> {
        type Error = StoreError;
        async fn pages(&mut self, run: PageRun, data: Bytes) -> Result<(), StoreError> {
            if run.pages == migrate_memory::RUN_PAGES_MAX
                && let Some(victim) = self.1.take()
            {
                self.2 = victim.ask().parse().unwrap();
            }
            self.0.pages(run, data).await
        }
    }
    require_tracking!("what_becomes_a_files_within_a_round_is_not_watched");
    // What a round does with memory that is new to it, and with memory that it knows.
    for rounds_before in [0, 1] {
        let mut victim = Victim::start(&["replaced", "4"]);
        let pid = victim.pid();
        let mut precopy = Precopy::new(pid, Limits::default()).unwrap();
        let mut direct = Direct::new();
        for _ in 0..rounds_before {
            precopy.round(&mut direct).await.unwrap();
        }
        assert_eq!(victim.ask(), "filled");
        let mut sink = Replaces(direct, Some(&mut victim), 0);
        let stats = precopy.round(&mut sink).await.unwrap();
        print("with a file", &stats);
        let Replaces(mut direct, unasked, at) = sink;
        assert!(unasked.is_none());
        let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
        let lines = smaps
            .lines()
            .skip_while(|line| !line.starts_with(&format!("{at:x}-")));
        let flags = lines.into_iter().find(|line| line.starts_with("VmFlags:"));
        assert!(!flags.unwrap().contains(" uw"), "{flags:?}");
        stop_and_compare(&[pid], &mut precopy, &mut direct).await;
    }
}

#[tokio::test]
async fn a_sparse_mapping_stays_sparse() {
    require_tracking!("a_sparse_mapping_stays_sparse");
    let victim = Victim::start(&["sparse", "1"]);
    let mut precopy = Precopy::new(victim.pid(), Limits::default()).unwrap();
    let mut sink = Direct::new();
    for _ in 0..3 {
        let stats = precopy.round(&mut sink).await.unwrap();
        print("round", &stats);
        assert!(stats.pages_scanned < 1000);
    }
    stop(victim.pid());
    assert!(populated(victim.pid()).len() < 1000, "marks were left");
}

#[tokio::test]
async fn no_blocked_call_sees_the_injection() {
    require_tracking!("no_blocked_call_sees_the_injection");
    for call in [
        "epoll",
        "epoll-timeout",
        "epoll-mask",
        "poll",
        "ppoll",
        "sleep",
        "read",
        "rcvtimeo",
        "sigtimedwait",
        "futex",
        "pause",
        "timeouts",
    ] {
        let mut victim = Victim::start(&["blocked", call]);
        let mut stopped_us = Vec::new();
        for _ in 0..50 {
            let mut precopy = Precopy::new(victim.pid(), Limits::default()).unwrap();
            let stats = precopy.round(&mut Direct::new()).await.unwrap();
            assert_tracked(&precopy);
            stopped_us.push(stats.injection_stopped_us_max);
            victim.assert_alive();
        }
        assert_eq!(victim.ask(), "here", "{call}");
        victim.assert_alive();
        // Nothing of ours is left inside.
        let inside = fs::read_dir(format!("/proc/{}/fd", victim.pid()))
            .unwrap()
            .filter_map(|fd| fs::read_link(fd.unwrap().path()).ok())
            .any(|to| to.to_string_lossy().contains("userfaultfd"));
        assert!(!inside, "{call}");
        stopped_us.sort_unstable();
        println!(
            "{call}: stopped for {} us (median), {} us (most)",
            stopped_us[25], stopped_us[49]
        );
    }
}

#[tokio::test]
async fn signals_are_neither_lost_nor_in_the_way() {
    require_tracking!("signals_are_neither_lost_nor_in_the_way");
    let mut victim = Victim::start(&["signals"]);
    let mut last = 0;
    for _ in 0..100 {
        let mut precopy = Precopy::new(victim.pid(), Limits::default()).unwrap();
        precopy.round(&mut Direct::new()).await.unwrap();
        assert_tracked(&precopy);
        let now: u64 = victim.ask().parse().unwrap();
        assert!(now > last, "the timer's signals ended");
        last = now;
    }
}

#[tokio::test]
async fn a_seccomp_filter_neither_kills_nor_is_lost() {
    require_tracking!("a_seccomp_filter_neither_kills_nor_is_lost");
    let mut victim = Victim::start(&["filtered"]);
    let mut precopy = Precopy::new(victim.pid(), Limits::default()).unwrap();
    precopy.round(&mut Direct::new()).await.unwrap();
    assert_tracked(&precopy);
    assert_eq!(victim.ask(), "here");
    let status = fs::read_to_string(format!("/proc/{}/status", victim.pid())).unwrap();
    assert!(status.contains("Seccomp:\t2"), "{status}");
}

#[tokio::test]
async fn a_stopped_process_stays_stopped() {
    require_tracking!("a_stopped_process_stays_stopped");
    let mut victim = Victim::start(&["idle", "1"]);
    stop(victim.pid());
    let mut precopy = Precopy::new(victim.pid(), Limits::default()).unwrap();
    let mut sink = Direct::new();
    precopy.round(&mut sink).await.unwrap();
    assert_tracked(&precopy);
    stop_and_compare(&[victim.pid()], &mut precopy, &mut sink).await;
    signal(victim.pid(), libc::SIGCONT);
    assert_eq!(victim.ask(), "here");
}

#[tokio::test]
async fn forks_between_rounds_are_followed() {
    require_tracking!("forks_between_rounds_are_followed");
    let mut victim = Victim::start(&["fork"]);
    let mut precopy = Precopy::new(victim.pid(), Limits::default()).unwrap();
    let mut sink = Direct::new();
    let mut children = Vec::new();
    for round in 0..4 {
        let stats = precopy.round(&mut sink).await.unwrap();
        print(&format!("round {round}"), &stats);
        assert_eq!(stats.processes, round + 1);
        assert_eq!(stats.injections, 1, "one new process in each round");
        children.push(Ended(victim.ask().parse().unwrap()));
    }
    // One ends: its memory is forgotten.
    let ended = children.remove(0);
    let pid = ended.0;
    drop(ended);
    let stats = loop {
        let stats = precopy.round(&mut sink).await.unwrap();
        // Killed, but perhaps not dead yet.
        if stats.processes == 4 {
            break stats;
        }
    };
    print("after one ended", &stats);
    assert!(
        sink.store
            .owners()
            .all(|owner| owner != PageOwner::Task(pid.unsigned_abs()))
    );
    let mut pids = vec![victim.pid()];
    pids.extend(children.iter().map(|child| child.0));
    stop_and_compare(&pids, &mut precopy, &mut sink).await;
    assert_tracked(&precopy);
}

/// Half of the private memory that a process and its child both have, in bytes:
/// the share in it that does not count as the process's own.
fn shared_bytes(pid: i32) -> u64 {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let field = |name: &str| -> u64 {
        let line = rollup.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    (field("Anonymous:") - field("Pss_Anon:")) << 10
}

#[tokio::test]
async fn what_parent_and_child_share_stays_shared() {
    require_tracking!("what_parent_and_child_share_stays_shared");
    const MIB: u64 = 8;
    let victim = Victim::start(&["family", &MIB.to_string()]);
    let before = shared_bytes(victim.pid());
    assert!(before >= MIB << 19, "{before}");
    let mut precopy = Precopy::new(victim.pid(), Limits::default()).unwrap();
    let mut sink = Direct::new();
    for round in 0..2 {
        let stats = precopy.round(&mut sink).await.unwrap();
        print(&format!("round {round}"), &stats);
    }
    assert_tracked(&precopy);
    // But for what the injection has touched.
    let after = shared_bytes(victim.pid());
    assert!(
        after + (64 << 10) >= before,
        "{before} before, {after} after"
    );
    let pids: Vec<i32> = precopy.processes().map(|process| process.pid).collect();
    assert_eq!(pids.len(), 2);
    stop_and_compare(&pids, &mut precopy, &mut sink).await;
}

fn maps(pid: i32) -> String {
    fs::read_to_string(format!("/proc/{pid}/maps")).unwrap()
}

fn vdso(pid: i32) -> Range<u64> {
    let maps = maps(pid);
    let vdso = maps.lines().find_map(|line| {
        let (range, _) = line.strip_suffix("[vdso]")?.split_once(' ')?;
        let (start, end) = range.split_once('-')?;
        let address = |text| u64::from_str_radix(text, 16).unwrap();
        Some(address(start)..address(end))
    });
    vdso.unwrap()
}

#[tokio::test]
async fn exec_between_rounds_is_noticed() {
    require_tracking!("exec_between_rounds_is_noticed");
    let mut victim = Victim::start(&["exec"]);
    let mut precopy = Precopy::new(victim.pid(), Limits::default()).unwrap();
    let mut sink = Direct::new();
    precopy.round(&mut sink).await.unwrap();
    assert!(precopy.moved_vdsos().unwrap().is_empty());
    assert_eq!(victim.ask(), "ready");
    // Until the next round what CRIU takes for sent is not.
    let moved = precopy.moved_vdsos().unwrap();
    let vdso = vdso(victim.pid());
    let pid = victim.pid().unsigned_abs();
    assert_eq!(moved.into_iter().collect::<Vec<_>>(), [(pid, vdso)]);
    let stats = precopy.round(&mut sink).await.unwrap();
    print("after exec", &stats);
    assert_eq!(stats.injections, 1);
    assert!(stats.pages_written >= 4 << 8);
    assert!(precopy.moved_vdsos().unwrap().is_empty());
    stop_and_compare(&[victim.pid()], &mut precopy, &mut sink).await;
}

/// Wherever a round is with a process when that calls exec: the process goes on, and since
/// CRIU takes the vDSO of a tracked process for sent, either it was or it is known not to be.
async fn exec_at_any_time(how: &str) {
    const CHILDREN: usize = 200;
    let mut victim = Victim::start(&["execs", how]);
    let mut precopy = Precopy::new(victim.pid(), Limits::default()).unwrap();
    let mut sink = Direct::new();
    let mut seen_before = 0;
    precopy.round(&mut sink).await.unwrap();
    for _ in 0..CHILDREN {
        victim.input.write_all(b"\n").unwrap();
        precopy.round(&mut sink).await.unwrap();
        let child = Ended(victim.line().parse().unwrap());
        seen_before += usize::from(precopy.processes().any(|process| process.pid == child.0));
        let deadline = Instant::now() + Duration::from_secs(20);
        let line = format!("/proc/{}/cmdline", child.0);
        while !fs::read(&line).unwrap().ends_with(b"\0parked\0") {
            assert!(Instant::now() < deadline, "{} is not parked", child.0);
            std::thread::yield_now();
        }
        precopy.round(&mut sink).await.unwrap();
        let (owner, vdso) = (PageOwner::Task(child.0.unsigned_abs()), vdso(child.0));
        let mut pages = vdso.clone().step_by(PAGE_BYTES);
        let moved = precopy.moved_vdsos().unwrap();
        assert!(
            pages.all(|page| sink.store.page(owner, page).is_some())
                || moved.get(&child.0.unsigned_abs()) == Some(&vdso),
            "{vdso:x?} of {} was never sent",
            child.0
        );
    }
    println!("{seen_before} of {CHILDREN} were seen by the round before");
    assert!(seen_before > 0);
}

#[tokio::test]
async fn exec_in_the_middle_of_a_round_is_noticed() {
    require_tracking!("exec_in_the_middle_of_a_round_is_noticed");
    exec_at_any_time("fork").await;
}

#[tokio::test]
async fn exec_of_who_had_the_memory_of_another_is_noticed() {
    require_tracking!("exec_of_who_had_the_memory_of_another_is_noticed");
    exec_at_any_time("vfork").await;
}

#[tokio::test]
async fn mappings_of_every_shape_are_copied_exactly() {
    require_tracking!("mappings_of_every_shape_are_copied_exactly");
    // A longer run: MIGRATE_TEST_SEEDS=20.
    let seeds = std::env::var("MIGRATE_TEST_SEEDS").map_or(4, |seeds| seeds.parse().unwrap());
    for seed in 1..=seeds {
        let mut victim = Victim::start(&["shape", &seed.to_string()]);
        let mut precopy = Precopy::new(victim.pid(), Limits::default()).unwrap();
        let mut sink = Direct::new();
        for _ in 0..12 {
            let stats = precopy.round(&mut sink).await.unwrap();
            assert_eq!(
                stats.pages_scanned,
                stats.pages_written + stats.pages_skipped
            );
            // While it stands still, what is clean is right at any moment.
            stop(victim.pid());
            let (clean, dirty) = compare(victim.pid(), &sink.store);
            println!("seed {seed}: {clean} clean, {dirty} dirty");
            signal(victim.pid(), libc::SIGCONT);
        }
        victim.assert_alive();
        stop_and_compare(&[victim.pid()], &mut precopy, &mut sink).await;
    }
}

#[tokio::test]
async fn a_round_that_fails_leaves_nothing_clean_that_was_not_sent() {
    require_tracking!("a_round_that_fails_leaves_nothing_clean_that_was_not_sent");
    let victim = Victim::start(&["idle", "16"]);
    let mut precopy = Precopy::new(victim.pid(), Limits::default()).unwrap();
    let mut sink = Direct::new();
    for refuse_after in [0, 1, 300, 1000, 3000] {
        sink.refuse_after = refuse_after;
        let result = precopy.round(&mut sink).await;
        assert!(matches!(result, Err(RoundError::Sink { .. })));
        stop(victim.pid());
        let (clean, dirty) = compare(victim.pid(), &sink.store);
        println!("refused after {refuse_after}: {clean} clean, {dirty} dirty");
        assert!(dirty > 0);
        signal(victim.pid(), libc::SIGCONT);
    }
    sink.refuse_after = u64::MAX;
    stop_and_compare(&[victim.pid()], &mut precopy, &mut sink).await;
}

#[tokio::test]
async fn a_round_that_is_dropped_leaves_nothing_clean_that_was_not_sent() {
    /// Takes some pages, then never answers.
    struct Stuck(Direct);
    impl PageSink for Stuck {
        type Error = StoreError;
        async fn pages(&mut self, run: PageRun, data: Bytes) -> Result<(), StoreError> {
            match self.0.pages(run, data).await {
                Err(_) => std::future::pending().await,
                done => done,
            }
        }
    }
    require_tracking!("a_round_that_is_dropped_leaves_nothing_clean_that_was_not_sent");
    let victim = Victim::start(&["idle", "16"]);
    let mut precopy = Precopy::new(victim.pid(), Limits::default()).unwrap();
    let mut sink = Stuck(Direct::new());
    sink.0.refuse_after = 700;
    let waiting = tokio::time::timeout(Duration::from_millis(500), precopy.round(&mut sink));
    assert!(waiting.await.is_err());
    sink.0.refuse_after = u64::MAX;
    stop_and_compare(&[victim.pid()], &mut precopy, &mut sink.0).await;
}

#[tokio::test]
async fn a_process_that_is_traced_is_left_alone() {
    require_tracking!("a_process_that_is_traced_is_left_alone");
    let mut victim = Victim::start(&["idle", "4"]);
    let pid = victim.pid();
    // Another process traces it, until its standard input ends.
    let mut tracer = Command::new("python3")
        .args([
            "-c",
            "import ctypes,sys\nlibc=ctypes.CDLL(None)\n\
             r=libc.ptrace(0x4206,int(sys.argv[1]),None,None)\nprint(r,flush=True)\nsys.stdin.read()",
            &pid.to_string(),
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut answer = String::new();
    BufReader::new(tracer.stdout.take().unwrap())
        .read_line(&mut answer)
        .unwrap();
    assert_eq!(answer.trim(), "0");
    let mut precopy = Precopy::new(pid, Limits::default()).unwrap();
    let stats = precopy.round(&mut Direct::new()).await.unwrap();
    print("traced", &stats);
    assert!(stats.pages_whole >= 4 << 8);
    assert_eq!(stats.pages_untracked, stats.pages_whole);
    let tracer_pid = tracer.id().cast_signed();
    assert!(precopy.processes().all(|process| matches!(
        process.state,
        TrackingState::Untracked { reason: UntrackedReason::Traced { tracer } } if *tracer == tracer_pid
    )));
    drop(tracer.stdin.take());
    tracer.wait().unwrap();
    assert_eq!(victim.ask(), "here");
    // The next round tracks it.
    precopy.round(&mut Direct::new()).await.unwrap();
    assert_tracked(&precopy);
}

#[tokio::test]
async fn marks_of_another_tracker_are_not_trusted() {
    require_tracking!("marks_of_another_tracker_are_not_trusted");
    let victim = Victim::start(&["idle", "16"]);
    let mut other = Precopy::new(victim.pid(), Limits::default()).unwrap();
    other.round(&mut Direct::new()).await.unwrap();
    let mut precopy = Precopy::new(victim.pid(), Limits::default()).unwrap();
    let mut sink = Direct::new();
    let stats = precopy.round(&mut sink).await.unwrap();
    print("beside another", &stats);
    assert_eq!(stats.pages_skipped, 0);
    assert!(stats.pages_whole >= 16 << 8);
    assert!(stats.pages_untracked >= stats.pages_whole);
    drop(other);
    let stats = precopy.round(&mut sink).await.unwrap();
    print("alone", &stats);
    assert!(stats.pages_written >= 16 << 8);
    assert_eq!(stats.pages_whole, 0);
    stop_and_compare(&[victim.pid()], &mut precopy, &mut sink).await;
}

#[tokio::test]
async fn an_ended_root_is_an_error() {
    require_tracking!("an_ended_root_is_an_error");
    let mut victim = Victim::start(&["idle", "1"]);
    let mut precopy = Precopy::new(victim.pid(), Limits::default()).unwrap();
    precopy.round(&mut Direct::new()).await.unwrap();
    victim.child.kill().unwrap();
    victim.child.wait().unwrap();
    let error = precopy.round(&mut Direct::new()).await.unwrap_err();
    assert!(matches!(
        error,
        RoundError::Memory {
            source: MemoryError::Gone { .. }
        }
    ));
}
