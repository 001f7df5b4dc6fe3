//! The library that is preloaded into CRIU for a dump that leaves out clean
//! pages, and the proof that it can be relied on here.
//!
//! The library itself is migrate-shim, and its first page says what it does.
//! It travels inside this program and is handed to CRIU as a sealed file
//! without a name, so that neither a missing file, nor another release's, nor
//! a tmpfs mounted `noexec` stands in its way.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirBuilder, File};
use std::io::{self, Write as _};
use std::ops::Range;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, MetadataExt as _};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bytes::Bytes;
use migrate_core::chain;
use migrate_core::facts::CriuVersion;
use migrate_core::wire::{PAGE_BYTES, PageOwner, PageRun};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio::sync::Mutex;
use tokio::time::timeout;

use crate::error::CriuError;
use crate::images::ImageDir;
use crate::locate::Criu;
use crate::pages::{PageSink, PageStats, serve_pages};
use crate::session::{Notice, Outcome};
use crate::worker::{DumpOptions, Track, WorkerOptions, above_standard, keep_open, memory_file};

/// The shared object.
static OBJECT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/migrate_shim.so"));

/// Its name in `/proc/PID/maps`.
const NAME: &str = "migrate-shim";

/// Where the library keeps what CRIU finds out about the kernel under it.
const KDAT: &str = "MIGRATE_SHIM_KDAT";
/// Makes the library become the process that the self-check dumps.
const PROBE: &str = "MIGRATE_SHIM_PROBE";

/// Names a descriptor of the page that names segments.
const SEGMENTS: &str = "MIGRATE_SHIM_SEGMENTS";

/// Names a descriptor of the file that names tasks and takes records.
const CLEAN: &str = "MIGRATE_SHIM_CLEAN";

/// Names a descriptor of the program that reads flags of mappings.
const MAPPINGS: &str = "MIGRATE_SHIM_MAPPINGS";

/// Makes tunnel devices look like plain open files.
const TUNNELS: &str = "MIGRATE_SHIM_TUNNELS";

/// `MFD_NOEXEC_SEAL` of `linux/memfd.h`, since Linux 6.3: it can be mapped
/// and never run, which is all that a host may allow.
const MFD_NOEXEC_SEAL: libc::c_uint = 8;

/// Private directories on a tmpfs for CRIU's cache and the self-check's
/// images, the first that can be had.
const PLACES: [&str; 2] = ["/run/migrate", "/dev/shm/migrate-criu"];

/// Limit for any single step of the self-check; all of it takes 20-100 ms.
const STEP_LIMIT: Duration = Duration::from_secs(20);

/// The file, made once for this process.
fn object() -> io::Result<RawFd> {
    static FILE: OnceLock<OwnedFd> = OnceLock::new();
    if let Some(file) = FILE.get() {
        return Ok(file.as_raw_fd());
    }
    let made = make_object()?;
    Ok(FILE.get_or_init(|| made).as_raw_fd())
}

fn make_object() -> io::Result<OwnedFd> {
    let name = std::ffi::CString::new(NAME)?;
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    let mut fd = -1;
    for flags in [flags | MFD_NOEXEC_SEAL, flags] {
        // SAFETY: the name is a C string; the result is checked below.
        fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
        if fd >= 0 {
            break;
        }
    }
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    let mut file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.write_all(OBJECT)?;
    let seals = libc::F_SEAL_SEAL | libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_WRITE;
    // SAFETY: plain system call on an open descriptor.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
        return Err(io::Error::last_os_error());
    }
    above_standard(file.into())
}

/// Has a command load the library. The descriptor that comes out must stay
/// open in the child ([`keep_open`]); the library closes it.
pub(crate) fn preload(command: &mut Command, version: CriuVersion) -> io::Result<RawFd> {
    let fd = object()?;
    command
        .env("LD_PRELOAD", format!("/proc/self/fd/{fd}"))
        .env_remove(PROBE)
        .env_remove(TUNNELS)
        .env_remove(MAPPINGS)
        .env_remove(SEGMENTS)
        .env_remove(CLEAN);
    match place() {
        Some(place) => command.env(KDAT, place.join(format!("criu-{version}.kdat"))),
        // Every start of CRIU then probes the kernel, which takes 30-60 ms.
        None => command.env_remove(KDAT),
    };
    Ok(fd)
}

/// Has a command's library show tunnel devices as plain open files; behind
/// [`preload`].
pub(crate) fn show_tunnels(command: &mut Command) {
    command.env(TUNNELS, "1");
}

/// Has a command's library read flags of mappings by a program, whose descriptor must stay
/// open in the child; behind [`preload`].
pub(crate) fn read_mappings(command: &mut Command, program: RawFd) {
    command.env(MAPPINGS, program.to_string());
}

/// The page by which the library learns which shared segments CRIU need not
/// dump; its layout is that of `segments.rs` in migrate-shim.
#[derive(Debug)]
pub(crate) struct SegmentTable(File);

impl SegmentTable {
    /// Bytes of the page.
    const BYTES: u64 = 4096;

    /// Segments that it has room for, besides the two words at its start.
    const SEGMENTS_MAX: usize = 510;

    /// Makes one that names nothing, and has a command's library read it. Its
    /// descriptor must stay open in the child, as [`preload`]'s.
    pub(crate) fn preload(command: &mut Command) -> io::Result<Self> {
        let file = memory_file(c"migrate-segments")?;
        let file = File::from(above_standard(file.into())?);
        file.set_len(Self::BYTES)?;
        command.env(SEGMENTS, file.as_raw_fd().to_string());
        Ok(Self(file))
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Names segments; those that there is no room for are dumped.
    pub(crate) fn name(&self, device: u64, inodes: &BTreeSet<u64>) -> io::Result<()> {
        let inodes = inodes.iter().copied().take(Self::SEGMENTS_MAX);
        let mut words = vec![0, device];
        words.extend(inodes);
        words[0] = (words.len() - 2) as u64;
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let (count, rest) = bytes.split_at(size_of::<u64>());
        self.0.write_all_at(rest, count.len() as u64)?;
        self.0.write_all_at(count, 0)
    }
}

/// The file by which the library learns whose clean pages CRIU need not list, and where it says
/// which these are; its layout is that of `clean.rs` in migrate-shim.
#[derive(Debug)]
pub(crate) struct CleanPages {
    file: File,
    /// Bytes of records that have been read.
    read: u64,
}

/// Pages of a task.
pub(crate) type CleanRange = (u32, Range<u64>);

impl CleanPages {
    /// Bytes in front of the records.
    const TABLE_BYTES: u64 = 32 << 10;

    /// Tasks that there is room for, besides the two words at the start.
    const TASKS_MAX: usize = 4094;

    /// Bytes of a record.
    const RECORD: usize = 24;

    /// Makes one that names nobody, and has a command's library read it. Its descriptor must
    /// stay open in the child, as [`preload`]'s.
    pub(crate) fn preload(command: &mut Command) -> io::Result<Self> {
        let file = memory_file(c"migrate-clean")?;
        let file = File::from(above_standard(file.into())?);
        file.set_len(Self::TABLE_BYTES)?;
        command.env(CLEAN, file.as_raw_fd().to_string());
        Ok(Self { file, read: 0 })
    }

    /// One in which the library has written these down.
    #[cfg(test)]
    pub(crate) fn holding(ranges: &[CleanRange]) -> Self {
        let file = File::from(OwnedFd::from(memory_file(c"test").unwrap()));
        let words = ranges
            .iter()
            .flat_map(|(pid, range)| [u64::from(*pid), range.start, range.end]);
        let bytes: Vec<u8> = words.flat_map(u64::to_ne_bytes).collect();
        file.write_all_at(&bytes, Self::TABLE_BYTES).unwrap();
        let length = bytes.len() as u64;
        file.write_all_at(&length.to_ne_bytes(), 8).unwrap();
        Self { file, read: 0 }
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Names tasks whose clean pages have gone over. Those that there is no room for CRIU lists
    /// itself.
    pub(crate) fn name(&self, tasks: &BTreeSet<u32>) -> io::Result<()> {
        let tasks = tasks.iter().take(Self::TASKS_MAX);
        let bytes: Vec<u8> = tasks
            .flat_map(|pid| u64::from(*pid).to_ne_bytes())
            .collect();
        self.file.write_all_at(&bytes, 16)?;
        let count = (bytes.len() / 8) as u64;
        self.file.write_all_at(&count.to_ne_bytes(), 0)
    }

    /// What the library has taken out of CRIU's list since the last call, in the order of its
    /// scans: of each task from lower to higher addresses. Whatever is below a run that CRIU
    /// has sent is there by then.
    pub(crate) fn next(&mut self) -> io::Result<Vec<CleanRange>> {
        let mut word = [0; 8];
        self.file.read_exact_at(&mut word, 8)?;
        let end = u64::from_ne_bytes(word);
        let new = usize::try_from(end.saturating_sub(self.read)).map_err(io::Error::other)?;
        if new == 0 {
            return Ok(Vec::new());
        }
        let mut bytes = vec![0; new];
        self.file
            .read_exact_at(&mut bytes, Self::TABLE_BYTES + self.read)?;
        self.read = end;
        let (records, rest) = bytes.as_chunks::<{ Self::RECORD }>();
        if !rest.is_empty() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        records
            .iter()
            .map(|record| {
                let mut words = record
                    .as_chunks::<8>()
                    .0
                    .iter()
                    .map(|word| u64::from_ne_bytes(*word));
                let mut next = || words.next().unwrap_or_default();
                let pid = u32::try_from(next()).map_err(io::Error::other)?;
                Ok((pid, next()..next()))
            })
            .collect()
    }
}

/// Whether a process has loaded the library: the loader only warns when it
/// cannot, and goes on without.
pub(crate) fn loaded(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/maps")).is_ok_and(|maps| {
        maps.lines()
            .any(|line| line.contains(&format!("/memfd:{NAME}")))
    })
}

/// A directory on a tmpfs that is nobody else's.
fn place() -> Option<PathBuf> {
    PLACES
        .iter()
        .map(Path::new)
        .find(|path| is_private(path))
        .map(Path::to_owned)
}

fn is_private(path: &Path) -> bool {
    let on_tmpfs = |path: &Path| statfs(path).is_ok_and(|fs| fs.filesystem_type() == TMPFS_MAGIC);
    if !path.parent().is_some_and(on_tmpfs) {
        return false;
    }
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(_) => return false,
    }
    // `/dev/shm` is open to all: what is there may be a trap.
    path.symlink_metadata().is_ok_and(|metadata| {
        metadata.is_dir()
            && metadata.uid() == nix::unistd::geteuid().as_raw()
            && metadata.mode() & 0o077 == 0
    }) && on_tmpfs(path)
}

/// A page came although it need not have: no content is at stake. It happens
/// by chance when the target is as young as a clock tick, for CRIU then takes
/// its PID for one that was used again (`detect_pid_reuse`, `criu/mem.c`).
const WASTEFUL: &str = "is clean and was dumped all the same";

/// How often a check is made that ends that way. A dirty page that was left
/// out is never given another chance.
const TRIES: u32 = 4;

impl Criu {
    /// Whether a dump with [`DumpOptions::track`] can be relied on here, with
    /// this CRIU on this kernel.
    ///
    /// CRIU's own check must say under the library that it can track memory.
    /// Then a small process is made, part of its memory protected and one page
    /// written, and dumped: what was written and what was not protected must
    /// come with data, and what was protected and not written must not. The
    /// process never ran anything but that, and is killed.
    ///
    /// The answer holds for the life of this process.
    ///
    /// # Errors
    ///
    /// What is wrong: [`CriuError::SelfCheck`].
    pub async fn self_check_shim(&self) -> Result<(), CriuError> {
        static ANSWERS: Mutex<Vec<(Criu, Result<(), String>)>> = Mutex::const_new(Vec::new());
        let mut answers = ANSWERS.lock().await;
        let known = answers.iter().find(|(criu, _)| criu == self);
        let answer = match known {
            Some((_, answer)) => answer.clone(),
            None => {
                let mut answer = self.try_shim().await;
                for _ in 1..TRIES {
                    if !answer.as_ref().is_err_and(|why| why.ends_with(WASTEFUL)) {
                        break;
                    }
                    answer = self.try_shim().await;
                }
                answers.push((self.clone(), answer.clone()));
                answer
            }
        };
        answer.map_err(|why| CriuError::SelfCheck { why })
    }

    async fn try_shim(&self) -> Result<(), String> {
        self.feature_under_shim().await?;
        let target = Target::start(self).await?;
        let place = place().ok_or_else(|| {
            format!(
                "there is no private place on a tmpfs, neither {} nor {}",
                PLACES[0], PLACES[1]
            )
        })?;
        // Numbered, since a path that was abandoned may be being removed.
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "check-{}-{}",
            std::process::id(),
            NUMBER.fetch_add(1, Ordering::Relaxed)
        );
        let images = ImageDir::create(place.join(name)).map_err(|error| chain(&error))?;
        let seen = self
            .dump_target(&target, &images)
            .await
            .map_err(|error| chain(&error))?;
        judge(&seen, &target)
    }

    /// `criu check --feature mem_dirty_track`, which also fills the cache.
    async fn feature_under_shim(&self) -> Result<(), String> {
        let mut command = Command::new(&self.path);
        command
            .args([
                "check",
                "--no-default-config",
                "--feature",
                "mem_dirty_track",
            ])
            .env_remove("CRIU_CONFIG_FILE")
            .stdin(Stdio::null())
            .kill_on_drop(true);
        let fd = preload(&mut command, self.version)
            .map_err(|error| format!("the library cannot be handed on: {error}"))?;
        keep_open(&mut command, fd);
        let output = timeout(STEP_LIMIT, command.output())
            .await
            .map_err(|_| "criu check does not end".to_owned())?
            .map_err(|error| format!("criu check does not run: {error}"))?;
        if output.status.success() {
            return Ok(());
        }
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        let last = text.lines().rfind(|line| !line.trim().is_empty());
        Err(format!(
            "criu finds no tracking of memory: {}",
            last.unwrap_or("it does not say why")
        ))
    }

    async fn dump_target(&self, target: &Target, images: &ImageDir) -> Result<Seen, CriuError> {
        let worker = self
            .worker(WorkerOptions {
                shim: true,
                ..WorkerOptions::default()
            })
            .await?;
        let task = u32::try_from(target.pid).unwrap_or_default();
        let mut session = worker
            .dump(&DumpOptions {
                track: Some(Track {
                    precopied: [task].into(),
                    ..Track::default()
                }),
                ..DumpOptions::new(target.pid, images.path())
            })
            .await?;
        let mut seen = Seen {
            owner: PageOwner::Task(task),
            pages: BTreeMap::new(),
        };
        let Some(socket) = session.page_socket() else {
            return Ok(seen);
        };
        let serve = serve_pages(socket, self.version, &mut seen, STEP_LIMIT);
        let drive = async {
            loop {
                let notice = session.next(STEP_LIMIT).await?;
                match notice {
                    Notice::Finished(Outcome::Refused) => return Ok(()),
                    // Nothing is to be dumped for good.
                    Notice::PostDump => session.answer(false).await?,
                    Notice::Finished(outcome) => {
                        tracing::debug!(?outcome, "the self-check's dump was not undone");
                        return Ok(());
                    }
                    _ => session.answer(true).await?,
                }
            }
        };
        let (served, driven): (_, Result<(), CriuError>) = tokio::join!(serve, drive);
        // CRIU's own report is the cause when both have failed.
        driven?;
        served?;
        Ok(seen)
    }
}

/// What came through the page stream, by address: the data's first byte.
struct Seen {
    owner: PageOwner,
    pages: BTreeMap<u64, Option<u8>>,
}

impl PageSink for Seen {
    type Error = io::Error;

    async fn pages(&mut self, run: PageRun, data: Bytes) -> io::Result<()> {
        if run.owner != self.owner {
            return Ok(());
        }
        let mut pieces = data.chunks_exact(PAGE_BYTES);
        let mut vaddr = run.vaddr;
        // A small process; what does not end is not it.
        for _ in 0..run.pages.min(1 << 20) {
            let first = pieces.next().and_then(|page| page.first().copied());
            self.pages.insert(vaddr, first);
            vaddr += PAGE_BYTES as u64;
        }
        Ok(())
    }

    async fn close(&mut self, _: PageStats) -> io::Result<()> {
        Ok(())
    }
}

/// Compares what came with what the target has done to its memory.
fn judge(seen: &Seen, target: &Target) -> Result<(), String> {
    for page in 0..Target::PAGES {
        let vaddr = target.pages + page * PAGE_BYTES as u64;
        let [value, ..] = (page + 1).to_le_bytes();
        let clean = page < Target::PROTECTED && page != Target::WRITTEN;
        match (seen.pages.get(&vaddr), clean) {
            (Some(None), true) => {}
            (Some(data), false) if *data == Some(value) => {}
            (None, _) => return Err(format!("page {page} is missing from the dump")),
            (Some(None), false) => {
                return Err(format!("page {page} is dirty and was left out of the dump"));
            }
            (Some(Some(_)), true) => {
                return Err(format!("page {page} {WASTEFUL}"));
            }
            (Some(Some(data)), false) => {
                return Err(format!(
                    "page {page} was dumped with the wrong content ({data})"
                ));
            }
        }
    }
    Ok(())
}

/// The process that is dumped; see migrate-shim's `probe`.
struct Target {
    /// Killed when dropped.
    _process: Child,
    pid: i32,
    /// Where its pages are.
    pages: u64,
    /// What protects them, open until the end.
    _tracker: OwnedFd,
}

impl Target {
    /// The numbers of `probe`.
    const PAGES: u64 = 544;
    const PROTECTED: u64 = 528;
    const WRITTEN: u64 = 5;

    async fn start(criu: &Criu) -> Result<Self, String> {
        let io = |doing: &'static str| move |error: io::Error| format!("{doing}: {error}");
        let starting = io("the process to be dumped does not start");
        let (ours, theirs) = StdUnixStream::pair().map_err(&starting)?;
        let theirs = above_standard(theirs.into()).map_err(&starting)?;
        // Any program that loads libraries would do.
        let mut command = Command::new(&criu.path);
        command
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true);
        let fd = preload(&mut command, criu.version).map_err(&starting)?;
        command.env(PROBE, theirs.as_raw_fd().to_string());
        // SAFETY: two system calls between fork and exec.
        unsafe {
            command.pre_exec(|| {
                libc::setsid();
                // What this process was given by whoever started it is nothing
                // that CRIU should have to dump. Before Linux 5.11 it may have to.
                libc::close_range(3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC.cast_signed());
                Ok(())
            });
        }
        keep_open(&mut command, fd);
        keep_open(&mut command, theirs.as_raw_fd());
        let process = command.spawn().map_err(&starting)?;
        drop(theirs);
        let pid = process.id().and_then(|pid| i32::try_from(pid).ok());
        let pid = pid.ok_or_else(|| "the process to be dumped has ended".to_owned())?;
        ours.set_nonblocking(true).map_err(&starting)?;
        let mut ours = UnixStream::from_std(ours).map_err(&starting)?;

        let mut message = [0; 24];
        let read = timeout(STEP_LIMIT, ours.read_exact(&mut message)).await;
        read.map_err(|_| "the process to be dumped says nothing".to_owned())?
            .map_err(io("the library is not loaded, or does not run"))?;
        let mut words = message.chunks_exact(8).map(|word| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(word);
            i64::from_ne_bytes(bytes)
        });
        let mut next = || words.next().unwrap_or_default();
        let (step, detail, pages) = (next(), next(), next());
        let detail = i32::try_from(detail).unwrap_or_default();
        if step != 0 {
            let what = match step {
                3 => "make a userfaultfd",
                4 => "have one that protects asynchronously (Linux 6.7)",
                5 | 6 => "protect its memory",
                _ => "prepare",
            };
            let error = io::Error::from_raw_os_error(detail);
            return Err(format!("the process to be dumped cannot {what}: {error}"));
        }
        let tracker = take_descriptor(pid, detail).map_err(io(
            "the userfaultfd of the process to be dumped cannot be had",
        ))?;
        let closed = timeout(STEP_LIMIT, async {
            ours.write_all(&[1]).await?;
            // It ends once both are closed there.
            ours.read(&mut message).await
        });
        match closed.await {
            Ok(Ok(0)) => {}
            Ok(Ok(_)) => return Err("the process to be dumped says too much".to_owned()),
            Ok(Err(error)) => return Err(format!("the process to be dumped is lost: {error}")),
            Err(_) => return Err("the process to be dumped hangs".to_owned()),
        }
        Ok(Self {
            _process: process,
            pid,
            pages: pages.cast_unsigned(),
            _tracker: tracker,
        })
    }
}

/// Copies a descriptor out of another process.
fn take_descriptor(pid: i32, fd: RawFd) -> io::Result<OwnedFd> {
    let own = |result: libc::c_long| {
        let fd = RawFd::try_from(result).unwrap_or(-1);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new descriptor that nobody else owns.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    };
    // SAFETY: plain system calls; the child has not been reaped, so that its
    // number is its own.
    unsafe {
        let process = own(libc::syscall(libc::SYS_pidfd_open, pid, 0))?;
        own(libc::syscall(
            libc::SYS_pidfd_getfd,
            process.as_raw_fd(),
            fd,
            0,
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the loader would look for: names without versions, which any C
    /// library has, and no way to panic.
    #[test]
    fn the_object_needs_little() {
        let has = |name: &str| {
            let name = [b"\0", name.as_bytes(), b"\0"].concat();
            OBJECT.windows(name.len()).any(|window| window == name)
        };
        for name in [
            "ioctl", "read", "pread64", "open64", "openat64", "unlink", "rename", "lseek",
            "lseek64",
        ] {
            assert!(has(name), "{name} is exported");
        }
        assert!(has("syscall") && has("unsetenv"));
        assert!(!has("abort"), "a panic is possible");
        for name in ["libc.so.6", "libgcc_s.so.1", "malloc"] {
            assert!(!has(name), "{name} is needed");
        }
        assert!(!OBJECT.windows(6).any(|window| window == b"GLIBC_"));
        assert!(OBJECT.len() < 64 << 10, "{} bytes", OBJECT.len());
    }

    #[test]
    fn the_object_is_a_sealed_file() {
        let first = object().unwrap();
        assert_eq!(first, object().unwrap());
        assert!(first > 2);
        let path = format!("/proc/self/fd/{first}");
        assert_eq!(fs::read(&path).unwrap(), OBJECT);
        let written = fs::OpenOptions::new()
            .write(true)
            .open(&path)
            .and_then(|mut file| file.write_all(b"x"));
        assert!(written.is_err());
    }

    /// Any program gets of `smaps` what CRIU reads, with the library and the program of
    /// flags; and all of it without the latter.
    #[tokio::test]
    async fn smaps_comes_without_counts() {
        if !nix::unistd::geteuid().is_root() {
            println!("SKIP smaps_comes_without_counts: not root");
            return;
        }
        let program = crate::mappings::program().await.expect("loaded");
        let mut steady = std::process::Command::new("cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // Once it has echoed, its mappings are those with which it waits.
        let mut byte = [0];
        io::Write::write_all(steady.stdin.as_mut().unwrap(), b"x").unwrap();
        io::Read::read_exact(steady.stdout.as_mut().unwrap(), &mut byte).unwrap();
        let path = format!("/proc/{}/smaps", steady.id());
        let version = CriuVersion::OLDEST_SUPPORTED;
        let mut texts = Vec::new();
        for program in [None, Some(program)] {
            let mut command = Command::new("cat");
            command.arg(&path);
            let library = preload(&mut command, version).unwrap();
            keep_open(&mut command, library);
            if let Some(program) = program {
                read_mappings(&mut command, program);
                keep_open(&mut command, program);
            }
            let output = command.output().await.unwrap();
            assert!(output.status.success(), "{output:?}");
            texts.push(String::from_utf8(output.stdout).unwrap());
        }
        let kernels = fs::read_to_string(&path).unwrap();
        steady.kill().unwrap();
        steady.wait().unwrap();
        assert!(texts[0].contains("\nRss:") && !texts[1].contains("Rss:"));
        let reads = |text: &str| -> Vec<String> {
            let known = |name: &&str| {
                let names = migrate_shim::flags::NAMES;
                names.iter().any(|(_, known)| known == name.as_bytes())
            };
            let mut lines = Vec::new();
            for line in text.lines() {
                let first = line.split(' ').next().unwrap_or_default();
                if first == "VmFlags:" {
                    lines.push(line.split(' ').skip(1).filter(known).collect::<String>());
                } else if !first.ends_with(':') {
                    lines.push(line.to_owned());
                }
            }
            lines
        };
        let mut kernels = reads(&kernels);
        // The kernel writes a line of flags for what is no process's, too.
        if let Some(at) = kernels.iter().position(|line| line.ends_with("[vsyscall]")) {
            kernels.remove(at + 1);
        }
        assert!(kernels.len() > 10);
        assert_eq!(reads(&texts[1]), kernels);
    }

    #[test]
    fn a_place_is_nobody_elses() {
        let parent = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = parent.path().join("place");
        assert!(is_private(&path) && is_private(&path));
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        assert!(!is_private(&path), "others can look");
        let link = parent.path().join("link");
        std::os::unix::fs::symlink(parent.path(), &link).unwrap();
        assert!(!is_private(&link), "it leads elsewhere");
        let disk = tempfile::tempdir_in("/var/tmp").unwrap();
        if statfs(disk.path()).unwrap().filesystem_type() != TMPFS_MAGIC {
            assert!(!is_private(&disk.path().join("place")), "it stays");
        }
    }
}
