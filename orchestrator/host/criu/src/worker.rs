//! A CRIU that has started and waits for one order.

use std::collections::BTreeSet;
use std::ffi::CStr;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt::SndBufForce,
};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio::time::timeout;

use crate::breakpoints;
use crate::error::{Action, CriuError};
use crate::images::{INVENTORY, private, uptime_inventory};
use crate::locate::Criu;
use crate::lock::NetworkLock;
use crate::mappings;
use crate::pages::PageSocket;
use crate::rpc::{
    CGROUPS_IGNORE, Features, InheritFd, NETWORK_LOCK_SKIP, Options, PageServerInfo, Request,
    Socket, kind,
};
use crate::session::Session;
use crate::shim::{self, CleanPages, SegmentTable};

/// Limit for a new worker's first answer: loading it takes 5-10 ms.
const GREETING_LIMIT: Duration = Duration::from_secs(10);

/// Send buffer of the page socket, in bytes: what CRIU can write while we are
/// busy. Pages in it are references to the frozen tree's memory, not copies.
const PAGE_SOCKET_BYTES: usize = 4 << 20;

/// How much of the worker's standard error is read for a message, in bytes.
const STDERR_BYTES_MAX: u64 = 16 << 10;

/// The directory beside the images of a tracked dump that CRIU takes for the
/// images of the dump before it.
const PARENT: &str = "before";

/// CRIU's own default for the time it may need to stop a tree, in seconds.
const FREEZE_LIMIT_S: u32 = 10;

/// How a worker is started.
#[derive(Debug, Default)]
pub struct WorkerOptions {
    /// Directory of a cgroup that the worker enters before it becomes CRIU, so
    /// that what it restores lives there. CRIU itself is in it as well until
    /// the restore is done.
    pub cgroup: Option<PathBuf>,
    /// Descriptors that CRIU shall have, for [`RestoreOptions::inherit_fd`].
    /// They are closed here once the worker runs.
    pub inherit: Vec<OwnedFd>,
    /// Start a session of its own: a tree that is restored as a shell job
    /// joins the session of the worker. Otherwise the worker only gets a
    /// process group, so that a Ctrl-C on the terminal does not reach it.
    pub new_session: bool,
    /// Start CRIU with the library that answers its question for soft-dirty
    /// pages, for a dump with [`Marks::Tracker`]. Ask
    /// [`Criu::self_check_shim`] first whether it works here.
    pub shim: bool,
    /// With that library, have CRIU take an end of a tunnel device for a plain
    /// open file. Without this it refuses to dump one.
    pub tunnel: bool,
    /// Start CRIU without transparent huge pages, for a restore with
    /// [`RestoreOptions::lazy`]: where one page of a mapping comes at once, the
    /// kernel may provide 512, and those that were to come later would be there
    /// as zeros. The tasks of the tree get their own setting back
    /// (`PR_SET_THP_DISABLE` in `criu/pie/restorer.c`).
    pub small_pages: bool,
}

/// A started CRIU that has loaded its libraries and answered.
///
/// It is killed when dropped; nothing has been touched by then.
#[derive(Debug)]
pub struct Worker {
    process: Process,
    socket: Socket,
    page_socket: UnixStream,
    /// The number of CRIU's end of the page socket, inside the worker.
    page_fd: RawFd,
    inherited: Vec<RawFd>,
    /// It has loaded the shim, which reads these.
    shim: Option<(SegmentTable, CleanPages)>,
}

/// The CRIU process and what it writes to its standard error.
#[derive(Debug)]
pub(crate) struct Process {
    child: Option<Child>,
    pid: i32,
    stderr: File,
    /// Kill it when dropped.
    pub(crate) expendable: bool,
    /// It sets breakpoints without a wait.
    breakpoints: Option<breakpoints::Event>,
}

impl Process {
    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    /// Whether it has not ended.
    pub(crate) fn alive(&mut self) -> bool {
        self.child
            .as_mut()
            .is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    /// Ends it and waits for the end.
    pub(crate) async fn kill(&mut self) -> io::Result<()> {
        match self.child.as_mut() {
            Some(child) => child.kill().await,
            None => Ok(()),
        }
    }

    /// Waits for its end, at most `limit`.
    pub(crate) async fn wait(&mut self, limit: Duration) -> Option<std::process::ExitStatus> {
        let child = self.child.as_mut()?;
        timeout(limit, child.wait()).await.ok()?.ok()
    }

    /// What it wrote to its standard error; CRIU does so until it has a log.
    pub(crate) fn stderr(&mut self) -> Vec<String> {
        let mut text = Vec::new();
        let read = self
            .stderr
            .rewind()
            .and_then(|()| (&self.stderr).take(STDERR_BYTES_MAX).read_to_end(&mut text));
        if let Err(error) = read {
            tracing::debug!(%error, "criu's standard error cannot be read");
        }
        String::from_utf8_lossy(&text)
            .lines()
            .filter(|line| !line.trim().is_empty())
            .map(str::to_owned)
            .collect()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let Some(mut child) = self.child.take() else {
            return;
        };
        if self.expendable
            && let Err(error) = child.start_kill()
        {
            tracing::debug!(%error, pid = self.pid, "criu could not be killed");
        }
        // Reaped in the background; it may still have a tree to put back.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { child.wait().await });
        }
    }
}

/// What to dump and how.
#[derive(Debug, Clone)]
pub struct DumpOptions {
    /// Root of the tree.
    pub pid: i32,
    /// Directory for everything but memory; it must exist and be a tmpfs.
    pub images: PathBuf,
    /// The tree's session leader or terminal is outside the tree.
    pub shell_job: bool,
    /// Resources that lead out of the tree, in CRIU's notation; see
    /// [`stdio`](crate::stdio).
    pub external: Vec<String>,
    /// Datagram sockets may be connected to a named socket outside the tree
    /// (`/dev/log`); they are connected to the same name on restore.
    pub external_unix: bool,
    /// CRIU's verbosity, 0 to 4. Every line costs time while the tree is frozen.
    pub log_level: u32,
    /// Largest open file without a name that is carried along, in bytes.
    pub deleted_file_bytes_max: u32,
    /// How long CRIU may try to stop the tree, in seconds.
    pub freeze_limit_s: u32,
    /// Who keeps packets from the tree.
    pub lock: NetworkLock,
    /// Leave out what has been copied before and not been written since.
    pub track: Option<Track>,
}

/// A dump of a tree whose memory has been copied while it ran.
///
/// CRIU then sends a page without data
/// ([`PARENT`](crate::PARENT)) when it is of a task named here and clean.
///
/// By [`Marks::Tracker`] that is a page whose mapping is registered with a
/// userfaultfd for asynchronous write protection and that has not been written
/// since it was protected. So every page must be protected before it is copied,
/// and the userfaultfd must stay open until CRIU has answered. The task's
/// `[vdso]` comes without data too, protected or not: it must be among what was
/// copied.
///
/// By [`Marks::Kernel`] it is a page that has not been written since the
/// pre-dump of [`Worker::pre_dump`]. Nobody else may clear the tree's
/// soft-dirty marks meanwhile.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Track {
    /// Whose marks tell clean pages.
    pub marks: Marks,
    /// PIDs of the tasks that were copied, as the tree itself sees them
    /// ([`PageOwner::Task`](migrate_core::wire::PageOwner::Task)). All others
    /// come whole.
    pub precopied: BTreeSet<u32>,
}

/// Who knows what has been written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Marks {
    /// A tracker of ours, asked by a worker with [`WorkerOptions::shim`].
    #[default]
    Tracker,
    /// The kernel, by its soft-dirty marks, asked by a worker without it.
    Kernel {
        /// The image directory of the pre-dump that cleared them last.
        since: PathBuf,
    },
}

/// What to copy of a running tree, and how.
#[derive(Debug, Clone)]
pub struct PreDumpOptions {
    /// Root of the tree.
    pub pid: i32,
    /// An empty directory on a tmpfs; no memory goes there.
    pub images: PathBuf,
    /// CRIU's verbosity, 0 to 4.
    pub log_level: u32,
    /// The pre-dump before this one, and the tasks that need not come whole,
    /// because their clean pages have been copied since then or before.
    pub track: Option<(PathBuf, BTreeSet<u32>)>,
}

impl PreDumpOptions {
    /// The usual options; everything is copied.
    #[must_use]
    pub fn new(pid: i32, images: impl Into<PathBuf>) -> Self {
        Self {
            pid,
            images: images.into(),
            log_level: 2,
            track: None,
        }
    }
}

impl DumpOptions {
    /// The usual options.
    #[must_use]
    pub fn new(pid: i32, images: impl Into<PathBuf>) -> Self {
        Self {
            pid,
            images: images.into(),
            shell_job: false,
            external: Vec::new(),
            external_unix: false,
            // Warnings and errors.
            log_level: 2,
            // CRIU's own default is 1 MiB; 64 MiB still fit a short blackout.
            deleted_file_bytes_max: 64 << 20,
            freeze_limit_s: FREEZE_LIMIT_S,
            lock: NetworkLock::Caller,
            track: None,
        }
    }
}

/// What to restore and how.
#[derive(Debug, Clone)]
pub struct RestoreOptions {
    /// Directory with a complete set of images.
    pub images: PathBuf,
    /// As in [`DumpOptions::shell_job`].
    pub shell_job: bool,
    /// CRIU's name of a resource, and the number of the descriptor that takes
    /// its place, from [`Worker::inherited`].
    pub inherit_fd: Vec<(String, RawFd)>,
    /// As in [`DumpOptions::external`].
    pub external: Vec<String>,
    /// As in [`DumpOptions::external_unix`].
    pub external_unix: bool,
    /// CRIU's verbosity, 0 to 4.
    pub log_level: u32,
    /// Somebody else puts the pages in place that [`ImageDir::lazy`] left out.
    /// He must listen on `lazy-pages.socket` in the image directory before the
    /// order is given, or before a parked restore is released.
    ///
    /// [`ImageDir::lazy`]: crate::ImageDir::lazy
    pub lazy: bool,
}

impl RestoreOptions {
    /// The usual options.
    #[must_use]
    pub fn new(images: impl Into<PathBuf>) -> Self {
        Self {
            images: images.into(),
            shell_job: false,
            inherit_fd: Vec::new(),
            external: Vec::new(),
            external_unix: false,
            log_level: 2,
            lazy: false,
        }
    }
}

impl Criu {
    /// Starts a worker and waits until it answers.
    ///
    /// # Errors
    ///
    /// It cannot be started, does not answer as CRIU does, or has not loaded
    /// the shim.
    pub async fn worker(&self, options: WorkerOptions) -> Result<Worker, CriuError> {
        // Of others it is not known what they read of `smaps` (`parse_smaps` of
        // `criu/proc_parse.c`).
        let mappings = if options.shim && !self.version.is_untested() {
            mappings::program().await
        } else {
            None
        };
        let mut worker = start(self, options, mappings).map_err(|source| CriuError::Start {
            path: self.path.clone(),
            source,
        })?;
        let request = Request {
            kind: kind::VERSION,
            keep_open: Some(true),
            ..Request::default()
        };
        let greeting = timeout(GREETING_LIMIT, async {
            worker.socket.send(&request).await?;
            worker.socket.receive().await
        });
        let (breakpoints, greeted) = tokio::join!(breakpoints::event(), greeting);
        worker.process.breakpoints = breakpoints;
        let introduced = match greeted {
            Ok(Ok(Some(response))) => response.success && response.version.is_some(),
            Ok(Ok(None) | Err(_)) | Err(_) => false,
        };
        if !introduced {
            let stderr = worker.process.stderr();
            return Err(CriuError::NoGreeting { stderr });
        }
        // Without it a kernel that knows soft-dirty pages gives its own answer,
        // which has nothing to do with the tracker's.
        if worker.shim.is_some() && !shim::loaded(worker.pid()) {
            let stderr = worker.process.stderr();
            return Err(CriuError::ShimNotLoaded { stderr });
        }
        Ok(worker)
    }
}

fn start(criu: &Criu, options: WorkerOptions, mappings: Option<RawFd>) -> io::Result<Worker> {
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?;
    // Only our end: the other end's flags are CRIU's, which expects to block.
    fcntl(&ours, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    let theirs = above_standard(theirs)?;

    let (pages_ours, pages_theirs) = StdUnixStream::pair()?;
    pages_ours.set_nonblocking(true)?;
    let pages_theirs = above_standard(pages_theirs.into())?;
    if let Err(error) = setsockopt(&pages_theirs, SndBufForce, &PAGE_SOCKET_BYTES) {
        tracing::debug!(%error, "the page socket keeps its small buffer");
    }

    let inherit = options
        .inherit
        .into_iter()
        .map(above_standard)
        .collect::<io::Result<Vec<_>>>()?;
    let inherited: Vec<RawFd> = inherit.iter().map(|fd| fd.as_raw_fd()).collect();
    let page_fd = pages_theirs.as_raw_fd();

    let cgroup = options
        .cgroup
        .map(|directory| {
            OpenOptions::new()
                .write(true)
                .open(directory.join("cgroup.procs"))
        })
        .transpose()?;
    let stderr = memory_file(c"criu-stderr")?;

    let mut command = Command::new(&criu.path);
    command
        .arg("--no-default-config")
        .arg("swrk")
        .arg(theirs.as_raw_fd().to_string())
        .env_remove("CRIU_CONFIG_FILE")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(stderr.try_clone()?);

    let mut keep = inherited.clone();
    keep.extend([theirs.as_raw_fd(), page_fd]);
    let mut segments = None;
    if options.shim {
        let table = SegmentTable::preload(&mut command)?;
        let shim = shim::preload(&mut command, criu.version)?;
        let clean = CleanPages::preload(&mut command)?;
        keep.extend([shim, table.fd(), clean.fd()]);
        if options.tunnel {
            shim::show_tunnels(&mut command);
        }
        if let Some(program) = mappings {
            shim::read_mappings(&mut command, program);
            keep.push(program);
        }
        segments = Some((table, clean));
    }
    let cgroup_fd = cgroup.as_ref().map(|file| file.as_raw_fd());
    let (new_session, small_pages) = (options.new_session, options.small_pages);
    // SAFETY: between fork and exec the closure only makes system calls on
    // memory prepared before the fork; it neither allocates nor takes a lock.
    unsafe {
        command.pre_exec(move || become_worker(&keep, cgroup_fd, new_session, small_pages));
    }
    let child = command.spawn()?;
    let pid = child
        .id()
        .and_then(|pid| i32::try_from(pid).ok())
        .ok_or_else(|| io::Error::other("the worker has no process id"))?;
    // The ends that belong to CRIU must not stay open here: only their closing
    // tells that CRIU is gone.
    drop((theirs, pages_theirs, inherit, cgroup));
    Ok(Worker {
        process: Process {
            child: Some(child),
            pid,
            stderr,
            expendable: true,
            breakpoints: None,
        },
        socket: Socket::new(ours)?,
        page_socket: UnixStream::from_std(pages_ours)?,
        page_fd,
        inherited,
        shim: segments,
    })
}

/// Runs in the child before `exec`: no allocation, no locks.
fn become_worker(
    keep: &[RawFd],
    cgroup: Option<RawFd>,
    new_session: bool,
    small_pages: bool,
) -> io::Result<()> {
    // SAFETY: no argument is a pointer.
    if small_pages && unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    for &fd in keep {
        // SAFETY: plain system call on a descriptor that the parent holds open.
        if unsafe { libc::fcntl(fd, libc::F_SETFD, 0) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    if let Some(fd) = cgroup {
        // "0" stands for the writer itself.
        // SAFETY: the buffer is a static of the given length.
        if unsafe { libc::write(fd, c"0".as_ptr().cast(), 1) } != 1 {
            return Err(io::Error::last_os_error());
        }
    }
    // SAFETY: no arguments but process ids; a child that has just been forked
    // leads no group, so that neither call can fail.
    unsafe {
        if new_session {
            libc::setsid();
        } else {
            libc::setpgid(0, 0);
        }
    }
    // CRIU opens every file of the tree and a pipe per MiB. Its own raise needs
    // CAP_SYS_RESOURCE; up to the hard limit none is needed.
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` is a valid place for the one structure read and written.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
        }
    }
    Ok(())
}

/// Moves a descriptor out of 0, 1 and 2, which the child gets anew.
pub(crate) fn above_standard(fd: OwnedFd) -> io::Result<OwnedFd> {
    if fd.as_raw_fd() > 2 {
        return Ok(fd);
    }
    let number = fcntl(&fd, FcntlArg::F_DUPFD_CLOEXEC(3))?;
    // SAFETY: F_DUPFD_CLOEXEC returned a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Leaves a descriptor open in the command's process.
pub(crate) fn keep_open(command: &mut Command, fd: RawFd) {
    // SAFETY: one system call between fork and exec, on a descriptor that is
    // open here until then.
    unsafe {
        command.pre_exec(move || {
            if libc::fcntl(fd, libc::F_SETFD, 0) < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
}

/// A file in memory, without a name.
pub(crate) fn memory_file(name: &CStr) -> io::Result<File> {
    // SAFETY: the name is a C string; the result is checked below.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { File::from_raw_fd(fd) })
}

impl Worker {
    /// CRIU's process id.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.process.pid()
    }

    /// The number that the `index`th of [`WorkerOptions::inherit`] has inside
    /// the worker.
    ///
    /// # Panics
    ///
    /// There were not that many.
    #[must_use]
    pub fn inherited(&self, index: usize) -> RawFd {
        self.inherited[index]
    }

    /// Orders the dump. CRIU starts at once, and asks before the freeze
    /// ([`Notice::PreDump`](crate::Notice::PreDump)).
    ///
    /// # Errors
    ///
    /// The order could not be sent; or the dump is tracked and this worker has
    /// not loaded the shim.
    pub async fn dump(self, options: &DumpOptions) -> Result<Session, CriuError> {
        let opts = Options {
            pid: Some(options.pid),
            ext_unix_sk: Some(options.external_unix),
            shell_job: Some(options.shell_job),
            log_level: Some(level(options.log_level)),
            ps: Some(PageServerInfo {
                fd: Some(self.page_fd),
            }),
            ghost_limit: Some(options.deleted_file_bytes_max),
            external: options.external.clone(),
            timeout: Some(options.freeze_limit_s),
            tcp_skip_in_flight: Some(true),
            network_lock: Some(options.lock.method()),
            track_mem: options.track.is_some().then_some(true),
            parent_img: options.track.is_some().then(|| PARENT.to_owned()),
            ..common(&options.images, Action::Dump)?
        };
        let precopied = match &options.track {
            None => BTreeSet::new(),
            Some(track) => {
                match (&track.marks, &self.shim) {
                    (Marks::Tracker, Some((_, clean))) => {
                        write_parent(&options.images, &uptime_now()?)?;
                        let named = clean.name(&track.precopied);
                        named.map_err(|source| CriuError::Socket {
                            action: Action::Dump,
                            source,
                        })?;
                    }
                    (Marks::Kernel { since }, None) => {
                        write_parent(&options.images, &inventory_of(since)?)?;
                    }
                    (_, shim) => {
                        let shim = shim.is_some();
                        return Err(CriuError::Untracked { shim });
                    }
                }
                track.precopied.clone()
            }
        };
        self.order(Action::Dump, &options.images, opts, precopied)
            .await
    }

    /// Orders a pre-dump: CRIU stops the tree, takes hold of the pages that are
    /// to come, clears the kernel's soft-dirty marks and lets the tree go on;
    /// then the pages come. It asks for no answer: serve the pages, then wait for
    /// [`Outcome::PreDumped`](crate::Outcome::PreDumped).
    ///
    /// # Errors
    ///
    /// The order could not be sent, or the worker has loaded the shim.
    pub async fn pre_dump(self, options: &PreDumpOptions) -> Result<Session, CriuError> {
        if self.shim.is_some() {
            return Err(CriuError::Untracked { shim: true });
        }
        let opts = Options {
            pid: Some(options.pid),
            log_level: Some(level(options.log_level)),
            ps: Some(PageServerInfo {
                fd: Some(self.page_fd),
            }),
            notify_scripts: None,
            track_mem: Some(true),
            parent_img: options.track.is_some().then(|| PARENT.to_owned()),
            ..common(&options.images, Action::PreDump)?
        };
        let precopied = match &options.track {
            None => BTreeSet::new(),
            Some((since, precopied)) => {
                write_parent(&options.images, &inventory_of(since)?)?;
                precopied.clone()
            }
        };
        self.order(Action::PreDump, &options.images, opts, precopied)
            .await
    }

    /// Asks CRIU whether the kernel marks soft-dirty pages, which CRIU finds out
    /// by trying.
    ///
    /// # Errors
    ///
    /// It does not ([`CriuError::NoSoftDirty`]), or CRIU gave no answer.
    pub async fn check_soft_dirty(self) -> Result<(), CriuError> {
        let action = Action::PreDump;
        let request = Request {
            kind: kind::FEATURE_CHECK,
            features: Some(Features {
                mem_track: Some(true),
            }),
            ..Request::default()
        };
        let within = GREETING_LIMIT;
        let asked = timeout(within, async {
            self.socket.send(&request).await?;
            self.socket.receive().await
        });
        let response = asked
            .await
            .map_err(|_| CriuError::Silent { action, within })?
            .map_err(|source| CriuError::Socket { action, source })?;
        let found = response.and_then(|response| response.features);
        match found.and_then(|features| features.mem_track) {
            Some(true) => Ok(()),
            Some(false) => Err(CriuError::NoSoftDirty),
            None => Err(CriuError::Socket {
                action,
                source: io::Error::new(io::ErrorKind::InvalidData, "no features in the answer"),
            }),
        }
    }

    /// Orders the restore. CRIU starts at once and asks before the tree may
    /// run ([`Notice::PostRestore`](crate::Notice::PostRestore)).
    ///
    /// # Errors
    ///
    /// The order could not be sent.
    pub async fn restore(self, options: &RestoreOptions) -> Result<Session, CriuError> {
        let opts = Options {
            ext_unix_sk: Some(options.external_unix),
            shell_job: Some(options.shell_job),
            log_level: Some(level(options.log_level)),
            rst_sibling: Some(false),
            inherit_fd: options
                .inherit_fd
                .iter()
                .map(|(key, fd)| InheritFd {
                    key: key.clone(),
                    fd: *fd,
                })
                .collect(),
            external: options.external.clone(),
            lazy_pages: options.lazy.then_some(true),
            ..common(&options.images, Action::Restore)?
        };
        self.order(Action::Restore, &options.images, opts, BTreeSet::new())
            .await
    }

    async fn order(
        mut self,
        action: Action,
        images: &Path,
        opts: Options,
        precopied: BTreeSet<u32>,
    ) -> Result<Session, CriuError> {
        let request = Request {
            kind: match action {
                Action::Dump => kind::DUMP,
                Action::PreDump => kind::SINGLE_PRE_DUMP,
                Action::Restore => kind::RESTORE,
            },
            opts: Some(opts),
            ..Request::default()
        };
        self.socket
            .send(&request)
            .await
            .map_err(|source| CriuError::Socket { action, source })?;
        self.process.expendable = false;
        let (segments, clean) = self.shim.unzip();
        // CRIU leaves a restore's page socket alone, so nothing is lost there.
        let page_socket = (action != Action::Restore).then(|| PageSocket {
            stream: self.page_socket,
            precopied,
            clean,
        });
        Ok(Session::new(
            action,
            self.process,
            self.socket,
            page_socket,
            segments,
            images.join(log_name(action)),
        ))
    }
}

fn level(level: u32) -> i32 {
    // CRIU knows four.
    i32::try_from(level.min(4)).unwrap_or(2)
}

fn log_name(action: Action) -> &'static str {
    match action {
        Action::Dump => "dump.log",
        Action::PreDump => "pre-dump.log",
        Action::Restore => "restore.log",
    }
}

/// Gives CRIU what it wants to see of a dump before this one: an inventory that
/// says when that was. A task that is younger is none that could have been in it.
fn write_parent(images: &Path, inventory: &[u8]) -> Result<(), CriuError> {
    let directory = images.join(PARENT);
    DirBuilder::new()
        .mode(0o700)
        .create(&directory)
        .map_err(|source| CriuError::image("create", &directory, source))?;
    let path = directory.join(INVENTORY);
    private()
        .write(true)
        .create_new(true)
        .open(&path)
        .and_then(|mut file| file.write_all(inventory))
        .map_err(|source| CriuError::image("write", &path, source))
}

/// The inventory of a pre-dump.
fn inventory_of(images: &Path) -> Result<Vec<u8>, CriuError> {
    let path = images.join(INVENTORY);
    fs::read(&path).map_err(|source| CriuError::image("read", &path, source))
}

/// An inventory of this moment. Where tasks are told apart by their memory's
/// registration, only its format is of use.
fn uptime_now() -> Result<Vec<u8>, CriuError> {
    let uptime = Path::new("/proc/uptime");
    let text =
        fs::read_to_string(uptime).map_err(|source| CriuError::image("read", uptime, source))?;
    let uptime_us = parse_uptime_us(&text).ok_or_else(|| CriuError::ImageData {
        what: format!("uptime {text:?}"),
    })?;
    Ok(uptime_inventory(uptime_us))
}

/// Reads `350735.47 234388.90`: seconds, with two digits behind the point.
fn parse_uptime_us(text: &str) -> Option<u64> {
    let (seconds, hundredths) = text.split_ascii_whitespace().next()?.split_once('.')?;
    if hundredths.len() != 2 {
        return None;
    }
    let seconds: u64 = seconds.parse().ok()?;
    let hundredths: u64 = hundredths.parse().ok()?;
    seconds
        .checked_mul(1_000_000)?
        .checked_add(hundredths * 10_000)
}

/// What dump and restore have in common.
fn common(images: &Path, action: Action) -> Result<Options, CriuError> {
    let absolute = images
        .canonicalize()
        .map_err(|source| CriuError::image("find image directory", images, source))?;
    let images_dir = absolute.to_str().map(str::to_owned).ok_or_else(|| {
        CriuError::image(
            "name image directory",
            images,
            io::Error::new(io::ErrorKind::InvalidInput, "not UTF-8"),
        )
    })?;
    Ok(Options {
        images_dir_fd: -1,
        images_dir: Some(images_dir),
        log_file: Some(log_name(action).to_owned()),
        notify_scripts: Some(true),
        tcp_established: Some(true),
        // A restore takes the lock that its images name.
        network_lock: Some(NETWORK_LOCK_SKIP),
        // The destination chooses the cgroup.
        manage_cgroups_mode: Some(CGROUPS_IGNORE),
        file_locks: Some(true),
        // A name that exists only on the source helps nobody.
        link_remap: Some(false),
        ..Options::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uptimes_as_the_kernel_prints_them() {
        assert_eq!(
            parse_uptime_us("350735.47 234388.90\n"),
            Some(350_735_470_000)
        );
        assert_eq!(parse_uptime_us("0.05 0.00\n"), Some(50_000));
        for bad in [
            "",
            "\n",
            "1",
            "1.5 2.00",
            "x.00",
            "18446744073709.99",
            "-1.00",
        ] {
            assert_eq!(parse_uptime_us(bad), None, "{bad}");
        }
    }
}
