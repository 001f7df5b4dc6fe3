//! From the machine's namespaces into a host's, and PID 1 of it.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::signal::{SigHandler, SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{ForkResult, Pid, fork, sethostname, setsid};

use super::{exit, report, word};
use crate::error::{Attempt, Error, Result};
use crate::files::{self, Keys};
use crate::layout::{
    HostName, INTERFACE, Member, PREFIX_BITS_V4, PREFIX_BITS_V6, WORKLOAD_V4, WORKLOAD_V6,
};
use crate::{cgroup, processes};

/// The bridge's name, in its own namespace.
const BRIDGE: &str = "br0";
/// Where mounts wait while what is below them changes.
const STAGE: &str = "/run/.stage";
/// What the machine had in the directory that the tools cover.
const MACHINE_TOOLS: &str = "/run/.machine-tools";
/// sshd listens within 100 ms as a rule; this is for a machine under load.
const SSHD_WITHIN: Duration = Duration::from_secs(8);

/// What an init is told.
pub(crate) struct InitArgs {
    pub(crate) lab: String,
    pub(crate) member: Member,
    /// The lab's directory, outside.
    pub(crate) state_dir: PathBuf,
    /// The switch's init, for the others.
    pub(crate) switch: Option<i32>,
    /// The directory with the programs under test.
    pub(crate) programs: PathBuf,
    /// The `migrate` to be found on the path.
    pub(crate) migrate: PathBuf,
}

impl InitArgs {
    /// The words after the helper's name.
    pub(crate) fn to_words(&self) -> Vec<OsString> {
        vec![
            (&self.lab).into(),
            self.member.as_str().into(),
            (&self.state_dir).into(),
            self.switch.unwrap_or_default().to_string().into(),
            (&self.programs).into(),
            (&self.migrate).into(),
        ]
    }

    fn from_words(mut words: impl Iterator<Item = OsString>) -> Result<Self> {
        let lab = word(&mut words, "lab")?;
        let name = word(&mut words, "member")?;
        let member = Member::parse(&name).ok_or(Error::UnknownHost { name })?;
        let state_dir = word(&mut words, "state directory")?.into();
        let switch = word(&mut words, "switch")?
            .parse()
            .ok()
            .filter(|pid| *pid > 0);
        let programs = word(&mut words, "programs")?.into();
        let migrate = word(&mut words, "migrate")?.into();
        Ok(Self {
            lab,
            member,
            state_dir,
            switch,
            programs,
            migrate,
        })
    }
}

/// Leaves for new namespaces, furnishes them, and forks the host's PID 1.
///
/// Reports `pid N` (as the machine sees it), then `ready` or `error: …`.
pub(super) fn run(words: impl Iterator<Item = OsString>) -> Result<i32> {
    let args = InitArgs::from_words(words)?;
    // A session of its own: no terminal of the machine signals it.
    let _ = setsid();
    let mut namespaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC;
    let has_own_cgroup = cgroup::path(&args.lab, args.member).is_some_and(|path| path.exists());
    if has_own_cgroup {
        namespaces |= CloneFlags::CLONE_NEWCGROUP;
    }
    unshare(namespaces).attempt(|| "make the namespaces".to_owned())?;
    remount("/", MsFlags::MS_REC | MsFlags::MS_PRIVATE)?;
    sethostname(args.member.as_str()).attempt(|| "set the host name".to_owned())?;

    keep_order()?;
    match args.member {
        Member::Switch => make_bridge()?,
        Member::Host(host) => {
            plug_in(host, args.switch)?;
            furnish(host, &args, has_own_cgroup)?;
        }
    }

    // Only now: the first child from here on is PID 1, and it must not be an `ip` of above.
    unshare(CloneFlags::CLONE_NEWPID).attempt(|| "make the PID namespace".to_owned())?;
    // SAFETY: this process has one thread.
    match unsafe { fork() }.attempt(|| "fork the init".to_owned())? {
        ForkResult::Parent { child } => {
            report(&format!("pid {child}"));
            Ok(0)
        }
        ForkResult::Child => be_init(&args),
    }
}

// ---- network

fn ip(batch: &str, inside: Option<&File>) -> Result<()> {
    let mut command = Command::new("ip");
    command.args(["-batch", "-"]);
    if let Some(netns) = inside {
        let fd = netns.as_raw_fd();
        // SAFETY: setns is a bare system call; `netns` outlives the child's start.
        unsafe {
            command.pre_exec(move || {
                let fd = std::os::fd::BorrowedFd::borrow_raw(fd);
                setns(fd, CloneFlags::CLONE_NEWNET).map_err(io::Error::from)
            });
        }
    }
    files::run(&mut command, "ip", "iproute2", Some(batch))
}

/// Has the interfaces that are made here from now on keep the order of a connection's packets, as
/// a cable does: each goes to the queue of one CPU, by its connection. Otherwise a packet goes to
/// the queue of the CPU that has sent it, and of two that their sender has handed on one behind the
/// other on two CPUs the second may arrive first, microseconds before or, where a machine is busy,
/// milliseconds. TCP takes the first for lost then, up to 45 segments at once.
fn keep_order() -> Result<()> {
    let path = Path::new("/proc/sys/net/core/rps_default_mask");
    // Linux 6.3, and only where it is configured.
    if !path.exists() {
        return Ok(());
    }
    let online = files::read(Path::new("/sys/devices/system/cpu/online"))?;
    write(path, &cpu_mask(online.trim()))
}

/// The kernel's mask of CPUs, hexadecimal, of its list of them (`0-3,8`).
fn cpu_mask(list: &str) -> String {
    let mut words = vec![0_u32];
    let ranges = list.split(',').filter_map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        Some(first.parse::<usize>().ok()?..=last.parse().ok()?)
    });
    for cpu in ranges.flatten() {
        if words.len() <= cpu / 32 {
            words.resize(cpu / 32 + 1, 0);
        }
        words[cpu / 32] |= 1 << (cpu % 32);
    }
    let words: Vec<String> = words
        .iter()
        .rev()
        .map(|word| format!("{word:08x}"))
        .collect();
    words.join(",")
}

fn make_bridge() -> Result<()> {
    // No spanning tree and no snooping: a port forwards, and a multicast passes, at once.
    ip(
        &format!(
            "link set lo up\n\
             link add {BRIDGE} type bridge stp_state 0 forward_delay 0 mcast_snooping 0\n\
             link set {BRIDGE} up\n"
        ),
        None,
    )
}

fn plug_in(host: HostName, switch: Option<i32>) -> Result<()> {
    let has_ipv6 = Path::new("/proc/sys/net/ipv6").exists();
    if has_ipv6 {
        // Addresses are usable at once, and nobody outside configures the host.
        for (key, value) in [("accept_dad", "0"), ("accept_ra", "0")] {
            write(format!("/proc/sys/net/ipv6/conf/default/{key}"), value)?;
        }
    }
    let switch = switch.unwrap_or_default();
    let mut batch = format!(
        "link set lo up\n\
         link add {INTERFACE} type veth peer name {host} netns {switch}\n\
         addr add {}/{PREFIX_BITS_V4} dev {INTERFACE}\n",
        host.ipv4()
    );
    let owns_workload = host == HostName::Host1;
    if owns_workload {
        batch += &format!("addr add {WORKLOAD_V4}/{PREFIX_BITS_V4} dev {INTERFACE}\n");
    }
    if has_ipv6 {
        // The host's own comes last, which makes it the source of the host's own connections.
        let workload = owns_workload.then_some(WORKLOAD_V6);
        for address in workload.into_iter().chain([host.ipv6()]) {
            batch += &format!("addr add {address}/{PREFIX_BITS_V6} dev {INTERFACE} nodad\n");
        }
    }
    batch += &format!("link set {INTERFACE} up\n");
    ip(&batch, None)?;

    let path = format!("/proc/{switch}/ns/net");
    let netns = File::open(&path).attempt(|| format!("open {path}"))?;
    ip(
        &format!("link set {host} master {BRIDGE} up\n"),
        Some(&netns),
    )
}

// ---- mounts and files

fn remount(target: &str, flags: MsFlags) -> Result<()> {
    mount(None::<&str>, target, None::<&str>, flags, None::<&str>)
        .attempt(|| format!("change the mount {target}"))
}

fn mount_new(kind: &str, target: &str, options: &str) -> Result<()> {
    // A terminal is a device: with `nodev` nobody could open one.
    let flags = match kind {
        "devpts" => MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
        _ => MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
    };
    mount(Some(kind), target, Some(kind), flags, Some(options))
        .attempt(|| format!("mount a new {kind} on {target}"))
}

fn bind(source: &Path, target: &Path) -> Result<()> {
    let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
    mount(Some(source), target, None::<&str>, flags, None::<&str>)
        .attempt(|| format!("bind {} to {}", source.display(), target.display()))
}

fn make_dir(path: impl AsRef<Path>) -> Result<()> {
    let path = path.as_ref();
    fs::create_dir_all(path).attempt(|| format!("make the directory {}", path.display()))
}

fn write(path: impl AsRef<Path>, text: &str) -> Result<()> {
    let path = path.as_ref();
    fs::write(path, text).attempt(|| format!("write {}", path.display()))
}

fn write_secret(path: &str, text: &str) -> Result<()> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .attempt(|| format!("write {path}"))
}

/// Memory-backed directories of each host. `/tmp` is shared with the machine: a checkout may be
/// there. Those that the machine has not are left out, but for the first two.
const PRIVATE: [(&str, &str); 6] = [
    ("/run", "mode=755,size=50%"),
    ("/etc/ssh", "mode=755,size=1m"),
    ("/srv", "mode=755,size=50%"),
    ("/dev/shm", "mode=1777,size=50%"),
    ("/var/tmp", "mode=1777,size=50%"),
    ("/root/.ssh", "mode=700,size=1m"),
];

fn furnish(host: HostName, args: &InitArgs, has_own_cgroup: bool) -> Result<()> {
    let keys = Keys::in_dir(&args.state_dir);
    let root_key = keys.private("root")?;
    let root_public = keys.public("root")?;
    let known_hosts = files::known_hosts(&keys)?;
    let host_key = if host.has_sshd() {
        Some(keys.private(host.as_str())?)
    } else {
        None
    };

    // What must stay reachable though a private directory covers it.
    let checkout = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let criu = std::env::var("MIGRATE_CRIU").ok();
    let criu_dir = criu.as_deref().map(Path::new).and_then(Path::parent);
    let mut kept: Vec<(PathBuf, OwnedFd)> = Vec::new();
    for path in [
        Some(&*checkout),
        Some(&*args.programs),
        args.migrate.parent(),
        criu_dir,
    ] {
        let Some(path) = path.and_then(|path| path.canonicalize().ok()) else {
            continue;
        };
        let is_covered =
            PRIVATE.iter().any(|(private, _)| path.starts_with(private)) && path.is_dir();
        if is_covered && kept.iter().all(|(other, _)| *other != path) {
            let flags = libc::O_PATH | libc::O_DIRECTORY;
            let file = OpenOptions::new()
                .read(true)
                .custom_flags(flags)
                .open(&path);
            kept.push((
                path,
                file.attempt(|| "open the checkout".to_owned())?.into(),
            ));
        }
    }

    for (directory, options) in PRIVATE {
        if directory == "/etc/ssh" && !Path::new(directory).is_dir() {
            return Err(Error::MissingProgram {
                program: "/usr/sbin/sshd",
                package: "openssh-server",
            });
        }
        if Path::new(directory).is_dir() {
            mount_new("tmpfs", directory, options)?;
        }
    }
    for (path, fd) in &kept {
        make_dir(path)?;
        bind(
            Path::new(&format!("/proc/self/fd/{}", fd.as_raw_fd())),
            path,
        )?;
    }
    for directory in [
        "/run/lock",
        "/run/user",
        "/run/ssh",
        "/run/sshd",
        "/run/.etc",
        STAGE,
    ] {
        make_dir(directory)?;
    }
    mount_new(
        "devpts",
        "/dev/pts",
        "newinstance,ptmxmode=0666,mode=620,gid=5",
    )?;
    furnish_sys(has_own_cgroup)?;
    fs::remove_dir_all(STAGE).attempt(|| format!("remove {STAGE}"))?;

    let shadow = fs::read_to_string("/etc/shadow").ok();
    let etc = [
        ("hosts", Some(files::hosts()), 0o644),
        ("hostname", Some(format!("{host}\n")), 0o644),
        (
            "shadow",
            shadow.as_deref().and_then(files::shadow_with_root_open),
            0o600,
        ),
    ];
    for (name, text, mode) in etc {
        let (Some(text), target) = (text, Path::new("/etc").join(name)) else {
            continue;
        };
        // A machine without the file does without.
        if target.exists() {
            let source = Path::new("/run/.etc").join(name);
            write(&source, &text)?;
            fs::set_permissions(&source, fs::Permissions::from_mode(mode))
                .attempt(|| format!("set the mode of {}", source.display()))?;
            bind(&source, &target)?;
        }
    }

    write("/etc/ssh/ssh_config", files::SSH_CONFIG)?;
    write("/etc/ssh/ssh_known_hosts", &known_hosts)?;
    write("/etc/ssh/authorized_keys", &root_public)?;
    write_secret("/etc/ssh/root_key", &root_key)?;
    if let Some(host_key) = host_key {
        write("/etc/ssh/sshd_config", &files::sshd_config(criu.as_deref()))?;
        write_secret("/etc/ssh/ssh_host_ed25519_key", &host_key)?;
    }
    furnish_tools(args)
}

/// A `/sys` that shows the host's own network, with all that the machine has mounted below it.
fn furnish_sys(has_own_cgroup: bool) -> Result<()> {
    let cgroup2 = cgroup::cgroup2_mount().filter(|_| has_own_cgroup);
    let mountinfo = files::read(Path::new("/proc/self/mountinfo"))?;
    let mut waiting = Vec::new();
    for target in mounts_directly_below("/sys", &mountinfo) {
        let stage = Path::new(STAGE).join(waiting.len().to_string());
        make_dir(&stage)?;
        bind(&target, &stage)?;
        waiting.push((stage, target));
    }
    umount2("/sys", MntFlags::MNT_DETACH).attempt(|| "detach the machine's /sys".to_owned())?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("sysfs"), "/sys", Some("sysfs"), flags, None::<&str>)
        .attempt(|| "mount a new sysfs on /sys".to_owned())?;
    for (stage, target) in waiting {
        mount(
            Some(&stage),
            &target,
            None::<&str>,
            MsFlags::MS_MOVE,
            None::<&str>,
        )
        .attempt(|| format!("move a mount to {}", target.display()))?;
    }
    // As every Debian has it, but none of the machine's pins and none left on the machine.
    if Path::new("/sys/fs/bpf").is_dir() {
        mount_new("bpf", "/sys/fs/bpf", "mode=700")?;
    }
    if let Some(mount_point) = cgroup2.as_deref().and_then(Path::to_str) {
        // The mount of the machine shows the whole tree; a new one starts at the host's own root.
        umount2(mount_point, MntFlags::MNT_DETACH)
            .attempt(|| format!("detach the machine's {mount_point}"))?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(
            Some("cgroup2"),
            mount_point,
            Some("cgroup2"),
            flags,
            None::<&str>,
        )
        .attempt(|| format!("mount a new cgroup2 on {mount_point}"))?;
    }
    Ok(())
}

/// The mount points whose parent is mounted on `parent`, each once.
fn mounts_directly_below(parent: &str, mountinfo: &str) -> Vec<PathBuf> {
    let mounts: Vec<(&str, &str, &str)> = mountinfo
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            let (id, parent_id) = (words.next()?, words.next()?);
            Some((id, parent_id, words.nth(2)?))
        })
        .collect();
    let mut found: Vec<PathBuf> = Vec::new();
    for (id, _, _) in mounts.iter().filter(|(_, _, target)| *target == parent) {
        for (_, _, target) in mounts.iter().filter(|(_, parent_id, _)| parent_id == id) {
            let target = PathBuf::from(target);
            if !found.contains(&target) {
                found.push(target);
            }
        }
    }
    found
}

/// Puts `migrate` and its companions in front of root's path.
fn furnish_tools(args: &InitArgs) -> Result<()> {
    let link = |target: &Path, name: &std::ffi::OsStr| {
        let link = Path::new(files::TOOLS).join(name);
        match symlink(target, &link) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other.attempt(|| format!("make the link {}", link.display())),
        }
    };
    make_dir(MACHINE_TOOLS)?;
    bind(Path::new(files::TOOLS), Path::new(MACHINE_TOOLS))?;
    mount_new("tmpfs", files::TOOLS, "mode=755,size=1m")?;
    // By path, so that the hosts see a new build at once.
    link(&args.migrate, "migrate".as_ref())?;
    for entry in fs::read_dir(&args.programs).into_iter().flatten().flatten() {
        let is_program = entry
            .metadata()
            .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
            && entry.path().extension().is_none();
        if is_program {
            link(&entry.path(), &entry.file_name())?;
        }
    }
    for entry in fs::read_dir(MACHINE_TOOLS).into_iter().flatten().flatten() {
        link(&entry.path(), &entry.file_name())?;
    }
    Ok(())
}

// ---- PID 1

fn be_init(args: &InitArgs) -> ! {
    let outcome = start(args);
    match &outcome {
        Ok(()) => report("ready"),
        Err(error) => report(&format!("error: {}", error.chain())),
    }
    if outcome.is_err() || detach_stdio().is_err() {
        exit(125);
    }
    reap_for_ever()
}

fn start(args: &InitArgs) -> Result<()> {
    umount2("/proc", MntFlags::MNT_DETACH).attempt(|| "detach the machine's /proc".to_owned())?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), "/proc", Some("proc"), flags, None::<&str>)
        .attempt(|| "mount a new proc on /proc".to_owned())?;
    std::env::set_current_dir("/").attempt(|| "change to /".to_owned())?;
    if let Member::Host(host) = args.member {
        write("/proc/sys/kernel/ns_last_pid", &host.last_pid().to_string())?;
        if host.has_sshd() {
            start_sshd(&args.lab, host)?;
        }
    }
    Ok(())
}

fn start_sshd(lab: &str, host: HostName) -> Result<()> {
    let failed = |error: Errno| io::Error::from(error);
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)
        .map_err(failed)
        .attempt(|| "watch /run".to_owned())?;
    inotify
        .add_watch("/run", AddWatchFlags::IN_CLOSE_WRITE)
        .map_err(failed)
        .attempt(|| "watch /run".to_owned())?;

    let mut command = Command::new("/usr/sbin/sshd");
    // The lab is in the command line, so that one can tell the sshds of a machine apart.
    command.args([
        "-f",
        "/etc/ssh/sshd_config",
        "-E",
        &format!("/run/sshd.{lab}.{host}.log"),
    ]);
    // Nothing of the caller's environment gets into the sessions.
    command
        .env_clear()
        .env("PATH", files::PATH)
        .env("LANG", "C.UTF-8")
        .stdin(Stdio::null());
    files::run(&mut command, "/usr/sbin/sshd", "openssh-server", None)?;

    // sshd writes its PID as soon as it listens.
    let deadline = Instant::now() + SSHD_WITHIN;
    while !fs::read_to_string(files::SSHD_PID_FILE).is_ok_and(|text| text.ends_with('\n')) {
        if !processes::readable_by(&inotify, deadline)? {
            let what = format!("sshd of {host} listening");
            return Err(Error::Deadline {
                what,
                limit: SSHD_WITHIN,
            });
        }
        let _ = inotify.read_events();
    }
    Ok(())
}

fn detach_stdio() -> io::Result<()> {
    let null = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    for fd in 0..=2 {
        // SAFETY: both descriptors are open, and nothing else uses the standard ones here.
        if unsafe { libc::dup2(null.as_raw_fd(), fd) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// The kernel ends the whole PID namespace with this process.
fn reap_for_ever() -> ! {
    let mut child_died = SigSet::empty();
    child_died.add(Signal::SIGCHLD);
    // SAFETY: no handler is installed, only the default restored, in case the starter ignored it.
    let _ = unsafe { nix::sys::signal::signal(Signal::SIGCHLD, SigHandler::SigDfl) };
    let _ = child_died.thread_block();
    loop {
        while waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG))
            .is_ok_and(|status| status.pid().is_some())
        {}
        let _ = child_died.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_of_cpus() {
        assert_eq!(cpu_mask("0-1"), "00000003");
        assert_eq!(cpu_mask("0-3,8,33"), "00000002,0000010f");
    }

    #[test]
    fn finds_what_is_mounted_below_sys() {
        let mountinfo = "\
22 27 0:21 / /proc rw - proc proc rw
23 27 0:22 / /sys rw - sysfs sysfs rw
31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw
32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu
33 23 0:30 / /sys/kernel/debug rw - debugfs debugfs rw
";
        assert_eq!(
            mounts_directly_below("/sys", mountinfo),
            [Path::new("/sys/fs/cgroup"), Path::new("/sys/kernel/debug")]
        );
    }
}
