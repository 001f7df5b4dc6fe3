//! Dump and restore with a real CRIU. Needs root; a part that cannot run
//! prints a line that starts with `SKIP`.
#![allow(
    clippy::unwrap_used,
    reason = "the exemption for tests does not reach their helpers"
)]

use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Once;
use std::time::{Duration, Instant};

use bytes::Bytes;
use migrate_core::wire::{ImagePiece, PageRun};
use migrate_criu::{
    Criu, CriuError, DumpOptions, ImageDir, Notice, Outcome, PageSink, PageStats, RestoreOptions,
    Session, WorkerOptions, locate, serve_pages, small_images,
};

/// Limit for any single step.
const LIMIT: Duration = Duration::from_secs(30);

/// CRIU, or why this test is skipped.
async fn criu() -> Option<Criu> {
    static REAPER: Once = Once::new();
    // Restored trees become children of this process.
    REAPER.call_once(|| {
        // SAFETY: a flag of this process, no memory involved.
        assert_eq!(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) }, 0);
    });
    if !nix::unistd::geteuid().is_root() {
        println!("SKIP criu: not root");
        return None;
    }
    match locate().await {
        Ok(criu) => {
            criu.warm().await.unwrap();
            Some(criu)
        }
        Err(error) => {
            println!("SKIP criu: {error}");
            None
        }
    }
}

/// A scratch directory on a tmpfs.
fn scratch() -> tempfile::TempDir {
    tempfile::Builder::new()
        .prefix("migrate-criu-")
        .tempdir_in("/dev/shm")
        .unwrap()
}

fn workload(arguments: &[&str]) -> Command {
    let mut path = std::env::current_exe().unwrap();
    path.pop();
    path.pop();
    let mut command = Command::new(path.join("examples/workload"));
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    // SAFETY: one system call between fork and exec.
    unsafe {
        command.pre_exec(|| {
            libc::setsid();
            Ok(())
        });
    }
    command
}

fn start(arguments: &[&str]) -> Killed {
    Killed::of(workload(arguments))
}

/// A process that is killed and reaped in the end, whoever made it.
struct Killed(i32);

impl Killed {
    #[allow(clippy::zombie_processes, reason = "reaped by number when dropped")]
    fn of(mut command: Command) -> Self {
        let child = command.spawn().unwrap();
        Self(i32::try_from(child.id()).unwrap())
    }

    fn alive(&self) -> bool {
        runs(self.0)
    }

    /// Waits for its end, by itself or by someone else's hand.
    fn reap(&self) {
        let mut status = 0;
        // SAFETY: `status` is a valid place for the result.
        let reaped = unsafe { libc::waitpid(self.0, &raw mut status, 0) };
        assert_eq!(reaped, self.0, "{}", io::Error::last_os_error());
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        // SAFETY: a signal to, and a wait for, a child of this process: its
        // number cannot have been given to anyone else before the wait.
        unsafe {
            if libc::waitpid(self.0, std::ptr::null_mut(), libc::WNOHANG) == 0 {
                libc::kill(self.0, libc::SIGKILL);
                libc::waitpid(self.0, std::ptr::null_mut(), 0);
            }
        }
    }
}

/// Whether there is such a process, and it has not ended.
fn runs(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        let state = stat.rsplit(") ").next().unwrap_or_default();
        !state.starts_with('Z') && !state.starts_with('X')
    })
}

/// Polls a condition on something outside that sends no event.
fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < end, "never: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn counter(file: &Path) -> u64 {
    fs::read_to_string(file)
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(0)
}

fn advances(file: &Path) {
    let before = counter(file);
    eventually("the counter advances", || counter(file) > before);
}

fn stands_still(file: &Path) -> u64 {
    let before = counter(file);
    std::thread::sleep(Duration::from_millis(60));
    assert_eq!(counter(file), before);
    before
}

/// Sends pages straight to the image directory of the destination.
struct ToImages<'a> {
    images: &'a mut ImageDir,
    refuse_after_pages: u64,
    refuse_close: bool,
}

impl PageSink for ToImages<'_> {
    type Error = io::Error;

    async fn pages(&mut self, run: PageRun, data: Bytes) -> io::Result<()> {
        self.images.pages(run, &data).map_err(io::Error::other)?;
        if self.images.stats().pages > self.refuse_after_pages {
            return Err(io::Error::other("the destination is gone"));
        }
        Ok(())
    }

    async fn close(&mut self, _: PageStats) -> io::Result<()> {
        if self.refuse_close {
            return Err(io::Error::other("the destination is gone"));
        }
        Ok(())
    }
}

/// Source and destination directories of one migration on one machine.
struct Images {
    source: ImageDir,
    destination: ImageDir,
}

impl Images {
    fn new(scratch: &Path, name: &str) -> Self {
        Self {
            source: ImageDir::create(scratch.join(format!("{name}-source"))).unwrap(),
            destination: ImageDir::create(scratch.join(format!("{name}-destination"))).unwrap(),
        }
    }

    fn dump_options(&self, pid: i32) -> DumpOptions {
        DumpOptions::new(pid, self.source.path())
    }

    /// Copies the small images and completes the destination's set.
    fn complete(&mut self) {
        for image in small_images(self.source.path()).unwrap() {
            let data = fs::read(&image.path).unwrap();
            let (head, tail) = data.split_at(data.len() / 2);
            for (data, last) in [(head, false), (tail, true)] {
                self.destination
                    .image_piece(&ImagePiece {
                        name: &image.name,
                        last,
                        data,
                    })
                    .unwrap();
            }
        }
        self.destination.finish().unwrap();
    }
}

/// Runs a dump up to the commit and returns it there, the tree frozen.
async fn dump_to_commit(criu: &Criu, images: &mut Images, options: &DumpOptions) -> Session {
    let worker = criu.worker(WorkerOptions::default()).await.unwrap();
    let mut session = worker.dump(options).await.unwrap();
    let pages = session.page_socket().unwrap();
    let mut sink = ToImages {
        images: &mut images.destination,
        refuse_after_pages: u64::MAX,
        refuse_close: false,
    };
    let serve = serve_pages(pages, criu.version, &mut sink, LIMIT);
    let drive = async {
        let mut seen = Vec::new();
        loop {
            let notice = session.next(LIMIT).await.unwrap();
            seen.push(notice.clone());
            if notice == Notice::PostDump {
                return seen;
            }
            session.answer(true).await.unwrap();
        }
    };
    let (stats, seen) = tokio::join!(serve, drive);
    assert!(stats.unwrap().pages > 0);
    assert_eq!(seen.first(), Some(&Notice::PreDump));
    assert!(seen.contains(&Notice::QueryExtFiles), "{seen:?}");
    session
}

/// Commits a dump and reaps what it killed.
async fn commit(session: Session, tree: &Killed) {
    commit_dump(session).await;
    tree.reap();
}

async fn commit_dump(mut session: Session) {
    session.answer(true).await.unwrap();
    let end = session.next(LIMIT).await.unwrap();
    assert_eq!(end, Notice::Finished(Outcome::Dumped));
}

async fn restore_to_commit(
    criu: &Criu,
    worker: WorkerOptions,
    options: impl FnOnce(&migrate_criu::Worker) -> RestoreOptions,
) -> Session {
    let worker = criu.worker(worker).await.unwrap();
    let options = options(&worker);
    restored(worker.restore(&options).await.unwrap()).await
}

async fn restored(mut session: Session) -> Session {
    loop {
        let notice = match session.next(LIMIT).await {
            Ok(notice) => notice,
            Err(error) => panic!("{error}: {:#?}", error.log()),
        };
        if matches!(notice, Notice::PostRestore { .. }) {
            return session;
        }
        session.answer(true).await.unwrap();
    }
}

async fn run_restored(mut session: Session) -> Killed {
    loop {
        session.answer(true).await.unwrap();
        if let Notice::Finished(outcome) = session.next(LIMIT).await.unwrap() {
            let Outcome::Restored { pid } = outcome else {
                panic!("{outcome:?}");
            };
            let parent = || {
                fs::read_to_string(format!("/proc/{pid}/status"))
                    .unwrap()
                    .contains(&format!("PPid:\t{}\n", std::process::id()))
            };
            eventually("the tree is ours", parent);
            return Killed(pid);
        }
    }
}

#[tokio::test]
async fn memory_moves_and_a_refused_dump_runs_on() {
    let Some(criu) = criu().await else { return };
    let scratch = scratch();
    let file = scratch.path().join("counter");
    let tree = start(&["count", file.to_str().unwrap(), "24"]);
    advances(&file);

    // Refused at the commit.
    let mut images = Images::new(scratch.path(), "first");
    let options = images.dump_options(tree.0);
    let mut session = dump_to_commit(&criu, &mut images, &options).await;
    stands_still(&file);
    session.answer(false).await.unwrap();
    let end = session.next(LIMIT).await.unwrap();
    assert_eq!(end, Notice::Finished(Outcome::Refused));
    advances(&file);

    // Committed.
    let mut images = Images::new(scratch.path(), "second");
    let options = images.dump_options(tree.0);
    let session = dump_to_commit(&criu, &mut images, &options).await;
    images.complete();
    let at_freeze = counter(&file);
    commit(session, &tree).await;
    assert!(!tree.alive());
    assert!(images.destination.stats().pages > 24 * 256);

    // Refused after the restore: the copy is gone, without having run.
    let restore = |_: &_| RestoreOptions::new(images.destination.path());
    let mut session = restore_to_commit(&criu, WorkerOptions::default(), restore).await;
    session.answer(false).await.unwrap();
    let end = session.next(LIMIT).await.unwrap();
    assert_eq!(end, Notice::Finished(Outcome::Refused));
    drop(session);
    eventually("the copy is gone", || {
        // SAFETY: no memory involved; reaps an orphan if it became ours.
        unsafe { libc::waitpid(tree.0, std::ptr::null_mut(), libc::WNOHANG) };
        !Path::new(&format!("/proc/{}", tree.0)).exists()
    });
    assert_eq!(counter(&file), at_freeze);

    // The same images again: it runs on with its memory.
    let session = restore_to_commit(&criu, WorkerOptions::default(), restore).await;
    assert_eq!(stands_still(&file), at_freeze);
    let copy = run_restored(session).await;
    assert_eq!(copy.0, tree.0);
    // More than every page once: each is checked against what it was.
    eventually("every page was visited", || {
        counter(&file) > at_freeze + 24 * 256 + 64
    });
    assert!(copy.alive());
}

#[tokio::test]
async fn a_connection_moves() {
    // In a network of its own, where the thread stays: nobody else's sockets
    // are dumped, and no packet leaves.
    if criu().await.is_none() {
        return;
    }
    std::thread::spawn(|| {
        private_network();
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(move_a_connection());
    })
    .join()
    .unwrap();
}

fn private_network() {
    #[repr(C)]
    struct Request {
        name: [u8; 16],
        flags: libc::c_short,
        padding: [u8; 22],
    }
    // SAFETY: only this thread changes its network namespace.
    assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0);
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    let mut request = Request {
        name: [0; 16],
        flags: libc::c_short::try_from(libc::IFF_UP | libc::IFF_RUNNING).unwrap(),
        padding: [0; 22],
    };
    request.name[..2].copy_from_slice(b"lo");
    // SAFETY: `request` has the layout of `struct ifreq` with `ifr_flags`.
    let set = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    assert_eq!(set, 0, "{}", io::Error::last_os_error());
}

async fn move_a_connection() {
    let criu = criu().await.unwrap();
    let scratch = scratch();
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let tree = start(&["echo", &port.to_string()]);
    let mut client = None;
    eventually("the server listens", || {
        client = TcpStream::connect(("127.0.0.1", port)).ok();
        client.is_some()
    });
    let mut client = client.unwrap();
    client.set_read_timeout(Some(LIMIT)).unwrap();
    let mut echo = |text: &str| {
        client.write_all(text.as_bytes()).unwrap();
        let mut answer = vec![0; text.len()];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(answer, text.as_bytes());
    };
    echo("before");

    let mut images = Images::new(scratch.path(), "refused");
    let options = images.dump_options(tree.0);
    let mut session = dump_to_commit(&criu, &mut images, &options).await;
    session.answer(false).await.unwrap();
    let end = session.next(LIMIT).await.unwrap();
    assert_eq!(end, Notice::Finished(Outcome::Refused));
    echo("after a refused dump");

    // Dropped at the commit: the end of the socket is as good as `false`.
    let mut images = Images::new(scratch.path(), "dropped");
    let options = images.dump_options(tree.0);
    drop(dump_to_commit(&criu, &mut images, &options).await);
    echo("after a dropped session");

    let mut images = Images::new(scratch.path(), "moved");
    let options = images.dump_options(tree.0);
    let session = dump_to_commit(&criu, &mut images, &options).await;
    images.complete();
    commit(session, &tree).await;
    let session = restore_to_commit(&criu, WorkerOptions::default(), |_| {
        RestoreOptions::new(images.destination.path())
    })
    .await;
    let copy = run_restored(session).await;
    echo("after the move");
    echo("and again");
    drop(copy);
}

#[tokio::test]
async fn a_tunnel_device_is_a_plain_open_file_only_where_that_is_said() {
    let Some(criu) = criu().await else { return };
    let tunnel = match File::options().read(true).write(true).open("/dev/net/tun") {
        Ok(file) => file,
        Err(error) => {
            println!("SKIP tunnel: {error}");
            return;
        }
    };
    let scratch = scratch();
    let file = scratch.path().join("counter");
    let mut command = workload(&["count", file.to_str().unwrap(), "1"]);
    let fd = tunnel.as_raw_fd();
    // SAFETY: one system call between fork and exec.
    unsafe {
        command.pre_exec(move || match libc::dup2(fd, 50) {
            50 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        });
    }
    let tree = Killed::of(command);
    advances(&file);
    for tunnel in [false, true] {
        let mut images = Images::new(scratch.path(), &format!("tunnel-{tunnel}"));
        let options = WorkerOptions {
            shim: true,
            tunnel,
            ..WorkerOptions::default()
        };
        let worker = criu.worker(options).await.unwrap();
        let mut session = worker.dump(&images.dump_options(tree.0)).await.unwrap();
        let pages = session.page_socket().unwrap();
        let mut sink = ToImages {
            images: &mut images.destination,
            refuse_after_pages: u64::MAX,
            refuse_close: false,
        };
        let serve = serve_pages(pages, criu.version, &mut sink, LIMIT);
        let drive = async {
            loop {
                match session.next(LIMIT).await? {
                    Notice::PostDump => return session.answer(false).await,
                    _ => session.answer(true).await?,
                }
            }
        };
        let (served, driven) = tokio::join!(serve, drive);
        if tunnel {
            driven.unwrap();
            assert!(served.unwrap().pages > 0);
            let end = session.next(LIMIT).await.unwrap();
            assert_eq!(end, Notice::Finished(Outcome::Refused));
        } else {
            let error = driven.unwrap_err();
            let log = format!("{:?}", error.log());
            assert!(log.contains("tun link"), "{error}: {log}");
        }
        advances(&file);
    }
}

#[tokio::test]
async fn whatever_breaks_before_the_commit_the_tree_runs_on() {
    let Some(criu) = criu().await else { return };
    let scratch = scratch();
    let file = scratch.path().join("counter");
    let tree = start(&["count", file.to_str().unwrap(), "8"]);
    advances(&file);

    // A worker that was never given an order dies with its owner.
    let worker = criu.worker(WorkerOptions::default()).await.unwrap();
    let pid = worker.pid();
    drop(worker);
    eventually("the idle worker is gone", || !runs(pid));

    // Dropped at the first question, and just after it was answered.
    for answered in [false, true] {
        let images = Images::new(scratch.path(), "early");
        let worker = criu.worker(WorkerOptions::default()).await.unwrap();
        let mut session = worker.dump(&images.dump_options(tree.0)).await.unwrap();
        assert_eq!(session.next(LIMIT).await.unwrap(), Notice::PreDump);
        let unanswered = session.next(LIMIT).await;
        assert!(matches!(unanswered, Err(CriuError::OutOfTurn { .. })));
        if answered {
            session.answer(true).await.unwrap();
        }
        let pid = session.pid();
        assert!(session.alive());
        drop(session);
        eventually("criu is gone", || !runs(pid));
        advances(&file);
    }

    // Refused when the tree is frozen and nobody has asked for its pages.
    let images = Images::new(scratch.path(), "frozen");
    let worker = criu.worker(WorkerOptions::default()).await.unwrap();
    let mut session = worker.dump(&images.dump_options(tree.0)).await.unwrap();
    loop {
        match session.next(LIMIT).await.unwrap() {
            Notice::QueryExtFiles => break,
            _ => session.answer(true).await.unwrap(),
        }
    }
    session.answer(false).await.unwrap();
    let ended = session.next(LIMIT).await.unwrap();
    assert_eq!(ended, Notice::Finished(Outcome::Refused));
    advances(&file);

    // The destination refuses pages in the middle, or the whole at the end.
    for (name, refuse_after_pages, refuse_close) in
        [("middle", 500, false), ("end", u64::MAX, true)]
    {
        let mut images = Images::new(scratch.path(), name);
        let worker = criu.worker(WorkerOptions::default()).await.unwrap();
        let mut session = worker.dump(&images.dump_options(tree.0)).await.unwrap();
        let pages = session.page_socket().unwrap();
        let mut sink = ToImages {
            images: &mut images.destination,
            refuse_after_pages,
            refuse_close,
        };
        let serve = serve_pages(pages, criu.version, &mut sink, LIMIT);
        let drive = async {
            loop {
                match session.next(LIMIT).await {
                    Ok(notice) => {
                        assert_ne!(notice, Notice::PostDump, "{name}");
                        session.answer(true).await.unwrap();
                    }
                    Err(error) => return error,
                }
            }
        };
        let (served, error) = tokio::join!(serve, drive);
        assert!(matches!(served, Err(CriuError::Sink { .. })), "{name}");
        assert!(
            matches!(error, CriuError::Failed { .. }),
            "{name}: {error:?}"
        );
        println!("{name}: {error}");
        advances(&file);
    }
    assert!(tree.alive());
}

#[tokio::test]
async fn a_killed_criu_leaves_a_fenced_tree_stopped_and_no_half_copy() {
    let Some(criu) = criu().await else { return };
    let scratch = scratch();
    let file = scratch.path().join("counter");
    let tree = start(&["count", file.to_str().unwrap(), "1"]);
    advances(&file);

    let mut images = Images::new(scratch.path(), "fenced");
    let options = images.dump_options(tree.0);
    let mut session = dump_to_commit(&criu, &mut images, &options).await;
    assert!(session.alive());
    // SAFETY: signals to children that have not been reaped: the tree is
    // fenced, then CRIU dies by another hand.
    unsafe {
        libc::kill(tree.0, libc::SIGSTOP);
        libc::kill(session.pid(), libc::SIGKILL);
    }
    eventually("the death of criu shows", || !session.alive());
    // The answer cannot be given any more, and the tree has not run.
    assert!(session.answer(true).await.is_err());
    drop(session);
    stands_still(&file);
    // SAFETY: as above.
    unsafe { libc::kill(tree.0, libc::SIGCONT) };
    advances(&file);

    let mut images = Images::new(scratch.path(), "fenced-again");
    let options = images.dump_options(tree.0);
    let session = dump_to_commit(&criu, &mut images, &options).await;
    // SAFETY: signals to a child that has not been reaped.
    unsafe { libc::kill(tree.0, libc::SIGSTOP) };
    session.kill().await.unwrap();
    stands_still(&file);
    // SAFETY: as above.
    unsafe { libc::kill(tree.0, libc::SIGCONT) };
    advances(&file);

    let mut images = Images::new(scratch.path(), "killed");
    let options = images.dump_options(tree.0);
    let session = dump_to_commit(&criu, &mut images, &options).await;
    images.complete();
    commit(session, &tree).await;
    let session = restore_to_commit(&criu, WorkerOptions::default(), |_| {
        RestoreOptions::new(images.destination.path())
    })
    .await;
    let before = stands_still(&file);
    session.kill().await.unwrap();
    eventually("the copy is gone", || !runs(tree.0));
    assert_eq!(counter(&file), before);
}

#[tokio::test]
async fn failures_are_explained() {
    let Some(criu) = criu().await else { return };
    let scratch = scratch();

    // A process that is not there.
    let images = Images::new(scratch.path(), "nobody");
    let gone = {
        let gone = start(&["lines"]);
        gone.reap();
        gone.0
    };
    let worker = criu.worker(WorkerOptions::default()).await.unwrap();
    let mut session = worker.dump(&images.dump_options(gone)).await.unwrap();
    drop(session.page_socket());
    let error = loop {
        match session.next(LIMIT).await {
            Ok(_) => session.answer(true).await.unwrap(),
            Err(error) => break error,
        }
    };
    println!("{error}\n{:#?}", error.log());
    assert!(matches!(error, CriuError::Failed { .. }));
    assert!(!error.log().unwrap().lines().is_empty());

    // A PID that is taken: by the tree itself, which is left as it was.
    let file = scratch.path().join("counter");
    let tree = start(&["count", file.to_str().unwrap(), "1"]);
    advances(&file);
    let mut images = Images::new(scratch.path(), "taken");
    let options = images.dump_options(tree.0);
    let mut session = dump_to_commit(&criu, &mut images, &options).await;
    images.complete();
    session.answer(false).await.unwrap();
    session.next(LIMIT).await.unwrap();
    let worker = criu.worker(WorkerOptions::default()).await.unwrap();
    let options = RestoreOptions::new(images.destination.path());
    let mut session = worker.restore(&options).await.unwrap();
    let error = loop {
        match session.next(LIMIT).await {
            Ok(_) => session.answer(true).await.unwrap(),
            Err(error) => break error,
        }
    };
    println!("{error}\n{:#?}", error.log());
    assert!(error.to_string().contains("File exists"), "{error}");
    assert!(error.help().unwrap().contains("PID"));
    advances(&file);

    // A CRIU that is killed while it is asked for nothing.
    let images = Images::new(scratch.path(), "killed");
    let worker = criu.worker(WorkerOptions::default()).await.unwrap();
    let mut session = worker.dump(&images.dump_options(tree.0)).await.unwrap();
    assert_eq!(session.next(LIMIT).await.unwrap(), Notice::PreDump);
    // Nothing is frozen yet. SAFETY: a child that has not been reaped.
    unsafe { libc::kill(session.pid(), libc::SIGSTOP) };
    session.answer(true).await.unwrap();
    // SAFETY: as above.
    unsafe { libc::kill(session.pid(), libc::SIGKILL) };
    let error = session.next(LIMIT).await.unwrap_err();
    assert!(matches!(error, CriuError::Died { .. }), "{error}");
    println!("{error}");
    advances(&file);

    // A program that is no CRIU.
    let other = Criu {
        path: PathBuf::from("/bin/false"),
        version: criu.version,
    };
    let error = other.worker(WorkerOptions::default()).await.unwrap_err();
    assert!(matches!(error, CriuError::NoGreeting { .. }), "{error}");
}

#[tokio::test]
async fn a_restored_tree_lives_in_the_workers_cgroup() {
    let Some(criu) = criu().await else { return };
    let Some(group) = Cgroup::new() else { return };
    let scratch = scratch();
    let file = scratch.path().join("counter");
    let tree = start(&["count", file.to_str().unwrap(), "1"]);
    advances(&file);
    let mut images = Images::new(scratch.path(), "cgroup");
    let options = images.dump_options(tree.0);
    let session = dump_to_commit(&criu, &mut images, &options).await;
    images.complete();
    commit(session, &tree).await;
    let worker = WorkerOptions {
        cgroup: Some(group.0.clone()),
        ..WorkerOptions::default()
    };
    let session = restore_to_commit(&criu, worker, |_| {
        RestoreOptions::new(images.destination.path())
    })
    .await;
    let copy = run_restored(session).await;
    advances(&file);
    let procs = fs::read_to_string(group.0.join("cgroup.procs")).unwrap();
    assert!(
        procs.lines().any(|line| line == copy.0.to_string()),
        "{procs}"
    );
    drop(copy);
}

#[tokio::test]
async fn a_parked_restore_waits_for_its_images() {
    let Some(criu) = criu().await else { return };
    for is_killed in [false, true] {
        let scratch = scratch();
        let file = scratch.path().join("counter");
        let tree = start(&["count", file.to_str().unwrap(), "1"]);
        advances(&file);
        let mut images = Images::new(scratch.path(), "parked");
        // Ordered before there is a single image.
        let worker = criu.worker(WorkerOptions::default()).await.unwrap();
        let pid = worker.pid();
        let order = RestoreOptions::new(images.destination.path());
        let parked = worker.park(order.clone(), &mut images.destination).await;
        let parked = parked.unwrap();
        let waits = || {
            let text = fs::read_to_string(format!("/proc/{pid}/wchan")).unwrap_or_default();
            text.contains("fifo") || text.contains("wait_for_partner")
        };
        eventually("CRIU waits for the inventory", waits);
        let options = images.dump_options(tree.0);
        let session = dump_to_commit(&criu, &mut images, &options).await;
        images.complete();
        commit(session, &tree).await;
        let session = if is_killed {
            // SAFETY: a process that this test has started and not reaped.
            unsafe { libc::kill(pid, libc::SIGKILL) };
            eventually("CRIU ends", || !runs(pid));
            let error = parked.release(&images.destination).await.unwrap_err();
            assert!(matches!(error, CriuError::Silent { .. }), "{error}");
            images.destination.unpark().unwrap();
            let worker = criu.worker(WorkerOptions::default()).await.unwrap();
            worker.restore(&order).await.unwrap()
        } else {
            parked.release(&images.destination).await.unwrap()
        };
        let copy = run_restored(restored(session).await).await;
        advances(&file);
        drop(copy);
    }
}

#[tokio::test]
async fn a_parked_restore_that_is_given_up_ends() {
    let Some(criu) = criu().await else { return };
    let scratch = scratch();
    let mut images = Images::new(scratch.path(), "given-up");
    let worker = criu.worker(WorkerOptions::default()).await.unwrap();
    let pid = worker.pid();
    let order = RestoreOptions::new(images.destination.path());
    let parked = worker.park(order, &mut images.destination).await.unwrap();
    let gone = || !runs(pid);
    assert!(!gone());
    drop(parked);
    eventually("CRIU ends", gone);

    // Its owner has died, and somebody else clears up.
    let mut images = Images::new(scratch.path(), "left");
    let worker = criu.worker(WorkerOptions::default()).await.unwrap();
    let pid = worker.pid();
    let order = RestoreOptions::new(images.destination.path());
    let parked = worker.park(order, &mut images.destination).await.unwrap();
    // Not before it waits there: somebody who clears up looks again.
    let dismissed = || {
        migrate_criu::dismiss_parked(images.destination.path());
        !runs(pid)
    };
    eventually("CRIU ends", dismissed);
    drop(parked);
}

/// A cgroup that is removed in the end.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new() -> Option<Self> {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let root = mounts.lines().find_map(|line| {
            let mut words = line.split(' ');
            let (at, kind) = (words.nth(1)?, words.next()?);
            (kind == "cgroup2").then(|| PathBuf::from(at))
        });
        let Some(root) = root else {
            println!("SKIP cgroup2: not mounted");
            return None;
        };
        let path = root.join(format!("migrate-criu-{}", std::process::id()));
        if let Err(error) = fs::create_dir(&path) {
            println!("SKIP cgroup2: {error}");
            return None;
        }
        Some(Self(path))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let end = Instant::now() + LIMIT;
        while fs::remove_dir(&self.0).is_err() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// What the tree's standard input and output were before the move.
#[derive(Debug, Clone, Copy)]
enum Before {
    Pipes,
    Terminal,
    UnixStream,
}

/// What they become.
#[derive(Debug, Clone, Copy)]
enum After {
    /// The same kind again, as CRIU does it.
    Same,
    /// A socket to read from and a file to append to.
    SocketAndFile,
}

#[tokio::test]
async fn standard_streams_are_attached_again() {
    let Some(criu) = criu().await else { return };
    for before in [Before::Pipes, Before::Terminal, Before::UnixStream] {
        for after in [After::Same, After::SocketAndFile] {
            println!("{before:?} {after:?}");
            move_streams(&criu, before, after, false).await;
        }
    }
}

#[tokio::test]
async fn a_job_of_a_shell_leaves_its_terminal() {
    let Some(criu) = criu().await else { return };
    for after in [After::Same, After::SocketAndFile] {
        println!("{after:?}");
        move_streams(&criu, Before::Terminal, after, true).await;
    }
}

/// Starts `lines`, as the leader of a session or as the foreground job of a
/// shell that leads the session of the terminal. In the second case the shell
/// is the other process.
fn start_lines(input: OwnedFd, output: OwnedFd, shell: bool) -> (Killed, Option<Killed>) {
    let mut command = workload(&["lines"]);
    if shell {
        let mut leader = Command::new("/bin/sh");
        leader
            .args(["-c", r#""$0" lines; exit 0"#])
            .arg(command.get_program());
        // SAFETY: system calls only, between fork and exec.
        unsafe {
            leader.pre_exec(|| {
                libc::setsid();
                if libc::ioctl(0, libc::TIOCSCTTY, 0) != 0 {
                    return Err(io::Error::last_os_error());
                }
                Ok(())
            });
        }
        command = leader;
    }
    command.stdin(input).stdout(output).stderr(Stdio::null());
    let first = Killed::of(command);
    if !shell {
        return (first, None);
    }
    let mut job = None;
    eventually("the shell has a job", || {
        let path = format!("/proc/{0}/task/{0}/children", first.0);
        job = fs::read_to_string(path).unwrap().trim().parse().ok();
        job.is_some()
    });
    (Killed(job.unwrap()), Some(first))
}

/// Our ends of the standard streams: to write to and to read from.
struct Ends {
    write: File,
    read: BufReader<File>,
}

impl Ends {
    fn ask(&mut self, line: &str) -> String {
        writeln!(self.write, "{line}").unwrap();
        let mut answer = String::new();
        self.read.read_line(&mut answer).unwrap();
        answer.trim().to_owned()
    }
}

/// Our ends, and the tree's input and output.
fn streams(kind: Before) -> (Ends, OwnedFd, OwnedFd) {
    match kind {
        Before::Pipes => {
            let (input, write) = io::pipe().unwrap();
            let (read, output) = io::pipe().unwrap();
            (ends(write.into(), read.into()), input.into(), output.into())
        }
        Before::UnixStream => {
            let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
            ours.set_read_timeout(Some(LIMIT)).unwrap();
            let ours = OwnedFd::from(ours);
            let theirs = OwnedFd::from(theirs);
            (
                ends(ours.try_clone().unwrap(), ours),
                theirs.try_clone().unwrap(),
                theirs,
            )
        }
        Before::Terminal => {
            let (mut ours, mut theirs) = (0, 0);
            // SAFETY: valid places for both descriptors, defaults for the rest.
            let opened = unsafe {
                libc::openpty(
                    &raw mut ours,
                    &raw mut theirs,
                    std::ptr::null_mut(),
                    std::ptr::null_mut(),
                    std::ptr::null_mut(),
                )
            };
            assert_eq!(opened, 0);
            // SAFETY: two new descriptors that nobody else owns.
            let (ours, theirs) =
                unsafe { (OwnedFd::from_raw_fd(ours), OwnedFd::from_raw_fd(theirs)) };
            for fd in [&ours, &theirs] {
                // SAFETY: plain system call on an open descriptor.
                unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) };
            }
            // SAFETY: `settings` is a valid place; without echo only answers are read.
            unsafe {
                let mut settings = std::mem::zeroed::<libc::termios>();
                assert_eq!(libc::tcgetattr(theirs.as_raw_fd(), &raw mut settings), 0);
                settings.c_lflag &= !(libc::ECHO | libc::ECHONL);
                assert_eq!(
                    libc::tcsetattr(theirs.as_raw_fd(), libc::TCSANOW, &raw const settings),
                    0
                );
            }
            (
                ends(ours.try_clone().unwrap(), ours),
                theirs.try_clone().unwrap(),
                theirs,
            )
        }
    }
}

fn ends(write: OwnedFd, read: OwnedFd) -> Ends {
    Ends {
        write: write.into(),
        read: BufReader::new(read.into()),
    }
}

/// CRIU's name of what is open here.
fn resource(kind: Before, fd: &OwnedFd) -> String {
    let metadata = File::from(fd.try_clone().unwrap()).metadata().unwrap();
    match kind {
        Before::Pipes => format!("pipe:[{}]", metadata.ino()),
        Before::UnixStream => format!("unix[{}]", metadata.ino()),
        Before::Terminal => format!("tty[{:x}:{:x}]", metadata.rdev(), metadata.dev()),
    }
}

async fn move_streams(criu: &Criu, before: Before, after: After, shell: bool) {
    let scratch = scratch();
    let (mut old, input, output) = streams(before);
    let resources = [resource(before, &input), resource(before, &output)];
    let (tree, leader) = start_lines(input, output, shell);
    assert_eq!(old.ask("one"), "1:one");

    let mut images = Images::new(scratch.path(), "stdio");
    let mut options = images.dump_options(tree.0);
    options.shell_job = shell;
    if !matches!(before, Before::Pipes) {
        options.external = resources.to_vec();
    }
    // A dump that is refused leaves them as they were.
    let mut session = dump_to_commit(criu, &mut images, &options).await;
    session.answer(false).await.unwrap();
    session.next(LIMIT).await.unwrap();
    assert_eq!(old.ask("two"), "2:two");

    let mut images = Images::new(scratch.path(), "again");
    options.images = images.source.path().to_owned();
    let session = dump_to_commit(criu, &mut images, &options).await;
    images.complete();
    match &leader {
        // The shell reaps its job, and ends.
        Some(leader) => {
            commit_dump(session).await;
            leader.reap();
        }
        None => commit(session, &tree).await,
    }
    drop(old);

    let appended = scratch.path().join("output");
    fs::write(&appended, "before\n").unwrap();
    let (mut ends, input, output) = match after {
        After::Same => streams(before),
        After::SocketAndFile => {
            let (ends, input, _) = streams(Before::UnixStream);
            let file = fs::OpenOptions::new()
                .append(true)
                .read(true)
                .open(&appended);
            (ends, input, file.unwrap().into())
        }
    };
    let keys = match (after, before) {
        (After::Same, Before::UnixStream) => {
            resources.map(|name| name.replace("unix[", "socket:["))
        }
        (After::Same, _) if !shell => resources.clone(),
        (After::SocketAndFile, Before::Pipes) => resources
            .clone()
            .map(|name| images.destination.redirect(&name).unwrap().unwrap()),
        // Input and output are one resource, so one descriptor serves both.
        _ => {
            let key = images.destination.redirect(&resources[0]).unwrap().unwrap();
            [key.clone(), key]
        }
    };
    let one = keys[0] == keys[1];
    let worker = WorkerOptions {
        inherit: if one {
            vec![input]
        } else {
            vec![input, output]
        },
        ..WorkerOptions::default()
    };
    let session = restore_to_commit(criu, worker, |worker| {
        let mut options = RestoreOptions::new(images.destination.path());
        options.shell_job = shell;
        options.inherit_fd = keys
            .into_iter()
            .take(if one { 1 } else { 2 })
            .enumerate()
            .map(|(index, key)| (key, worker.inherited(index)))
            .collect();
        options
    })
    .await;
    let copy = run_restored(session).await;
    if one || matches!(after, After::Same) {
        assert_eq!(ends.ask("three"), "3:three");
        assert_eq!(ends.ask("four"), "4:four");
    } else {
        writeln!(ends.write, "three").unwrap();
        eventually("the answer is appended", || {
            fs::read_to_string(&appended).unwrap() == "before\n3:three\n"
        });
    }
    drop(copy);
}
