//! Memory that arrives after the restore, with a real CRIU and a process that
//! takes its memory apart meanwhile and checks every byte of it. Needs root;
//! what cannot run prints a line that starts with `SKIP`.
#![allow(
    clippy::unwrap_used,
    reason = "the exemption for tests does not reach their helpers"
)]

use std::fs;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Once};
use std::time::{Duration, Instant};

use bytes::Bytes;
use migrate_core::late::LateRuns;
use migrate_core::wire::{ImagePiece, PAGE_BYTES, PageOwner, PageRun};
use migrate_criu::{
    Criu, DumpOptions, ImageDir, Notice, Outcome, PARENT, PageSink, PageStats, RestoreOptions,
    Session, WorkerOptions, locate, serve_pages, small_images,
};
use migrate_memory::{
    Content, Keeper, LatePages, LazyError, LazyOptions, LazyReport, LazyServer, LazyServing,
    PageStore,
};

/// Limit for any single step.
const LIMIT: Duration = Duration::from_secs(60);

/// `PE_LAZY`.
const LAZY: u32 = 2;

async fn criu() -> Option<Criu> {
    static REAPER: Once = Once::new();
    // Restored trees become children of this process.
    REAPER.call_once(|| {
        // SAFETY: a flag of this process, no memory involved.
        assert_eq!(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) }, 0);
    });
    // SAFETY: no arguments.
    if unsafe { libc::geteuid() } != 0 {
        println!("SKIP lazy: not root");
        return None;
    }
    // SAFETY: the call takes no pointer; the descriptor is closed again.
    let uffd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
    if uffd < 0 {
        println!("SKIP lazy: no userfaultfd: {}", io::Error::last_os_error());
        return None;
    }
    // SAFETY: opened above.
    unsafe { libc::close(i32::try_from(uffd).unwrap()) };
    let criu = match locate().await {
        Ok(criu) => criu,
        Err(error) => {
            println!("SKIP lazy: {error}");
            return None;
        }
    };
    criu.warm().await.unwrap();
    Some(criu)
}

struct Workload {
    child: Child,
    file: PathBuf,
    go: PathBuf,
}

impl Workload {
    fn start(scratch: &Path, mode: &str, mib: u64, seed: u64) -> Self {
        let (file, go) = (scratch.join("file"), scratch.join("go"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_lazy-memory"));
        command
            .args([mode, &mib.to_string(), &seed.to_string()])
            .args([&file, &go])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        // SAFETY: two system calls between fork and exec.
        unsafe {
            command.pre_exec(|| {
                libc::setsid();
                libc::close_range(3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC.cast_signed());
                Ok(())
            });
        }
        let this = Self {
            child: command.spawn().unwrap(),
            file,
            go,
        };
        assert_eq!(this.said(|text| text == "ready"), "ready");
        this
    }

    fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    /// Reaps the dumped tree, whose process ids are wanted again.
    fn gone(&mut self) {
        let group = self.pid();
        self.child.wait().unwrap();
        // Whoever is left of its group has become a child of this process.
        // SAFETY: no memory involved.
        while unsafe { libc::waitpid(-group, std::ptr::null_mut(), 0) } > 0 {}
    }

    /// Waits for a text in its file.
    fn said(&self, wanted: impl Fn(&str) -> bool) -> String {
        let end = Instant::now() + LIMIT;
        loop {
            let text = fs::read_to_string(&self.file).unwrap_or_default();
            if wanted(&text) {
                return text;
            }
            assert!(Instant::now() < end, "the workload says {text:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Workload {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How pages that can wait come to the destination.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    /// Not at all: everything is restored at once.
    Eager,
    /// With their data, from the frozen tree.
    Fresh,
    /// In rounds before, so that the final list only names them.
    Precopied,
}

struct Sink<'a> {
    images: &'a mut ImageDir,
    store: &'a mut PageStore,
    way: Way,
}

impl PageSink for Sink<'_> {
    type Error = io::Error;

    async fn pages(&mut self, run: PageRun, data: Bytes) -> io::Result<()> {
        let lazy = run.flags & LAZY != 0;
        assert_eq!(self.images.leaves_out(&run), lazy && self.way != Way::Eager);
        if lazy {
            self.store.put(run, &data).map_err(io::Error::other)?;
        }
        if lazy && self.way == Way::Precopied {
            let flags = PARENT;
            self.images.gap(PageRun { flags, ..run })
        } else {
            self.images.pages(run, &data)
        }
        .map_err(io::Error::other)
    }

    async fn close(&mut self, _: PageStats) -> io::Result<()> {
        Ok(())
    }
}

/// A tree that is dumped and gone, ready to be restored.
struct Dumped {
    images: ImageDir,
    store: PageStore,
}

/// Kills a child of this process.
fn end_now(pid: i32) {
    // SAFETY: no memory involved.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGKILL) }, 0);
}

/// A process of 16 MiB, which is gone then.
async fn one_dumped(criu: &Criu, scratch: &Path) -> Dumped {
    let mut workload = Workload::start(scratch, "check", 16, 1);
    let dumped = dump(criu, &workload, scratch, Way::Fresh).await;
    workload.gone();
    dumped
}

async fn dump(criu: &Criu, workload: &Workload, scratch: &Path, way: Way) -> Dumped {
    let source = ImageDir::create(scratch.join("source")).unwrap();
    let mut images = ImageDir::create(scratch.join("destination")).unwrap();
    if way != Way::Eager {
        images.lazy().unwrap();
    }
    let mut store = PageStore::new(1 << 30);
    let worker = criu.worker(WorkerOptions::default()).await.unwrap();
    let options = DumpOptions::new(workload.pid(), source.path());
    let mut session = worker.dump(&options).await.unwrap();
    let socket = session.page_socket().unwrap();
    let mut sink = Sink {
        images: &mut images,
        store: &mut store,
        way,
    };
    let serve = serve_pages(socket, criu.version, &mut sink, LIMIT);
    let drive = async {
        loop {
            match session.next(LIMIT).await {
                Ok(Notice::PostDump) => return,
                Ok(_) => session.answer(true).await.unwrap(),
                Err(error) => panic!("{error}: {:#?}", error.log()),
            }
        }
    };
    let (served, ()) = tokio::join!(serve, drive);
    served.unwrap();
    for image in small_images(source.path()).unwrap() {
        let data = fs::read(&image.path).unwrap();
        images
            .image_piece(&ImagePiece {
                name: &image.name,
                last: true,
                data: &data,
            })
            .unwrap();
    }
    session.answer(true).await.unwrap();
    let end = session.next(LIMIT).await.unwrap();
    assert_eq!(end, Notice::Finished(Outcome::Dumped));
    let mut in_time = 0;
    images
        .fill(
            &mut |owner, vaddr: u64, pages: u64, out: &mut dyn io::Write| {
                in_time += pages;
                let end = vaddr + pages * PAGE_BYTES as u64;
                for piece in store.range(owner, vaddr..end) {
                    match piece.content {
                        Content::Data(data) => out.write_all(data)?,
                        Content::Zero(pages) => {
                            for _ in 0..pages {
                                out.write_all(&[0; PAGE_BYTES])?;
                            }
                        }
                    }
                }
                Ok(())
            },
        )
        .unwrap();
    let stats = images.finish().unwrap();
    if way == Way::Eager {
        assert_eq!(stats.lazy_pages, 0);
    } else {
        assert!(
            stats.lazy_pages * 4096 > store.held_bytes() * 9 / 10,
            "{stats:?}"
        );
        assert!(in_time < 64, "only the stack: {in_time} pages");
    }
    Dumped { images, store }
}

/// Answers CRIU until it holds the complete copy.
async fn held(session: &mut Session) {
    loop {
        match session.next(LIMIT).await {
            Ok(Notice::PostRestore { .. }) => return,
            Ok(_) => session.answer(true).await.unwrap(),
            Err(error) => panic!("{error}: {:#?}", error.log()),
        }
    }
}

async fn release(session: &mut Session) -> i32 {
    session.answer(true).await.unwrap();
    loop {
        match session.next(LIMIT).await {
            Ok(Notice::Finished(Outcome::Restored { pid })) => return pid,
            Ok(_) => session.answer(true).await.unwrap(),
            Err(error) => panic!("{error}: {:#?}", error.log()),
        }
    }
}

/// Waits for the end of a restored process, which becomes a child of this one
/// when CRIU has ended.
fn reap(pid: i32) {
    let end = Instant::now() + LIMIT;
    // SAFETY: no memory involved.
    while unsafe { libc::waitpid(pid, std::ptr::null_mut(), libc::WNOHANG) } != pid {
        assert!(Instant::now() < end, "{pid} has not ended");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn serve(dumped: &Dumped, options: LazyOptions) -> LazyServing {
    let plan = dumped.images.lazy_ranges();
    LazyServer::bind(dumped.images.path())
        .unwrap()
        .start(&dumped.store, &plan, options)
        .unwrap()
}

fn scratch() -> tempfile::TempDir {
    tempfile::Builder::new()
        .prefix("migrate-lazy-")
        .tempdir_in("/dev/shm")
        .unwrap()
}

/// Dumps, restores, and lets the workload do its work while its memory comes.
async fn run(
    criu: &Criu,
    mode: &str,
    mib: u64,
    seed: u64,
    way: Way,
    options: LazyOptions,
) -> LazyReport {
    let scratch = scratch();
    let mut workload = Workload::start(scratch.path(), mode, mib, seed);
    let dumped = dump(criu, &workload, scratch.path(), way).await;
    workload.gone();
    let mut serving = serve(&dumped, options);
    let worker = criu.worker(WorkerOptions::default()).await.unwrap();
    let options = RestoreOptions {
        lazy: true,
        ..RestoreOptions::new(dumped.images.path())
    };
    let mut session = worker.restore(&options).await.unwrap();
    held(&mut session).await;
    fs::write(&workload.go, "").unwrap();
    let pid = release(&mut session).await;
    // The end of the workload and the end of the fill come in any order.
    let said = workload.said(|text| text != "ready");
    let report = serving.wait(LIMIT).unwrap();
    assert_eq!(said, "ok", "{mode} {seed}: {report:?}");
    reap(pid);
    println!("{mode} {mib} MiB, seed {seed}: {report:?}");
    report
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_finds_its_memory_while_it_arrives() {
    let Some(criu) = criu().await else { return };
    for way in [Way::Fresh, Way::Precopied] {
        let report = run(&criu, "check", 64, 1, way, LazyOptions::default()).await;
        assert_eq!((report.tasks, report.forks, report.ended), (1, 0, 0));
        // Of 16 pages 14 hold something.
        assert!(report.filled_pages >= 64 * 256 * 14 / 16, "{report:?}");
        assert!(report.faults > 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn threads_find_theirs_at_once() {
    let Some(criu) = criu().await else { return };
    let report = run(&criu, "threads", 64, 1, Way::Fresh, LazyOptions::default()).await;
    assert_eq!(report.ended, 0);
}

/// What is unmapped, moved, given back or inherited meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn memory_that_changes_hands_while_it_arrives_is_right() {
    let Some(criu) = criu().await else { return };
    for seed in 1..=6 {
        let options = LazyOptions {
            // Small pieces: longer, and more to go wrong.
            piece_bytes: 64 << 10,
            threads: 1 + usize::try_from(seed).unwrap() % 3,
            ..LazyOptions::default()
        };
        let way = if seed % 2 == 0 {
            Way::Precopied
        } else {
            Way::Fresh
        };
        run(&criu, "churn", 64, seed, way, options).await;
    }
}

/// Parent and child from before the dump, with pages in common.
#[tokio::test(flavor = "multi_thread")]
async fn each_process_of_a_tree_gets_its_own() {
    let Some(criu) = criu().await else { return };
    for way in [Way::Fresh, Way::Precopied] {
        let report = run(&criu, "family", 32, 1, way, LazyOptions::default()).await;
        assert_eq!(report.tasks, 2);
    }
}

/// Dumps and restores up to the commit.
async fn up_to_the_commit(
    criu: &Criu,
    scratch: &Path,
    mode: &str,
    options: LazyOptions,
) -> (Workload, Dumped, LazyServing, Session) {
    let mut workload = Workload::start(scratch, mode, 64, 1);
    let dumped = dump(criu, &workload, scratch, Way::Fresh).await;
    workload.gone();
    let serving = serve(&dumped, options);
    let worker = criu.worker(WorkerOptions::default()).await.unwrap();
    let options = RestoreOptions {
        lazy: true,
        ..RestoreOptions::new(dumped.images.path())
    };
    let mut session = worker.restore(&options).await.unwrap();
    held(&mut session).await;
    fs::write(&workload.go, "").unwrap();
    (workload, dumped, serving, session)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_is_refused_ends_the_server() {
    let Some(criu) = criu().await else { return };
    let scratch = scratch();
    let (_workload, _dumped, mut serving, mut session) =
        up_to_the_commit(&criu, scratch.path(), "check", LazyOptions::default()).await;
    session.answer(false).await.unwrap();
    let end = session.next(LIMIT).await.unwrap();
    assert_eq!(end, Notice::Finished(Outcome::Refused));
    let end = serving.wait(LIMIT);
    assert!(matches!(end, Err(LazyError::RestoreEnded)), "{end:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_is_killed_meanwhile_ends_the_server() {
    let Some(criu) = criu().await else { return };
    let scratch = scratch();
    let options = LazyOptions {
        piece_bytes: 64 << 10,
        threads: 1,
        ..LazyOptions::default()
    };
    let (_workload, _dumped, mut serving, mut session) =
        up_to_the_commit(&criu, scratch.path(), "hang", options).await;
    let pid = release(&mut session).await;
    end_now(pid);
    reap(pid);
    // It may have been complete by then.
    let report = serving.wait(LIMIT).unwrap();
    println!("killed: {report:?}");
}

/// A server that fails holds whoever touches what is missing; he must never
/// find zeros there.
#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_filled_is_never_zeros() {
    let Some(criu) = criu().await else { return };
    let scratch = scratch();
    let options = LazyOptions {
        limit: Duration::ZERO,
        ..LazyOptions::default()
    };
    let (workload, _dumped, mut serving, mut session) =
        up_to_the_commit(&criu, scratch.path(), "hang", options).await;
    let pid = release(&mut session).await;
    let end = serving.wait(LIMIT);
    let Err(error @ LazyError::Slow { .. }) = end else {
        panic!("{end:?}");
    };
    assert!(error.help().unwrap().contains("kill"));
    drop(serving);
    // It waits in the kernel for a page that does not come.
    let stat = format!("/proc/{pid}/wchan");
    let end = Instant::now() + LIMIT;
    while fs::read_to_string(&stat).unwrap() != "handle_userfault" {
        let said = fs::read_to_string(&workload.file).unwrap();
        assert_eq!(said, "ready");
        assert!(Instant::now() < end, "{:?}", fs::read_to_string(&stat));
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(fs::read_to_string(&workload.file).unwrap(), "ready");
    end_now(pid);
    reap(pid);
}

#[test]
fn a_plan_that_the_store_cannot_keep_is_refused() {
    let scratch = scratch();
    let mut store = PageStore::new(1 << 20);
    let owner = PageOwner::Task(7);
    let run = PageRun {
        owner,
        vaddr: 0x1000,
        pages: 2,
        flags: PageRun::PRESENT,
    };
    store.put(run, &[1; 2 * PAGE_BYTES]).unwrap();
    let start = |range| {
        let _ = fs::remove_file(scratch.path().join("lazy-pages.socket"));
        LazyServer::bind(scratch.path()).unwrap().start(
            &store,
            &[(owner, range)],
            LazyOptions::default(),
        )
    };
    let error = start(0x1000..0x4000).unwrap_err();
    assert!(
        matches!(error, LazyError::PageMissing { vaddr: 0x3000, .. }),
        "{error}"
    );
    // Nobody connects, and nobody wants it any more.
    let mut serving = start(0x1000..0x3000).unwrap();
    let early = serving.wait(Duration::ZERO);
    assert!(matches!(early, Err(LazyError::NotYet { .. })), "{early:?}");
    drop(serving);
}

fn keeper() -> Keeper {
    Keeper::start(Command::new(env!("CARGO_BIN_EXE_lazy-keeper"))).unwrap()
}

/// One that dies at a moment that nobody could hit from outside.
fn mortal_keeper(moment: &str) -> Keeper {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lazy-keeper"));
    command.arg(moment);
    Keeper::start(command).unwrap()
}

/// Serves from a process of its own. The descriptor can be read to its end when
/// nobody holds the other one any more.
fn serve_apart(dumped: &Dumped, keeper: Keeper) -> (LazyServing, io::PipeReader) {
    let (end, hold) = io::pipe().unwrap();
    let serving = keeper
        .serve(
            LazyServer::bind(dumped.images.path()).unwrap(),
            &dumped.store,
            &dumped.images.lazy_ranges(),
            LazyOptions {
                piece_bytes: 64 << 10,
                ..LazyOptions::default()
            },
            (Arc::new(LatePages::new(0).unwrap()), &LateRuns::default()),
            Some(hold.into()),
        )
        .unwrap();
    (serving, end)
}

/// When the keeper is killed.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Killed {
    Never,
    /// CRIU holds the complete copy and has not yet said that it runs.
    BeforeItRuns,
    WhenItRuns,
    /// It has read this many events, and told of all but the last ones.
    AtEvent(u32),
    /// It has told of CRIU's last word and not taken it.
    AtLastWord,
}

/// Restores with a keeper.
async fn run_apart(criu: &Criu, mode: &str, seed: u64, killed: Killed) -> LazyReport {
    let scratch = scratch();
    let mut workload = Workload::start(scratch.path(), mode, 64, seed);
    let dumped = dump(criu, &workload, scratch.path(), Way::Precopied).await;
    workload.gone();
    let keeper = match killed {
        Killed::AtEvent(number) => mortal_keeper(&number.to_string()),
        Killed::AtLastWord => mortal_keeper("last-word"),
        Killed::Never | Killed::BeforeItRuns | Killed::WhenItRuns => keeper(),
    };
    let keeper_pid = keeper.pid();
    let (mut serving, mut end) = serve_apart(&dumped, keeper);
    let Dumped { images, store } = dumped;
    // The keeper has all it needs.
    drop(store);
    let worker = criu.worker(WorkerOptions::default()).await.unwrap();
    let options = RestoreOptions {
        lazy: true,
        ..RestoreOptions::new(images.path())
    };
    let mut session = worker.restore(&options).await.unwrap();
    held(&mut session).await;
    serving.handed_over(LIMIT).unwrap();
    serving.handed_over(LIMIT).unwrap();
    serving.is_served().unwrap();
    fs::write(&workload.go, "").unwrap();
    if killed == Killed::BeforeItRuns {
        end_now(keeper_pid);
        let end = Instant::now() + LIMIT;
        while serving.is_served().is_ok() {
            assert!(Instant::now() < end, "the keeper lives");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    let pid = release(&mut session).await;
    if killed == Killed::WhenItRuns {
        end_now(keeper_pid);
    }
    let report = serving.wait(LIMIT).unwrap();
    let said = workload.said(|text| text != "ready");
    assert_eq!(said, "ok", "{mode} {seed}: {report:?}");
    reap(pid);
    assert_eq!(io::Read::read(&mut end, &mut [0]).unwrap(), 0);
    println!("{mode}, seed {seed}: {report:?}");
    report
}

#[tokio::test(flavor = "multi_thread")]
async fn a_keeper_serves_from_a_process_of_its_own() {
    let Some(criu) = criu().await else { return };
    let report = run_apart(&criu, "check", 1, Killed::Never).await;
    assert_eq!((report.tasks, report.forks, report.ended), (1, 0, 0));
    let report = run_apart(&criu, "family", 1, Killed::Never).await;
    assert_eq!(report.tasks, 2);
    run_apart(&criu, "churn", 7, Killed::Never).await;
}

/// Never wrong bytes: another one goes on where the keeper was, whatever the
/// tree has done to its memory.
#[tokio::test(flavor = "multi_thread")]
async fn a_keeper_that_is_killed_is_replaced() {
    let Some(criu) = criu().await else { return };
    let mut replaced = 0;
    for (mode, seed) in [("check", 1), ("churn", 1), ("churn", 2), ("family", 1)] {
        let report = run_apart(&criu, mode, seed, Killed::WhenItRuns).await;
        // CRIU has handed its tasks over to another one.
        replaced += u32::from(report.tasks == 0);
    }
    assert!(replaced > 0, "the keeper was always faster");
}

/// What it had read and told nobody of is found where it has left it, forked memory
/// included.
#[tokio::test(flavor = "multi_thread")]
async fn a_keeper_that_dies_before_it_can_tell_is_replaced() {
    let Some(criu) = criu().await else { return };
    for number in 1..=4 {
        let report = run_apart(&criu, "fork", 1, Killed::AtEvent(number)).await;
        // CRIU has handed its task to the keeper.
        assert_eq!(report.tasks, 0, "{number}: {report:?}");
        // The first event is the first fork.
        if number == 1 {
            assert_eq!(report.forks, 3, "{report:?}");
        }
    }
    for number in [1, 2, 3, 5, 8, 13, 21, 34] {
        let report = run_apart(&criu, "churn", 3, Killed::AtEvent(number)).await;
        assert_eq!(report.tasks, 0, "{number}: {report:?}");
    }
    for mode in ["check", "fork"] {
        let report = run_apart(&criu, mode, 1, Killed::AtLastWord).await;
        assert_eq!(report.tasks, 0, "{report:?}");
    }
}

/// CRIU, which is about to say that the tree may run, finds somebody to say it to.
#[tokio::test(flavor = "multi_thread")]
async fn a_keeper_that_is_killed_when_the_copy_is_let_go_is_replaced() {
    let Some(criu) = criu().await else { return };
    for (mode, seed) in [("check", 1), ("churn", 1), ("family", 1)] {
        let report = run_apart(&criu, mode, seed, Killed::BeforeItRuns).await;
        // CRIU has handed its tasks over to the keeper, which has not filled one.
        assert_eq!(report.tasks, 0, "{report:?}");
        assert!(report.filled_pages > 0, "{report:?}");
    }
}

/// Nobody has to go on where CRIU then gives the copy up.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_is_refused_without_its_keeper_ends_whoever_has_replaced_it() {
    let Some(criu) = criu().await else { return };
    let scratch = scratch();
    let dumped = one_dumped(&criu, scratch.path()).await;
    let keeper = keeper();
    let pid = keeper.pid();
    let (mut serving, mut end) = serve_apart(&dumped, keeper);
    let worker = criu.worker(WorkerOptions::default()).await.unwrap();
    let options = RestoreOptions {
        lazy: true,
        ..RestoreOptions::new(dumped.images.path())
    };
    let mut session = worker.restore(&options).await.unwrap();
    held(&mut session).await;
    serving.handed_over(LIMIT).unwrap();
    end_now(pid);
    session.answer(false).await.unwrap();
    let refused = session.next(LIMIT).await.unwrap();
    assert_eq!(refused, Notice::Finished(Outcome::Refused));
    let ended = serving.wait(LIMIT);
    assert!(matches!(ended, Err(LazyError::RestoreEnded)), "{ended:?}");
    assert_eq!(io::Read::read(&mut end, &mut [0]).unwrap(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_keeper_that_is_killed_before_the_tree_runs_is_noticed() {
    let Some(criu) = criu().await else { return };
    let scratch = scratch();
    let dumped = one_dumped(&criu, scratch.path()).await;
    let keeper = keeper();
    let pid = keeper.pid();
    let (mut serving, _end) = serve_apart(&dumped, keeper);
    end_now(pid);
    let end = serving.handed_over(LIMIT);
    assert!(matches!(end, Err(LazyError::Lost)), "{end:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_keeper_that_is_not_needed_ends() {
    let Some(criu) = criu().await else { return };
    let scratch = scratch();
    let dumped = one_dumped(&criu, scratch.path()).await;
    let unused = keeper();
    let pid = unused.pid();
    drop(unused);
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
    let (serving, mut end) = serve_apart(&dumped, keeper());
    drop(serving);
    assert_eq!(io::Read::read(&mut end, &mut [0]).unwrap(), 0);
}

/// The time from the order to the run, either way; printed, not judged.
#[tokio::test(flavor = "multi_thread")]
async fn how_long_a_restore_takes() {
    let Some(criu) = criu().await else { return };
    for way in [Way::Eager, Way::Fresh] {
        let scratch = scratch();
        let mut workload = Workload::start(scratch.path(), "wait", 256, 1);
        let dumped = dump(&criu, &workload, scratch.path(), way).await;
        workload.gone();
        fs::write(&workload.go, "").unwrap();
        let worker = criu.worker(WorkerOptions::default()).await.unwrap();
        let started = Instant::now();
        let serving = (way != Way::Eager).then(|| serve(&dumped, LazyOptions::default()));
        let options = RestoreOptions {
            lazy: serving.is_some(),
            ..RestoreOptions::new(dumped.images.path())
        };
        let mut session = worker.restore(&options).await.unwrap();
        held(&mut session).await;
        let ready = started.elapsed();
        let pid = release(&mut session).await;
        println!(
            "256 MiB {}: ready after {ready:?}, runs after {:?}",
            if serving.is_some() { "lazy" } else { "eager" },
            started.elapsed()
        );
        assert_eq!(workload.said(|text| text != "ready"), "ok");
        if let Some(mut serving) = serving {
            println!("{:?}", serving.wait(LIMIT).unwrap());
        }
        reap(pid);
    }
}
