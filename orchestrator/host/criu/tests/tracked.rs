//! Dumps that leave out clean pages, with a real CRIU under the shim and a
//! process that is its own tracker. Needs root; what cannot run prints a line
//! that starts with `SKIP`.
#![allow(
    clippy::unwrap_used,
    reason = "the exemption for tests does not reach their helpers"
)]

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Once;
use std::time::{Duration, Instant};

use bytes::Bytes;
use migrate_core::wire::{ImagePiece, PAGE_BYTES, PageOwner, PageRun};
use migrate_criu::{
    Criu, CriuError, DumpOptions, ImageDir, Notice, Outcome, PARENT, PageSink, PageStats,
    RestoreOptions, Session, Track, WorkerOptions, locate, serve_pages, small_images,
};

/// Limit for any single step.
const LIMIT: Duration = Duration::from_secs(30);
const PAGE: u64 = PAGE_BYTES as u64;

/// CRIU, when tracked dumps work here; else why this test is skipped.
async fn criu() -> Option<Criu> {
    static REAPER: Once = Once::new();
    // Restored trees become children of this process.
    REAPER.call_once(|| {
        // SAFETY: a flag of this process, no memory involved.
        assert_eq!(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) }, 0);
    });
    if !nix::unistd::geteuid().is_root() {
        println!("SKIP tracked: not root");
        return None;
    }
    let criu = match locate().await {
        Ok(criu) => criu,
        Err(error) => {
            println!("SKIP tracked: {error}");
            return None;
        }
    };
    if !kernel_protects_asynchronously() {
        println!("SKIP tracked: no userfaultfd that protects asynchronously");
        return None;
    }
    criu.warm().await.unwrap();
    criu.self_check_shim().await.unwrap();
    Some(criu)
}

/// `UFFD_FEATURE_WP_ASYNC`, asked of the kernel itself.
fn kernel_protects_asynchronously() -> bool {
    let mut api = [0xaau64, 1 << 15, 0];
    // SAFETY: a descriptor of our own, and an argument of the request's size.
    unsafe {
        let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | 1);
        let Ok(fd) = RawFd::try_from(fd) else {
            return false;
        };
        if fd < 0 {
            return false;
        }
        let fd = OwnedFd::from_raw_fd(fd);
        libc::ioctl(fd.as_raw_fd(), 0xc018_aa3f, &raw mut api) == 0
    }
}

fn scratch() -> tempfile::TempDir {
    tempfile::Builder::new()
        .prefix("migrate-tracked-")
        .tempdir_in("/dev/shm")
        .unwrap()
}

/// Pages by address.
type Store = BTreeMap<u64, Vec<u8>>;

/// The workload `tracked`, its tracker in our hands.
struct Tracked {
    child: Child,
    file: PathBuf,
    pages: u64,
    pages_count: u64,
    others: u64,
    others_count: u64,
    tracker: Option<OwnedFd>,
    stream: Option<BufReader<UnixStream>>,
}

impl Tracked {
    fn start(scratch: &Path, mib: u64) -> Self {
        let (socket, file) = (scratch.join("socket"), scratch.join("file"));
        let listener = UnixListener::bind(&socket).unwrap();
        let mut program = std::env::current_exe().unwrap();
        program.pop();
        program.pop();
        let mut command = Command::new(program.join("examples/workload"));
        command
            .arg("tracked")
            .args([&socket, &file])
            .arg(mib.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        // SAFETY: two system calls between fork and exec.
        unsafe {
            command.pre_exec(|| {
                libc::setsid();
                // Whatever this test was started with.
                libc::close_range(3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC.cast_signed());
                Ok(())
            });
        }
        let child = command.spawn().unwrap();
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let mut this = Self {
            child,
            file,
            pages: 0,
            pages_count: 0,
            others: 0,
            others_count: 0,
            tracker: None,
            stream: Some(BufReader::new(stream)),
        };
        let words = this.line();
        let words: Vec<u64> = words.split(' ').map(|word| word.parse().unwrap()).collect();
        [this.pages, this.pages_count, this.others, this.others_count] =
            words[1..].try_into().unwrap();
        this.tracker = Some(take(this.pid(), RawFd::try_from(words[0]).unwrap()));
        assert_eq!(this.ask("close"), "closed");
        this
    }

    fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    fn task(&self) -> PageOwner {
        PageOwner::Task(self.child.id())
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.stream.as_mut().unwrap().read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    fn ask(&mut self, line: &str) -> String {
        writeln!(self.stream.as_mut().unwrap().get_mut(), "{line}").unwrap();
        self.line()
    }

    fn write(&mut self, pages: impl IntoIterator<Item = u64>) {
        for page in pages {
            assert_eq!(
                self.ask(&format!("write {page} {}", page * 3 + 1)),
                "written"
            );
        }
    }

    /// Leaves it alone: it then writes its counter and sum.
    fn hang_up(&mut self) {
        self.stream = None;
        report_after(&self.file, 0);
    }

    fn address(&self, page: u64) -> u64 {
        assert!(page < self.pages_count);
        self.pages + page * PAGE
    }

    /// Copies what is protected, and the code that the kernel maps.
    fn copy(&self) -> Store {
        let mut store = Store::new();
        self.copy_range(self.pages, self.pages_count, &mut store);
        let (vdso, pages) = self.vdso();
        self.copy_range(vdso, pages, &mut store);
        store
    }

    fn vdso(&self) -> (u64, u64) {
        let maps = fs::read_to_string(format!("/proc/{}/maps", self.pid())).unwrap();
        let line = maps.lines().find(|line| line.ends_with("[vdso]")).unwrap();
        let range = line.split(' ').next().unwrap().split_once('-').unwrap();
        let number = |text| u64::from_str_radix(text, 16).unwrap();
        let (start, end) = (number(range.0), number(range.1));
        (start, (end - start) / PAGE)
    }

    fn copy_range(&self, vaddr: u64, pages: u64, store: &mut Store) {
        let memory = fs::File::open(format!("/proc/{}/mem", self.pid())).unwrap();
        for vaddr in (0..pages).map(|page| vaddr + page * PAGE) {
            let mut data = vec![0; PAGE_BYTES];
            std::os::unix::fs::FileExt::read_exact_at(&memory, &mut data, vaddr).unwrap();
            store.insert(vaddr, data);
        }
    }

    fn options(&self, images: &Path) -> DumpOptions {
        DumpOptions {
            track: Some(Track {
                precopied: [self.child.id()].into(),
                ..Track::default()
            }),
            ..DumpOptions::new(self.pid(), images)
        }
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits for a report with a counter above `counter`.
fn report_after(file: &Path, counter: u64) -> (u64, u64) {
    let end = Instant::now() + LIMIT;
    loop {
        let text = fs::read_to_string(file).unwrap_or_default();
        let words: Vec<u64> = text
            .split_ascii_whitespace()
            .filter_map(|word| word.parse().ok())
            .collect();
        if let [now, sum] = words[..]
            && now > counter
        {
            return (now, sum);
        }
        assert!(
            Instant::now() < end,
            "the workload does not go on: {text:?}"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn take(pid: i32, fd: RawFd) -> OwnedFd {
    // SAFETY: system calls without memory; each result is a new descriptor.
    unsafe {
        let process = libc::syscall(libc::SYS_pidfd_open, pid, 0);
        assert!(process >= 0, "{}", io::Error::last_os_error());
        let process = OwnedFd::from_raw_fd(RawFd::try_from(process).unwrap());
        let taken = libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), fd, 0);
        assert!(taken >= 0, "{}", io::Error::last_os_error());
        OwnedFd::from_raw_fd(RawFd::try_from(taken).unwrap())
    }
}

/// Puts pages where they belong, and remembers which came how.
struct ToImages<'a> {
    images: &'a mut ImageDir,
    /// Whether they came with data.
    seen: BTreeMap<(PageOwner, u64), bool>,
    bytes: u64,
}

impl PageSink for ToImages<'_> {
    type Error = io::Error;

    async fn pages(&mut self, run: PageRun, data: Bytes) -> io::Result<()> {
        let present = run.flags & PageRun::PRESENT != 0;
        assert_eq!(present, run.flags & PARENT == 0, "{run:?}");
        for page in 0..run.pages {
            self.seen
                .insert((run.owner, run.vaddr + page * PAGE), present);
        }
        self.bytes += data.len() as u64;
        if present {
            self.images.pages(run, &data)
        } else {
            self.images.gap(run)
        }
        .map_err(io::Error::other)
    }

    async fn close(&mut self, _: PageStats) -> io::Result<()> {
        Ok(())
    }
}

/// Where CRIU waits for the commit of a dump.
struct Dumped {
    session: Session,
    seen: BTreeMap<(PageOwner, u64), bool>,
    bytes: u64,
}

impl Dumped {
    /// Pages of one task without data.
    fn left_out(&self, task: PageOwner) -> Vec<u64> {
        self.seen
            .iter()
            .filter(|((owner, _), present)| *owner == task && !**present)
            .map(|((_, vaddr), _)| *vaddr)
            .collect()
    }

    async fn finish(self, commit: bool) {
        finish(self.session, commit).await;
    }
}

async fn finish(mut session: Session, commit: bool) {
    session.answer(commit).await.unwrap();
    let end = session.next(LIMIT).await.unwrap();
    let expected = if commit {
        Outcome::Dumped
    } else {
        Outcome::Refused
    };
    assert_eq!(end, Notice::Finished(expected));
}

async fn dump(criu: &Criu, options: &DumpOptions, to: &mut ImageDir) -> Dumped {
    let mut sink = ToImages {
        images: to,
        seen: BTreeMap::new(),
        bytes: 0,
    };
    let (session, _) = dump_to(criu, options, &mut sink).await;
    Dumped {
        session,
        seen: sink.seen,
        bytes: sink.bytes,
    }
}

/// Dumps up to the commit; also says how long that took from the first
/// question after the freeze on.
async fn dump_to(
    criu: &Criu,
    options: &DumpOptions,
    sink: &mut impl PageSink,
) -> (Session, Duration) {
    let worker = criu
        .worker(WorkerOptions {
            shim: options.track.is_some(),
            ..WorkerOptions::default()
        })
        .await
        .unwrap();
    let mut session = worker.dump(options).await.unwrap();
    let socket = session.page_socket().unwrap();
    let serve = serve_pages(socket, criu.version, sink, LIMIT);
    let drive = async {
        let mut frozen = Instant::now();
        loop {
            let notice = match session.next(LIMIT).await {
                Ok(notice) => notice,
                Err(error) => panic!("{error}: {:#?}", error.log()),
            };
            match notice {
                Notice::QueryExtFiles => frozen = Instant::now(),
                Notice::PostDump => return frozen.elapsed(),
                _ => {}
            }
            session.answer(true).await.unwrap();
        }
    };
    let (stats, frozen) = tokio::join!(serve, drive);
    stats.unwrap();
    (session, frozen)
}

fn image_dirs(scratch: &Path, name: &str) -> (ImageDir, ImageDir) {
    (
        ImageDir::create(scratch.join(format!("{name}-source"))).unwrap(),
        ImageDir::create(scratch.join(format!("{name}-destination"))).unwrap(),
    )
}

fn copy_small(from: &ImageDir, to: &mut ImageDir) {
    for image in small_images(from.path()).unwrap() {
        let data = fs::read(&image.path).unwrap();
        to.image_piece(&ImagePiece {
            name: &image.name,
            last: true,
            data: &data,
        })
        .unwrap();
    }
}

async fn restore(criu: &Criu, images: &ImageDir) -> i32 {
    let worker = criu.worker(WorkerOptions::default()).await.unwrap();
    let mut session = worker
        .restore(&RestoreOptions::new(images.path()))
        .await
        .unwrap();
    loop {
        match session.next(LIMIT).await {
            Ok(Notice::Finished(Outcome::Restored { pid })) => return pid,
            Ok(_) => session.answer(true).await.unwrap(),
            Err(error) => panic!("{error}: {:#?}", error.log()),
        }
    }
}

#[tokio::test]
async fn only_what_was_written_travels_and_the_rest_comes_out_of_the_store() {
    let Some(criu) = criu().await else { return };
    let scratch = scratch();
    let mut tracked = Tracked::start(scratch.path(), 16);
    let task = tracked.task();
    let mut store = tracked.copy();
    let mut dirty = vec![3, 100, 101, 102, 4000, 4095];
    tracked.write(dirty.iter().copied());
    let sum: u64 = tracked.ask("sum").parse().unwrap();
    tracked.hang_up();

    // Refused at the commit: it runs on with its memory as it was.
    let (source, mut destination) = image_dirs(scratch.path(), "refused");
    let dumped = dump(&criu, &tracked.options(source.path()), &mut destination).await;
    check_pages(&tracked, &dumped, &dirty);
    let (counter, _) = report_after(&tracked.file, 0);
    dumped.finish(false).await;
    let (_, after) = report_after(&tracked.file, counter + 1);
    assert_eq!(after, sum);

    // What was written since it was protected stays dirty.
    let (source, mut destination) = image_dirs(scratch.path(), "moved");
    let dumped = dump(&criu, &tracked.options(source.path()), &mut destination).await;
    dirty.sort_unstable();
    check_pages(&tracked, &dumped, &dirty);
    let (counter, _) = report_after(&tracked.file, 0);
    assert!(dumped.bytes < 2 << 20, "{} bytes", dumped.bytes);
    copy_small(&source, &mut destination);

    // A store without one of the pages is of no use.
    let missing = tracked.address(2000);
    let page = store.remove(&missing).unwrap();
    let error = fill(&mut destination, &store, task).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains(&format!("{missing:#x}")) && text.contains(&format!("{task:?}")),
        "{text}"
    );
    assert!(destination.finish().is_err(), "with gaps");
    store.insert(missing, page);
    // The dirty pages' old content is in store too, and must not win.
    fill(&mut destination, &store, task).unwrap();
    destination.finish().unwrap();
    dumped.finish(true).await;
    tracked.child.wait().unwrap();

    let pid = restore(&criu, &destination).await;
    assert_eq!(pid, tracked.pid());
    // The first report may have been begun before the dump.
    let (_, after) = report_after(&tracked.file, counter + 2);
    let copy = nix::unistd::Pid::from_raw(pid);
    nix::sys::signal::kill(copy, nix::sys::signal::Signal::SIGKILL).unwrap();
    // SAFETY: no memory involved; ours by then, or its reaper's.
    unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
    assert_eq!(after, sum);
}

fn fill(images: &mut ImageDir, store: &Store, task: PageOwner) -> Result<(), CriuError> {
    images.fill(
        &mut |owner, vaddr, pages, out: &mut dyn io::Write| -> io::Result<()> {
            assert_eq!(owner, task);
            for page in 0..pages {
                let page = store.get(&(vaddr + page * PAGE));
                out.write_all(page.ok_or_else(|| io::Error::other("no such page"))?)?;
            }
            Ok(())
        },
    )
}

/// Of the protected pages the `dirty` ones came with data and no others did,
/// and everything else came whole.
fn check_pages(tracked: &Tracked, dumped: &Dumped, dirty: &[u64]) {
    let task = tracked.task();
    for page in 0..tracked.pages_count {
        let present = dumped.seen.get(&(task, tracked.address(page)));
        assert_eq!(present, Some(&dirty.contains(&page)), "page {page}");
    }
    for page in 0..tracked.others_count {
        let present = dumped.seen.get(&(task, tracked.others + page * PAGE));
        assert_eq!(present, Some(&true), "unprotected page {page}");
    }
    let (vdso, pages) = tracked.vdso();
    let known = |vaddr: u64| {
        (tracked.pages..tracked.pages + tracked.pages_count * PAGE).contains(&vaddr)
            || (vdso..vdso + pages * PAGE).contains(&vaddr)
    };
    for vaddr in dumped.left_out(task) {
        assert!(known(vaddr), "{vaddr:#x} was left out");
    }
}

#[tokio::test]
async fn what_the_tracker_does_not_hold_comes_whole() {
    let Some(criu) = criu().await else { return };
    let scratch = scratch();
    let mut tracked = Tracked::start(scratch.path(), 4);
    let task = tracked.task();
    tracked.hang_up();

    // Tracked, but of no task that was copied.
    let (source, mut destination) = image_dirs(scratch.path(), "unknown");
    let mut options = tracked.options(source.path());
    options.track = Some(Track {
        precopied: [1].into(),
        ..Track::default()
    });
    let dumped = dump(&criu, &options, &mut destination).await;
    assert_eq!(dumped.left_out(task), []);
    dumped.finish(false).await;

    // A tracker that has gone takes its protection along.
    tracked.tracker = None;
    let (source, mut destination) = image_dirs(scratch.path(), "untracked");
    let dumped = dump(&criu, &tracked.options(source.path()), &mut destination).await;
    let (vdso, pages) = tracked.vdso();
    for vaddr in dumped.left_out(task) {
        assert!((vdso..vdso + pages * PAGE).contains(&vaddr), "{vaddr:#x}");
    }
    for page in 0..tracked.pages_count {
        assert!(dumped.seen[&(task, tracked.address(page))]);
    }
    dumped.finish(false).await;
}

#[tokio::test]
async fn the_self_check_says_what_is_wrong() {
    let Some(criu) = criu().await else { return };
    // The second time it is known: nothing is there any more that could be asked.
    let scratch = scratch();
    let copy = Criu {
        path: scratch.path().join("copy"),
        version: criu.version,
    };
    std::os::unix::fs::symlink(&criu.path, &copy.path).unwrap();
    copy.self_check_shim().await.unwrap();
    fs::remove_file(&copy.path).unwrap();
    copy.self_check_shim().await.unwrap();

    // A worker without the library does not dump that way.
    let images = ImageDir::create(scratch.path().join("images")).unwrap();
    let worker = criu.worker(WorkerOptions::default()).await.unwrap();
    let options = DumpOptions {
        track: Some(Track::default()),
        ..DumpOptions::new(1, images.path())
    };
    let error = worker.dump(&options).await.unwrap_err();
    assert!(
        matches!(error, CriuError::Untracked { shim: false }),
        "{error}"
    );

    // Programs that are no CRIU, or none that lets itself be preloaded.
    for (name, script, expected) in [
        ("silent", "exit 1", "does not say why"),
        (
            "old",
            "echo Dirty tracking is OFF >&2; exit 1",
            "tracking is OFF",
        ),
        ("liar", "exit 0", "introduce itself"),
    ] {
        let path = scratch.path().join(name);
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let other = Criu {
            path,
            version: criu.version,
        };
        let error = other.self_check_shim().await.unwrap_err();
        assert!(matches!(error, CriuError::SelfCheck { .. }), "{error}");
        assert!(error.to_string().contains(expected), "{error}");
        assert!(error.help().is_some());
    }
}

#[tokio::test]
async fn the_cache_of_every_other_criu_is_left_alone() {
    let Some(criu) = criu().await else { return };
    let cache = Path::new("/run/criu.kdat");
    let before = fs::read(cache).ok();
    let worker = criu
        .worker(WorkerOptions {
            shim: true,
            ..WorkerOptions::default()
        })
        .await
        .unwrap();
    // It has closed what the library was loaded from.
    for fd in fs::read_dir(format!("/proc/{}/fd", worker.pid())).unwrap() {
        let target = fs::read_link(fd.unwrap().path()).unwrap_or_default();
        assert!(
            !target.to_string_lossy().contains("migrate-shim"),
            "{target:?}"
        );
    }
    drop(worker);
    assert_eq!(fs::read(cache).ok(), before);
}

#[tokio::test]
async fn what_criu_runs_finds_no_trace_of_the_shim() {
    let Some(criu) = criu().await else { return };
    let scratch = scratch();
    let environment = scratch.path().join("environment");
    let wrapper = scratch.path().join("criu");
    let script = format!(
        "#!/bin/sh\nenv > {}\nexec {} \"$@\"\n",
        environment.display(),
        criu.path.display()
    );
    fs::write(&wrapper, script).unwrap();
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755)).unwrap();
    let wrapped = Criu {
        path: wrapper,
        version: criu.version,
    };
    // The shell has loaded it, so that what the shell runs has not: a CRIU that
    // answers, and would believe what the kernel says.
    let shim = WorkerOptions {
        shim: true,
        ..WorkerOptions::default()
    };
    let error = wrapped.worker(shim).await.unwrap_err();
    assert!(matches!(error, CriuError::ShimNotLoaded { .. }), "{error}");
    let environment = fs::read_to_string(environment).unwrap();
    assert!(environment.contains("PATH="));
    assert!(!environment.contains("PRELOAD") && !environment.contains("MIGRATE_SHIM"));
    let error = wrapped.self_check_shim().await.unwrap_err();
    assert!(matches!(error, CriuError::SelfCheck { .. }), "{error}");
}
