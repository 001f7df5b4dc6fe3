//! A `migrate` that fails or is made to fail, and what must hold after it.
//!
//! A [`Scene`] is a workload with strict clients at it. Whatever happens to a
//! migration in it, [`Scene::unharmed`] demands that the workload runs in one
//! place, serves the connections it had before, and that nothing of the
//! attempt is left on either host.
//!
//! The functions here panic with all that is known, as assertions do.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use migrate_core::Phase;
use migrate_test_hosts::{Host, HostName, Lab, LabGuard};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::client::StrictClient;
use crate::hosts::{eventually, gates, has_address, listens, runs};
use crate::migration::{moves, serves_old_connections};
use crate::workload::{Kind, Workload};

/// From the start of `migrate`, or any of its events, to the next one, and to its
/// end: longer than the 90 s for which `migrate` waits for a silent peer while the
/// tree runs.
const EVENT_WITHIN: Duration = Duration::from_secs(150);
/// What the other host undoes may outlast the command by a little.
const SETTLE_WITHIN: Duration = Duration::from_secs(10);
/// A workload's own program listens at once.
const LISTENS_WITHIN: Duration = Duration::from_secs(20);

/// `migrate` failed and the source runs on.
pub const ROLLED_BACK: i32 = 6;
/// The command line is wrong.
pub const USAGE: i32 = 2;
/// Preflight refused.
pub const REFUSED: i32 = 3;
/// The destination was not reached.
pub const CONNECT: i32 = 4;
/// The destination may run the tree; the source is fenced.
pub const UNDECIDED: i32 = 7;
/// Interrupted and rolled back.
pub const INTERRUPTED: i32 = 130;

/// How a `migrate` ended.
#[derive(Debug)]
pub struct Ended {
    /// How the process ended.
    pub status: ExitStatus,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// From the start to the end.
    pub took: Duration,
}

impl Ended {
    /// Both outputs, for looking at what a person would see.
    #[must_use]
    pub fn text(&self) -> String {
        format!("{}{}", self.stdout, self.stderr)
    }

    /// The events of `--json`.
    #[must_use]
    pub fn events(&self) -> Vec<Value> {
        let lines = self.stdout.lines();
        lines
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect()
    }

    /// The command failed with `code`, and said all of `words`: the thing, the
    /// cause and, behind `help:` or `->`, a way out.
    ///
    /// # Panics
    ///
    /// When it did not.
    #[track_caller]
    pub fn expect(&self, code: i32, words: &[&str]) {
        assert_eq!(self.status.code(), Some(code), "exit code of {self:#?}");
        let text = self.text();
        for word in words {
            assert!(text.contains(word), "`{word}` is not in {self:#?}");
        }
        let has_way_out = ["help: ", "-> ", "\"help\":\"", "--help"]
            .iter()
            .any(|mark| text.contains(mark));
        assert!(
            has_way_out || code == INTERRUPTED,
            "no way out in {self:#?}"
        );
    }
}

/// A `migrate` that runs in a host.
pub struct Running {
    child: Child,
    lines: Receiver<String>,
    stdout: Vec<String>,
    stderr: Option<JoinHandle<String>>,
    begun: Instant,
    ended: Option<ExitStatus>,
}

impl Running {
    /// Starts a command whose output is collected.
    ///
    /// # Panics
    ///
    /// When it cannot be started.
    #[track_caller]
    #[must_use]
    pub fn start(mut command: Command) -> Self {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let begun = Instant::now();
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(error) => panic!("could not start {command:?}: {error}"),
        };
        let (sender, lines) = channel();
        if let Some(stdout) = child.stdout.take() {
            thread::spawn(move || {
                let mut lines = BufReader::new(stdout).lines().map_while(Result::ok);
                lines.try_for_each(|line| sender.send(line))
            });
        }
        let stderr = child.stderr.take().map(|mut stderr| {
            thread::spawn(move || {
                let mut bytes = Vec::new();
                // What was read before an error is kept.
                let _ = stderr.read_to_end(&mut bytes);
                String::from_utf8_lossy(&bytes).into_owned()
            })
        });
        Self {
            child,
            lines,
            stdout: Vec::new(),
            stderr,
            begun,
            ended: None,
        }
    }

    /// Waits for an event of `--json`. `false` when the command ended without.
    ///
    /// # Panics
    ///
    /// When neither happens in time.
    #[track_caller]
    pub fn await_event(&mut self, wanted: impl Fn(&Value) -> bool) -> bool {
        let deadline = Instant::now() + EVENT_WITHIN;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    let event = serde_json::from_str(&line).unwrap_or(Value::Null);
                    self.stdout.push(line);
                    if wanted(&event) {
                        return true;
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return false,
                Err(RecvTimeoutError::Timeout) => {
                    panic!("nothing more within {EVENT_WITHIN:?}: {:#?}", self.stdout)
                }
            }
        }
    }

    /// Waits for the beginning of a phase; `false` when it never began.
    ///
    /// # Panics
    ///
    /// As [`Running::await_event`].
    #[track_caller]
    pub fn await_started(&mut self, phase: Phase) -> bool {
        let phase = serde_json::to_value(phase).unwrap_or_default();
        self.await_event(|event| event["event"] == "started" && event["phase"] == phase)
    }

    /// Waits for its end.
    ///
    /// # Panics
    ///
    /// When it does not end in time.
    #[track_caller]
    #[must_use]
    pub fn finish(mut self) -> Ended {
        let mut status = None;
        let ended = eventually(EVENT_WITHIN, || {
            status = self.child.try_wait().ok().flatten();
            status.is_some()
        });
        self.ended = status;
        let took = self.begun.elapsed();
        assert!(ended, "it has not ended: {:#?}", self.stdout);
        // Both pipes end with the process.
        while let Ok(line) = self.lines.recv_timeout(EVENT_WITHIN) {
            self.stdout.push(line);
        }
        let stderr = self.stderr.take().and_then(|thread| thread.join().ok());
        let mut stdout = self.stdout.join("\n");
        stdout.push('\n');
        Ended {
            status: self.ended.unwrap_or_default(),
            stdout,
            stderr: stderr.unwrap_or_default(),
            took,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.ended.is_none() {
            // A test has failed; its lab ends with it.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// A workload with strict clients at it, in a lab of its own.
pub struct Scene {
    /// The hosts.
    pub lab: LabGuard,
    /// What runs.
    pub workload: Workload,
    /// Connected since before anything happened.
    pub client: StrictClient,
    /// Where the workload runs.
    pub at: HostName,
    /// A destination keeps the record of a migration that succeeded.
    has_records: bool,
}

impl Scene {
    /// Starts a workload on `host1` with `connections` clients.
    ///
    /// # Panics
    ///
    /// When something does not start.
    #[track_caller]
    #[must_use]
    pub fn start(test: &str, kind: Kind, connections: usize) -> Self {
        let lab = scoped(test);
        let workload = match Workload::start(kind, &lab) {
            Ok(workload) => workload,
            Err(error) => panic!("{error}"),
        };
        Self::with(lab, workload, connections)
    }

    /// The same with a command of the test's own that serves what `kind`
    /// serves.
    ///
    /// # Panics
    ///
    /// When it does not start.
    #[track_caller]
    #[must_use]
    pub fn start_program<I>(lab: LabGuard, kind: Kind, argv: I, connections: usize) -> Self
    where
        I: IntoIterator,
        I::Item: AsRef<OsStr>,
    {
        let host = lab.host(HostName::Host1);
        let pid = match host.spawn_detached(argv, "/dev/null") {
            Ok(pid) => pid,
            Err(error) => panic!("{error}"),
        };
        let up = eventually(LISTENS_WITHIN, || listens(&host, kind.address().port()));
        assert!(up, "{kind:?}, PID {pid}, does not listen");
        Self::with(lab, Workload { kind, pid }, connections)
    }

    #[track_caller]
    fn with(lab: LabGuard, workload: Workload, connections: usize) -> Self {
        let client = match workload.client(&lab, connections, &[]) {
            Ok(client) => client,
            Err(error) => panic!("{error}"),
        };
        let mut scene = Self {
            lab,
            workload,
            client,
            at: HostName::Host1,
            has_records: false,
        };
        serves_old_connections(&mut scene.client);
        scene
    }

    /// Where the workload runs.
    #[must_use]
    pub fn source(&self) -> Host {
        self.lab.host(self.at)
    }

    /// Where it is to go.
    #[must_use]
    pub fn destination(&self) -> Host {
        self.lab.host(self.other())
    }

    fn other(&self) -> HostName {
        match self.at {
            HostName::Host1 => HostName::Host2,
            HostName::Host2 | HostName::Client => HostName::Host1,
        }
    }

    /// `migrate` with these arguments on the source.
    #[must_use]
    pub fn migrate(&self, arguments: &[&str]) -> Command {
        let mut command = self.source().command("migrate");
        command.args(arguments);
        command
    }

    /// `migrate --to DESTINATION PID`, with more arguments in front.
    #[must_use]
    pub fn to_destination(&self, more: &[&str]) -> Command {
        let mut command = self.migrate(more);
        command.args([
            "--to",
            self.other().as_str(),
            &self.workload.pid.to_string(),
        ]);
        command
    }

    /// Starts a migration whose driver stands still at the beginning of a
    /// phase until the second value is dropped: nothing has to be faster than
    /// it.
    ///
    /// # Panics
    ///
    /// When it does not get that far.
    #[track_caller]
    pub fn held_at(&self, mut command: Command, phase: Phase) -> (Running, Held) {
        command.env("MIGRATE_STOP_AT", phase.name());
        let running = Running::start(command);
        let held = Held::by_itself(driver(&self.source()));
        (running, held)
    }

    /// Starts a migration whose dump does not come to its end as long as the
    /// second value lives: its agent stands still from before the freeze.
    ///
    /// # Panics
    ///
    /// When it does not get that far.
    #[track_caller]
    pub fn in_dump(&self, command: Command) -> (Running, Held) {
        let (mut running, at_freeze) = self.held_at(command, Phase::Freeze);
        let held = Held::stop(agent(&self.destination()));
        drop(at_freeze);
        let begun = running.await_started(Phase::Dump);
        assert!(begun, "no dump: {:#?}", running.stdout);
        (running, held)
    }

    /// Runs a command that must fail with `code` and say all of `words`, and
    /// demands that nothing has been harmed.
    ///
    /// # Panics
    ///
    /// When one of these does not hold.
    #[track_caller]
    pub fn fails(&mut self, command: Command, code: i32, words: &[&str]) -> Ended {
        let ended = Running::start(command).finish();
        ended.expect(code, words);
        self.unharmed();
        ended
    }

    /// The workload runs in one place, serves the connections it had, and
    /// nothing of a migration is left on either host.
    ///
    /// # Panics
    ///
    /// When that is not so.
    #[track_caller]
    pub fn unharmed(&mut self) {
        self.serves_here();
        for host in [self.source(), self.destination()] {
            clean(&host);
            if !self.has_records {
                let nothing = "nothing is under way and nothing was left behind";
                let mut said = String::new();
                // Who clears up ends a moment after all is cleared.
                eventually(SETTLE_WITHIN, || {
                    said = shell(&host, "migrate status");
                    said == nothing
                });
                assert_eq!(said, nothing, "on {}", host.name());
            }
        }
        let (address, destination) = (self.workload.kind.address().ip(), self.destination());
        let home = format!("*/migrate/*-{}*", self.workload.pid);
        assert_eq!(cgroups(&destination, "-path", &home), Vec::<String>::new());
        match has_address(&destination, address) {
            Ok(has) => assert!(!has, "{address} is left on {}", destination.name()),
            Err(error) => panic!("{error}"),
        }
    }

    /// The workload serves the connections it had from where it was.
    ///
    /// # Panics
    ///
    /// When that is not so.
    #[track_caller]
    pub fn serves_on(&mut self) {
        serves_old_connections(&mut self.client);
        let pid = self.workload.pid;
        let source = self.source();
        assert!(runs(&source, pid), "{pid} runs on {}", source.name());
        let address = self.workload.kind.address().ip();
        match has_address(&source, address) {
            Ok(has) => assert!(has, "{address} is on {}", source.name()),
            Err(error) => panic!("{error}"),
        }
    }

    /// It does, and nowhere else is a copy of it.
    ///
    /// # Panics
    ///
    /// When that is not so.
    #[track_caller]
    pub fn serves_here(&mut self) {
        self.serves_on();
        let destination = self.destination();
        // A copy listens, whatever PID it has.
        let port = self.workload.kind.address().port();
        assert!(
            !listens(&destination, port),
            "nothing listens on {}",
            destination.name()
        );
    }

    /// The cause is gone: the same command moves the workload, without any
    /// error in all the client's life.
    ///
    /// # Panics
    ///
    /// When it does not.
    #[track_caller]
    pub fn moves_now(mut self) {
        self.moves();
        match self.client.stop() {
            Ok(verdict) => assert!(verdict.is_clean(), "{verdict:?}"),
            Err(error) => panic!("{error}"),
        }
    }

    /// Moves the workload to the other host.
    ///
    /// # Panics
    ///
    /// When that fails.
    #[track_caller]
    pub fn moves(&mut self) {
        let to = self.other();
        moves(&self.lab, &self.workload, self.at, to);
        self.has_moved();
        self.unharmed();
    }

    /// A migration has moved the workload.
    pub fn has_moved(&mut self) {
        self.at = self.other();
        self.has_records = true;
    }
}

/// A lab that no other test has.
///
/// # Panics
///
/// When it does not come up.
#[track_caller]
#[must_use]
pub fn scoped(test: &str) -> LabGuard {
    match Lab::scoped(&format!("{test}-{}", std::process::id())) {
        Ok(lab) => lab,
        Err(error) => panic!("{}", error.chain()),
    }
}

/// Nothing of a migration is left on a host: no gate, no image, no fence, no
/// record of one under way, no agent.
///
/// # Panics
///
/// When something is.
#[track_caller]
pub fn clean(host: &Host) {
    let mut left = Vec::new();
    eventually(SETTLE_WITHIN, || {
        left = leftovers(host);
        left.is_empty()
    });
    assert_eq!(left, Vec::<String>::new(), "left on {}", host.name());
}

/// What a migration has left on a host, by the host's kernel and files.
#[must_use]
pub fn leftovers(host: &Host) -> Vec<String> {
    let mut left = match gates(host) {
        Ok(gates) => gates,
        Err(error) => vec![error.to_string()],
    };
    for directory in [
        "/run/migrate/images",
        "/dev/shm/migrate-images",
        "/run/migrate/bpf",
    ] {
        let entries = entries(&host.path(directory));
        // The kernel's own, in every bpffs.
        left.extend(
            entries
                .into_iter()
                .filter(|entry| !entry.ends_with(".debug")),
        );
    }
    left.extend(image_mounts(host));
    for record in entries(&host.path("/run/migrate/journal")) {
        let text = fs::read_to_string(&record).unwrap_or_default();
        // Destinations keep the ended ones for a late question.
        if record.ends_with(".json") && !text.contains("\"done\"") {
            left.push(format!("{record}: {text}"));
        }
    }
    left.extend(cgroups(host, "-name", "migrate-fence-*"));
    left
}

/// The agent's policy in tests. Not where an agent looks by itself, so that other
/// tests are not bound.
pub const POLICY_FILE: &str = "/run/agent.toml";

/// Has a migration's agent on `destination` go by this policy.
///
/// # Panics
///
/// When the policy cannot be written.
#[track_caller]
pub fn under_policy(migration: &mut Command, destination: &Host, policy: &str) {
    let written = fs::write(destination.path(POLICY_FILE), policy);
    assert!(written.is_ok(), "{written:?}");
    let agent = format!("env MIGRATE_AGENT_POLICY={POLICY_FILE} migrate");
    migration.env("MIGRATE_REMOTE_COMMAND", agent);
}

/// The lines of a host's `mountinfo` for what is mounted where images are.
#[must_use]
pub fn image_mounts(host: &Host) -> Vec<String> {
    let mounts = format!("/proc/{}/mountinfo", host.init_pid());
    let text = fs::read_to_string(mounts).unwrap_or_default();
    let ours = text.lines().filter(|line| {
        let at = line.split(' ').nth(4).unwrap_or_default();
        at.starts_with("/run/migrate/images/") || at.starts_with("/dev/shm/migrate-images/")
    });
    ours.map(str::to_owned).collect()
}

fn entries(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.path().display().to_string())
        .collect()
}

/// cgroups of a host by a test of `find`, in the host's own view.
fn cgroups(host: &Host, test: &str, pattern: &str) -> Vec<String> {
    match host.exec(["find", "/sys/fs/cgroup", "-type", "d", test, pattern]) {
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stdout);
            text.lines().map(str::to_owned).collect()
        }
        Err(error) => vec![error.chain()],
    }
}

/// PIDs, as this machine sees them, of the processes of a host whose command
/// line satisfies a predicate.
fn machine_pids(host: &Host, wanted: impl Fn(&[String]) -> bool) -> Vec<Pid> {
    let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let home = namespace(&host.init_pid().to_string());
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Ok(pid) = name.parse() else {
            continue;
        };
        if home.is_none() || namespace(&name) != home {
            continue;
        }
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words: Vec<String> = line
            .split(|byte| *byte == 0)
            .map(|word| String::from_utf8_lossy(word).into_owned())
            .collect();
        if wanted(&words) {
            found.push(Pid::from_raw(pid));
        }
    }
    found
}

/// The agent that serves a migration on a host, as this machine sees it.
///
/// # Panics
///
/// When there is none, or more than one.
#[track_caller]
#[must_use]
pub fn agent(host: &Host) -> Pid {
    the_migrate(host, |words| {
        words.get(1).is_some_and(|word| word == "agent")
    })
}

/// The `migrate` that drives a migration on a host, as this machine sees it.
///
/// # Panics
///
/// When there is none, or more than one.
#[track_caller]
#[must_use]
pub fn driver(host: &Host) -> Pid {
    the_migrate(host, |words| words.iter().any(|word| word == "--to"))
}

/// The `migrate VERB` that runs on a host, as this machine sees it.
///
/// # Panics
///
/// When there is none, or more than one.
#[track_caller]
#[must_use]
pub fn runner(host: &Host, verb: &str) -> Pid {
    the_migrate(host, |words| words.get(1).is_some_and(|word| word == verb))
}

/// The guards of a host, as this machine sees them: each clears up after the
/// `migrate` or agent that started it, if that is killed.
#[must_use]
pub fn guards(host: &Host) -> Vec<Pid> {
    machine_pids(host, |words| {
        words.get(1).is_some_and(|word| word == "guard")
    })
}

/// The processes that put memory in place on a host, as this machine sees them.
#[must_use]
pub fn keepers(host: &Host) -> Vec<Pid> {
    let mut found = machine_pids(host, |words| {
        words.get(1).is_some_and(|word| word == "keep-memory")
    });
    // The one that only holds a keeper's descriptors was not started as a program of
    // its own.
    found.retain(|pid| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        name.trim_end() != "memory-holder"
    });
    found
}

/// Whether a process stands still because of a signal.
#[must_use]
pub fn is_stopped(pid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| rest.starts_with('T'))
}

/// Whether a process has ended with all its threads, reaped or not: nothing of it
/// is open any more.
#[must_use]
pub fn is_over(pid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let Some((_, rest)) = stat.rsplit_once(") ") else {
        return true;
    };
    rest.starts_with('Z') && entries(Path::new(&format!("/proc/{pid}/task"))).len() <= 1
}

/// The CRIU of an agent or a `migrate`, as this machine sees it.
///
/// # Panics
///
/// When it has none, or several.
#[track_caller]
#[must_use]
pub fn criu_of(owner: Pid) -> Pid {
    match criu_if_any(owner).as_slice() {
        [pid] => *pid,
        others => panic!("CRIUs of {owner}: {others:?}"),
    }
}

/// The same where it may have none.
#[must_use]
pub fn criu_if_any(owner: Pid) -> Vec<Pid> {
    let mut found = children(owner);
    // Its guard is another child.
    found.retain(|pid| {
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "criu\n")
    });
    found
}

fn children(owner: Pid) -> Vec<Pid> {
    let mut found = Vec::new();
    for thread in entries(Path::new(&format!("/proc/{owner}/task"))) {
        let children = fs::read_to_string(format!("{thread}/children")).unwrap_or_default();
        let pids = children.split_whitespace();
        found.extend(pids.filter_map(|pid| pid.parse::<i32>().ok()));
    }
    found.into_iter().map(Pid::from_raw).collect()
}

/// A process and all that it has started, who have no memory left but what they
/// have, and a little.
pub struct Starved {
    cgroup: PathBuf,
    limit: &'static str,
    no_limit: &'static str,
}

impl Starved {
    /// Enough for a call into the kernel, and for no step of a migration.
    const MORE_BYTES: &str = "262144";

    /// Sets the limit. `None` where this machine has no memory cgroups.
    #[must_use]
    pub fn with_helpers(owner: Pid) -> Option<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
        let mount = |wanted: &dyn Fn(&str, &str) -> bool| {
            mounts.lines().find_map(|line| {
                let (before, after) = line.split_once(" - ")?;
                let mut words = after.split(' ');
                let (kind, options) = (words.next()?, words.nth(1)?);
                wanted(kind, options).then(|| before.split(' ').nth(4).map(PathBuf::from))?
            })
        };
        let v1 = mount(&|kind, options| {
            kind == "cgroup" && options.split(',').any(|option| option == "memory")
        });
        let v2 = || mount(&|kind, _| kind == "cgroup2");
        let (root, limit, no_limit) = match v1 {
            Some(root) => (root, "memory.limit_in_bytes", "-1"),
            None => (v2()?, "memory.max", "max"),
        };
        if no_limit == "max" {
            fs::write(root.join("cgroup.subtree_control"), "+memory").ok()?;
        }
        let cgroup = root.join(format!("migrate-starved-{}", std::process::id()));
        fs::create_dir_all(&cgroup).ok()?;
        let starved = Self {
            cgroup,
            limit,
            no_limit,
        };
        // What they have stays with the cgroup that they leave.
        starved.write(limit, Self::MORE_BYTES).ok()?;
        let mut pids = vec![owner];
        while let Some(pid) = pids.pop() {
            pids.extend(children(pid));
            // It may have ended.
            let _ = starved.write("cgroup.procs", &pid.to_string());
        }
        Some(starved)
    }

    fn write(&self, file: &str, text: &str) -> std::io::Result<()> {
        fs::write(self.cgroup.join(file), text)
    }

    /// Whether the kernel has killed one of them.
    #[must_use]
    pub fn has_killed(&self) -> bool {
        ["memory.oom_control", "memory.events"].iter().any(|file| {
            let text = fs::read_to_string(self.cgroup.join(file)).unwrap_or_default();
            text.lines()
                .filter_map(|line| line.strip_prefix("oom_kill "))
                .any(|count| count != "0")
        })
    }
}

impl Drop for Starved {
    fn drop(&mut self) {
        let _ = self.write(self.limit, self.no_limit);
        // Whoever clears up goes on now, and ends.
        let gone = eventually(EVENT_WITHIN, || fs::remove_dir(&self.cgroup).is_ok());
        if !gone && !thread::panicking() {
            panic!("{} is not empty", self.cgroup.display());
        }
    }
}

#[track_caller]
fn the_migrate(host: &Host, wanted: impl Fn(&[String]) -> bool) -> Pid {
    let mut found = Vec::new();
    // It may be on its way through a login, and what it starts has its command
    // line until it has become the other program.
    eventually(EVENT_WITHIN, || {
        found = machine_pids(host, |words| {
            words.first().is_some_and(|word| word.ends_with("migrate")) && wanted(words)
        });
        found.len() == 1
    });
    match found.as_slice() {
        [pid] => *pid,
        others => panic!("on {}: {others:?}", host.name()),
    }
}

/// A process that stands still for as long as this lives: what waits for it
/// waits, however fast or slow the machine is.
#[must_use]
pub struct Held(Pid);

impl Held {
    /// Stops it.
    ///
    /// # Panics
    ///
    /// When it has gone.
    #[track_caller]
    pub fn stop(pid: Pid) -> Self {
        match kill(pid, Signal::SIGSTOP) {
            Ok(()) => Self(pid),
            Err(error) => panic!("could not stop {pid}: {error}"),
        }
    }

    /// Waits until it has stopped itself.
    ///
    /// # Panics
    ///
    /// When it does not.
    #[track_caller]
    pub fn by_itself(pid: Pid) -> Self {
        let stands = eventually(EVENT_WITHIN, || is_stopped(pid));
        assert!(stands, "{pid} does not stop");
        Self(pid)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // It may have been killed meanwhile.
        let _ = kill(self.0, Signal::SIGCONT);
    }
}

/// Cuts a host off from another one.
///
/// # Panics
///
/// When that fails.
#[track_caller]
pub fn wall(host: &Host, from: &Host) {
    let mut wall = "nft add table inet wall && \
         nft add chain inet wall input '{ type filter hook input priority 0; }' && \
         nft add chain inet wall output '{ type filter hook output priority 0; }'"
        .to_owned();
    let (v4, v6) = (from.ipv4(), from.ipv6());
    for (chain, what) in [("input", "saddr"), ("output", "daddr")] {
        let _ = write!(
            wall,
            " && nft add rule inet wall {chain} ip {what} {v4} drop \
              && nft add rule inet wall {chain} ip6 {what} {v6} drop"
        );
    }
    shell(host, &wall);
}

/// Ends that, if it was done.
///
/// # Panics
///
/// When that fails.
#[track_caller]
pub fn unwall(host: &Host) {
    shell(host, "nft delete table inet wall 2>/dev/null || true");
}

/// Runs a shell command in a host, which must succeed.
///
/// # Panics
///
/// When it does not.
#[track_caller]
pub fn shell(host: &Host, script: &str) -> String {
    match host.exec(["sh", "-c", script]) {
        Ok(output) => {
            assert!(output.status.success(), "{script}: {output:?}");
            String::from_utf8_lossy(&output.stdout).trim().to_owned()
        }
        Err(error) => panic!("{script}: {}", error.chain()),
    }
}
