//! The unit that a moved tree runs in: `systemctl status`, `stop` and `restart` work
//! on the destination as they did on the source.
//!
//! Nobody can put a running tree into a service from outside: systemd does not let a
//! service be made of processes that are there, and takes a main process only from
//! the service itself. So the unit is started, with one change for as long as that
//! takes ([`drop_in_text`]): what it executes is not its program but
//! `migrate adopt`, which runs in the unit's cgroup, brings the tree in
//! ([`bring_in`]), names the tree's root as the main process in the same message by
//! which it says that it is ready, and ends. Then the change is taken back, and the
//! unit is what its own files say.
//!
//! systemd kills what is in a unit's cgroup when a start fails. In the changed unit
//! it kills nothing (`KillMode=none`) and runs no command of the unit's that could
//! talk to the tree, so whatever fails here fails around a tree that runs.
//!
//! A scope is simpler: `systemd-run --scope` executes `migrate adopt` in a new one.

use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use migrate_core::chain;
use migrate_core::facts::TreeFacts;
use migrate_core::preflight::Finding;
use migrate_core::unit::{AdoptChoice, Limits, UnitFacts, is_instance, is_unit_name};
use migrate_core::wire::Adopted;

use crate::cgroup::{self, HOME_PARENT, Hierarchy};
use crate::error::ProcError;
use crate::read;
use crate::supervisor::Supervisor;
use crate::systemd;
use crate::tree::{Tree, start_ticks, tree};

/// The hidden verb that [`bring_in`] runs under.
pub const ADOPT_VERB: &str = "adopt";
/// How long a unit may take to start around a tree. Nothing of the unit's own runs
/// then; but jobs that it waits for may be under way.
const START_LIMIT: Duration = Duration::from_secs(45);
/// How long `migrate adopt` may take, in seconds, by systemd's own watch.
const ADOPT_SECONDS: u64 = 30;
/// File name of the drop-in; the last in the order of names wins.
const DROP_IN: &str = "zzz-migrate-adopt.conf";
/// First line of the drop-in, with whose it is after it.
const OWNER: &str = "# Written by migrate, process ";
/// Looks for processes that were forked while others were brought in. Each look
/// finds those of the time between two, in which a process that forks all the time
/// makes a few.
const LOOKS_MAX: u32 = 200;
/// Kinds of services whose main process is not what they are about.
const UNLIKE: [&str; 2] = ["oneshot", "dbus"];
/// End of the name of a scope that a moved tree gets.
const SCOPE: &str = ".migrated.scope";

/// What is to become of a tree's unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Adoption {
    /// It stays in the cgroup that it was restored in: nobody here, or the user, wants
    /// anything else.
    Stays,
    /// This service takes it.
    Service(String),
    /// It gets a scope.
    Scope {
        /// Its name.
        name: String,
        /// Why the service does not take it whose main process it was.
        why: Option<String>,
    },
}

/// Where a tree stands among this host's units.
#[must_use]
pub fn unit_facts(tree: &Tree, supervisor: Option<&Supervisor>) -> UnitFacts {
    let path = cgroup::without_fence(tree.cgroup());
    let service = match supervisor {
        Some(Supervisor::SystemdUnit { unit, .. }) => Some(unit.clone()),
        _ => service_of_scope(path, tree.root()),
    };
    // A login's bounds are not the workload's.
    let own = (path != "/" && !cgroup::is_login(path)).then_some(path);
    let directory = own.and_then(|path| Hierarchy::v2()?.directory(path));
    let slice = own.and_then(|path| path.split('/').rfind(|part| part.ends_with(".slice")));
    UnitFacts {
        service,
        slice: slice.map(ToOwned::to_owned),
        limits: directory.map_or_else(Limits::default, |directory| {
            Limits::read(|file| read::text(directory.join(file)).ok())
        }),
    }
}

impl Adoption {
    /// Decides for a tree that comes to this host; changes nothing. `admits` says
    /// whether a service may take it.
    ///
    /// # Errors
    /// When systemd does not answer.
    pub fn plan(
        tree: &TreeFacts,
        choice: AdoptChoice,
        admits: impl Fn(&str) -> bool,
    ) -> Result<Self, ProcError> {
        if choice == AdoptChoice::None || !systemd::is_booted() {
            return Ok(Self::Stays);
        }
        let service = tree.unit.service.as_deref();
        let named = service.filter(|name| is_unit_name(name, ".service"));
        let why = match (choice, service, named) {
            (AdoptChoice::Scope, ..) | (_, None, _) => None,
            (_, Some(odd), None) => Some(format!("{odd:?} is no name of a service")),
            (_, _, Some(named)) => match service_for(named, admits)? {
                Ok(unit) => return Ok(Self::Service(unit)),
                Err(why) => Some(why),
            },
        };
        Ok(Self::Scope {
            name: scope_name(tree, named),
            why,
        })
    }

    /// The line for the preflight table.
    #[must_use]
    pub fn finding(&self) -> Option<Finding> {
        match self {
            Self::Stays => None,
            Self::Service(unit) => Some(Finding::ok(
                format!("unit {unit}"),
                "takes the tree on the destination once it runs",
            )),
            Self::Scope { name, why: None } => Some(Finding::ok(
                format!("unit {name}"),
                "is made for the tree on the destination; stop works there, restart cannot",
            )),
            Self::Scope {
                name,
                why: Some(why),
            } => Some(Finding::note(
                format!("unit {name}"),
                format!("is made for the tree on the destination: {why}"),
                "put that right there first, or go on: stop works on a scope, restart cannot",
            )),
        }
    }
}

/// The unit of this host by that name that can take a tree, or why none can.
fn service_for(
    name: &str,
    admits: impl Fn(&str) -> bool,
) -> Result<Result<String, String>, ProcError> {
    const PROPERTIES: &str = "Id,LoadState,ActiveState,Type,CanStart,Job,Conflicts,DynamicUser,\
                              RootDirectory,RootImage,UnitFileState";
    let shown = systemd::show(name, PROPERTIES)?;
    let is = |property: &str| shown.get(property).map_or("", String::as_str);
    // Another name that it goes by here is the one its drop-ins go by.
    let unit = match is("Id") {
        "" => name,
        id => id,
    };
    let why = match (is("LoadState"), is("ActiveState")) {
        _ if !is_unit_name(unit, ".service") => format!("{unit:?} is no name of a service"),
        ("loaded", "inactive" | "failed") if !is("Job").is_empty() && is("Job") != "0" => {
            format!("{unit} is being started or stopped")
        }
        ("loaded", "inactive" | "failed") => {
            let conflicts: Vec<&str> = is("Conflicts").split_whitespace().collect();
            if is("CanStart") == "no" {
                format!("{unit} cannot be started by hand")
            } else if UNLIKE.contains(&is("Type")) {
                format!("{unit} has Type={}", is("Type"))
            } else if is("DynamicUser") == "yes" {
                format!("{unit} has DynamicUser=yes")
            } else if !is("RootDirectory").is_empty() || !is("RootImage").is_empty() {
                format!("{unit} has a root directory of its own")
            } else if is_instance(unit) && !is("UnitFileState").starts_with("enabled") {
                // Any instance of a template is there for whoever names it.
                format!("{unit} is an instance that is not enabled")
            } else if let Some(other) = any_active(&conflicts) {
                format!("starting {unit} would stop {other}")
            } else if !admits(unit) {
                format!("the agent's policy does not name {unit}")
            } else {
                return Ok(Ok(unit.to_owned()));
            }
        }
        ("loaded", state) => format!("{unit} is {state} there"),
        ("not-found", _) => format!("there is no {unit}"),
        (state, _) => format!("{unit} is {state} there"),
    };
    Ok(Err(why))
}

/// One of these units that runs.
fn any_active<'a>(units: &[&'a str]) -> Option<&'a str> {
    units.iter().copied().find(|unit| {
        let state = systemd::show(unit, "ActiveState");
        // One that cannot be asked about may run.
        state.map_or(true, |shown| {
            shown
                .get("ActiveState")
                .is_none_or(|state| state != "inactive" && state != "failed")
        })
    })
}

/// A scope's name: that of the service where there is one, else the program's with
/// its PID.
fn scope_name(tree: &TreeFacts, service: Option<&str>) -> String {
    match service.and_then(|name| name.strip_suffix(".service")) {
        Some(stem) if stem.len() + SCOPE.len() + 16 < 255 => format!("{stem}{SCOPE}"),
        _ => scope_of_pid(tree),
    }
}

/// The service that a tree was before it came into a scope: another host may have it.
fn service_of_scope(path: &str, root_pid: i32) -> Option<String> {
    let stem = path.rsplit('/').next()?.strip_suffix(SCOPE)?;
    let of_process = stem.ends_with(&format!("-{root_pid}"));
    (!of_process).then(|| format!("{stem}.service"))
}

/// The name that is free for certain once the tree runs here, for it has the PID.
fn scope_of_pid(tree: &TreeFacts) -> String {
    let name = tree.processes.first().map_or("tree", |root| &root.name);
    let name = cgroup::file_name(name);
    let name = name.trim_start_matches(['-', '.']);
    format!("{name}-{}{SCOPE}", tree.root_pid)
}

/// Lets the unit take a tree that runs here, in the cgroup `home`. Whatever goes
/// wrong, the tree runs on; what comes back says where.
#[must_use]
pub fn adopt(plan: &Adoption, tree: &TreeFacts, home: &str) -> Option<Adopted> {
    // Someone has made that cgroup and put the tree's namesake there.
    if *plan == Adoption::Stays || !(home.is_empty() || is_made(home)) {
        return None;
    }
    let failed = |warning: String| Adopted {
        unit: None,
        warning: Some(warning),
    };
    let guest = match Guest::of(tree, home) {
        Ok(guest) => guest,
        Err(error) => return Some(failed(chain(&error))),
    };
    let (name, not_own) = match plan {
        Adoption::Stays => return None,
        Adoption::Scope { name, why } => (name.clone(), why.clone()),
        Adoption::Service(unit) => match guest.to_service(unit) {
            Ok(warning) => {
                guest.leave_home();
                return Some(Adopted {
                    unit: Some(unit.clone()),
                    warning,
                });
            }
            Err(error) => {
                let why = format!(
                    "{unit} could not take it: {}; `journalctl -u {unit}` says more",
                    chain(&error)
                );
                (scope_name(tree, Some(unit)), Some(why))
            }
        },
    };
    let taken = guest
        .to_scope(&name)
        .map(|()| name.clone())
        .or_else(|error| {
            let other = scope_of_pid(tree);
            if other == name {
                return Err(error);
            }
            // An earlier tree may still run under the first name.
            guest.to_scope(&other).map(|()| other)
        });
    Some(match taken {
        Ok(name) => {
            guest.leave_home();
            Adopted {
                warning: not_own.map(|why| {
                    format!("{why}; systemctl status and stop work for {name}, restart cannot")
                }),
                unit: Some(name),
            }
        }
        Err(error) => failed(format!(
            "{}{}; the tree runs on in cgroup {home}, and a signal stops it",
            not_own.map_or_else(String::new, |why| format!("{why}; ")),
            chain(&error)
        )),
    })
}

/// A tree that is to be taken in.
struct Guest<'a> {
    tree: &'a TreeFacts,
    home: &'a str,
    ticks: u64,
    program: PathBuf,
}

impl<'a> Guest<'a> {
    fn of(tree: &'a TreeFacts, home: &'a str) -> Result<Self, ProcError> {
        let pid = tree.root_pid;
        let ticks = start_ticks(pid).ok_or(ProcError::NoSuchProcess { pid })?;
        let own = Path::new("/proc/self/exe");
        let program = std::fs::read_link(own).map_err(|source| ProcError::Read {
            path: own.to_owned(),
            source,
        })?;
        Ok(Self {
            tree,
            home,
            ticks,
            program,
        })
    }

    /// `migrate adopt` for this tree.
    fn words(&self) -> Vec<String> {
        let mut words = vec![
            self.program.to_string_lossy().into_owned(),
            ADOPT_VERB.to_owned(),
            "--ticks".to_owned(),
            self.ticks.to_string(),
        ];
        if !self.home.is_empty() {
            words.extend(["--home".to_owned(), self.home.to_owned()]);
        }
        words.push(self.tree.root_pid.to_string());
        words
    }

    /// The whole way into a service; what is left to tell of a tree that it has.
    fn to_service(&self, unit: &str) -> Result<Option<String>, ProcError> {
        let command = self.words().join(" ");
        if let Some(odd) = command.chars().find(|c| !is_plain(*c)) {
            return Err(ProcError::Command {
                command,
                reason: format!("systemd would not take {odd:?} as it is"),
            });
        }
        let drop_in = systemd::runtime_drop_ins(unit).join(DROP_IN);
        systemd::drop_in(&drop_in, &drop_in_text(&command))?;
        if let Err(error) = is_ready(unit, &command, self.tree.root_pid) {
            // Nothing was started: what runs there is somebody else's.
            let _ = systemd::withdraw(&drop_in);
            return Err(error);
        }
        if let Err(error) = self.started(unit) {
            return Err(match self.back_out(unit, &drop_in) {
                Ok(()) => error,
                // As long as it is there nothing but `migrate adopt` can be started, and
                // nothing is killed.
                Err(left) => ProcError::Command {
                    command: format!("systemctl start {unit}"),
                    reason: format!(
                        "{}; and then {}: remove {} and run `systemctl daemon-reload`",
                        chain(&error),
                        chain(&left),
                        drop_in.display()
                    ),
                },
            });
        }
        Ok(systemd::withdraw(&drop_in).err().map(|error| {
            format!(
                "{unit} has the tree, but not its own settings yet: {}; remove {} and run \
                 `systemctl daemon-reload`",
                chain(&error),
                drop_in.display()
            )
        }))
    }

    /// Starts the unit as it is now and makes sure of what has come of it.
    fn started(&self, unit: &str) -> Result<(), ProcError> {
        let mut start = Command::new("systemctl");
        // A job of somebody else is not undone for this one.
        start.args(["start", "--job-mode=fail", "--no-ask-password", "--", unit]);
        systemd::output(start, Some(START_LIMIT))?;
        let shown = systemd::show(unit, "ActiveState,MainPID")?;
        let is = |property: &str| shown.get(property).map_or("", String::as_str);
        if is("ActiveState") == "active" && is("MainPID") == self.tree.root_pid.to_string() {
            return Ok(());
        }
        // Where a condition of the unit does not hold, nothing is started.
        Err(ProcError::Command {
            command: format!("systemctl start {unit}"),
            reason: format!(
                "the unit is {} with main PID {}",
                is("ActiveState"),
                is("MainPID")
            ),
        })
    }

    /// Takes everything back: the tree out of the unit first, the unit down, and only
    /// then its own settings in force.
    fn back_out(&self, unit: &str, drop_in: &Path) -> Result<(), ProcError> {
        let shown = systemd::show(unit, "ControlGroup")?;
        let group = shown.get("ControlGroup").map_or("", String::as_str);
        if !group.is_empty() {
            let inside = || -> Result<Vec<i32>, ProcError> {
                let mut inside = Vec::new();
                for pid in self.tree_now()? {
                    if cgroup::of_tree(pid)?.is_some_and(|path| path.starts_with(group)) {
                        inside.push(pid);
                    }
                }
                Ok(inside)
            };
            let home = Hierarchy::v2().and_then(|v2| v2.directory(self.home));
            moved(inside, |pid| match &home {
                Some(home) => cgroup::enter(home, pid),
                None => Ok(false),
            })?;
        }
        let mut stop = Command::new("systemctl");
        stop.args(["stop", "--no-ask-password", "--", unit]);
        systemd::output(stop, Some(START_LIMIT))?;
        systemd::withdraw(drop_in)
    }

    fn tree_now(&self) -> Result<Vec<i32>, ProcError> {
        processes(self.tree.root_pid, self.ticks, self.home)
    }

    fn to_scope(&self, name: &str) -> Result<(), ProcError> {
        let mut run = Command::new("systemd-run");
        run.args(["--scope", "--quiet", "--collect", "--no-ask-password"]);
        run.arg(format!("--unit={name}"));
        let root = self.tree.processes.first();
        let program = root.map_or("tree", |root| root.name.as_str());
        run.arg(format!(
            "--description={} (PID {}), moved to this host",
            cgroup::file_name(program),
            self.tree.root_pid
        ));
        let slice = self.tree.unit.slice.as_deref();
        if let Some(slice) = slice.filter(|name| is_unit_name(name, ".slice")) {
            run.arg(format!("--slice={slice}"));
        }
        for setting in self.tree.unit.limits.settings() {
            run.args(["-p", &setting]);
        }
        run.arg("--").args(self.words());
        systemd::output(run, Some(START_LIMIT)).map(drop)
    }

    /// Nothing is left in the cgroup that it was restored in.
    fn leave_home(&self) {
        if let Some(home) = Hierarchy::v2().and_then(|v2| v2.directory(self.home)) {
            cgroup::remove_empty_home(&home);
        }
    }
}

/// Whether a start of the unit would run this command and nothing else, and the unit
/// is still down: preflight was a while ago. Somebody else may have started it since
/// the change, and then it takes the tree already.
fn is_ready(unit: &str, command: &str, root: i32) -> Result<(), ProcError> {
    const PROPERTIES: &str = "ActiveState,MainPID,Type,KillMode,Restart,ExecStart,ExecStop";
    let shown = systemd::show(unit, PROPERTIES)?;
    let is = |property: &str| shown.get(property).map_or("", String::as_str);
    let takes = is("MainPID")
        .parse()
        .is_ok_and(|main| main == root || read::arguments(main).join(" ") == command);
    let down = matches!(is("ActiveState"), "inactive" | "failed");
    let ours = is("Type") == "notify"
        && is("KillMode") == "none"
        && is("Restart") == "no"
        && is("ExecStop").is_empty()
        && is("ExecStart").matches("path=").count() == 1
        && is("ExecStart").contains(&format!("argv[]={command} ;"));
    let reason = if !down && !takes {
        format!("the unit is {} meanwhile", is("ActiveState"))
    } else if !ours {
        "other settings have the last word over those that a start around a running tree needs"
            .to_owned()
    } else {
        return Ok(());
    };
    Err(ProcError::Command {
        command: format!("systemctl show {unit}"),
        reason,
    })
}

/// Whether a character stands for itself in a setting of a unit.
fn is_plain(c: char) -> bool {
    c.is_ascii_alphanumeric() || " /._+:,=@-".contains(c)
}

/// The change to a unit for as long as its start around a tree takes.
fn drop_in_text(command: &str) -> String {
    let owner = read::own_pid();
    let ticks = start_ticks(owner).unwrap_or(0);
    format!(
        "{OWNER}{owner} {ticks}
[Unit]
StartLimitIntervalSec=0
StartLimitAction=none
SuccessAction=none
FailureAction=none
[Service]
Type=notify
NotifyAccess=main
GuessMainPID=no
PIDFile=
RemainAfterExit=no
Restart=no
KillMode=none
SendSIGHUP=no
TimeoutStartSec={ADOPT_SECONDS}
WatchdogSec=0
ExecCondition=
ExecStartPre=
ExecStart=
ExecStart=+{command}
ExecStartPost=
ExecReload=
ExecStop=
ExecStopPost=
"
    )
}

/// What `migrate adopt` does, as a process of the unit that takes the tree: moves
/// every process of it into its own cgroups, and tells systemd where it is a
/// service. What cannot be completed is undone.
///
/// # Errors
/// When the tree is not there any more, or cannot be moved whole.
pub fn bring_in(root: i32, ticks: u64, home: &str) -> Result<(), ProcError> {
    let own = cgroup::paths(read::own_pid())?;
    let outside = || -> Result<Vec<i32>, ProcError> {
        let mut outside = Vec::new();
        for pid in processes(root, ticks, home)? {
            let theirs = cgroup::paths(pid)?;
            // One that has gone is nowhere.
            if !theirs.is_empty() && theirs != own {
                outside.push(pid);
            }
        }
        Ok(outside)
    };
    let brought = moved(outside, |pid| into(&own, pid)).and_then(|()| notify(root));
    if brought.is_err()
        && let Some(home) = Hierarchy::v2().and_then(|v2| v2.directory(home))
    {
        for pid in processes(root, ticks, "").unwrap_or_default() {
            // The first failure is the one to tell.
            let _ = cgroup::enter(&home, pid);
        }
    }
    brought
}

/// Moves a process into cgroups of all hierarchies.
fn into(paths: &[(String, String)], pid: i32) -> Result<bool, ProcError> {
    let mut there = true;
    for (controllers, path) in paths {
        let hierarchy = if controllers.is_empty() {
            Hierarchy::v2()
        } else {
            Hierarchy::v1(controllers)
        };
        if let Some(directory) = hierarchy.and_then(|hierarchy| hierarchy.directory(path)) {
            there &= cgroup::enter(&directory, pid)?;
        }
    }
    Ok(there)
}

/// Moves until none is left to be moved: a tree forks meanwhile.
fn moved(
    left: impl Fn() -> Result<Vec<i32>, ProcError>,
    place: impl Fn(i32) -> Result<bool, ProcError>,
) -> Result<(), ProcError> {
    let mut pids = left()?;
    for _ in 0..LOOKS_MAX {
        if pids.is_empty() {
            return Ok(());
        }
        for pid in pids {
            place(pid)?;
        }
        pids = left()?;
    }
    match pids.first() {
        None => Ok(()),
        Some(&pid) => Err(ProcError::Unstable {
            pid,
            attempts: LOOKS_MAX,
        }),
    }
}

/// Whether a cgroup is one that we make for trees.
fn is_made(home: &str) -> bool {
    let below = home.strip_prefix(HOME_PARENT);
    below.is_some_and(|below| below.len() > 1 && below.starts_with('/'))
}

/// The tree's processes: the root's descendants, and whoever else lives in the cgroup
/// that was made for it, for a daemon's children lose their parent.
fn processes(root: i32, ticks: u64, home: &str) -> Result<Vec<i32>, ProcError> {
    if start_ticks(root) != Some(ticks) {
        return Err(ProcError::NoSuchProcess { pid: root });
    }
    let mut pids = tree(root)?.pids();
    let home = Hierarchy::v2()
        .and_then(|v2| v2.directory(home))
        .filter(|_| is_made(home));
    if let Some(home) = home {
        let listed = read::text_if_there(home.join("cgroup.procs"))?.unwrap_or_default();
        let program = |pid: &str| {
            let meta = std::fs::metadata(format!("/proc/{pid}/exe")).ok()?;
            Some((meta.dev(), meta.ino()))
        };
        let ours = program("self");
        for pid in listed.lines() {
            // What has put memory in place there is ours, and about to end.
            if let Ok(number) = pid.parse()
                && program(pid) != ours
                && !pids.contains(&number)
            {
                pids.push(number);
            }
        }
    }
    Ok(pids)
}

/// Tells systemd that the service is up, and who it is (`sd_notify(3)`). A scope has
/// nobody to tell.
fn notify(root: i32) -> Result<(), ProcError> {
    let Some(socket) = std::env::var_os("NOTIFY_SOCKET") else {
        return Ok(());
    };
    let told = || {
        let name = socket.as_encoded_bytes();
        let address = match name.strip_prefix(b"@") {
            Some(abstract_name) => SocketAddr::from_abstract_name(abstract_name)?,
            None => SocketAddr::from_pathname(&socket)?,
        };
        let message = format!("MAINPID={root}\nREADY=1");
        UnixDatagram::unbound()?.send_to_addr(message.as_bytes(), &address)
    };
    match told() {
        Ok(_) => Ok(()),
        Err(source) => Err(ProcError::Write {
            attempt: "tell",
            path: PathBuf::from(&socket),
            source,
        }),
    }
}

/// Takes back what a process that was killed has left of an adoption, once nothing of
/// it is under way any more; whether something still is. What it was about stays as it
/// is: a unit that has its tree keeps it.
pub fn clear_adoptions() -> bool {
    let mut under_way = false;
    for (unit, drop_in) in left_behind() {
        let text = read::text(&drop_in).unwrap_or_default();
        let owner = text.lines().next().and_then(|line| {
            let (pid, ticks) = line.strip_prefix(OWNER)?.split_once(' ')?;
            Some((pid.parse().ok()?, ticks.parse().ok()?))
        });
        let alive = |(pid, ticks): (i32, u64)| start_ticks(pid) == Some(ticks);
        if owner.is_some_and(alive) {
            continue;
        }
        let settled = systemd::show(&unit, "ActiveState,Job").is_ok_and(|shown| {
            let idle = shown
                .get("Job")
                .is_none_or(|job| job.is_empty() || job == "0");
            let state = shown.get("ActiveState").map_or("", String::as_str);
            idle && matches!(state, "active" | "inactive" | "failed")
        });
        if !settled {
            under_way = true;
            continue;
        }
        match systemd::withdraw_same(&drop_in, &text) {
            Ok(true) => {
                if let Some(home) = home_in(&text)
                    && let Some(home) = Hierarchy::v2().and_then(|v2| v2.directory(home))
                {
                    cgroup::remove_empty_home(&home);
                }
            }
            // Another one's by now.
            Ok(false) => under_way = true,
            Err(error) => {
                tracing::warn!(error = %chain(&error), unit, "could not give the unit its settings back");
            }
        }
    }
    under_way
}

/// The cgroup that the tree was restored in which a drop-in is about.
fn home_in(drop_in: &str) -> Option<&str> {
    let command = drop_in
        .lines()
        .find_map(|line| line.strip_prefix("ExecStart=+"))?;
    command.split_once(" --home ")?.1.split(' ').next()
}

/// Units with a drop-in of an adoption.
fn left_behind() -> Vec<(String, PathBuf)> {
    let directories = std::fs::read_dir(systemd::BOOTED);
    directories
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let unit = entry.file_name().to_str()?.strip_suffix(".d")?.to_owned();
            let drop_in = entry.path().join(DROP_IN);
            drop_in.exists().then_some((unit, drop_in))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(service: Option<&str>) -> TreeFacts {
        TreeFacts {
            root_pid: 1006,
            unit: UnitFacts {
                service: service.map(ToOwned::to_owned),
                ..UnitFacts::default()
            },
            ..TreeFacts::default()
        }
    }

    #[test]
    fn scopes_are_named_after_the_service_or_the_process() {
        let of = |service| scope_name(&tree(service), service);
        assert_eq!(
            of(Some("redis-server.service")),
            "redis-server.migrated.scope"
        );
        assert_eq!(of(None), "tree-1006.migrated.scope");
        let long = format!("{}.service", "a".repeat(245));
        assert_eq!(of(Some(&long)), "tree-1006.migrated.scope");
        for service in [Some("redis-server.service"), None, Some(&*long)] {
            assert!(is_unit_name(&of(service), ".scope"));
        }
        let back = |name: &str| service_of_scope(&format!("/system.slice/{name}"), 1006);
        assert_eq!(
            back(&of(Some("redis-server.service"))).as_deref(),
            Some("redis-server.service")
        );
        assert_eq!(back(&of(None)), None);
        assert_eq!(back("session-3.scope"), None);
    }

    #[test]
    fn only_cgroups_made_for_trees_are_left_for_a_unit() {
        assert!(is_made("/migrate/redis-server-9"));
        for other in ["", "/", "/migrate", "/migrate/", "/migrated/x", "/pods/x"] {
            assert!(!is_made(other), "{other}");
        }
    }

    #[test]
    fn a_start_around_a_tree_runs_one_command_and_kills_nothing() {
        let command = "/usr/bin/migrate adopt --ticks 7 --home /migrate/redis-server-9 9";
        assert!(command.chars().all(is_plain));
        let text = drop_in_text(command);
        let set = |name: &str| -> Vec<&str> {
            text.lines()
                .filter_map(|line| line.strip_prefix(name)?.strip_prefix('='))
                .collect()
        };
        assert_eq!(set("ExecStart"), ["", &format!("+{command}")]);
        assert_eq!(home_in(&text), Some("/migrate/redis-server-9"));
        assert_eq!(
            home_in(&drop_in_text("/usr/bin/migrate adopt --ticks 7 9")),
            None
        );
        for reset in [
            "ExecCondition",
            "ExecStartPre",
            "ExecStartPost",
            "ExecReload",
            "ExecStop",
            "ExecStopPost",
            "PIDFile",
        ] {
            assert_eq!(set(reset), [""], "{reset}");
        }
        for (name, value) in [
            ("Type", "notify"),
            ("KillMode", "none"),
            ("Restart", "no"),
            ("WatchdogSec", "0"),
        ] {
            assert_eq!(set(name), [value], "{name}");
        }
        assert!(text.starts_with(&format!("{OWNER}{} ", read::own_pid())));
        for odd in ['$', '%', '"', '\'', '\\', ';', '\n', '{', '*'] {
            assert!(!is_plain(odd), "{odd:?}");
        }
    }

    #[test]
    fn nobody_is_asked_for_what_nobody_wants() {
        let none = Adoption::plan(&tree(Some("x.service")), AdoptChoice::None, |_| true);
        assert_eq!(none.unwrap(), Adoption::Stays);
        assert_eq!(Adoption::Stays.finding(), None);
        assert_eq!(adopt(&Adoption::Stays, &tree(None), ""), None);
    }

    #[test]
    fn a_tree_that_has_gone_is_not_looked_for() {
        let gone = bring_in(read::own_pid(), 0, "");
        assert!(matches!(gone, Err(ProcError::NoSuchProcess { .. })));
    }
}
