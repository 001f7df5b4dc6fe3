//! Guests that run.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, Read, Write as _};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use migrate_test_hosts::HostName;
use migrate_test_hosts::files::Keys;

use crate::agent::{FAILED, PORTS, READY};
use crate::disk;
use crate::error::{Attempt, Error, Result};
use crate::exec::{self, EXEC};
use crate::kernels::{Fetched, Kernel};
use crate::root::{self, Program};
use crate::switch::{self, Switch};

/// A guest is up within 10 s under emulation; three at once took 170 s on two cores that had
/// thirty others to serve.
const UP_WITHIN: Duration = Duration::from_secs(600);
/// Quick to boot, dead at the first oops.
const COMMAND_LINE: &str = "console=ttyS0 rdinit=/init panic=-1 oops=panic nokaslr mitigations=off \
     net.ifnames=0 loglevel=4 quiet nowatchdog rcupdate.rcu_cpu_stall_suppress=1";
/// Lines of a console kept for a failure's message.
const CONSOLE_LINES_MAX: usize = 40;
/// A kernel that dies prints for so long.
const DYING_WORDS: Duration = Duration::from_secs(1);
/// Between two looks at a process.
const LOOK_AGAIN: Duration = Duration::from_millis(10);
/// What a kernel prints when nothing after it can be trusted.
/// Not that it made no progress: on a busy machine nobody does, and every wait has its deadline.
const FATAL: [&str; 6] = [
    "KVM internal error",
    "Kernel panic",
    "BUG: ",
    "Oops",
    "general protection fault",
    "Out of memory",
];

/// One guest to be made.
#[derive(Clone, Copy, Debug)]
pub struct Order {
    /// Its name and place.
    pub host: HostName,
    /// What it boots.
    pub kernel: Kernel,
    /// Its memory.
    pub memory_mib: u32,
    /// A kernel to go on with, with everything that it boots, on a disk of the guest's.
    pub next: Option<Kernel>,
    /// Whether systemd is PID 1 under that.
    pub next_by_systemd: bool,
    /// Whether systemd is PID 1 from the first boot on.
    pub systemd: bool,
}

impl Order {
    /// With as much memory as a small workload needs.
    #[must_use]
    pub const fn new(host: HostName, kernel: Kernel) -> Self {
        Self {
            host,
            kernel,
            memory_mib: 768,
            next: None,
            next_by_systemd: false,
            systemd: false,
        }
    }

    /// With systemd as PID 1, as [`Order::by_systemd`], but from the first boot on.
    #[must_use]
    pub const fn under_systemd(mut self) -> Self {
        self.systemd = true;
        // Its programs and units are in memory, too.
        self.memory_mib = 1024;
        self
    }

    /// With a disk at [`DISK`](crate::DISK), which outlives the kernel, and with what `kernel` boots on it, as
    /// `vmlinuz` and `initrd`. If there is a script `before-network` on it, that is run at each
    /// boot while there is no address.
    #[must_use]
    pub const fn with_disk(mut self, kernel: Kernel) -> Self {
        self.next = Some(kernel);
        // What kexec boots lies in memory beside what has been booted.
        self.memory_mib = 1280;
        self
    }

    /// With systemd as PID 1 of the next kernel: it brings up the network by its own means, with
    /// what is in the directory `etc` of the disk over its `/etc`. The guest is up before that
    /// has begun.
    #[must_use]
    pub const fn by_systemd(mut self) -> Self {
        self.next_by_systemd = true;
        self
    }
}

/// How a guest gets another kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// The kernel that runs starts the other one.
    Kexec,
    /// The machine is reset, and its firmware starts the other one.
    Reset,
}

/// A directory for a set of guests, private and removed with the handle.
///
/// # Errors
///
/// When it cannot be made.
pub fn scratch() -> Result<tempfile::TempDir> {
    tempfile::Builder::new()
        .prefix("migrate-vms.")
        .tempdir()
        .attempt(|| "make a directory for the machines".to_owned())
}

/// A set of guests that runs as long as this lives.
#[derive(Debug)]
pub struct Machines {
    dir: PathBuf,
    /// Both in the order of the orders.
    machines: Vec<Machine>,
    qemus: Vec<Child>,
    _switch: Switch,
}

impl Machines {
    /// Boots them side by side, with their sockets and consoles in `dir`, and waits until all are
    /// up.
    ///
    /// # Errors
    ///
    /// When something they are made of is missing, or one does not come up. Nothing runs then.
    pub fn boot(dir: &Path, orders: &[Order], programs: &[Program]) -> Result<Self> {
        let keys = Keys::in_dir(dir);
        keys.generate().map_err(Error::Keys)?;
        let common = dir.join("common.cpio");
        root::common(&common, programs)?;
        let ports: Vec<_> = orders
            .iter()
            .map(|order| (order.host.as_str(), hardware_address(order.host)))
            .collect();
        let mut machines = Self {
            dir: dir.to_owned(),
            machines: Vec::new(),
            qemus: Vec::new(),
            _switch: Switch::start(dir, &ports)?,
        };
        for order in orders {
            let initrd = |kernel: &Fetched, name: &Path, by_systemd| {
                let modules = dir.join(format!("{}.modules.cpio", kernel.kernel));
                root::modules(&modules, kernel)?;
                let own = dir.join(format!("{}.own.cpio", order.host));
                root::own(&own, order.host, &keys, order.next.is_some(), by_systemd)?;
                let systemd = dir.join(format!("{}.systemd.cpio", order.host));
                let mut parts = vec![common.as_path(), &modules, &own];
                if by_systemd {
                    root::systemd(&systemd, order.host, programs)?;
                    parts.push(&systemd);
                }
                concatenate(&parts, name)
            };
            let kernel = order.kernel.find()?;
            let first = dir.join(format!("{}.initrd", order.host));
            initrd(&kernel, &first, order.systemd)?;
            if let Some(next) = order.next {
                let kernel = next.find()?;
                let initrd_of_next = next_initrd(dir, order.host);
                initrd(&kernel, &initrd_of_next, order.next_by_systemd)?;
                disk::make(&disk_file(dir, order.host), &kernel.image, &initrd_of_next)?;
            }
            let (machine, child) = Machine::start(dir, order, &kernel, &first)?;
            machines.qemus.push(child);
            machines.machines.push(machine);
        }
        let deadline = Instant::now() + UP_WITHIN;
        for machine in &machines.machines {
            machine.await_up(deadline)?;
        }
        // QEMU has read them; whatever may end this process, little is left behind.
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if path
                .extension()
                .is_some_and(|kind| kind == "cpio" || kind == "initrd")
            {
                let _ = fs::remove_file(path);
            }
        }
        Ok(machines)
    }

    /// Runs a command that ends the guest's kernel, and waits until the next one, that of
    /// [`Order::with_disk`], is up.
    ///
    /// # Errors
    ///
    /// When the command fails or comes back, or the guest dies or does not come up in time.
    pub fn leave_kernel<I>(&mut self, host: HostName, way: Way, argv: I) -> Result<()>
    where
        I: IntoIterator,
        I::Item: AsRef<OsStr>,
    {
        let is_it = |machine: &Machine| machine.host() == host;
        let at = self.machines.iter().position(is_it);
        let (Some(machine), Some(qemu)) = (
            at.and_then(|at| self.machines.get_mut(at)),
            at.and_then(|at| self.qemus.get_mut(at)),
        ) else {
            return Err(Error::NoDisk {
                host: host.as_str(),
            });
        };
        let kernel = machine.order.next.ok_or(Error::NoDisk {
            host: host.as_str(),
        })?;
        let kernel = kernel.find()?;
        let deadline = Instant::now() + UP_WITHIN;
        // From here on it is the next one that is awaited.
        machine.watch.begins_anew(way);
        machine.run_until_left(argv, deadline)?;
        machine.order.kernel = kernel.kernel;
        if way == Way::Reset {
            qemu.wait().attempt(|| "wait for QEMU".to_owned())?;
            let initrd = next_initrd(&self.dir, host);
            let order = machine.order;
            (*machine, *qemu) = Machine::start(&self.dir, &order, &kernel, &initrd)?;
        }
        machine.await_up(deadline)
    }

    /// One of them.
    #[must_use]
    pub fn get(&self, host: HostName) -> Option<&Machine> {
        self.machines.iter().find(|machine| machine.host() == host)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Machine> {
        self.machines.iter()
    }
}

impl Drop for Machines {
    fn drop(&mut self) {
        for qemu in &mut self.qemus {
            let _ = qemu.kill();
        }
        for qemu in &mut self.qemus {
            let _ = qemu.wait();
        }
    }
}

/// A locally administered address, the last byte the host's.
fn hardware_address(host: HostName) -> [u8; 6] {
    let [.., last] = host.ipv4().octets();
    [0x52, 0x54, 0, 0x77, 0, last]
}

/// A guest's disk, if it has one.
fn disk_file(dir: &Path, host: HostName) -> PathBuf {
    dir.join(format!("{host}.disk"))
}

/// What its next kernel boots; no name of those that are removed when all are up.
fn next_initrd(dir: &Path, host: HostName) -> PathBuf {
    dir.join(format!("{host}.next"))
}

/// Kernels take several archives one behind the other.
fn concatenate(parts: &[&Path], whole: &Path) -> Result<()> {
    let write = || format!("write {}", whole.display());
    let mut to = File::create(whole).attempt(write)?;
    for part in parts {
        let mut from = File::open(part).attempt(|| format!("read {}", part.display()))?;
        io::copy(&mut from, &mut to).attempt(write)?;
    }
    Ok(())
}

/// How the guests' instructions are run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Accelerator {
    Hardware,
    Emulation,
}

impl Accelerator {
    /// Hardware help only where somebody has asked for it and vouches for it: on a machine that is
    /// a guest itself the device may be there, and a guest of it stand still for ever at an
    /// instruction that the hypervisor above does not run ("KVM internal error", seen minutes
    /// after the boot).
    fn wanted() -> Self {
        if std::env::var_os("MIGRATE_VM_KVM").is_some() {
            Self::Hardware
        } else {
            Self::Emulation
        }
    }

    /// A guest measures how fast its CPU counts. Where the machine gives it no time meanwhile, it
    /// gets that wrong, and its clock and its timers with it: emulated timers keep the time.
    /// Nor does it take a timer for broken then that has not fired in time.
    const fn clocks(self) -> &'static str {
        match self {
            Self::Hardware => "",
            Self::Emulation => "notsc nolapic_timer no_timer_check clocksource=hpet",
        }
    }

    fn add_to(self, command: &mut Command) {
        command.args(match self {
            Self::Hardware => ["-accel", "kvm", "-cpu", "host,-arch-capabilities"],
            // Five levels of page tables would be walked by hand.
            Self::Emulation => [
                "-accel",
                "tcg,thread=multi",
                "-cpu",
                "max,la57=off,tsc-deadline=off",
            ],
        });
    }
}

fn qemu(dir: &Path, order: &Order) -> Command {
    let name = order.host.as_str();
    let accelerator = Accelerator::wanted();
    let mut command = Command::new(crate::kernels::qemu());
    accelerator.add_to(&mut command);
    command
        .args(["-nodefaults", "-no-user-config", "-display", "none"])
        .args(["-no-reboot", "-m", &order.memory_mib.to_string()])
        .args(["-name", name, "-serial", "stdio"])
        .args(["-device", "virtio-rng-pci"])
        .args([
            "-device",
            &format!("virtio-serial-pci,max_ports={}", PORTS + 1),
        ]);
    let prefix = dir.join(name);
    for number in 0..PORTS {
        let path = exec::port(&prefix, number);
        let path = path.display();
        command
            .args([
                "-chardev",
                &format!("socket,id=c{number},path={path},server=on,wait=off"),
            ])
            .args([
                "-device",
                &format!("virtserialport,chardev=c{number},name=agent.{number}"),
            ]);
    }
    if order.next.is_some() {
        let file = disk_file(dir, order.host);
        command
            // It need not outlive this machine.
            .args([
                "-drive",
                &format!(
                    "if=none,id=d0,format=raw,cache=unsafe,file={}",
                    file.display()
                ),
            ])
            .args(["-device", "virtio-blk-pci,drive=d0"]);
    }
    let (plug, socket) = (switch::plug(dir, name), switch::socket(dir, name));
    let address = hardware_address(order.host).map(|byte| format!("{byte:02x}"));
    command
        .args([
            "-netdev",
            &format!(
                "dgram,id=n0,local.type=unix,local.path={},remote.type=unix,remote.path={}",
                plug.display(),
                socket.display()
            ),
        ])
        // No ROM: nothing boots from this network.
        .args([
            "-device",
            &format!(
                "virtio-net-pci,netdev=n0,romfile=,mac={}",
                address.join(":")
            ),
        ])
        .args([
            "-append",
            &format!("{COMMAND_LINE} {}", accelerator.clocks()),
        ]);
    command
}

#[derive(Debug, Default)]
struct Watched {
    ready: bool,
    /// QEMU is about to end, as it should.
    may_end: bool,
    ended: bool,
    /// The line after which nothing counts.
    verdict: Option<String>,
    last_lines: VecDeque<String>,
}

#[derive(Debug, Default)]
struct Watch {
    state: Mutex<Watched>,
    changed: Condvar,
}

impl Watch {
    fn line(&self, line: &str) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.last_lines.len() == CONSOLE_LINES_MAX {
            state.last_lines.pop_front();
        }
        state.last_lines.push_back(line.to_owned());
        state.ready |= line.starts_with(READY);
        let is_fatal = line.starts_with(FAILED) || FATAL.iter().any(|text| line.contains(text));
        if is_fatal && state.verdict.is_none() {
            state.verdict = Some(line.to_owned());
        }
        self.changed.notify_all();
    }

    /// What was said of it so far was of another kernel.
    fn begins_anew(&self, way: Way) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.ready = false;
        state.may_end = way == Way::Reset;
    }

    /// Whether another kernel is up, or QEMU has ended, within `limit` from now.
    fn is_left(&self, limit: Duration) -> bool {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let not_left =
            |state: &mut Watched| !state.ready && !state.ended && state.verdict.is_none();
        let waited = self.changed.wait_timeout_while(state, limit, not_left);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        !not_left(&mut state)
    }

    fn end(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.ended = true;
        if state.verdict.is_none() && !state.may_end {
            let last = state.last_lines.back().cloned().unwrap_or_default();
            state.verdict = Some(format!("QEMU ended after `{last}`"));
        }
        self.changed.notify_all();
    }
}

/// One guest.
#[derive(Debug)]
pub struct Machine {
    /// With the kernel that it runs.
    order: Order,
    prefix: PathBuf,
    console: PathBuf,
    watch: Arc<Watch>,
}

/// How a command in a guest ended.
#[derive(Debug)]
pub struct Finished {
    /// The exit code; 128 and the signal's number for a signal.
    pub code: Option<i32>,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
}

impl Finished {
    /// Both outputs as text.
    #[must_use]
    pub fn said(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned() + &String::from_utf8_lossy(&self.stderr)
    }
}

impl Machine {
    fn start(dir: &Path, order: &Order, kernel: &Fetched, initrd: &Path) -> Result<(Self, Child)> {
        let mut command = qemu(dir, order);
        command.arg("-kernel").arg(&kernel.image);
        command.arg("-initrd").arg(initrd);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        // SAFETY: prctl is a bare system call. A guest ends with the thread that made it.
        unsafe {
            command.pre_exec(|| {
                if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) < 0 {
                    return Err(io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let mut child = command.spawn().attempt(|| "start QEMU".to_owned())?;
        let watch = Arc::new(Watch::default());
        let console = dir.join(format!("{}.console", order.host));
        let create = || format!("create {}", console.display());
        let log = File::options().create(true).append(true).open(&console);
        let log = Arc::new(log.attempt(create)?);
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        if let Some(stdout) = stdout {
            let (watch, log) = (Arc::clone(&watch), Arc::clone(&log));
            thread::spawn(move || {
                follow(stdout, &watch, &log);
                watch.end();
            });
        }
        if let Some(stderr) = stderr {
            let watch = Arc::clone(&watch);
            thread::spawn(move || follow(stderr, &watch, &log));
        }
        let machine = Self {
            order: *order,
            prefix: dir.join(order.host.as_str()),
            console,
            watch,
        };
        Ok((machine, child))
    }

    fn await_up(&self, deadline: Instant) -> Result<()> {
        let outcome = self.await_ready(deadline);
        if outcome.is_err() {
            // What comes behind the verdict tells why, and the file goes with the directory.
            thread::sleep(DYING_WORDS);
            eprint!("{}", self.console());
        }
        outcome
    }

    fn await_ready(&self, deadline: Instant) -> Result<()> {
        let mut state = self
            .watch
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(verdict) = &state.verdict {
                return Err(self.died(verdict.clone()));
            }
            if state.ready {
                return Ok(());
            }
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                let last = state.last_lines.back().cloned().unwrap_or_default();
                let seconds = UP_WITHIN.as_secs();
                return Err(self.died(format!("hangs: not up after {seconds} s, `{last}`")));
            };
            state = self
                .watch
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn died(&self, verdict: String) -> Error {
        Error::Machine {
            host: self.host().as_str(),
            series: self.order.kernel.series(),
            verdict,
            console: self.console.clone(),
        }
    }

    /// Its name.
    #[must_use]
    pub fn host(&self) -> HostName {
        self.order.host
    }

    /// The kernel it runs.
    #[must_use]
    pub fn kernel(&self) -> Kernel {
        self.order.kernel
    }

    /// The line by which it died, if it did.
    #[must_use]
    pub fn verdict(&self) -> Option<String> {
        let state = self.watch.state.lock();
        state
            .unwrap_or_else(PoisonError::into_inner)
            .verdict
            .clone()
    }

    /// The end of what it printed on its console.
    #[must_use]
    pub fn console(&self) -> String {
        let state = self.watch.state.lock();
        let state = state.unwrap_or_else(PoisonError::into_inner);
        state
            .last_lines
            .iter()
            .map(|line| format!("{line}\n"))
            .collect()
    }

    /// A command that runs `program` in the guest, used like any other [`Command`]: arguments and
    /// standard streams are the program's, the exit code too (128 and the number for a signal).
    /// When it is killed, so is the program's session. Arguments have to be UTF-8.
    #[must_use]
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        Self::command_at(&self.prefix, program)
    }

    /// The same from another process than the one that booted it: `prefix` is the directory of the
    /// set with the host's name.
    #[must_use]
    pub fn command_at(prefix: &Path, program: impl AsRef<OsStr>) -> Command {
        Self::helper(prefix, "", program)
    }

    fn helper(prefix: &Path, log: &str, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("/proc/self/exe");
        command.arg0(EXEC).arg(prefix).arg(log).arg(program);
        command
    }

    /// Runs a program to its end. How it ended is in what comes back.
    ///
    /// # Errors
    ///
    /// When the guest is dead, or the program not done within `limit`.
    pub fn exec<I>(&self, argv: I, limit: Duration) -> Result<Finished>
    where
        I: IntoIterator,
        I::Item: AsRef<OsStr>,
    {
        let mut argv = argv.into_iter();
        let mut command = match argv.next() {
            Some(program) => self.command(program),
            None => self.command(""),
        };
        command.args(argv).stdin(Stdio::null());
        self.finish(command, &[], limit)
    }

    /// As [`Machine::exec`], and it has to succeed.
    ///
    /// # Errors
    ///
    /// As [`Machine::exec`], and [`Error::Command`] when it fails.
    pub fn succeed<I>(&self, argv: I, limit: Duration) -> Result<String>
    where
        I: IntoIterator,
        I::Item: AsRef<OsStr>,
    {
        let argv: Vec<_> = argv
            .into_iter()
            .map(|word| word.as_ref().to_owned())
            .collect();
        let finished = self.exec(&argv, limit)?;
        if finished.code == Some(0) {
            return Ok(String::from_utf8_lossy(&finished.stdout).into_owned());
        }
        Err(Error::Command {
            host: self.host().as_str(),
            command: format!("{argv:?}"),
            code: finished.code,
            said: finished.said(),
        })
    }

    /// Starts a daemon: a child of the guest's init, in a session of its own, with `log` as its
    /// output. Returns its PID.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn spawn_detached<I>(&self, argv: I, log: &str) -> Result<i32>
    where
        I: IntoIterator,
        I::Item: AsRef<OsStr>,
    {
        let argv: Vec<_> = argv
            .into_iter()
            .map(|word| word.as_ref().to_owned())
            .collect();
        let mut words = argv.iter();
        let program = words.next().cloned().unwrap_or_default();
        let mut command = Self::helper(&self.prefix, log, program);
        command.args(words).stdin(Stdio::null());
        let finished = self.finish(command, &[], UP_WITHIN)?;
        let text = String::from_utf8_lossy(&finished.stdout);
        text.trim().parse().map_err(|_| Error::Command {
            host: self.host().as_str(),
            command: format!("{argv:?}"),
            code: finished.code,
            said: finished.said(),
        })
    }

    /// Puts a file of this machine into the guest.
    ///
    /// # Errors
    ///
    /// When it cannot be read here or written there.
    pub fn put(&self, from: &Path, to: &str, mode: u32) -> Result<()> {
        let content = fs::read(from).attempt(|| format!("read {}", from.display()))?;
        let mut command = self.command("sh");
        let script = format!("cat >\"$0\" && chmod {mode:o} \"$0\"");
        command.args(["-c", &script, to]).stdin(Stdio::piped());
        let finished = self.finish(command, &content, UP_WITHIN)?;
        if finished.code == Some(0) {
            return Ok(());
        }
        Err(Error::Command {
            host: self.host().as_str(),
            command: format!("write {to}"),
            code: finished.code,
            said: finished.said(),
        })
    }

    /// The content of a file of the guest.
    ///
    /// # Errors
    ///
    /// When there is none, or it cannot be read.
    pub fn read(&self, path: &str) -> Result<String> {
        self.succeed(["cat", path], UP_WITHIN)
    }

    /// Runs a command that does not come back: until another kernel is up, or QEMU has ended.
    fn run_until_left<I>(&self, argv: I, deadline: Instant) -> Result<()>
    where
        I: IntoIterator,
        I::Item: AsRef<OsStr>,
    {
        let mut command = self.command("sh");
        // Its own output comes too late or not at all: what it says is on the console.
        command.args(["-c", "\"$@\" >/dev/ttyS0 2>&1", "sh"]);
        command.args(argv).stdin(Stdio::null());
        let what = || format!("run a program on {}", self.host());
        let mut child = command.spawn().attempt(what)?;
        let mut returned = None;
        while returned.is_none() && !self.watch.is_left(LOOK_AGAIN) && Instant::now() < deadline {
            returned = child.try_wait().attempt(what)?;
        }
        let Some(status) = returned else {
            child.kill().attempt(what)?;
            child.wait().attempt(what)?;
            return if self.watch.is_left(Duration::ZERO) {
                Ok(())
            } else {
                Err(Error::Deadline {
                    host: self.host().as_str(),
                    command: "a command that does not come back".to_owned(),
                    limit: UP_WITHIN,
                    said: "nothing of another kernel on the console".to_owned(),
                })
            };
        };
        // With QEMU it ends, too.
        if self.watch.is_left(DYING_WORDS) {
            return Ok(());
        }
        Err(Error::Command {
            host: self.host().as_str(),
            command: "what should end the kernel".to_owned(),
            code: status.code(),
            said: self.console(),
        })
    }

    fn finish(&self, mut command: Command, input: &[u8], limit: Duration) -> Result<Finished> {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let words: Vec<_> = command
            .get_args()
            .skip(2)
            .map(|word| word.to_string_lossy().into_owned())
            .collect();
        let what = || format!("run a program on {}", self.host());
        let mut child = command.spawn().attempt(what)?;
        let (stdin, stdout, stderr) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let deadline = Instant::now() + limit;
        thread::scope(|scope| {
            if let Some(mut stdin) = stdin {
                // A program that does not read it says so in another way.
                scope.spawn(move || drop(stdin.write_all(input)));
            }
            let stdout = scope.spawn(|| read_all(stdout));
            let stderr = scope.spawn(|| read_all(stderr));
            let mut ended = child.try_wait().attempt(what)?;
            while ended.is_none() && Instant::now() < deadline && self.verdict().is_none() {
                thread::sleep(LOOK_AGAIN);
                ended = child.try_wait().attempt(what)?;
            }
            if ended.is_none() {
                child.kill().attempt(what)?;
            }
            let status = child.wait().attempt(what)?;
            let finished = Finished {
                code: status.code(),
                stdout: stdout.join().unwrap_or_default(),
                stderr: stderr.join().unwrap_or_default(),
            };
            if let Some(verdict) = self.verdict() {
                return Err(self.died(verdict));
            }
            if ended.is_none() {
                return Err(Error::Deadline {
                    host: self.host().as_str(),
                    command: words.join(" "),
                    limit,
                    said: finished.said(),
                });
            }
            Ok(finished)
        })
    }
}

fn read_all(from: Option<impl Read>) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Some(mut from) = from {
        // What came before an error counts.
        let _ = from.read_to_end(&mut bytes);
    }
    bytes
}

fn follow(from: impl Read, watch: &Watch, log: &File) {
    let mut from = BufReader::new(from);
    let mut line = Vec::new();
    while from
        .read_until(b'\n', &mut line)
        .is_ok_and(|length| length > 0)
    {
        // The log is for the reader of a failure; the watch is what counts.
        let mut log = log;
        let _ = log.write_all(&line);
        watch.line(String::from_utf8_lossy(&line).trim_end());
        line.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_console_tells_who_is_up_and_who_is_dead() {
        let watch = Watch::default();
        watch.line("[    0.1] Linux version 6.1");
        assert!(!watch.state.lock().unwrap().ready);
        watch.line(READY);
        assert!(watch.state.lock().unwrap().ready);
        watch.line("[   9.0] Kernel panic - not syncing: Attempted to kill init!");
        watch.line("[   9.1] BUG: another");
        watch.end();
        let verdict = watch.state.lock().unwrap().verdict.clone().unwrap();
        assert!(verdict.contains("Attempted to kill init"), "{verdict}");
    }

    #[test]
    fn a_guest_that_ends_without_a_word_is_dead() {
        let watch = Watch::default();
        watch.line("the last line");
        watch.end();
        let verdict = watch.state.lock().unwrap().verdict.clone().unwrap();
        assert_eq!(verdict, "QEMU ended after `the last line`");
    }
}
