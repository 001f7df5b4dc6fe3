//! PID 1 of a guest, and the agent that runs what the machine asks for.
//!
//! ```text
//!   /init            furnishes the guest, starts sshd, forks; then reaps orphans for ever
//!     └─ /init       the agent: one thread per serial port, one command per port at a time
//!          └─ PROGRAM
//! ```
//!
//! Where systemd shall be PID 1, the agent is its child, and PID 1 becomes it once the disk is there,
//! as at the end of an initramfs. The network and what is started are then systemd's affair.
//!
//! A command whose port is closed by the machine is killed with its session, so that a test that
//! dies leaves nothing running in a guest that lives on.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, setsid};
use serde::{Deserialize, Serialize};

use crate::error::{Attempt, Error, Result};
use crate::wire::{self, Job, Kind, PAYLOAD_BYTES_MAX};

/// The line by which the machine knows that a guest is up.
pub(crate) const READY: &str = "migrate-vm: ready";
/// The beginning of the line that says why it is not.
pub(crate) const FAILED: &str = "migrate-vm: failed: ";
/// What a guest is told, in its archive.
pub(crate) const SETUP_FILE: &str = "/etc/migrate-vm.json";
/// Commands that run side by side in a guest.
pub(crate) const PORTS: usize = 12;
/// Where a guest that has a disk finds it.
pub const DISK: &str = "/disk";
/// On the disk: a script that is run while the guest has no address.
pub(crate) const BEFORE_NETWORK: &str = "before-network";
/// On the disk: what lies over `/etc` of a guest with systemd.
pub(crate) const ETC: &str = "etc";
/// Where Debian has it.
pub(crate) const SYSTEMD: &str = "/usr/lib/systemd/systemd";

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// The kernel tells of ports and interfaces within a second, under emulation.
const DEVICES_WITHIN: Duration = Duration::from_secs(30);
/// Between two looks at whether the machine has connected to a port.
const LOOK_AGAIN: Duration = Duration::from_millis(30);

/// What a guest is told.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Setup {
    pub(crate) hostname: String,
    pub(crate) modules: Vec<String>,
    /// A batch for `ip`.
    pub(crate) network: String,
    pub(crate) last_pid: u32,
    pub(crate) sshd: bool,
    /// Whether there is a disk.
    pub(crate) disk: bool,
    /// Whether systemd is PID 1.
    pub(crate) systemd: bool,
}

/// Runs as PID 1 and never returns.
pub(crate) fn run() -> ! {
    let outcome = start();
    if let Err(error) = outcome {
        println!("{FAILED}{}", error.chain());
    }
    let _ = io::stdout().flush();
    // SAFETY: sync has no preconditions.
    unsafe { libc::sync() };
    let _ = reboot(RebootMode::RB_POWER_OFF);
    // Only without the right to: then the kernel panics, which the machine sees.
    std::process::exit(1)
}

/// Returns only when the agent has died, or nothing came up.
fn start() -> Result<()> {
    // As open as /tmp otherwise, and sshd refuses keys below such a directory.
    fs::set_permissions("/", fs::Permissions::from_mode(0o755))
        .attempt(|| "set the mode of /".to_owned())?;
    for (kind, target, options) in [
        ("proc", "/proc", ""),
        ("sysfs", "/sys", ""),
        ("devtmpfs", "/dev", "mode=755"),
    ] {
        mount_new(kind, target, options)?;
    }
    for directory in ["/dev/pts", "/dev/shm"] {
        make_dir(directory)?;
    }
    for (kind, target, options) in [
        ("devpts", "/dev/pts", "ptmxmode=0666,mode=620,gid=5"),
        ("tmpfs", "/dev/shm", "mode=1777"),
        ("tmpfs", "/run", "mode=755"),
        ("tmpfs", "/tmp", "mode=1777"),
        ("cgroup2", "/sys/fs/cgroup", ""),
        ("bpf", "/sys/fs/bpf", "mode=700"),
        ("tracefs", "/sys/kernel/tracing", ""),
    ] {
        mount_new(kind, target, options)?;
    }
    for directory in ["/run/sshd", "/run/ssh", "/run/lock"] {
        make_dir(directory)?;
    }
    let text = fs::read(SETUP_FILE).attempt(|| format!("read {SETUP_FILE}"))?;
    let setup: Setup =
        serde_json::from_slice(&text).attempt(|| format!("understand {SETUP_FILE}"))?;
    nix::unistd::sethostname(&setup.hostname).attempt(|| "set the host name".to_owned())?;
    // What the kernel does not have is missed by the test that needs it.
    let _ = command("modprobe").arg("-aq").args(&setup.modules).status();
    await_path("/sys/class/net/eth0")?;
    if setup.disk {
        mount_disk()?;
    }
    if setup.systemd {
        return become_systemd();
    }
    if setup.disk {
        before_network()?;
    }
    for (key, value) in [("accept_dad", "0"), ("accept_ra", "0")] {
        let path = format!("/proc/sys/net/ipv6/conf/default/{key}");
        fs::write(&path, value).attempt(|| format!("write {path}"))?;
        let path = format!("/proc/sys/net/ipv6/conf/eth0/{key}");
        fs::write(&path, value).attempt(|| format!("write {path}"))?;
    }
    fs::write("/run/network", &setup.network).attempt(|| "write /run/network".to_owned())?;
    succeed(command("ip").args(["-batch", "/run/network"]))?;
    if setup.sshd {
        succeed(command("sshd").args(["-E", "/run/sshd.log"]))?;
    }
    start_pids_above(setup.last_pid)?;
    let ports = open_ports()?;

    // SAFETY: this process has one thread.
    match unsafe { fork() }.attempt(|| "fork the agent".to_owned())? {
        ForkResult::Child => {
            serve(ports);
            std::process::exit(1)
        }
        ForkResult::Parent { child } => {
            drop(ports);
            println!("{READY}");
            reap_until(child)
        }
    }
}

/// Goes on as systemd, with the agent as its child, and with its `/etc` from the disk.
fn become_systemd() -> Result<()> {
    let etc = Path::new(DISK).join(ETC);
    if etc.exists() {
        succeed(command("cp").arg("-a").arg(etc).arg("/"))?;
    }
    let ports = open_ports()?;
    // SAFETY: this process has one thread.
    match unsafe { fork() }.attempt(|| "fork the agent".to_owned())? {
        ForkResult::Child => {
            serve(ports);
            std::process::exit(1)
        }
        ForkResult::Parent { .. } => {
            drop(ports);
            println!("{READY}");
            let error = command(SYSTEMD).exec();
            Err(error).attempt(|| format!("become {SYSTEMD}"))
        }
    }
}

/// The disk.
fn mount_disk() -> Result<()> {
    const DEVICE: &str = "/dev/vda";
    await_path(DEVICE)?;
    make_dir(DISK)?;
    mount(
        Some(DEVICE),
        DISK,
        Some("ext4"),
        MsFlags::empty(),
        None::<&str>,
    )
    .attempt(|| format!("mount {DEVICE} on {DISK}"))
}

/// What the disk says is to be done before there is a network.
fn before_network() -> Result<()> {
    let script = Path::new(DISK).join(BEFORE_NETWORK);
    if script.exists() {
        succeed(command("sh").arg("-e").arg(script))?;
    }
    Ok(())
}

/// Higher ones may be wanted already, by whoever keeps those below free.
fn start_pids_above(wanted: u32) -> Result<()> {
    const LAST_PID: &str = "/proc/sys/kernel/ns_last_pid";
    let last = fs::read_to_string(LAST_PID).attempt(|| "read the last PID".to_owned())?;
    if last.trim().parse().is_ok_and(|last: u32| last >= wanted) {
        return Ok(());
    }
    fs::write(LAST_PID, wanted.to_string()).attempt(|| "set the next PID".to_owned())
}

fn mount_new(kind: &str, target: &str, options: &str) -> Result<()> {
    mount(
        Some(kind),
        target,
        Some(kind),
        MsFlags::empty(),
        Some(options),
    )
    .attempt(|| format!("mount a {kind} on {target}"))
}

fn make_dir(path: &str) -> Result<()> {
    fs::create_dir_all(path).attempt(|| format!("make the directory {path}"))
}

fn command(program: &str) -> Command {
    // Looked up in PATH of this process, which the kernel started with none.
    let directories = PATH
        .split(':')
        .map(|directory| Path::new(directory).join(program));
    let found = directories.into_iter().find(|path| path.is_file());
    let mut command = Command::new(found.unwrap_or_else(|| program.into()));
    command
        .env_clear()
        .env("PATH", PATH)
        .env("HOME", "/root")
        .env("LANG", "C.UTF-8")
        .stdin(Stdio::null());
    command
}

fn succeed(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().attempt(|| format!("start {name}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(Error::Program {
        command: name,
        message: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}

fn await_path(path: &str) -> Result<()> {
    let deadline = Instant::now() + DEVICES_WITHIN;
    while !Path::new(path).exists() {
        if Instant::now() > deadline {
            return Err(Error::System {
                attempt: format!("see {path}"),
                source: io::ErrorKind::TimedOut.into(),
            });
        }
        std::thread::sleep(LOOK_AGAIN);
    }
    Ok(())
}

/// The ports of the machine, which have names.
fn open_ports() -> Result<Vec<File>> {
    const CLASS: &str = "/sys/class/virtio-ports";
    let deadline = Instant::now() + DEVICES_WITHIN;
    loop {
        let mut found = Vec::new();
        for entry in fs::read_dir(CLASS).into_iter().flatten().flatten() {
            let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
            let device = Path::new("/dev").join(entry.file_name());
            if name.starts_with("agent.") && device.exists() {
                found.push(device);
            }
        }
        if found.len() == PORTS {
            let open = |path: &std::path::PathBuf| {
                OpenOptions::new()
                    .read(true)
                    .write(true)
                    .open(path)
                    .attempt(|| format!("open {}", path.display()))
            };
            return found.iter().map(open).collect();
        }
        if Instant::now() > deadline {
            return Err(Error::System {
                attempt: format!("see {PORTS} serial ports, there are {}", found.len()),
                source: io::ErrorKind::TimedOut.into(),
            });
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}

fn reap_until(agent: Pid) -> Result<()> {
    loop {
        let status = waitpid(None, None).attempt(|| "wait for children".to_owned())?;
        if status.pid() == Some(agent)
            && matches!(status, WaitStatus::Exited(..) | WaitStatus::Signaled(..))
        {
            return Err(Error::System {
                attempt: format!("keep the agent running: {status:?}"),
                source: io::ErrorKind::BrokenPipe.into(),
            });
        }
    }
}

// ---- the agent

fn serve(ports: Vec<File>) {
    std::thread::scope(|scope| {
        for port in ports {
            scope.spawn(move || serve_port(&Arc::new(Port::new(port))));
        }
    });
}

struct Port {
    file: File,
    writing: Mutex<()>,
}

impl Port {
    fn new(file: File) -> Self {
        Self {
            file,
            writing: Mutex::new(()),
        }
    }

    fn say(&self, session: u64, kind: Kind, payload: &[u8]) -> io::Result<()> {
        let _one = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        wire::write(&self.file, session, kind, payload)
    }
}

/// A command that a port's peer has asked for.
struct Running {
    session: u64,
    /// It leads a session of its own.
    pid: Pid,
    stdin: Option<ChildStdin>,
    ended: Arc<Mutex<bool>>,
}

impl Drop for Running {
    fn drop(&mut self) {
        // The PID is the command's own until it has been waited for, which the flag says.
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        if !*ended {
            let _ = killpg(self.pid, Signal::SIGKILL);
        }
    }
}

fn serve_port(port: &Arc<Port>) {
    let mut running: Option<Running> = None;
    loop {
        match wire::read(&port.file) {
            Ok(frame) => match frame.kind {
                Kind::Exec => {
                    running = None;
                    running = begin(port, frame.session, &frame.payload).or(running);
                }
                Kind::Stdin => {
                    let to = running
                        .as_mut()
                        .filter(|running| running.session == frame.session);
                    if let Some(running) = to {
                        feed(running, &frame.payload);
                    }
                }
                _ => {}
            },
            // Nobody is connected.
            Err(_) => {
                running = None;
                std::thread::sleep(LOOK_AGAIN);
            }
        }
    }
}

fn feed(running: &mut Running, payload: &[u8]) {
    let Some(stdin) = running.stdin.as_mut() else {
        return;
    };
    // A command that reads no more is none of the agent's business.
    if payload.is_empty() || stdin.write_all(payload).is_err() {
        running.stdin = None;
    }
}

fn begin(port: &Arc<Port>, session: u64, job: &[u8]) -> Option<Running> {
    let started = serde_json::from_slice::<Job>(job)
        .map_err(io::Error::from)
        .and_then(|job| {
            if job.daemon_log.is_some() {
                daemon(&job).map(Started::Daemon)
            } else {
                spawn(&job).map(Started::Child)
            }
        });
    let tell = |kind, text: &str| {
        // Whoever asked is gone when this fails.
        let _ = port.say(session, kind, text.as_bytes());
    };
    match started {
        Ok(Started::Daemon(pid)) => {
            tell(Kind::Started, &pid.to_string());
            tell(Kind::Exit, "0");
            None
        }
        Ok(Started::Child(mut child)) => {
            tell(Kind::Started, &child.id().to_string());
            let running = Running {
                session,
                pid: Pid::from_raw(child.id().cast_signed()),
                stdin: child.stdin.take(),
                ended: Arc::new(Mutex::new(false)),
            };
            let (port, ended) = (Arc::clone(port), Arc::clone(&running.ended));
            std::thread::spawn(move || attend(&port, session, child, &ended));
            Some(running)
        }
        Err(error) => {
            tell(Kind::Failed, &error.to_string());
            None
        }
    }
}

enum Started {
    Daemon(i32),
    Child(Child),
}

fn prepare(job: &Job) -> io::Result<Command> {
    let (program, arguments) = job.argv.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    let mut command = command(program);
    command
        .args(arguments)
        .envs(job.env.iter().map(|(name, value)| (name, value)))
        .current_dir("/");
    Ok(command)
}

fn spawn(job: &Job) -> io::Result<Child> {
    let mut command = prepare(job)?;
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    // SAFETY: setsid is a bare system call.
    unsafe {
        command.pre_exec(|| setsid().map(drop).map_err(io::Error::from));
    }
    command.spawn()
}

/// Starts a command as a child of PID 1, in a session of its own.
fn daemon(job: &Job) -> io::Result<i32> {
    let mut command = prepare(job)?;
    let log = job.daemon_log.as_deref().unwrap_or("/dev/null");
    let log = OpenOptions::new().append(true).create(true).open(log)?;
    command.stdout(log.try_clone()?).stderr(log);
    let (read, write) = pipe()?;
    let write = write.as_raw_fd();
    // SAFETY: only bare system calls between fork and exec; the pipe outlives the start.
    unsafe {
        command.pre_exec(move || {
            setsid().map_err(io::Error::from)?;
            match fork().map_err(io::Error::from)? {
                ForkResult::Parent { child } => {
                    let pid = child.as_raw().to_ne_bytes();
                    libc::write(write, pid.as_ptr().cast(), pid.len());
                    libc::_exit(0)
                }
                ForkResult::Child => Ok(()),
            }
        });
    }
    let mut child = command.spawn()?;
    child.wait()?;
    let mut pid = [0; 4];
    File::from(read).read_exact(&mut pid)?;
    Ok(i32::from_ne_bytes(pid))
}

fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut ends = [0; 2];
    // SAFETY: the array has room for both.
    if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has just opened both for us alone.
    Ok(unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) })
}

/// Hands the output of a command on to its end.
fn attend(port: &Port, session: u64, mut child: Child, ended: &Mutex<bool>) {
    std::thread::scope(|scope| {
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        scope.spawn(move || hand_on(port, session, Kind::Stdout, stdout));
        scope.spawn(move || hand_on(port, session, Kind::Stderr, stderr));
    });
    // Not yet waited for: so the PID stays its own until the flag says otherwise.
    let pid = Pid::from_raw(child.id().cast_signed());
    let _ = nix::sys::wait::waitid(
        nix::sys::wait::Id::Pid(pid),
        nix::sys::wait::WaitPidFlag::WEXITED | nix::sys::wait::WaitPidFlag::WNOWAIT,
    );
    let status = {
        let mut ended = ended.lock().unwrap_or_else(PoisonError::into_inner);
        *ended = true;
        child.wait()
    };
    let code = status.map_or(125, |status| {
        status
            .code()
            .unwrap_or_else(|| 128 + status.signal().unwrap_or_default())
    });
    let _ = port.say(session, Kind::Exit, code.to_string().as_bytes());
}

fn hand_on(port: &Port, session: u64, kind: Kind, from: Option<impl io::Read>) {
    let Some(mut from) = from else { return };
    let mut buffer = vec![0; PAYLOAD_BYTES_MAX];
    let mut wanted = true;
    while let Ok(length) = from.read(&mut buffer) {
        if length == 0 {
            break;
        }
        // The rest is read all the same: a command does not hang because nobody listens.
        wanted = wanted && port.say(session, kind, &buffer[..length]).is_ok();
    }
}

/// Whether this process is PID 1 of a guest.
pub(crate) fn is_init(name: &std::ffi::OsStr) -> bool {
    name == "/init" && std::process::id() == 1 && Path::new(SETUP_FILE).exists()
}
